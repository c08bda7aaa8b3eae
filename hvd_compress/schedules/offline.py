"""The best division of a budget among exchanges whose energies are known.

To plan from a recorded run, and to measure what a rule that does not know the future misses. All of it is one
problem, ``min Σ_t φ(G_t, k_t)`` under ``Σ k_t ≤ K`` and ``k_min ≤ k_t ≤ d``. arXiv 2210.13532 minimises an error
bound over the degrees under a budget; the error models here and their optima are derived, not read there. The φ are
convex in k, so that an allocation of whole elements is optimal exactly when no element gains by moving to another
exchange. That is also the rounding rule: the real-valued optimum is rounded down; then elements are added and moved,
each to where it gains most, the earliest exchange among equals, until the budget is used up and no move gains.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


class ErrorModel(ABC):
    """What an exchange of energy G, a squared norm, is expected to lose when it sends k of d elements."""

    @abstractmethod
    def error(self, energy: float, k: int, d: int) -> float:
        """φ(G, k); convex in k."""

    @abstractmethod
    def gain(self, energy: float, k: int, d: int) -> float:
        """φ(G, k) − φ(G, k + 1) up to a factor that is the same for all G and k."""

    @abstractmethod
    def relaxed(self, energies: Sequence[float], budget: float, d: int, k_min: int) -> list[float]:
        """The real-valued optimum for energies > 0, up to rounding of floats."""


@dataclass(frozen=True)
class Linear(ErrorModel):
    """``φ = G (1 − k/d)``: top-k's worst case, and random k's only one.

    The optimum is bang-bang: the exchanges of largest energy get d elements, the others k_min, one lies between.
    """

    def error(self, energy: float, k: int, d: int) -> float:
        """See :class:`ErrorModel`."""
        return energy * (1 - k / d)

    def gain(self, energy: float, k: int, d: int) -> float:
        """See :class:`ErrorModel`."""
        return energy

    def relaxed(self, energies: Sequence[float], budget: float, d: int, k_min: int) -> list[float]:
        """See :class:`ErrorModel`."""
        ks, rest = [float(k_min)] * len(energies), budget - k_min * len(energies)
        for t in sorted(range(len(energies)), key=lambda t: -energies[t]):
            ks[t] += min(d - k_min, rest)
            rest -= ks[t] - k_min
        return ks


@dataclass(frozen=True)
class Bell(ErrorModel):
    """``φ = G (1 − k/d)²``: an upper bound for elements with a bell-shaped distribution (arXiv 1911.08772).

    The optimum is ``k_t = d [1 − ν/G_t]``, at least k_min.
    """

    def error(self, energy: float, k: int, d: int) -> float:
        """See :class:`ErrorModel`."""
        return energy * (1 - k / d) ** 2

    def gain(self, energy: float, k: int, d: int) -> float:
        """See :class:`ErrorModel`."""
        return energy * (2 * (d - k) - 1)

    def relaxed(self, energies: Sequence[float], budget: float, d: int, k_min: int) -> list[float]:
        """See :class:`ErrorModel`; the level is −ν."""
        return _fill([float(d)] * len(energies), [d / g for g in energies], budget, k_min, d)


@dataclass(frozen=True)
class Power(ErrorModel):
    """``φ = G k^(1 − 1/p)``: memory terms of error feedback. The optimum is ``k_t ∝ G_t^p`` within the limits.

    Args:
        exponent: p in (0, 1): 1/3 for a term in ``(1 − γ)/γ²`` with small γ = k/d, 1/2 for one in ``1/γ``.

    Raises:
        ValueError: it is out of its range.
    """

    exponent: float = 1 / 3

    def __post_init__(self) -> None:
        if not 0 < self.exponent < 1:
            raise ValueError(f"exponent must be in (0, 1), got {self.exponent!r}")

    def error(self, energy: float, k: int, d: int) -> float:
        """See :class:`ErrorModel`; infinite for k = 0."""
        return energy * k ** (1 - 1 / self.exponent) if k else math.inf

    def gain(self, energy: float, k: int, d: int) -> float:
        """See :class:`ErrorModel`; for k ≥ 1."""
        power = 1 - 1 / self.exponent
        return -energy * k**power * math.expm1(power * math.log1p(1 / k))  # without cancellation

    def relaxed(self, energies: Sequence[float], budget: float, d: int, k_min: int) -> list[float]:
        """See :class:`ErrorModel`; the level is the factor of proportionality."""
        return _fill([0.0] * len(energies), [g**self.exponent for g in energies], budget, k_min, d)


def best_allocation(
    model: ErrorModel, energies: Sequence[float], *, budget: int, d: int, k_min: int = 1
) -> list[int]:
    """The k_t that minimise ``Σ φ(G_t, k_t)`` among all whole numbers within the limits.

    Args:
        model: φ.
        energies: G_t ≥ 0 of each exchange.
        budget: K. It is used up, unless all exchanges send everything.
        d: elements that there are.
        k_min: of each exchange; at least 1 for :class:`Power`.

    Raises:
        ValueError: an energy is not finite or negative, or the limits contradict each other.
    """
    n = len(energies)
    if not all(0 <= g < math.inf for g in energies):
        raise ValueError("energies must be finite and not negative: leave out exchanges that overflowed")
    if not int(isinstance(model, Power)) <= k_min <= d:
        raise ValueError(f"k_min must be at most d = {d}, and at least 0, or 1 for Power; got {k_min}")
    _check(budget, n, k_min)
    # A power of two, so that no energy changes but those too small to matter, and no gain overflows.
    exponent = math.frexp(max(energies, default=0.0))[1]
    scaled = [math.ldexp(g, -exponent) for g in energies]
    return _settle(
        _start(model, scaled, budget, d, k_min), lambda t, k: model.gain(scaled[t], k, d), budget, k_min, d
    )


def global_threshold(tensors: Sequence[Tensor], *, budget: int, k_min: int = 0) -> tuple[float, list[int]]:
    """The k_t that minimise ``Σ ‖x_t − Top_k_t(x_t)‖²`` for recorded tensors, and the λ that selects as many.

    An element that is sent saves its square, so the optimum is to send the largest of all exchanges: those with
    ``|x|² ≥ λ``, one λ for all. Of elements of equal magnitude the earlier ones are sent.

    Args:
        tensors: x_t, flat.
        budget: K, elements. It is used up, unless all exchanges send everything.
        k_min: elements that each exchange sends at least, or all it has.

    Returns:
        λ, the smallest square that is sent beyond the k_min largest of its exchange (``inf`` if none is), and k_t.

    Raises:
        ValueError: a tensor holds inf or NaN, or the limits contradict each other.
    """
    if not all(bool(torch.isfinite(x).all()) for x in tensors):
        raise ValueError("tensors must be finite: leave out exchanges that overflowed")
    if k_min < 0:
        raise ValueError(f"k_min must be at least 0, got {k_min}")
    _check(budget, len(tensors), k_min)
    squares = [x.double().square().sort(descending=True).values for x in tensors]
    ks = [min(k_min, len(s)) for s in squares]
    others = [s[k:] for s, k in zip(squares, ks, strict=True)]
    owner = torch.repeat_interleave(
        torch.arange(len(others)), torch.tensor([len(o) for o in others], dtype=torch.int64)
    )
    chosen = torch.sort(torch.cat([torch.empty(0).double(), *others]), descending=True, stable=True)
    count = min(budget - sum(ks), len(owner))
    more = torch.bincount(owner[chosen.indices[:count]], minlength=len(ks)).tolist()
    return float(chosen.values[count - 1]) if count else math.inf, [k + m for k, m in zip(ks, more, strict=True)]


_NEGLIGIBLE = 1e-200
"""Part of the largest energy (between 1/2 and 1) that counts as none where a good start is looked for."""


def _check(budget: int, exchanges: int, k_min: int) -> None:
    if budget < k_min * exchanges:
        raise ValueError(
            f"a budget of {budget} elements has no k_min={k_min} for each of {exchanges} exchanges: lower k_min or "
            "raise the budget"
        )


def _start(model: ErrorModel, energies: Sequence[float], budget: int, d: int, k_min: int) -> list[int]:
    """The real-valued optimum, rounded down. Exchanges without energy share evenly what the others cannot use."""
    some = [t for t, g in enumerate(energies) if g > _NEGLIGIBLE]
    without = len(energies) - len(some)
    for_some = min(budget - without * k_min, len(some) * d)
    rest = (budget - for_some) // without if without else 0
    ks = [min(rest, d)] * len(energies)
    for t, k in zip(some, model.relaxed([energies[t] for t in some], for_some, d, k_min), strict=True):
        ks[t] = min(max(math.floor(k), k_min), d)
    return ks


def _fill(offsets: Sequence[float], slopes: Sequence[float], total: float, low: float, high: float) -> list[float]:
    """``offset + slope · c`` cut to [low, high], for the one c with which they add up to ``total``: water-filling.

    Their sum is piecewise linear in c. Its bends are sorted and walked along, so that c is found in closed form.
    """
    bends = [
        ((limit - a) / b, sign, b)
        for a, b in zip(offsets, slopes, strict=True)
        for limit, sign in ((low, 1), (high, -1))
    ]
    missing, level, slope = total - low * len(slopes), -math.inf, Fraction(0)
    for position, sign, b in sorted(bends):
        if slope > 0:
            if missing <= float(slope) * (position - level):
                level += missing / float(slope)
                break
            missing -= float(slope) * (position - level)
        level = position
        slope += sign * Fraction(b)  # exact, so that nothing is left of a large one when it has gone
    return [min(max(a + b * level, low), high) for a, b in zip(offsets, slopes, strict=True)]


def _settle(ks: list[int], gain: Callable[[int, int], float], budget: int, low: int, high: int) -> list[int]:
    """Add, take away and move single elements until the budget is used up and no move gains.

    Args:
        ks: within the limits; the nearer to the optimum the quicker.
        gain: of the element that follows k in exchange t; does not grow with k.
    """
    ks, spent = list(ks), sum(ks)
    up: list[tuple[float, int, int]] = []  # (−gain of one more, exchange, its k)
    down: list[tuple[float, int, int]] = []  # (loss of one less, −exchange, its k)

    def offer(t: int) -> None:
        if ks[t] < high:
            heapq.heappush(up, (-gain(t, ks[t]), t, ks[t]))
        if ks[t] > low:
            heapq.heappush(down, (gain(t, ks[t] - 1), -t, ks[t]))

    def change(t: int, by: int) -> None:
        ks[t] += by
        offer(t)

    for t in range(len(ks)):
        offer(t)
    while True:
        while up and ks[up[0][1]] != up[0][2]:
            heapq.heappop(up)
        while down and ks[-down[0][1]] != down[0][2]:
            heapq.heappop(down)
        if spent > budget:
            change(-down[0][1], -1)
            spent -= 1
        elif up and spent < budget:
            change(up[0][1], 1)
            spent += 1
        elif up and down and -up[0][0] > down[0][0]:
            to, source = up[0][1], -down[0][1]
            change(source, -1)
            change(to, 1)
        else:
            return ks
