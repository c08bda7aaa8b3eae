"""What one rank says about one tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from ..errors import WireError
from ..kernels import Sparse, add_at, as_divisor, is_finite, random_subset, subtract_at, sum_at
from .values import Floats, SymmetricRuns, Values


@dataclass(frozen=True)
class Subset:
    """Uniformly random indices: receivers draw them again from the seed, so none are sent."""

    seed: int  # 0 ≤ seed < 2 ** 63

    def indices(self, numel: int, count: int) -> Tensor:
        """Ascending int64 ``[count]`` on the CPU."""
        return random_subset(numel, count, self.seed)


@dataclass(frozen=True)
class Block:
    """Consecutive indices from ``start`` on, which go on at 0 behind the last one."""

    start: int

    def indices(self, numel: int, count: int) -> Tensor:
        """Ascending int64 ``[count]`` on the CPU."""
        return ((torch.arange(count, device="cpu") + self.start) % numel).sort().values


@dataclass(frozen=True)
class Message:
    """The compressed form of one tensor: some of its elements (sparse) or all of them (dense).

    Build one with :meth:`sparse` or :meth:`dense`; the constructor takes its arguments as they are.
    """

    shape: tuple[int, ...]  # of the tensor that was compressed
    indices: Tensor | None  # int64 [k], strictly ascending, into the flattened tensor; or int32. None: every element
    values: Values  # of length k; numel when indices is None
    rule: Subset | Block | None = None  # sent in place of the indices, which it yields

    @classmethod
    def sparse(cls, shape: tuple[int, ...], indices: Tensor, values: Tensor) -> Message:
        """Elements ``indices`` (any order, each once) of a flattened tensor of ``shape`` have ``values``.

        Raises:
            ValueError: the two do not have one and the same length.
        """
        if indices.shape != values.shape or indices.dim() != 1:
            raise ValueError(
                f"indices and values must be of one length, got shapes {tuple(indices.shape)} and "
                f"{tuple(values.shape)}"
            )
        order = torch.argsort(indices)
        return cls(tuple(shape), indices[order].to(torch.int64), Floats(values[order]))

    @classmethod
    def dense(cls, tensor: Tensor) -> Message:
        """Every element of ``tensor``, unchanged."""
        return cls(tuple(tensor.shape), None, Floats(tensor.reshape(-1)))

    @property
    def numel(self) -> int:
        """Number of elements of the tensor that was compressed."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.values.floats.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoded values."""
        return self.values.floats.dtype

    def is_finite(self) -> Tensor:
        """Whether all that receivers see is finite, as a bool tensor of no dimensions."""
        return is_finite(self.values.floats)

    def to(self, device: torch.device) -> Message:
        """The same message on ``device``."""
        if device == self.device:
            return self
        indices = None if self.indices is None else self.indices.to(device)
        return replace(self, indices=indices, values=self.values.to(device))

    def part(self, start: int, stop: int) -> Message:
        """What it says about elements [start, stop), as a message about these alone.

        Raises:
            TypeError: its values cannot be divided; whatever ``start`` and ``stop`` are.
        """
        if self.indices is None:
            return Message((stop - start,), None, self.values.part(start, stop))
        if (start, stop) == (0, self.numel):  # mostly; the search waits for a GPU
            return Message((stop,), self.indices, self.values.part(0, len(self.values)))
        bounds = torch.tensor([start, stop]).to(self.indices)  # int32 ones are of less than 2^31 elements
        low, high = torch.searchsorted(self.indices, bounds).tolist()
        return Message((stop - start,), self.indices[low:high] - start, self.values.part(low, high))

    def add_to(self, flat: Tensor, *, alpha: float = 1) -> None:
        """``flat += alpha * C(x)`` in place; ``flat`` is one-dimensional with :attr:`numel` elements."""
        values = self.values.decode()
        values = values if values.dtype == flat.dtype else values.to(flat.dtype)
        if self.indices is None:
            flat.add_(values, alpha=alpha)
        else:
            add_at(flat, self.indices, values, alpha)

    def clear_in(self, flat: Tensor) -> None:
        """Set the elements of ``flat`` that are sent to zero, unless all are."""
        if self.indices is not None:
            flat.index_fill_(0, self.indices.to(torch.int64), 0)

    def decode(self) -> Tensor:
        """The tensor a receiver sees: C(x), of :attr:`shape` and :attr:`dtype`, on the message's device."""
        flat = torch.zeros(self.numel, dtype=self.dtype, device=self.device)
        self.add_to(flat)
        return flat.reshape(self.shape)

    def to_bytes(self) -> bytes:
        """This message alone as a packet; see :mod:`hvd_compress.wire.packet`."""
        from .packet import encode

        return encode([self]).data.tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> Message:
        """Inverse of :meth:`to_bytes`.

        Raises:
            WireError: ``data`` is not exactly one well-formed message.
        """
        from .packet import decode

        packet = decode(data)
        if len(packet.messages) != 1:
            raise WireError(f"expected one message, the packet holds {len(packet.messages)}")
        return packet.messages[0]


class Fused(Sequence[Message]):
    """Sparse messages whose indices and values lie one after the other; single ones are cut out when asked for.

    None of them has all elements of its tensor.

    Args:
        shapes, counts: of each message; see :class:`Message`.
        indices: int32 or int64 ``[n]``: they are held until all ranks' messages are summed.
        values: of all messages, n.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        counts: Sequence[int],
        indices: Tensor,
        values: Floats | SymmetricRuns,
    ) -> None:
        self.kind = values.floats.dtype, values.floats.device
        self.shapes = shapes
        self.counts = counts
        self.indices = indices
        self.values = values

    def vectors(self) -> Sparse:
        """What receivers see of each message."""
        return Sparse(self.indices, self.values.decode(), self.counts)

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, place: int) -> Message: ...
    @overload
    def __getitem__(self, place: slice) -> list[Message]: ...
    def __getitem__(self, place: int | slice) -> Message | list[Message]:
        return self._cut[place]

    @cached_property
    def _cut(self) -> list[Message]:
        indices = self.indices.to(torch.int64).split([*self.counts])
        return [*map(Message, self.shapes, indices, self.values.split(self.counts))]


def numels_of(messages: Sequence[Message]) -> list[int]:
    """Elements of the tensor that each is about."""
    return [math.prod(s) for s in messages.shapes] if isinstance(messages, Fused) else [m.numel for m in messages]


def device_of(messages: Sequence[Message]) -> torch.device:
    """Where the first one's tensors are; the CPU if there is none."""
    if isinstance(messages, Fused):
        return messages.kind[1]
    return messages[0].device if messages else torch.device("cpu")


def add_up(ranks: Sequence[Sequence[Message]], flats: Sequence[Tensor], divisor: float = 1.0) -> None:
    """``flats[i]`` becomes the sum of what receivers of ``ranks[r][i]`` see, in order of r, divided by ``divisor``.

    Args:
        ranks: the messages of each rank, one about each of ``flats``.
        flats: float32 or float64 ``[d]`` each; may hold anything before.
        divisor: 1 for the sum.
    """
    if (fused := _alike(ranks, flats)) is not None:
        sum_at(flats, fused, divisor)
        return
    for flat, messages in zip(flats, zip(*ranks, strict=True), strict=True):
        _add_up([message.to(flat.device) for message in messages], flat, divisor)


def subtract(ranks: Sequence[Sequence[Message]], flats: Sequence[Tensor], divisor: float = 1.0) -> None:
    """``flats`` less what :func:`add_up` makes of ``ranks``, rounded to the dtype of ``flats``, in place.

    Args:
        ranks, divisor: see :func:`add_up`.
        flats: floating point ``[d]`` each.
    """
    if (fused := _alike(ranks, flats)) is not None:
        subtract_at(flats, fused, divisor)
        return
    for flat, messages in zip(flats, zip(*ranks, strict=True), strict=True):
        _subtract([message.to(flat.device) for message in messages], flat, divisor)


def _alike(ranks: Sequence[Sequence[Message]], flats: Sequence[Tensor]) -> list[Sparse] | None:
    """Each rank's messages in one, if all are fused and of the dtype and on the device of ``flats``."""
    fused = [messages for messages in ranks if isinstance(messages, Fused)]
    kinds = {*((flat.dtype, flat.device) for flat in flats), *(messages.kind for messages in fused)}
    return None if len(fused) < len(ranks) or len(kinds) > 1 else [messages.vectors() for messages in fused]


def _add_up(messages: Sequence[Message], flat: Tensor, divisor: float) -> None:
    indices = [m.indices for m in messages if m.indices is not None]
    if len(indices) == len(messages):
        values = [m.values.decode().to(flat.dtype) for m in messages]
        sum_at([flat], _each(indices, values), divisor)
        return
    flat.zero_()
    for message in messages:
        message.add_to(flat)
    flat.div_(as_divisor(divisor, flat))


def _subtract(messages: Sequence[Message], flat: Tensor, divisor: float) -> None:
    indices = [m.indices for m in messages if m.indices is not None]
    values = [m.values.decode() for m in messages]
    if len(indices) == len(messages) and all(v.dtype == flat.dtype for v in values):
        subtract_at([flat], _each(indices, values), divisor)
        return
    total = torch.empty(len(flat), dtype=torch.promote_types(flat.dtype, torch.float32), device=flat.device)
    _add_up(messages, total, divisor)
    flat.sub_(total.to(flat.dtype))


def _each(indices: Sequence[Tensor], values: Sequence[Tensor]) -> list[Sparse]:
    return [Sparse(i.to(torch.int64), v, [len(i)]) for i, v in zip(indices, values, strict=True)]
