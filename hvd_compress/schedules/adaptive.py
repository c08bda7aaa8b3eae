"""Adaptive Top-K: k follows the gradients' norm, within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import check_numbers
from ..operators import Operator, TopK
from .base import Plan, Schedule
from .budget import Budget, affordable, check_budget, divide


@dataclass(frozen=True)
class AdaptiveTopK(Plan):
    """Top-k whose k follows the norm of the gradients under a total budget.

    After "Adaptive Top-K in SGD" (arXiv 2210.13532), whose degree depends on the norm and on the budget. The paper's
    own formula was not at hand; this rule is derived here. Minimising the error terms Σ G_t/k_t² of error feedback
    under Σ k_t ≤ K gives k_t in proportion to G_t^(1/3) (:class:`~hvd_compress.schedules.Power`, which finds the
    optimum for energies that are known). As future norms are unknown, G_t is compared with its moving average::

        k̄ = (K − spent) / (exchanges left),   k_t = k̄ · (G_{t−1} / Ḡ)^exponent,   k_min ≤ k_t ≤ d

    and so that k_min is left for every later exchange. Σ k_t ≤ K holds whatever the gradients do.

    Args:
        ratio: K as an average: part of all compressed elements that an exchange sends, 0 < ratio ≤ 1.
        exchanges: T, over which the budget holds: those of an epoch, say. After T a new budget begins.
        smallest: part of the average that every exchange gets at least; k_min, but at least one element a tensor.
        exponent: 1/3 with error feedback, 1/2 to 1 without; 0 is plain top-k.
        decay: of the moving average, per exchange.

    Raises:
        ValueError: an argument out of its range.
        TypeError: one that is no number.
    """

    ratio: float
    exchanges: int
    smallest: float = 0.1
    exponent: float = 1 / 3
    decay: float = 0.95

    def __post_init__(self) -> None:
        check_budget(self.ratio, self.exchanges, self.smallest)
        check_numbers(exponent=self.exponent, decay=self.decay)
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"exponent must be in [0, 1], got {self.exponent!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    def start(self, sizes: Mapping[str, int]) -> AdaptiveTopKSchedule:
        """See :class:`Plan`."""
        return AdaptiveTopKSchedule(self, sizes)


class AdaptiveTopKSchedule(Schedule):
    """See :class:`AdaptiveTopK`."""

    def __init__(self, plan: AdaptiveTopK, sizes: Mapping[str, int]) -> None:
        # Configuration
        self._plan = plan
        self._sizes = {name: size for name, size in sizes.items() if size}
        # State
        self._budget = Budget(self._sizes, plan.ratio, plan.exchanges, plan.smallest)
        self._mean_energy: float | None = None
        self._energy: float | None = None  # of the last exchange
        self._plan_next()

    @property
    def budget(self) -> int:
        """K, elements."""
        return self._budget.total

    def operator(self, name: str) -> Operator:
        """See :class:`Schedule`."""
        return TopK(k=self.share[name]) if name in self.share else TopK(k=1)

    def advance(self, energy: float, kept: int) -> None:
        """See :class:`Schedule`."""
        self._budget.spend(self.k)
        if math.isfinite(energy):
            self._energy = energy
            if self._mean_energy is None:
                self._mean_energy = energy
            else:
                self._mean_energy += (1 - self._plan.decay) * (energy - self._mean_energy)
        self._plan_next()

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Schedule`."""
        return {
            "done": self._budget.done,
            "spent": self._budget.spent,
            "energy": self._energy,
            "mean_energy": self._mean_energy,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Schedule`."""
        self._budget.resume(state["done"], state["spent"])
        self._energy, self._mean_energy = state["energy"], state["mean_energy"]
        self._plan_next()

    def _plan_next(self) -> None:
        relative = 1.0
        if self._energy is not None and self._mean_energy:
            relative = self._energy / self._mean_energy
        self.k = next_k(
            left=self._budget.left,
            exchanges_left=self._budget.exchanges_left,
            relative_energy=relative,
            exponent=self._plan.exponent,
            k_min=self._budget.k_min,
            k_max=self._budget.k_max,
        )
        self.share = divide(self.k, self._sizes)


def next_k(*, left: int, exchanges_left: int, relative_energy: float, exponent: float, k_min: int, k_max: int) -> int:
    """The k of :class:`AdaptiveTopK`'s rule.

    Args:
        left, exchanges_left, k_min, k_max: see :func:`~hvd_compress.schedules.budget.affordable`.
        relative_energy: G over its moving average.
        exponent: see :class:`AdaptiveTopK`.
    """
    wished = left / exchanges_left * relative_energy**exponent
    return affordable(wished, left=left, exchanges_left=exchanges_left, k_min=k_min, k_max=k_max)
