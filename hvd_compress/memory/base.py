"""What a memory is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..operators import Operator

MASS = "mass"  # what is still to be sent
ESTIMATE = "estimate"  # of something of this rank's own, such as its gradient
TOTAL = "total"  # the sum of all ranks' estimates, the same on all ranks
COMMON = "common"  # the same on all ranks, however many there are


class Sent(Protocol):
    """The part of a message that a memory needs."""

    def add_to(self, flat: Tensor, *, alpha: float = 1) -> None:
        """``flat += alpha * (what the receivers see)``."""

    def clear_in(self, flat: Tensor) -> None:
        """Set the elements of ``flat`` that were sent to zero, unless all were sent."""


class Memory(ABC):
    """What a rank remembers about each parameter from one exchange to the next.

    For each exchange and tensor :meth:`compensate` is called, and :meth:`update` with what is sent. Then comes either
    :meth:`commit`, once the messages of all ranks have arrived and are finite, or :meth:`rollback`, after which the
    memory is bit for bit as it was. What the optimizer gets in the end goes through :meth:`receive`. The ``repr``
    tells the settings, which ranks compare.
    """

    covers_small: ClassVar[bool] = False
    """Whether tensors that are too small to be compressed need this memory too: they are then exchanged with the
    others rather than left to Horovod."""

    feeds_back: ClassVar[bool] = False
    """Whether what an operator does wrong comes back to it, so that it explodes unless the operator contracts."""

    only_adds: ClassVar[bool] = False
    """Whether :meth:`compensate` returns its tensor first, without having looked at what it holds: that may then be
    filled in later."""

    takes_back: ClassVar[bool] = False
    """Whether :meth:`take_back` is possible."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def receives(self) -> bool:
        """Whether :meth:`receive` does anything."""
        return type(self).receive is not Memory.receive

    @property
    def operators(self) -> tuple[Operator, ...]:
        """Operators of its own, to each of which comes back what it does wrong, as :attr:`feeds_back` says of what
        sends."""
        return ()

    @property
    def rows(self) -> tuple[str, ...]:
        """What each vector of a parameter's memory is: :data:`MASS`, :data:`ESTIMATE`, :data:`TOTAL` or
        :data:`COMMON`. It says what becomes of them when the number of ranks changes."""
        return (MASS,)

    @abstractmethod
    def compensate(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is to be compressed in place of ``tensor``: the first alone, or the sum of two.

        The first becomes that sum p, and only this memory changes it. A second one also means that all this memory
        wants to know is what is left, p − C(p): whoever compresses may leave that in the first's place, and does not
        call :meth:`update` then.

        Args:
            name: the parameter's.
            tensor: float32 or float64 ``[d]``. It is given up: the memory may write to it until it is told of the
                outcome, and keep it then, if :meth:`commit` returns another one for it.
        """

    @abstractmethod
    def update(self, name: str, sent: Sent) -> None:
        """``sent`` is the compressed form of what :meth:`compensate` has asked for; the outcome is open."""

    @abstractmethod
    def commit(self, name: str) -> Tensor | None:
        """The exchange has succeeded: remember what :meth:`update` was told last.

        Returns:
            A vector in exchange for the tensor that :meth:`compensate` was given, if the memory keeps that: of its
            size, dtype and device, holding anything.
        """

    @abstractmethod
    def rollback(self, name: str) -> None:
        """The exchange has failed, on whatever rank: forget what :meth:`compensate` was given last."""

    def receive(self, name: str, total: Tensor, world_size: int, draws: Callable[[], torch.Generator]) -> Tensor:
        """What the optimizer gets, after :meth:`commit`: here ``total`` itself.

        The result must be the same on all ranks, so it depends on what was received only.

        Args:
            name: the parameter's.
            total: flat sum of all ranks' messages; may be written to and returned, but not kept.
            world_size: number of ranks that were summed over.
            draws: a generator that is the same on all ranks.

        Returns:
            A flat tensor in the units of ``total``, that is ``world_size`` times the average; ``total``, or one of
            its own storage.
        """
        return total

    def take_back(self, name: str, start: int, rest: Tensor) -> None:
        """After :meth:`commit`: some of what ranks have sent was left out of the sum, and is to be sent again.

        Args:
            name: the parameter's.
            start: the first of its elements that ``rest`` is about.
            rest: ``[n]``, in the units of the tensors.

        Raises:
            TypeError: this memory does not keep what was not sent.
        """
        raise TypeError(f"{self!r} takes nothing back; memory='residual' does")

    def residual(self, name: str) -> Tensor | None:
        """What is still to be sent, ``[d]`` in the units of the tensors; None for nothing.

        Raises:
            TypeError: this memory does not keep what was not sent.
        """
        raise TypeError(f"{self!r} keeps no residual; memory='residual' does")

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The memory of each parameter by name, ``[d]``, or ``[n, d]`` for n vectors of a parameter's size.

        Copies: no later exchange changes them.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the memory by copies of what :meth:`state_dict` returned.

        Raises:
            ValueError: the state is another kind of memory's; nothing has changed then.
        """

    def _check(self, state: Mapping[str, Tensor], vectors: int) -> None:
        """Raise ValueError unless ``state`` has so many vectors for each parameter."""
        for name, memory in state.items():
            found = 1 if memory.dim() == 1 else len(memory)
            if found != vectors or memory.dim() > 2:
                raise ValueError(
                    f"{self!r} keeps {vectors} vector(s) for a parameter, the state has {found} for {name!r}: it was "
                    "saved with another memory=…"
                )
