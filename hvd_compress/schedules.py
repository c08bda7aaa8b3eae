"""How much is sent, exchange by exchange: the operator may change, and does so alike on all ranks.

Ranks agree without an exchange of their own: each packet carries its rank's energy, the squared norm of what it was
about to compress, so after an exchange all ranks know the same R numbers and draw the same conclusion for the next.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .operators import Operator, TopK


class Schedule(ABC):
    """The state of one reducer's plan."""

    needs_energy = True
    """Whether :meth:`advance` makes use of the energy, which costs a pass over the tensors."""

    @abstractmethod
    def operator(self, name: str) -> Operator:
        """What compresses the tensor ``name`` in the coming exchange."""

    @abstractmethod
    def advance(self, energy: float) -> None:
        """An exchange has taken place.

        Args:
            energy: mean over ranks of the squared norm of all compressed tensors, memory included: the G_t of the
                paper. The same float on all ranks; not finite after an overflow.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""


class Plan(ABC):
    """A frozen configuration that schedules are started from; may stand wherever an operator may."""

    @abstractmethod
    def start(self, sizes: Mapping[str, int]) -> Schedule:
        """A schedule for tensors of these sizes, in elements, by name."""


class Constant(Schedule):
    """One operator throughout."""

    needs_energy = False

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def operator(self, name: str) -> Operator:
        """See :class:`Schedule`."""
        return self._operator

    def advance(self, energy: float) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


@dataclass(frozen=True)
class AdaptiveTopK(Plan):
    """Top-k whose k follows the norm of the gradients under a total budget.

    After "Adaptive Top-K in SGD" (arXiv 2210.13532), whose degree depends on the norm and on the budget. The paper's
    own formula was not at hand; this rule is derived here. Minimising the error terms Σ G_t/k_t² of error feedback
    under Σ k_t ≤ K gives k_t in proportion to G_t^(1/3). As future norms are unknown, G_t is compared with its moving
    average::

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
    """

    ratio: float
    exchanges: int
    smallest: float = 0.1
    exponent: float = 1 / 3
    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio!r}")
        if isinstance(self.exchanges, bool) or not isinstance(self.exchanges, int) or self.exchanges < 1:
            raise ValueError(f"exchanges must be a number ≥ 1, got {self.exchanges!r}")
        if not 0 <= self.smallest <= 1:
            raise ValueError(f"smallest must be in [0, 1], got {self.smallest!r}")
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
        self._elements = sum(self._sizes.values())
        average = max(round(plan.ratio * self._elements), len(self._sizes))
        self.budget = average * plan.exchanges  # K, elements
        self._k_min = max(round(plan.smallest * average), len(self._sizes))
        # State
        self._done = 0  # exchanges of the current budget
        self._spent = 0
        self._mean_energy: float | None = None
        self._energy: float | None = None  # of the last exchange
        self._plan_next()

    def operator(self, name: str) -> Operator:
        """See :class:`Schedule`."""
        return TopK(k=self.share[name]) if name in self.share else TopK(k=1)

    def advance(self, energy: float) -> None:
        """See :class:`Schedule`."""
        self._spent += self.k
        self._done += 1
        if self._done == self._plan.exchanges:
            self._done = self._spent = 0
        if math.isfinite(energy):
            self._energy = energy
            if self._mean_energy is None:
                self._mean_energy = energy
            else:
                self._mean_energy += (1 - self._plan.decay) * (energy - self._mean_energy)
        self._plan_next()

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Schedule`."""
        return {"done": self._done, "spent": self._spent, "energy": self._energy, "mean_energy": self._mean_energy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Schedule`."""
        self._done, self._spent = state["done"], state["spent"]
        self._energy, self._mean_energy = state["energy"], state["mean_energy"]
        self._plan_next()

    def _plan_next(self) -> None:
        self.k = next_k(
            left=self.budget - self._spent,
            exchanges_left=self._plan.exchanges - self._done,
            relative_energy=self._energy / self._mean_energy if self._energy and self._mean_energy else 1.0,
            exponent=self._plan.exponent,
            k_min=self._k_min,
            k_max=self._elements,
        )
        self.share = divide(self.k, self._sizes)


@dataclass(frozen=True)
class Accordion(Plan):
    """Top-k with a high ratio while gradients change much, and a low one while they do not.

    Accordion (arXiv 2010.16248): high if ``|‖Δ_before‖ − ‖Δ‖| / ‖Δ_before‖ ≥ threshold``, Δ what was accumulated over
    an interval; here its squared norm is the sum of the exchanges' energies.

    Args:
        high: ratio in critical times, and at the start.
        low: ratio otherwise.
        interval: exchanges between decisions.
        threshold: relative change of the norm that is critical.

    Raises:
        ValueError: an argument out of its range.
    """

    high: float
    low: float
    interval: int = 10
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise ValueError(f"ratios must be 0 < low ≤ high ≤ 1, got low={self.low!r}, high={self.high!r}")
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"interval must be a number of exchanges ≥ 1, got {self.interval!r}")
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold!r}")

    def start(self, sizes: Mapping[str, int]) -> AccordionSchedule:
        """See :class:`Plan`."""
        return AccordionSchedule(self)


class AccordionSchedule(Schedule):
    """See :class:`Accordion`."""

    def __init__(self, plan: Accordion) -> None:
        # Configuration
        self._plan = plan
        # State
        self._ratio = plan.high
        self._done = 0  # exchanges of the current interval
        self._energy = 0.0  # of them
        self._norm_before: float | None = None

    def operator(self, name: str) -> Operator:
        """See :class:`Schedule`."""
        return TopK(ratio=self._ratio)

    def advance(self, energy: float) -> None:
        """See :class:`Schedule`."""
        self._energy += energy if math.isfinite(energy) else 0.0
        self._done += 1
        if self._done < self._plan.interval:
            return
        norm, before = math.sqrt(self._energy), self._norm_before
        if before is not None:
            critical = abs(before - norm) >= self._plan.threshold * before
            self._ratio = self._plan.high if critical else self._plan.low
        self._norm_before, self._energy, self._done = norm, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Schedule`."""
        return {"ratio": self._ratio, "done": self._done, "energy": self._energy, "norm_before": self._norm_before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Schedule`."""
        self._ratio, self._done = state["ratio"], state["done"]
        self._energy, self._norm_before = state["energy"], state["norm_before"]


def next_k(*, left: int, exchanges_left: int, relative_energy: float, exponent: float, k_min: int, k_max: int) -> int:
    """The k of :class:`AdaptiveTopK`'s rule.

    Args:
        left: elements of the budget that are not spent; at least ``k_min · exchanges_left``.
        exchanges_left: this one among them.
        relative_energy: G over its moving average.
        exponent: see :class:`AdaptiveTopK`.
        k_min: for this exchange and every later one.
        k_max: number of elements there are.
    """
    wished = round(left / exchanges_left * relative_energy**exponent)
    return max(k_min, min(wished, k_max, left - k_min * (exchanges_left - 1)))


def divide(k: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """``k`` elements divided among tensors in proportion to their sizes, at least one each: exactly k in total.

    Args:
        k: at least the number of tensors, at most the sum of their sizes.
        sizes: positive.
    """
    rest, total = k - len(sizes), sum(sizes.values()) - len(sizes)
    shares, behind = {}, 0
    for name, size in sizes.items():
        before = rest * behind // total if total else 0
        behind += size - 1
        shares[name] = 1 + (rest * behind // total if total else 0) - before
    return shares
