"""The compressed sum over ranks: where operator, memory, wire and exchange become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import wire
from .errors import PeerError, RankMismatchError, WireError
from .sender import AFTER, Pending, Sender
from .wire import Message

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI

    from .exchange import Exchange


@dataclass(frozen=True)
class Reduced:
    """The outcome of one exchange."""

    sums: dict[str, Tensor]  # name → flat sum over ranks, in the working dtype, on the tensor's device
    overflow: list[tuple[int, str]]  # rank and name of what holds inf or NaN; if there is any, no memory was updated


class Reducer(Sender):
    """Sums named tensors over ranks by compressed messages; the result is bit-identical on every rank.

    Tensors are :meth:`add`-ed in any order, which may differ between ranks, and exchanged by one :meth:`reduce`.
    Whatever fails on one rank, in an operator for instance, raises on all of them, and no memory changes. Its
    arguments are those of :class:`Sender`.
    """

    # State
    _exchange: Exchange | None = None
    _called: Sequence[int] = ()  # what messages call the ranks

    @property
    def is_open(self) -> bool:
        """Whether the ranks have met."""
        return self._exchange is not None

    def open(
        self,
        communicator: MPI.Intracomm,
        ranks: Sequence[int],
        expects: str,
        timeout: float,
        called: Sequence[int] | None = None,
    ) -> None:
        """Meet the other ``ranks`` of ``communicator``. Collective over them.

        Args:
            communicator: contains the ranks.
            ranks: ascending, this one among them.
            expects: lines that must be the same on all ranks, besides what this reducer knows itself.
            timeout: seconds to wait for the other ranks.
            called: numbers that errors call the ranks by, if not ``ranks``.

        Raises:
            RankMismatchError: on every rank, when ranks differ or do not come, or when a rank has loaded the state of
                another rank or of another number of ranks.
        """
        from .exchange import Exchange

        expects = f"{self._round} exchanges so far\n{expects}"
        self._exchange = Exchange(self._meet(communicator, ranks, expects, timeout))
        self._called = ranks if called is None else called

    def reduce(self, step: int | None = None, *, overflow_elsewhere: bool = False) -> Reduced:
        """Exchange what was added, on this and all other ranks. Collective.

        Args:
            step: a number that must be the same on all ranks; that of the exchange if None.
            overflow_elsewhere: this rank has met inf or NaN in what it has not added, so that the step is likely to
                be skipped on all ranks. No memory is updated then.

        Raises:
            PeerError: another rank failed.
            RankMismatchError: the ranks added different tensors, or are not at the same step.
            WireError: a message arrived damaged.
            Exception: whatever :meth:`add` or packing raised on this rank.
        """
        step = self._round if step is None else step
        pending, failure = self._take()
        try:
            packets = self._swap_packets(pending, failure, step, overflow_elsewhere)
            overflow = self._agree([(self._called[r], n) for r, n in _overflow(packets, list(pending))])
        except BaseException:
            self._rollback(pending)
            raise
        if overflow:
            self._rollback(pending)
        else:
            self._commit(pending)
        sums = {}
        for place, (name, p) in enumerate(pending.items()):
            total = _sum([packet.messages[place] for packet in packets], p.flat)
            sums[name] = self._receive(name, total) if p.remembered and not overflow else total
        return Reduced(sums, overflow)

    def _receive(self, name: str, total: Tensor) -> Tensor:
        return self._memory.receive(name, total, self.size, lambda: self._generator(name, AFTER, total.device))

    def _swap_packets(
        self, pending: Mapping[str, Pending], failure: Exception | None, step: int, overflow: bool
    ) -> list[wire.Packet]:
        """Send this rank's messages, or why there are none, and receive everyone's."""
        assert self._exchange is not None, "open() comes first"
        energy = self._energy()
        sent_before = self._exchange.sent
        shares: list[int] = []
        if failure is None:
            try:
                ids = [self._ids[name] for name in pending]
                messages = [p.message for p in pending.values()]
                encoded = wire.encode(messages, ids=ids, round=step, energy=energy, overflow=overflow)
                buffer, shares = encoded.data, encoded.shares
            except Exception as error:
                failure = error
        if failure is not None:
            buffer = wire.encode_failure(f"{type(failure).__name__}: {failure}", round=step)
        received = self._exchange.allgatherv(buffer)

        for name, share in zip(pending, shares, strict=failure is None):
            self._ledger.tensors[name].mpi += share
        self._ledger.shared.mpi += self._exchange.sent - sent_before - sum(shares)
        self._ledger.exchanges += 1
        if failure is not None:
            raise failure
        device = next(iter(pending.values())).message.device if pending else torch.device("cpu")
        packets = self._open_packets(received, list(pending), step, device)
        self._round += 1
        # In rank order, as the sums: all ranks must come to the same conclusion.
        self._schedule.advance(sum(packet.energy for packet in packets) / len(packets), _kept(packets, pending))
        return packets

    def _open_packets(
        self, received: Sequence[Any], names: list[str], step: int, device: torch.device
    ) -> list[wire.Packet]:
        packets = []
        for rank, data in zip(self._called, received, strict=True):
            try:
                packets.append(wire.decode(data, device))
            except WireError as error:
                raise WireError(f"from rank {rank}: {error}") from None
        by_rank = list(zip(self._called, packets, strict=True))
        failed = [f"rank {rank} failed: {packet.failure}" for rank, packet in by_rank if packet.failure is not None]
        if failed:
            raise PeerError("; ".join(failed))
        ids = [self._ids[name] for name in names]
        for rank, packet in by_rank:
            if packet.round != step:
                raise RankMismatchError(f"rank {rank} exchanges at step {packet.round}, this rank at step {step}")
            if packet.ids != ids:
                different = {*packet.ids} ^ {*ids}
                which = ", ".join(name for name, id in self._ids.items() if id in different)
                raise RankMismatchError(f"rank {rank} and this rank do not send the same tensors: {which}")
            for name, message in zip(names, packet.messages, strict=True):
                if message.numel != self._shapes[name].numel():
                    raise WireError(f"rank {rank} sent {message.numel} elements of {name!r}")
        return packets


def _kept(packets: list[wire.Packet], pending: Mapping[str, Pending]) -> int:
    """How many elements of compressed tensors the rank has sent that sent most."""
    compressed = [i for i, p in enumerate(pending.values()) if p.compressed]
    return max(sum(len(packet.messages[i].values) for i in compressed) for packet in packets)


def _overflow(packets: list[wire.Packet], names: list[str]) -> list[tuple[int, str]]:
    """Which ranks' messages about which tensors hold inf or NaN, and which ranks have met some elsewhere."""
    elsewhere = [(rank, "a tensor that is not compressed") for rank, packet in enumerate(packets) if packet.overflow]
    messages = [(rank, name, m) for rank, p in enumerate(packets) for name, m in zip(names, p.messages, strict=True)]
    if not messages:
        return elsewhere
    finite = torch.stack([m.is_finite() for _, _, m in messages]).tolist()
    return elsewhere + [(rank, name) for (rank, name, _), good in zip(messages, finite, strict=True) if not good]


def _sum(messages: list[Message], flat: Tensor) -> Tensor:
    """In rank order, since floating point addition is not associative and all ranks must get the same bits."""
    flat.zero_()
    for message in messages:
        message.to(flat.device).add_to(flat)
    return flat
