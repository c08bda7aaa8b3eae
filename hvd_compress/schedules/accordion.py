"""Accordion: two ratios, and when to use which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import check_numbers
from ..operators import Operator, TopK
from .base import Plan, Schedule


@dataclass(frozen=True)
class Accordion(Plan):
    """Top-k with a high ratio while gradients change much, and a low one while they do not.

    Accordion (arXiv 2010.16248): high if ``|‖Δ_before‖ − ‖Δ‖| / ‖Δ_before‖ ≥ threshold``, Δ what was accumulated over
    an interval; here its squared norm is the sum of the exchanges' energies, of gradients alone, without memory.

    Args:
        high: ratio in critical times, and at the start.
        low: ratio otherwise.
        interval: exchanges between decisions.
        threshold: relative change of the norm that is critical.

    Raises:
        ValueError: an argument out of its range.
        TypeError: one that is no number.
    """

    high: float
    low: float
    interval: int = 10
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(high=self.high, low=self.low, threshold=self.threshold)
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

    # With the memory's, every switch to the low ratio, after which the memory grows, would look like a critical time.
    energy_of = "added"

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

    def advance(self, energy: float, kept: int) -> None:
        """See :class:`Schedule`."""
        if not math.isfinite(energy):
            return  # an overflow says nothing of the gradient, and loss scaling begins with some
        self._energy += energy
        self._done += 1
        if self._done < self._plan.interval:
            return
        norm, before = math.sqrt(self._energy), self._norm_before
        if before is not None:
            critical = norm != before and abs(before - norm) >= self._plan.threshold * before
            self._ratio = self._plan.high if critical else self._plan.low
        self._norm_before, self._energy, self._done = norm, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Schedule`."""
        return {"ratio": self._ratio, "done": self._done, "energy": self._energy, "norm_before": self._norm_before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Schedule`."""
        self._ratio, self._done = state["ratio"], state["done"]
        self._energy, self._norm_before = state["energy"], state["norm_before"]
