"""What a memory is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Sent(Protocol):
    """The part of a message that a memory needs."""

    def add_to(self, flat: Tensor, *, alpha: float = 1) -> None:
        """``flat += alpha * (what the receivers see)``."""


class Memory(ABC):
    """What a rank remembers about each parameter from one exchange to the next.

    For each exchange and tensor :meth:`compensate` is called once, and once the exchange has succeeded,
    :meth:`update`. Without the second call the memory is as it was: a failed exchange loses nothing.
    The ``repr`` tells the settings, which ranks compare.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abstractmethod
    def compensate(self, name: str, tensor: Tensor) -> Tensor:
        """What is to be compressed in place of ``tensor``: a flat tensor of its own storage.

        Args:
            name: the parameter's.
            tensor: float32 or float64 ``[d]``; is left as it is.
        """

    @abstractmethod
    def update(self, name: str, compensated: Tensor, sent: Sent) -> None:
        """Remember the outcome. Takes over the storage of ``compensated``, which :meth:`compensate` returned."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The memory of each parameter by name. The tensors are the memory's own: copy or save, do not change."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the memory by copies of what :meth:`state_dict` returned."""
