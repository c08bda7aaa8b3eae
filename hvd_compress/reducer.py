"""The compressed sum over ranks: where operator, memory, wire and exchange become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from . import wire
from .errors import PeerError, RankMismatchError, WireError
from .horovod_exchange import HorovodExchange
from .kernels import all_finite, as_divisor
from .meeting import source_of
from .sender import AFTER, Overflow, Pending, Sender, check_stamp, stamp
from .side_stream import SideStream

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI

    from .exchange import Exchange, Watch
    from .exchange.gather import Bytes


@dataclass(frozen=True)
class Reduced:
    """The outcome of one exchange."""

    sums: dict[str, Tensor]  # name → flat sum over ranks, in the working dtype, on the tensor's device
    overflow: Overflow  # if there is any, no memory was updated

    def subtracted_from(self, minuends: Mapping[str, Tensor] | None) -> Reduced:
        """The same with no sums: they are subtracted from ``minuends``, if those are given and nothing overflowed."""
        if minuends is None or self.overflow:
            return self
        for name, total in self.sums.items():
            minuends[name].sub_(total.to(minuends[name].dtype))
        return replace(self, sums={})


@dataclass(frozen=True)
class _Arrived:
    """What has become of one bucket."""

    shares: list[int]  # bytes that each of this rank's messages took
    sent: int  # bytes handed to MPI
    within: int  # bytes handed on within the node
    packets: list[wire.Packet]  # of all ranks; fewer if there is an error
    error: Exception | None


@dataclass(frozen=True)
class _Departed:
    """A bucket on its way."""

    names: list[str]  # in the order of the messages
    stamp: int
    arrival: Future[_Arrived]


class Reducer(Sender):
    """Sums named tensors over ranks by compressed messages; the result is bit-identical on every rank.

    Tensors are :meth:`add`-ed in any order, which may differ between ranks, and summed by one :meth:`reduce`. They
    travel in *buckets* of neighbours, one packet each, from the last tensor to the first, as a backward pass makes
    gradients. A bucket departs in a thread of its own, as soon as its tensors are there and the bucket before it has
    departed; the last one with :meth:`reduce`. Which tensors share a bucket changes no bit of the sums.

    Whatever fails on one rank, in an operator for instance, raises on all of them, and no memory changes. What fails
    after all messages have come, as they are opened and summed, raises on that rank only, and on all in the next
    exchange.

    Args:
        shapes: see :class:`Sender`, as for the other arguments.
        buckets: names of the tensors that travel together, in the order in which buckets depart; all of ``shapes``.
        nodes: a number for each rank's node (Horovod's rank is the place in it); None to ask MPI.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        *,
        buckets: Sequence[Sequence[str]],
        nodes: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(shapes, **options)
        # Configuration
        self._buckets = buckets
        self._nodes = nodes
        # State
        self._exchange: Exchange | HorovodExchange | None = None
        self._watch: Watch | None = None
        self._called: Sequence[int] = ()  # what errors call the ranks
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hvd_compress exchange")
        self._side_stream = SideStream()
        self._awaited = [set(names) for names in self._buckets]  # what came last time; the same on all ranks
        self._here: set[str] = set()  # what was added since the last time, whether or not it could be compressed
        self._departed: list[_Departed] = []
        self._gone: set[str] = set()  # their names

    @property
    def is_open(self) -> bool:
        """Whether the ranks have met."""
        return self._exchange is not None

    def open(self, link: MPI.Intracomm | hvd.ProcessSet, ranks: Sequence[int], expects: str, timeout: float) -> None:
        """Meet the other ``ranks``. Collective over them.

        Args:
            link: a communicator that contains the ranks; their process set where Horovod runs without MPI.
            ranks: ascending, this one among them.
            expects: lines that must be the same on all ranks, besides what this reducer knows itself.
            timeout: seconds to wait for the other ranks.

        Raises:
            RankMismatchError: on every rank, when ranks differ or do not come, or when a rank has loaded the state of
                another rank or of another number of ranks.
            ValueError: ``nodes`` does not speak of all ranks.
        """
        if isinstance(link, hvd.ProcessSet):
            self._exchange = self._meet_through_horovod(link, ranks, self._expects(expects))
            self._called = ranks
        else:
            from .exchange import Watch

            self._watch = Watch(self.join(link, ranks, expects, timeout, ranks), timeout)

    def join(
        self, communicator: MPI.Intracomm, ranks: Sequence[int], expects: str, timeout: float, called: Sequence[int]
    ) -> MPI.Intracomm:
        """:meth:`open` for a part of a larger exchange, which sees by itself to ranks that do not come.

        Args:
            communicator, ranks, expects, timeout: see there.
            called: numbers that errors call the ranks by.

        Returns:
            A communicator of ``ranks`` alone.
        """
        from .exchange import Exchange, labels_of

        labels = labels_of(self._nodes, ranks)
        private = self._meet(communicator, ranks, self._expects(expects), timeout)
        self._exchange, self._called = Exchange(private, labels), called
        self._ledger.shared.mpi += self._exchange.sent
        return private

    def _expects(self, more: str) -> str:
        way = f"exchange allgather by {source_of(self._nodes)}, {len(self._buckets)} buckets"
        return f"{way}\n{self._round} exchanges so far\n{more}"

    def leave(self) -> None:
        """Forget the other ranks, since the world is about to be another one: the next exchange opens anew."""
        self._drop()
        self._exchange = self._watch = self._place = self._saved_as = None
        self._awaited = [set(names) for names in self._buckets]  # as on ranks that are new

    def stay_away(self) -> None:
        """See :meth:`hvd_compress.meeting.Member.stay_away`. If a bucket has departed, the next exchange fails."""
        if not self._departed:
            super().stay_away()
        elif self._watch is not None:
            self._watch.give_up()

    def add(self, name: str, tensor: Tensor, into: Tensor | None = None) -> None:
        """See :meth:`Sender.add`; a second one of a name, once the first has departed, is an error on all ranks.

        From now on this rank may wait for others, in Horovod or here.
        """
        if self._watch is not None:
            self._watch.begin()
        if name in self._gone:
            self.let_fail(RuntimeError(f"a second tensor {name!r} came before the sum of the first was asked for"))
            return
        super().add(name, tensor, into)
        self._here.add(name)
        self._depart_early()

    def reduce(
        self,
        step: int | None = None,
        *,
        divisor: float = 1.0,
        overflow_elsewhere: bool = False,
        minuends: Mapping[str, Tensor] | None = None,
    ) -> Reduced:
        """Exchange what was added, on this and all other ranks. Collective.

        Args:
            step: a number that must be the same on all ranks; that of the exchange if None.
            divisor: of the sums; the number of ranks for the average.
            overflow_elsewhere: this rank has met inf or NaN in what it has not added, so that the step is likely to
                be skipped on all ranks. No memory is updated then.
            minuends: flat tensors by name, from which the sums are subtracted in place, rather than that they are
                returned: of sparse messages, this touches only what they are about. With an overflow they are left
                as they are.

        Raises:
            PeerError: another rank failed.
            RankMismatchError: the ranks added different tensors, or are not at the same step.
            WireError: a message arrived damaged.
            Exception: whatever :meth:`add` or packing raised on this rank.
        """
        with self._ledger.timed("compress"):
            return self._reduce(stamp(self._round, step), divisor, overflow_elsewhere, minuends)

    def _reduce(
        self, stamped: int, divisor: float, overflow_elsewhere: bool, minuends: Mapping[str, Tensor] | None
    ) -> Reduced:
        self._depart_rest(stamped, overflow_elsewhere)
        departed, self._departed = self._departed, []
        pending, _, failure = self._take()
        self._here.clear()
        self._gone.clear()
        try:
            arrived = self._arrive(departed, failure)
            with self.alone():
                overflow = _overflow(self._called, departed, arrived)
            overflow = self._agree(overflow)
        except BaseException:
            self._rollback(pending)
            raise
        with self.alone():
            self._conclude(pending, departed, arrived)
            return self._reduced(pending, departed, arrived, overflow, divisor, minuends)

    def _reduced(
        self,
        pending: Mapping[str, Pending],
        departed: list[_Departed],
        arrived: list[_Arrived],
        overflow: Overflow,
        divisor: float,
        minuends: Mapping[str, Tensor] | None,
    ) -> Reduced:
        """Update the memory, and make the sums."""
        free = self._rollback(pending) if overflow else self._commit(pending)
        receives = self._memory.receives and not overflow
        # In rank order, since floating point addition is not associative and all ranks must get the same bits.
        buckets = [
            (bucket.names, [packet.messages for packet in arrival.packets])
            for bucket, arrival in zip(departed, arrived, strict=True)
        ]
        if minuends is not None and not overflow and not receives:
            for names, ranks in buckets:
                wire.subtract(ranks, [minuends[name] for name in names], divisor)
            return Reduced({}, overflow)
        for names, ranks in buckets:
            wire.add_up(ranks, [free[name] for name in names], 1.0 if receives else divisor)
        if receives:
            free = {name: self._received(name, flat, pending[name], divisor) for name, flat in free.items()}
        return Reduced(free, overflow).subtracted_from(minuends)

    def _received(self, name: str, total: Tensor, pending: Pending, divisor: float) -> Tensor:
        if pending.remembered:
            total = self._memory.receive(name, total, self.size, partial(self._generator, name, AFTER, total.device))
        return total.div_(as_divisor(divisor, total))

    def _drop(self) -> None:
        if self._departed:
            self._give_up()
        super()._drop()
        if self._watch is not None:
            self._watch.give_up()
        self._here.clear()
        self._gone.clear()

    def _give_up(self) -> None:
        """Let the exchange that has begun fail, on all ranks.

        How many of its buckets have departed may differ between ranks, and what has departed cannot be called back:
        others' buckets of the next exchange would meet them. So all of them depart, and are waited for.
        """
        if any(map(_has_lost_horovod, self._departed)):  # which must not be asked for more
            for bucket in self._departed:
                bucket.arrival.cancel()
            wait(bucket.arrival for bucket in self._departed)
            self._departed.clear()
            return
        self.let_fail(RuntimeError("the exchange was given up"))
        if self._watch is not None:
            self._watch.begin()
        try:
            self._depart_rest(stamp(self._round, None), overflow=False)
            wait(bucket.arrival for bucket in self._departed)
        finally:
            self._departed.clear()
            if self._watch is not None:
                self._watch.end()

    # Departures. How many there are, and what is in them, depends on nothing but the tensors that were added.

    def _depart_early(self) -> None:
        """Send off what may go before :meth:`reduce`: all but the last bucket, in order."""
        while self._exchange is not None and len(self._departed) < len(self._buckets) - 1:
            place = len(self._departed)
            if not self._awaited[place] <= self._here:
                return
            self._depart(self._awaited[place], stamp(self._round, None))

    def _depart_rest(self, stamped: int, overflow: bool) -> None:
        while (place := len(self._departed)) < len(self._buckets) - 1:
            self._depart(self._awaited[place], stamp(self._round, None))
        if place < len(self._buckets):  # The last one takes along what was not awaited where it belongs.
            self._depart(self._here - self._gone, stamped, energy=self._energy(), overflow=overflow)

    def _depart(self, names: set[str], stamped: int, *, energy: float = 0.0, overflow: bool = False) -> None:
        assert self._exchange is not None, "open() comes first"
        waiting = sorted(names & self._waiting.keys(), key=self._ids.__getitem__)
        chosen, messages = waiting, self._compress_together(waiting)
        if not messages or names & self._messages.keys():
            self._messages.update(zip(waiting, messages, strict=False))
            chosen = sorted(names & self._messages.keys(), key=self._ids.__getitem__)
            messages = [self._messages.pop(name) for name in chosen]
        device = wire.device_of(messages)
        failure = None if self._failure is None else _story(self._failure)
        own = wire.Packet(stamped, [self._ids[name] for name in chosen], messages, energy, overflow, failure)
        trip = partial(_travel, self._exchange, len(self._departed), own, device, self._called)
        arrival = self._worker.submit(self._side_stream.after_now(device, trip))
        self._departed.append(_Departed(chosen, stamped, arrival))
        self._gone.update(chosen)

    # Arrivals

    def _arrive(self, departed: list[_Departed], failure: Exception | None) -> list[_Arrived]:
        """What has become of the buckets, if all of them are as they should be."""
        assert self._exchange is not None, "open() comes first"
        try:
            with self._ledger.timed("exchange"), self.alone():
                wait(bucket.arrival for bucket in departed)  # whatever becomes of the first of them
                arrived = [bucket.arrival.result() for bucket in departed]
        finally:
            if self._watch is not None:
                self._watch.end()
        library = self._exchange.library
        for bucket, arrival in zip(departed, arrived, strict=True):
            for name, share in zip(bucket.names, arrival.shares, strict=False):
                self._ledger.tensors[name].count(library, share)
            self._ledger.shared.count(library, arrival.sent - sum(arrival.shares))
            self._ledger.shared.node += arrival.within
        self._ledger.exchanges += 1
        for error in (failure, *(arrival.error for arrival in arrived)):
            if error is not None:
                raise error
        for bucket, arrival in zip(departed, arrived, strict=True):
            self._check(bucket, arrival.packets)
        return arrived

    def _check(self, bucket: _Departed, packets: list[wire.Packet]) -> None:
        by_rank = list(zip(self._called, packets, strict=True))
        failed = [f"rank {rank} failed: {packet.failure}" for rank, packet in by_rank if packet.failure is not None]
        if failed:
            raise PeerError("; ".join(failed))
        ids = [self._ids[name] for name in bucket.names]
        for rank, packet in by_rank:
            check_stamp(rank, packet.round, bucket.stamp)
            if [*packet.ids] != ids:
                different = {*packet.ids} ^ {*ids}
                which = ", ".join(name for name, id in self._ids.items() if id in different)
                raise RankMismatchError(f"rank {rank} and this rank do not send the same tensors: {which}")
            for name, numel in zip(bucket.names, packet.numels, strict=True):
                if numel != self._shapes[name].numel():
                    raise WireError(f"rank {rank} sent {numel} elements of {name!r}")

    def _conclude(self, pending: Mapping[str, Pending], departed: list[_Departed], arrived: list[_Arrived]) -> None:
        """What all ranks learn from an exchange alike."""
        self._round += 1
        kept = [0] * self.size
        for bucket, arrival in zip(departed, arrived, strict=True):
            compressed = [pending[name].compressed for name in bucket.names]
            for rank, packet in enumerate(arrival.packets):
                kept[rank] += sum(compress(packet.counts, compressed))
        energy = sum(packet.energy for packet in arrived[-1].packets) / self.size  # in rank order, as the sums
        self._schedule.advance(energy, max(kept))
        self._awaited = [{*names} & pending.keys() for names in self._buckets]


def _travel(
    exchange: Exchange | HorovodExchange, place: int, own: wire.Packet, device: torch.device, called: Sequence[int]
) -> _Arrived:
    """Send this rank's packet, and receive everyone's. In the exchange's thread."""
    sent_before, within_before = exchange.sent, exchange.within
    shares: list[int] = []
    packets: list[wire.Packet] = []
    error: Exception | None = None
    encoded: wire.Encoded | None = None
    try:
        if own.failure is None:
            encoded = wire.encode(
                own.messages, ids=own.ids, round=own.round, energy=own.energy, overflow=own.overflow
            )
            buffer, shares = encoded.data, encoded.shares
        else:
            buffer = wire.encode_failure(own.failure, round=own.round)
    except Exception as caught:
        error = caught
        buffer = wire.encode_failure(_story(caught), round=own.round)
    try:
        for rank, data in enumerate(exchange.allgatherv(buffer, place)):
            # Its own too: all ranks judge the same bytes.
            packets.append(_open(called[rank], data, device, encoded, is_own=rank == exchange.rank))
    except (WireError, OverflowError) as caught:  # what else goes wrong does so on this rank alone
        error = error or caught
    return _Arrived(shares, exchange.sent - sent_before, exchange.within - within_before, packets, error)


def _has_lost_horovod(bucket: _Departed) -> bool:
    return bucket.arrival.done() and isinstance(bucket.arrival.exception(), HorovodInternalError)


def _story(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _open(rank: int, data: Bytes, device: torch.device, sent: wire.Encoded | None, is_own: bool) -> wire.Packet:
    if is_own and sent is not None and sent.packet is not None and np.array_equal(data, sent.data):
        return sent.packet
    try:
        return wire.decode(data, device, likely=None if sent is None else sent.table)
    except WireError as error:
        raise WireError(f"from rank {rank}: {error}") from None


def _overflow(called: Sequence[int], departed: list[_Departed], arrived: list[_Arrived]) -> Overflow:
    """Which ranks' messages about which tensors hold inf or NaN, and which ranks have met some elsewhere."""
    packets = [
        (rank, bucket.names, packet)
        for bucket, arrival in zip(departed, arrived, strict=True)
        for rank, packet in zip(called, arrival.packets, strict=True)
    ]
    elsewhere = [(rank, "a tensor that is not compressed") for rank, _, packet in packets if packet.overflow]
    if all_finite([floats for _, _, packet in packets for floats in packet.floats]):
        return elsewhere
    return elsewhere + [
        (rank, name)
        for rank, names, packet in packets
        for name, message in zip(names, packet.messages, strict=True)
        if not bool(message.is_finite())
    ]
