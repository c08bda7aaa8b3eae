"""Truncated quantization: cut the tails, then place the levels where gradients are.

TNQSGD is arXiv 2402.01160 (Laplace); TUQSGD, TNQSGD and TBQSGD with power-law tails are arXiv 2402.01798. Here
``TQSGD`` is the one with even levels. A tensor is cut at ±α and rounded without bias between s + 1 levels; the only
bias is the cut. For Laplace, α and the levels minimise the error per element, ``c Σ mass · Δ² + lost(α)``, Δ the
width of a step; TNQSGD's as if levels had a density, which is within 0.3 % of the least error. For a power law α is
the papers' fixed point, which takes the first term to grow as α², or g_min if that is more. With ρ = 0.05 and even
levels the error is within 0.4 % of the least from 3 bits on. With fewer the best cut lies below g_min: with 2 bits
the error is up to 29 % above the least (80 % if zero is a level), and with 1 bit up to 4 times as large, which is
more than sending nothing has: take Laplace there. TNQSGD's is up to 3 % above the least at 3 bits, 15 % at 4 and
48 % at 5. The papers' c = 1/4 is the worst case in a step; 1/6, the average over a step, is up to 3 % better for
Laplace (derived here).
"""

from __future__ import annotations

import itertools
import math
import sys
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_numbers
from ..kernels import choose_by_chance
from ..wire import Codebook, Levels, Message, Range
from .base import Quantizer, check_steps, flatten, told
from .gradient_models import Laplace, PowerLaw, fit_laplace, fit_power_law

Model = Laplace | PowerLaw

_FARTHEST = 300.0  # ln(α/g_min), beyond that of any number of levels


@dataclass(frozen=True)
class Truncated(Quantizer):
    """What the three have in common.

    Args:
        levels: s, the number of steps between levels; or
        bits: of each element on the wire, s = 2^bits − 1, or one step less with ``zero``.
        model: ``"laplace"``, or ``"power"`` for heavier tails and 3 bits or more.
        constant: c, 1/4 or 1/6.
        zero: with ``bits``, an even s, so that zero is a level and zeros stay zeros.

    Raises:
        ValueError, TypeError: neither or both of levels and bits, or a setting out of its range.
    """

    levels: int | None = None
    bits: int | None = None
    model: Literal["laplace", "power"] = "laplace"
    constant: float = 1 / 4
    zero: bool = False

    def __post_init__(self) -> None:
        self._steps()
        if self.model not in ("laplace", "power"):
            raise ValueError(f"model must be 'laplace' or 'power', got {self.model!r}")
        check_numbers(constant=self.constant)
        if not 0 < self.constant <= 1 / 4:
            raise ValueError(f"constant must be in (0, 1/4]: 1/4 or 1/6, got {self.constant!r}")

    def _steps(self) -> int:
        return check_steps(self.levels, self.bits, 2**12, lambda b: 2**b - (2 if self.zero else 1))

    @property
    def s(self) -> int:
        """Number of steps."""
        return self._steps()

    @abstractmethod
    def table(self, model: Model) -> tuple[float, ...]:
        """The s + 1 levels for a distribution, ascending."""

    def error(self, model: Model) -> float:
        """The error per element that the levels of :meth:`table` are expected to have, by the bound with c."""
        table = self.table(model)
        quantized = sum((b - a) ** 2 * _mass_between(model, a, b) for a, b in itertools.pairwise(table))
        return self.constant * quantized + model.lost(table[-1])

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`."""
        flat = flatten(x)
        table = self._fitted(flat)
        levels = choose_by_chance(flat, table, generator)
        return Message(tuple(x.shape), None, self._values(levels, table))

    def _values(self, levels: Tensor, table: Tensor) -> Levels:
        return Codebook(levels, table)

    def _fitted(self, flat: Tensor) -> Tensor:
        """The levels for this tensor, on its device."""
        fitted = fit_power_law(flat) if self.model == "power" else None
        if fitted is not None:
            # Levels are in proportion to g_min, whose powers may leave a float64's range.
            unit = replace(fitted, g_min=1.0, largest=fitted.largest / fitted.g_min)
            table = [fitted.g_min * level for level in self.table(unit)]
            return torch.tensor(table, dtype=flat.dtype, device=flat.device)
        # A Laplace distribution's levels are in proportion to its scale, which need not leave the device.
        scale = fit_laplace(flat)
        scale = torch.where(torch.isfinite(scale), scale, torch.nan)  # which receivers see everywhere
        return _normalised(self, flat.dtype, flat.device) * scale


@dataclass(frozen=True)
class TNQSGD(Truncated):
    """Levels as dense as the cube root of the density, which makes the error the smallest: non-uniform.

    For Laplace (arXiv 2402.01160; K = √(54c), 3.674 for c = 1/4): ``α = 3γ ln(1 + s/K)``, levels
    ``∓3γ ln(1 − |2k − s|/(s + K))``, error ``108 c γ²/(s + K)²``, 27 γ²/(s + K)² for c = 1/4. That is the error of a
    density of levels; :meth:`error`, of the levels themselves, is up to 3 % above it.
    """

    def table(self, model: Model) -> tuple[float, ...]:
        """See :class:`Truncated`."""
        s = self.s
        if isinstance(model, Laplace):
            k = math.sqrt(54 * self.constant)
            half = [-3 * model.scale * math.log1p(-j / (s + k)) for j in range(s % 2 or 2, s + 1, 2)]
        else:
            # Q of the fixed point is (∫ p^{1/3})³ / (4α²), the integral over both sides.
            alpha = _fixed_point(model, s, self.constant, lambda a: (2 * model.cube_root_mass(a)) ** 3 / (4 * a * a))
            step = 2 * model.cube_root_mass(alpha) / s
            half = [model.cube_root_quantile(j * step / 2) for j in range(s % 2 or 2, s + 1, 2)]
        return _mirrored(half, s)


@dataclass(frozen=True)
class TQSGD(Truncated):
    """Evenly spaced levels between the cuts: truncated uniform quantization."""

    def table(self, model: Model) -> tuple[float, ...]:
        """See :class:`Truncated`."""
        s, c = self.s, self.constant
        if isinstance(model, Laplace):
            unit = Laplace()
            alpha = model.scale * _minimum(lambda a: 4 * c * a * a / s**2 * unit.mass(a) + unit.lost(a), 0.01, 40.0)
        else:
            alpha = _fixed_point(model, s, c, model.mass)
        return tuple(alpha * (2 * j - s) / s for j in range(s + 1))

    def _values(self, levels: Tensor, table: Tensor) -> Levels:
        return Range(levels, told(torch.stack([table[0], table[-1]])), self.s)


@dataclass(frozen=True)
class TBQSGD(Truncated):
    """Two step widths: narrow ones up to kα, wide ones from there to α: bi-scaled.

    The steps are divided as ``s_in : s_out = (k² Q_in)^{1/3} : ((1−k)² Q_out)^{1/3}``, Q the masses of the two parts,
    and k is searched (arXiv 2402.01798). Whole numbers of steps, as many to each side, are the ones nearest to that.
    """

    def table(self, model: Model) -> tuple[float, ...]:
        """See :class:`Truncated`."""
        s, c = self.s, self.constant
        if s < 3:  # too few for two parts
            return TQSGD(levels=s, model=self.model, constant=c).table(model)

        def split(alpha: float, k: float) -> tuple[float, float]:
            inner = model.mass(k * alpha)
            outer = max(model.mass(alpha) - inner, 0.0)
            return (k * k * inner) ** (1 / 3), ((1 - k) ** 2 * outer) ** (1 / 3)

        def best_k(alpha: float) -> float:
            return _minimum(lambda k: sum(split(alpha, k)) ** 3, 0.02, 0.98)

        if isinstance(model, Laplace):
            unit = Laplace()

            def bound(a: float) -> float:
                at = a * model.scale
                return 4 * c * a * a / s**2 * sum(split(at, best_k(at))) ** 3 + unit.lost(a)

            alpha = model.scale * _minimum(bound, 0.01, 40.0)
        else:
            alpha = _fixed_point(model, s, c, lambda a: sum(split(a, best_k(a))) ** 3)
        inner, outer = split(alpha, best_k(alpha))
        ideal = 2 * round(s * outer / (inner + outer) / 2)  # even: as many to each side
        choices = {min(max(ideal + shift, 2), (s - 1) // 2 * 2) for shift in (-2, 0, 2)}
        k, wide = min(
            (self._split_of(model, alpha, s, wide) for wide in sorted(choices)), key=lambda choice: choice[0]
        )[1:]
        narrow = s - wide
        inside = [k * alpha * (2 * j - narrow) / narrow for j in range(narrow // 2 + 1, narrow + 1)]
        outside = [k * alpha + (1 - k) * alpha * 2 * j / wide for j in range(1, wide // 2 + 1)]
        return _mirrored(inside + outside, s)

    @staticmethod
    def _split_of(model: Model, alpha: float, s: int, wide: int) -> tuple[float, float, int]:
        """(error, k, wide) of the best k for a whole number of wide steps; k = 1 − wide/s are even steps."""

        def error(k: float) -> float:
            inner = model.mass(k * alpha)
            return inner * (k / (s - wide)) ** 2 + (model.mass(alpha) - inner) * ((1 - k) / wide) ** 2

        k = min(_minimum(error, 0.02, 0.98), 1 - wide / s, key=error)
        return error(k), k, wide


@lru_cache
def _normalised(operator: Truncated, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(operator.table(Laplace()), dtype=dtype, device=device)


def _mirrored(half: list[float], s: int) -> tuple[float, ...]:
    """Ascending levels from the positive ones; with zero between them when s is even."""
    return (*(-v for v in reversed(half)), *([] if s % 2 else [0.0]), *half)


def _mass_between(model: Model, low: float, high: float) -> float:
    """P(low < g < high)."""

    def signed(g: float) -> float:
        return math.copysign(model.mass(abs(g)) / 2, g)

    return signed(high) - signed(low)


def _fixed_point(model: PowerLaw, s: int, c: float, q: Callable[[float], float]) -> float:
    """``α = g_min [ρ s² / (2c (γ−2) Q(α))]^{1/(γ−1)}``, the papers' condition for a power law.

    At least g_min, and at most the largest magnitude, where a cut loses nothing any more.
    """

    def excess(log: float) -> float:
        """ln of the right hand side over α = g_min exp(log)."""
        q_there = max(q(model.g_min * math.exp(log)), sys.float_info.min)
        return math.log(model.rho * s**2 / (2 * c * (model.tail - 2) * q_there)) / (model.tail - 1) - log

    # By bisection: to repeat the right hand side takes the longer to settle the heavier the tail.
    low, high = 0.0, min(math.log(model.largest / model.g_min), _FARTHEST)
    if excess(low) <= 0:
        return model.g_min
    if excess(high) > 0:
        return model.g_min * math.exp(high)
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return model.g_min * math.exp(high)


def _minimum(f: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum has it: golden sections."""
    golden = (math.sqrt(5) - 1) / 2
    a, b = low, high
    left, right = b - golden * (b - a), a + golden * (b - a)
    at_left, at_right = f(left), f(right)
    while b - a > 1e-10 * (1 + abs(a)):
        if at_left < at_right:
            b, right, at_right = right, left, at_left
            left = b - golden * (b - a)
            at_left = f(left)
        else:
            a, left, at_left = left, right, at_right
            right = a + golden * (b - a)
            at_right = f(right)
    return (a + b) / 2
