"""A denser start: DGC's warm-up of the ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import check_numbers
from ..operators import TopK
from .base import Plan, Schedule


@dataclass(frozen=True)
class WarmUp(Plan):
    """Top-k whose ratio falls in a geometric sequence to its final value (DGC, arXiv 1712.01887, section 3.3).

    The paper's, for a final ratio of 0.1 %, are 25 %, 6.25 %, 1.5625 % and 0.4 %, a quarter of each other, for one
    epoch each: ``WarmUp(ratio=0.001, exchanges=4 * steps_per_epoch)``.

    Args:
        ratio: the final one, 0 < ratio ≤ 1.
        exchanges: over which the warm-up extends, in equal stages; 0 for none.
        first: ratio of the first stage.
        factor: from one stage to the next, 0 < factor < 1. Stages at or below the final ratio are left out.

    Raises:
        ValueError: an argument out of its range.
        TypeError: one that is no number.
    """

    ratio: float
    exchanges: int
    first: float = 0.25
    factor: float = 0.25

    def __post_init__(self) -> None:
        check_numbers(ratio=self.ratio, first=self.first, factor=self.factor)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio!r}")
        if isinstance(self.exchanges, bool) or not isinstance(self.exchanges, int) or self.exchanges < 0:
            raise ValueError(f"the warm-up must be a number of exchanges ≥ 0, got {self.exchanges!r}")
        if not 0 < self.first <= 1:
            raise ValueError(f"first must be in (0, 1], got {self.first!r}")
        if not 0 < self.factor < 1:
            raise ValueError(f"factor must be between 0 and 1, got {self.factor!r}")

    def ratio_at(self, exchange: int) -> float:
        """The ratio of an exchange, counted from 0."""
        stages = []
        ratio = self.first
        while ratio > self.ratio:
            stages.append(ratio)
            ratio *= self.factor
        if exchange >= self.exchanges or not stages:
            return self.ratio
        return stages[exchange * len(stages) // self.exchanges]

    def start(self, sizes: Mapping[str, int]) -> WarmUpSchedule:
        """See :class:`Plan`."""
        return WarmUpSchedule(self)


class WarmUpSchedule(Schedule):
    """See :class:`WarmUp`."""

    energy_of = "nothing"

    def __init__(self, plan: WarmUp) -> None:
        # Configuration
        self._plan = plan
        # State
        self._done = 0  # exchanges
        self._operator = TopK(ratio=plan.ratio_at(0))

    def operator(self, name: str) -> TopK:
        """See :class:`Schedule`."""
        return self._operator

    def advance(self, energy: float, kept: int) -> None:
        """See :class:`Schedule`."""
        self._move_to(self._done + 1)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Schedule`."""
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Schedule`."""
        self._move_to(state["done"])

    def _move_to(self, exchange: int) -> None:
        self._done = exchange
        self._operator = TopK(ratio=self._plan.ratio_at(exchange))
