"""The compressed sum over ranks with the work of summing divided: a sparse reduce-scatter, then an allgather.

Each rank owns a *region* of the concatenation of all tensors. In one exchange

1. the ranks agree on regions in which about equally many elements were selected: the mean over ranks of where each
   would cut its own selection into equal parts (Ok-Topk, arXiv 2201.07598, section 3.1),
2. each rank sends every other one the part of its messages that lies in that one's region,
3. owners sum what they have received, in rank order, and select again: as many elements as one rank has sent on
   average, or more where there is room (:func:`hvd_compress.costs.room`). What is left out goes into the owner's
   memory, so nothing is lost,
4. owners send their part of the sum to all, sparse, or dense where that is shorter (SparCML, arXiv 1802.08021).

So a rank sends and receives between one and two messages, however many ranks there are, where with the flat exchange
it receives every other rank's.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor

from . import wire
from .costs import room
from .errors import PeerError, RankMismatchError, WireError
from .kernels import all_finite, as_divisor
from .ledger import Ledger
from .meeting import source_of, through_mpi
from .memory import Memory
from .operators import Operator
from .operators.topk import largest
from .pieces import Piece, cut, even_ends
from .reducer import Reduced
from .schedules import Plan
from .sender import AFTER, Overflow, Pending, Sender, check_stamp, stamp
from .wire import Floats, Message

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI

    from .exchange import Scatter, Watch

_ELSEWHERE = "a tensor that is not compressed"


class ScatteredReducer(Sender):
    """Sums named tensors over ranks as :class:`hvd_compress.reducer.Reducer` does, in another way.

    The sum is the flat exchange's less what the second selection leaves out, and the same to the bit on every rank.

    Args:
        shapes, operator, memory, dense_below, seed, ledger: see :class:`hvd_compress.sender.Sender`. Messages must be
            such that they can be divided: sparse, or floats.
        reselect: how many elements the sum may have, as a multiple of what one rank sends on average; infinite for
            all of them, None for as many as :func:`hvd_compress.costs.room` says. Memories that take nothing back
            make it infinite.
        nodes: see :class:`hvd_compress.reducer.Reducer`.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        *,
        operator: Operator | Plan,
        memory: Memory,
        dense_below: int,
        seed: int,
        ledger: Ledger,
        reselect: float | None = None,
        nodes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(shapes, operator=operator, memory=memory, dense_below=dense_below, seed=seed, ledger=ledger)
        # Configuration
        self._reselect = reselect if memory.takes_back else math.inf
        self._nodes = nodes
        # State
        self._exchange: Scatter | None = None
        self._watch: Watch | None = None
        self._limit = math.inf  # elements of the sum, as a multiple of what one rank sends on average
        self._called: Sequence[int] = ()  # what errors call the ranks
        self._is_awaited = False  # from the first to the last of an exchange's collectives

    @property
    def is_open(self) -> bool:
        """Whether the ranks have met."""
        return self._exchange is not None

    def open(self, link: MPI.Intracomm | hvd.ProcessSet, ranks: Sequence[int], expects: str, timeout: float) -> None:
        """Meet the other ranks; see :meth:`hvd_compress.reducer.Reducer.open`.

        Raises:
            RankMismatchError: see there.
            RuntimeError: Horovod runs without MPI.
            ValueError: ``nodes`` does not speak of all ranks.
        """
        communicator = through_mpi(link, "reduce_scatter")
        from .exchange import Scatter, Watch, labels_of

        labels = labels_of(self._nodes, ranks)
        expects = (
            f"exchange reduce_scatter by {source_of(self._nodes)}, reselect={self._reselect}\n"
            f"{self._round} exchanges so far\n{expects}"
        )
        private = self._meet(communicator, ranks, expects, timeout)
        self._exchange, self._watch, self._called = Scatter(private, labels), Watch(private, timeout), ranks
        self._limit = room(self.size, self._exchange.nodes) if self._reselect is None else self._reselect
        self._ledger.shared.mpi += self._exchange.sent

    def leave(self) -> None:
        """Forget the other ranks; see :meth:`hvd_compress.reducer.Reducer.leave`."""
        self._drop()
        self._exchange = self._watch = self._place = self._saved_as = None

    def add(self, name: str, tensor: Tensor, into: Tensor | None = None) -> None:
        """See :meth:`hvd_compress.reducer.Reducer.add`."""
        if self._watch is not None:
            self._watch.begin()
        super().add(name, tensor, into)

    def reduce(
        self,
        step: int | None = None,
        *,
        divisor: float = 1.0,
        overflow_elsewhere: bool = False,
        minuends: Mapping[str, Tensor] | None = None,
    ) -> Reduced:
        """Exchange what was added; see :meth:`hvd_compress.reducer.Reducer.reduce`.

        A rank that fails or is interrupted where others wait for it, and cannot be told, ends the job.
        """
        assert self._watch is not None, "open() comes first"
        self._watch.begin()
        try:
            with self._ledger.timed("compress"):
                reduced = self._reduce(stamp(self._round, step), divisor, overflow_elsewhere)
                with self.alone():
                    return reduced.subtracted_from(minuends)
        except BaseException:
            if self._is_awaited:
                self._watch.end_job(f"the others wait for it, and it fails:\n{traceback.format_exc()}")
            raise
        finally:
            self._watch.end()

    def _reduce(self, step: int, divisor: float, overflow_elsewhere: bool) -> Reduced:
        assert self._exchange is not None
        pending, messages, failure = self._take()
        sent_before, within_before = self._exchange.sent, self._exchange.within
        try:
            try:
                proposal = self._proposal(*(({}, {}) if failure else (pending, messages)))
            except Exception as error:
                failure, proposal = error, self._proposal({}, {})
            self._is_awaited = self.size > 1
            regions, kept = self._agree_on_regions(*proposal)
            packets, failure = self._scatter(messages, regions, step, failure, overflow_elsewhere)
            flagged = [p.overflow for p in packets]
            results, rests = self._gather(pending, regions, packets, step, failure)
            with self.alone():
                overflow = self._overflow(flagged, results, regions)
            overflow = self._agree(overflow)
        except BaseException:
            self._rollback(pending)
            raise
        finally:
            self._ledger.exchanges += 1
            self._ledger.shared.mpi += self._exchange.sent - sent_before
            self._ledger.shared.node += self._exchange.within - within_before
        with self.alone():
            self._round += 1
            self._schedule.advance(sum(p.energy for p in packets) / len(packets), kept)
            sums = self._rollback(pending) if overflow else self._commit(pending)
            if not overflow:
                for piece, rest in rests:
                    self._memory.take_back(piece.name, piece.start, rest)
            _assemble(sums, regions, results)
            for name, p in pending.items():
                if p.remembered and not overflow:
                    sums[name] = self._receive(name, sums[name])
                if divisor != 1:
                    sums[name].div_(as_divisor(divisor, sums[name]))
            return Reduced(sums, overflow)

    def _drop(self) -> None:
        super()._drop()
        if self._watch is not None:
            self._watch.give_up()

    def _receive(self, name: str, total: Tensor) -> Tensor:
        return self._memory.receive(name, total, self.size, lambda: self._generator(name, AFTER, total.device))

    def _proposal(
        self, pending: Mapping[str, Pending], messages: Mapping[str, Message]
    ) -> tuple[dict[str, int], np.ndarray]:
        """The tensors' sizes, where this rank would divide them, and how many compressed elements it has kept."""
        counts = [len(message.values) for message in messages.values()]
        kept = np.zeros(self.size, np.int64)
        kept[self.rank] = sum(n for n, p in zip(counts, pending.values(), strict=True) if p.compressed)
        sizes = {name: message.numel for name, message in messages.items()}
        ends = equal_parts([*messages.values()], self.size) if sum(counts) else None
        return sizes, np.array([*(ends or even_ends(sum(sizes.values()), self.size))[:-1], *kept], np.int64)

    def _agree_on_regions(self, sizes: Mapping[str, int], proposal: np.ndarray) -> tuple[list[list[Piece]], int]:
        """Each rank's pieces of the tensors, and how many compressed elements the rank has kept that kept most."""
        assert self._exchange is not None
        with self._ledger.timed("exchange"):
            agreed = self._exchange.sum(proposal)
        total = sum(sizes.values())
        ends = [min(int(end) // self.size, total) for end in agreed[: self.size - 1]] + [total]
        return cut(sizes, ends), int(agreed[self.size - 1 :].max())

    def _scatter(
        self,
        messages: Mapping[str, Message],
        regions: list[list[Piece]],
        step: int,
        failure: Exception | None,
        overflow_elsewhere: bool,
    ) -> tuple[list[wire.Packet], Exception | None]:
        """What all ranks say about this rank's region, or why it is not known."""
        assert self._exchange is not None
        energy = self._energy()
        buffers, mine = [], wire.Packet(step, [], [], energy, False)
        shares: dict[str, Counter[str]] = {"mpi": Counter(), "node": Counter()}
        if failure is None:
            try:
                overflow = overflow_elsewhere or not all_finite([m.values.floats for m in messages.values()])
                for owner, pieces in enumerate(regions):
                    ids = [self._ids[p.name] for p in pieces]
                    parts = [messages[p.name].part(p.start, p.stop) for p in pieces]
                    if owner == self.rank:
                        mine = wire.Packet(step, ids, parts, energy, overflow)
                        buffers.append(np.empty(0, np.uint8))
                        continue
                    encoded = wire.encode(parts, ids=ids, round=step, energy=energy, overflow=overflow)
                    buffers.append(encoded.data)
                    where = "node" if self._exchange.stays_within(owner) else "mpi"
                    for piece, share in zip(pieces, encoded.shares, strict=True):
                        shares[where][piece.name] += share
                self._exchange.check(buffers)
            except Exception as error:
                failure, shares = error, {}
        if failure is not None:
            buffers = [wire.encode_failure(_text(failure), round=step)] * self.size
        with self._ledger.timed("exchange"):
            received = self._exchange.alltoall(buffers)
        for where, some in shares.items():
            self._count(some, where)
        if failure is not None:
            return [], failure
        try:
            device = next(iter(messages.values())).device if messages else torch.device("cpu")
            packets = [
                mine if rank == self.rank else self._opened(data, rank, mine.ids, regions[self.rank], step, device)
                for rank, data in enumerate(received)
            ]
            self._check_failures(packets)
        except Exception as error:
            return [], error
        return packets, None

    def _gather(
        self,
        pending: Mapping[str, Pending],
        regions: list[list[Piece]],
        packets: list[wire.Packet],
        step: int,
        failure: Exception | None,
    ) -> tuple[list[Sequence[Message]], list[tuple[Piece, Tensor]]]:
        """Each owner's part of the sum, and what this rank has left out of its own."""
        assert self._exchange is not None
        rests: list[tuple[Piece, Tensor]] = []
        shares: dict[str, int] = {}
        if failure is None:
            try:
                results = []
                overflow = any(packet.overflow for packet in packets)
                for place, piece in enumerate(regions[self.rank]):
                    messages = [packet.messages[place] for packet in packets]
                    p = pending[piece.name]
                    is_whole = overflow or not p.compressed or math.isinf(self._limit)
                    mean = sum(len(m.values) for m in messages) / self.size
                    total = _sum(messages, torch.zeros(len(piece), dtype=p.flat.dtype, device=p.flat.device))
                    result, rest = select_again(total, math.inf if is_whole else self._limit * mean)
                    results.append(result)
                    if rest is not None:
                        rests.append((piece, rest))
                ids = [self._ids[piece.name] for piece in regions[self.rank]]
                encoded = wire.encode(results, ids=ids, round=step)
                buffer = encoded.data
                shares = {p.name: n for p, n in zip(regions[self.rank], encoded.shares, strict=True)}
            except Exception as error:
                failure = error
        if failure is not None:
            buffer = wire.encode_failure(_text(failure), round=step)
        with self._ledger.timed("exchange"):
            try:
                received = self._exchange.allgatherv(buffer)
            except OverflowError:  # on all ranks
                self._is_awaited = False
                raise
        self._is_awaited = False
        self._count(shares)
        if failure is not None:
            raise failure
        device = next(iter(pending.values())).flat.device if pending else torch.device("cpu")
        with self.alone():
            gathered = [
                self._opened(data, owner, [self._ids[p.name] for p in regions[owner]], regions[owner], step, device)
                for owner, data in enumerate(received)
            ]
        self._check_failures(gathered)
        return [packet.messages for packet in gathered], rests

    def _opened(
        self, data: np.ndarray, rank: int, ids: Sequence[int], pieces: list[Piece], step: int, device: torch.device
    ) -> wire.Packet:
        """A packet of another rank's, which is about ``pieces``."""
        called = self._called[rank]
        try:
            packet = wire.decode(data, device)
        except WireError as error:
            raise WireError(f"from rank {called}: {error}") from None
        if packet.failure is not None:
            return packet
        check_stamp(called, packet.round, step)
        if [*packet.ids] != [*ids] or [*packet.numels] != [len(piece) for piece in pieces]:
            names = ", ".join(name for name, id in self._ids.items() if id in {*packet.ids} ^ {*ids})
            raise RankMismatchError(f"rank {called} and this rank do not send the same tensors: {names}")
        return packet

    def _check_failures(self, packets: list[wire.Packet]) -> None:
        by_rank = zip(self._called, packets, strict=True)
        failed = [f"rank {rank} failed: {p.failure}" for rank, p in by_rank if p.failure is not None]
        if failed:
            raise PeerError("; ".join(failed))

    def _overflow(
        self, flagged: Sequence[bool], results: Sequence[Sequence[Message]], regions: list[list[Piece]]
    ) -> Overflow:
        """Which ranks have met inf or NaN, and in which tensors these now are; which rank sent which is not known."""
        if not any(flagged):
            return []
        names = [
            piece.name
            for pieces, messages in zip(regions, results, strict=True)
            for piece, message in zip(pieces, messages, strict=True)
            if not bool(message.is_finite())
        ]
        ranks = [rank for rank, flag in zip(self._called, flagged, strict=True) if flag]
        return [(rank, name) for rank in ranks for name in dict.fromkeys(names) or [_ELSEWHERE]]

    def _count(self, shares: Mapping[str, int], where: str = "mpi") -> None:
        """Write bytes down as single tensors', which will be counted among the shared ones too."""
        for name, share in shares.items():
            self._ledger.tensors[name].count(where, share)
            self._ledger.shared.count(where, -share)


def equal_parts(messages: Sequence[Message], parts: int) -> list[int]:
    """Where parts of the tensors' concatenation end that have equally many of the messages' values, give or take one.

    Args:
        messages: one for each tensor, with at least one value in all.
        parts: how many.
    """
    counts = np.cumsum([0] + [len(m.values) for m in messages])
    offsets = np.cumsum([0] + [m.numel for m in messages])
    ends = []
    for number in even_ends(int(counts[-1]), parts)[:-1]:
        which = int(np.searchsorted(counts, number, side="right")) - 1
        indices, place = messages[which].indices, number - int(counts[which])
        ends.append(int(offsets[which]) + (place if indices is None else int(indices[place])))
    return [*ends, int(offsets[-1])]


def select_again(total: Tensor, limit: float) -> tuple[Message, Tensor | None]:
    """``total`` as a message of at most ``limit`` elements, the largest, and what was left out; None for nothing.

    Args:
        total: float32 or float64 ``[n]``.
        limit: rounded up. Once so many are allowed that a dense message is as short, nothing is left out.
    """
    union = total != 0  # NaN too
    present, numel, bits = int(union.sum()), len(total), 8 * total.element_size()
    count = present if math.isinf(limit) else min(present, math.ceil(limit))
    if count * bits + numel >= numel * bits:  # a bit for each element says at least where the values are
        return Message.dense(total), None
    if count == present:
        indices = torch.nonzero(union).reshape(-1)
        return Message((numel,), indices, Floats(total[indices])), None
    indices, values = largest(total, count)
    return Message((numel,), indices, Floats(values)), total.index_fill(0, indices, 0)


def _sum(messages: Sequence[Message], total: Tensor) -> Tensor:
    for message in messages:
        message.to(total.device).add_to(total)
    return total


def _assemble(sums: Mapping[str, Tensor], regions: list[list[Piece]], results: Sequence[Sequence[Message]]) -> None:
    """Put the owners' parts together in ``sums``."""
    for total in sums.values():
        total.zero_()
    for pieces, messages in zip(regions, results, strict=True):
        for piece, message in zip(pieces, messages, strict=True):
            flat = sums[piece.name][piece.start : piece.stop]
            message.to(flat.device).add_to(flat)


def _text(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"
