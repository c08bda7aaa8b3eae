"""How much is sent, exchange by exchange: the operator may change, and does so alike on all ranks.

Ranks agree without an exchange of their own: each packet carries its rank's energy, the squared norm of what it was
about to compress, so after an exchange all ranks know the same R numbers and draw the same conclusion for the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from ..operators import Operator


class Schedule(ABC):
    """The state of one reducer's plan."""

    energy_of: Literal["compressed", "added", "nothing"] = "compressed"
    """Whose energy :meth:`advance` makes use of, which costs a pass over the tensors: of what is compressed, memory
    included, or of what was added to it; or of nothing, since it does not."""

    @abstractmethod
    def operator(self, name: str) -> Operator:
        """What compresses the tensor ``name`` in the coming exchange."""

    @abstractmethod
    def advance(self, energy: float, kept: int) -> None:
        """An exchange has taken place.

        Args:
            energy: mean over ranks of the squared norm of all tensors that :attr:`energy_of` speaks of; with memory,
                the G_t of Adaptive Top-K. The same float on all ranks; not finite after an overflow.
            kept: elements of all compressed tensors that were sent by the rank that sent most. The same on all ranks.
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

    energy_of = "nothing"

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def operator(self, name: str) -> Operator:
        """See :class:`Schedule`."""
        return self._operator

    def advance(self, energy: float, kept: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""
