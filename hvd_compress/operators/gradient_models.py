"""How gradients are distributed: densities with an estimator, for quantizers that fit their levels to them.

Yan et al., "Truncated non-uniform quantization for distributed SGD" (arXiv 2402.01160), and the sibling for heavy
tails (arXiv 2402.01798). Closed forms that are not in the papers' abstracts are derived from the definitions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Laplace:
    """``p(g) = exp(−|g|/γ) / (2γ)``; with γ = 1 unless said otherwise."""

    scale: float = 1.0  # γ

    def mass(self, alpha: float) -> float:
        """``∫ p`` over [−α, α]."""
        return -math.expm1(-alpha / self.scale)

    def lost(self, alpha: float) -> float:
        """``2 ∫ (g − α)² p`` over [α, ∞): the error of cutting at ±α."""
        return 2 * self.scale**2 * math.exp(-alpha / self.scale)

    def cube_root_mass(self, alpha: float) -> float:
        """``∫ p^{1/3}`` over [0, α]."""
        return 3 * self.scale * (2 * self.scale) ** (-1 / 3) * -math.expm1(-alpha / (3 * self.scale))

    def cube_root_quantile(self, mass: float) -> float:
        """The α with that :meth:`cube_root_mass`."""
        return -3 * self.scale * math.log1p(-mass / (3 * self.scale * (2 * self.scale) ** (-1 / 3)))


@dataclass(frozen=True)
class PowerLaw:
    """``p(g) = ρ (γ−1) g_min^{γ−1} |g|^{−γ}`` for ``|g| > g_min``, 3 < γ ≤ 5; evenly spread below (derived here).

    The papers fix the tail only; an even body is the choice with the largest entropy.
    """

    tail: float  # γ
    rho: float  # P(g > g_min): one side
    g_min: float
    largest: float = math.inf  # magnitude there is: with many levels the papers' cut lies beyond

    def mass(self, alpha: float) -> float:
        """See :class:`Laplace`."""
        if alpha <= self.g_min:
            return (1 - 2 * self.rho) * alpha / self.g_min
        return 1 - 2 * self.rho * (self.g_min / alpha) ** (self.tail - 1)

    def lost(self, alpha: float) -> float:
        """See :class:`Laplace`; for α ≥ g_min."""
        power = self.g_min ** (self.tail - 1) * alpha ** (3 - self.tail)
        return 4 * self.rho * power / ((self.tail - 2) * (self.tail - 3))

    def cube_root_mass(self, alpha: float) -> float:
        """See :class:`Laplace`."""
        body = ((1 - 2 * self.rho) / (2 * self.g_min)) ** (1 / 3)
        if alpha <= self.g_min:
            return body * alpha
        root, power = self._root(), 1 - self.tail / 3
        return body * self.g_min + root * (alpha**power - self.g_min**power) / power

    def cube_root_quantile(self, mass: float) -> float:
        """See :class:`Laplace`."""
        body = ((1 - 2 * self.rho) / (2 * self.g_min)) ** (1 / 3)
        if mass <= body * self.g_min:
            return mass / body
        root, power = self._root(), 1 - self.tail / 3
        return float((self.g_min**power + (mass - body * self.g_min) * power / root) ** (1 / power))

    def _root(self) -> float:
        return float((self.rho * (self.tail - 1) * self.g_min ** (self.tail - 1)) ** (1 / 3))


QUANTILE = 0.9
"""Which part of a gradient's magnitudes counts as its body under :func:`fit_power_law`."""


def fit_laplace(flat: Tensor) -> Tensor:
    """Maximum likelihood: γ is the mean magnitude. A tensor of no dimensions."""
    return flat.abs().mean() if len(flat) else flat.new_zeros(())


def fit_power_law(flat: Tensor) -> PowerLaw | None:
    """Maximum likelihood of the tail above the 90 % quantile of the magnitudes, γ kept within (3, 5].

    None when there is no tail to speak of: fewer than two elements above the quantile, a body of zeros, or anything
    that is not finite.
    """
    magnitude = flat.abs()
    if len(flat) < 20:
        return None
    g_min = torch.kthvalue(magnitude, int(QUANTILE * len(flat))).values
    above = ~(magnitude <= g_min)  # NaN too
    logarithms = torch.where(above, (magnitude / g_min).log(), 0.0).sum()
    # One transfer for the four.
    low, count, total, largest = torch.stack(
        [g_min, above.sum().to(g_min.dtype), logarithms, magnitude.amax()]
    ).tolist()
    if not (low > 0 and count >= 2 and 0 < total < math.inf):
        return None
    tail = min(max(1 + count / total, 3.05), 5.0)
    return PowerLaw(tail=tail, rho=count / len(flat) / 2, g_min=low, largest=largest)
