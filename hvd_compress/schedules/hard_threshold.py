"""One threshold for all tensors and exchanges, which a budget moves."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import check_numbers
from ..operators import Operator, Threshold, TopK
from .base import Plan, Schedule
from .budget import Budget, affordable, apportion, check_budget, divide

_LARGEST_EXPONENT = 700.0  # math.exp raises an error soon after


@dataclass(frozen=True)
class HardThreshold(Plan):
    """Elements of magnitude √λ or more, in all tensors and exchanges alike; λ is such that a budget lasts.

    For energies known beforehand the least ``Σ_t ‖p_t − C(p_t)‖²`` under Σ k_t ≤ K is one threshold for all
    (:func:`~hvd_compress.schedules.global_threshold`; Sahu et al., arXiv 2108.00951). Its λ is the price of an
    element, and is found online by the multiplicative update of a dual variable (derived here)::

        k̄ = (K − spent) / (exchanges left),   λ ← λ · exp(rate · (k/k̄ − 1)),   k_min ≤ k ≤ min(largest · k̄, d)

    and so that k_min is left for every later exchange. k is what the rank that sent most has sent, so that all ranks
    have one λ without asking each other, and Σ k_t ≤ K holds on each of them whatever the gradients do. Where too
    many elements pass, the largest are sent; where too few, the largest of those that do not pass as well: the
    limits are divided among tensors in proportion to their sizes.

    The first exchange sends k̄ elements as :class:`AdaptiveTopK`'s does. Then λ starts where as many would pass if
    magnitudes were exponentially distributed (Laplace), which the energy G of d elements tells: ``(G/2d) ln²(d/k̄)``
    (derived here).

    Args:
        ratio: K as an average: part of all compressed elements that an exchange sends, 0 < ratio ≤ 1.
        exchanges: T, over which the budget holds. After T a new budget begins; λ goes on.
        smallest: part of the average that every exchange gets at least; k_min, but at least one element a tensor.
        largest: multiple of k̄ that an exchange gets at most, ≥ 1. It keeps one exchange from spending the budget
            while λ is still wrong, and the step of ln λ below ``rate · (largest − 1)``.
        rate: how fast λ follows; slow, k follows the gradients. A step of ln λ changes ln k by ½ ln(d/k) times as
            much (Laplace), so that from 4/ln(d/k) on, 0.87 at 1 % and 0.58 at 0.1 %, λ overshoots for ever and k
            swings between its limits; with memory from about half of that on. The budget holds all the same.

    Raises:
        ValueError: an argument out of its range.
        TypeError: one that is no number.
    """

    ratio: float
    exchanges: int
    smallest: float = 0.1
    largest: float = 4.0
    rate: float = 0.2

    def __post_init__(self) -> None:
        check_budget(self.ratio, self.exchanges, self.smallest)
        check_numbers(largest=self.largest, rate=self.rate)
        if not 1 <= self.largest < math.inf:
            raise ValueError(f"largest must be a number ≥ 1, got {self.largest!r}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {self.rate!r}")

    def start(self, sizes: Mapping[str, int]) -> HardThresholdSchedule:
        """See :class:`Plan`."""
        return HardThresholdSchedule(self, sizes)


class HardThresholdSchedule(Schedule):
    """See :class:`HardThreshold`."""

    def __init__(self, plan: HardThreshold, sizes: Mapping[str, int]) -> None:
        # Configuration
        self._plan = plan
        self._sizes = {name: size for name, size in sizes.items() if size}
        # State
        self._budget = Budget(self._sizes, plan.ratio, plan.exchanges, plan.smallest)
        self.price: float | None = None  # λ; None before the first exchange
        self._plan_next()

    @property
    def budget(self) -> int:
        """K, elements."""
        return self._budget.total

    def operator(self, name: str) -> Operator:
        """See :class:`Schedule`."""
        if name not in self._sizes:
            return TopK(k=1)
        if self.price is None:
            return TopK(k=self._most[name])
        return Threshold(math.sqrt(self.price), at_least=self._least[name], at_most=self._most[name])

    def advance(self, energy: float, kept: int) -> None:
        """See :class:`Schedule`."""
        average = self._budget.average
        self._budget.spend(kept)
        # An overflow says nothing of magnitudes, and neither do tensors of zeros.
        if 0 < energy < math.inf:
            if self.price is None:
                self.price = laplace_price(energy, self._budget.k_max, min(average, self._budget.k_max))
            else:
                self.price *= math.exp(min(self._plan.rate * (kept / average - 1), _LARGEST_EXPONENT))
            self.price = min(max(self.price, sys.float_info.min), sys.float_info.max)
        self._plan_next()

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Schedule`."""
        return {"done": self._budget.done, "spent": self._budget.spent, "price": self.price}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Schedule`."""
        self._budget.resume(state["done"], state["spent"])
        self.price = state["price"]
        self._plan_next()

    def _plan_next(self) -> None:
        budget = self._budget
        most = affordable(
            budget.average * (1.0 if self.price is None else self._plan.largest),
            left=budget.left,
            exchanges_left=budget.exchanges_left,
            k_min=budget.k_min,
            k_max=budget.k_max,
        )
        self._least = divide(budget.k_min, self._sizes)
        rooms = {name: size - self._least[name] for name, size in self._sizes.items()}
        self._most = {name: self._least[name] + m for name, m in apportion(most - budget.k_min, rooms).items()}


def laplace_price(energy: float, elements: int, k: float) -> float:
    """The λ with ``P(|p|² ≥ λ) = k/d`` for Laplace-distributed p of mean square ``energy/d``: ``(G/2d) ln²(d/k)``.

    Derived here: ``P(|p| ≥ a) = exp(−a/b)`` and ``E p² = 2b²``.

    Args:
        energy: G, positive.
        elements: d.
        k: 0 < k ≤ d.
    """
    return energy / (2 * elements) * math.log(elements / k) ** 2
