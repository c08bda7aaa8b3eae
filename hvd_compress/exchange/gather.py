"""Buffers of different lengths between ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from .topology import Topology, topology

Bytes = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.int64]

LIMIT = 2**31 - 1  # MPI counts and displacements are C ints before MPI 4
_LENGTH_BYTES = 8  # in front of each buffer
_IMPATIENT_LOOKS = 20  # at a request before the first pause
_SHORTEST, _LONGEST = 5e-5, 1e-3  # pauses in seconds


class Exchange:
    """All-to-all exchange of one buffer per rank over an mpi4py communicator that nobody else uses.

    Exchanges are given a place each in a sequence that repeats, the buckets of a step say. What a rank sends in one
    place mostly has about the same length from one time to the next, so as many bytes as are to be expected
    travel together with the buffer's length, and only what is longer needs a second collective.

    Where ranks share a node's network card, each buffer crosses it once for each other node, rather than once for
    each rank there.

    Args:
        communicator: of the ranks. Collective over them.
        nodes: see :func:`hvd_compress.exchange.topology`.
    """

    library = "mpi"

    def __init__(self, communicator: MPI.Intracomm, nodes: Sequence[int] | None = None) -> None:
        self._communicator = communicator
        self.rank: int = communicator.Get_rank()
        self.size: int = communicator.Get_size()
        found, sent = topology(communicator, nodes)
        self.nodes = len(found.nodes)
        node, _ = found.place(self.rank)
        self._neighbours = np.array([r != self.rank and r in found.nodes[node] for r in range(self.size)])
        self._relays = _Relays(communicator, found) if 1 < len(found.nodes) < self.size else None
        # State
        self.sent = sent  # bytes of all send buffers handed to MPI so far, counted by the rank that they come from
        self.within = 0  # bytes that were handed on within the node, besides those
        self._forecasts: dict[int, _Forecast] = {}  # by place; the same on all ranks

    def allgatherv(self, buffer: Bytes, place: int = 0) -> list[Bytes]:
        """Every rank's ``buffer`` in rank order, this rank's own among them. Collective.

        Args:
            buffer: any length.
            place: which exchange of the sequence this is; the same on all ranks.

        Raises:
            OverflowError: the buffers of all ranks together have more than 2^31 − 1 bytes; on every rank.
        """
        forecast = self._forecasts.setdefault(place, _Forecast(self.size))
        expected = forecast.lengths
        first = np.zeros(_LENGTH_BYTES + int(expected[self.rank]), np.uint8)
        first[:_LENGTH_BYTES].view(np.int64)[0] = buffer.nbytes
        begin = min(buffer.nbytes, int(expected[self.rank]))
        first[_LENGTH_BYTES:][:begin] = buffer[:begin]
        parts = self._gather(first, _LENGTH_BYTES + expected)

        lengths = np.array([int(part[:_LENGTH_BYTES].view(np.int64)[0]) for part in parts])
        total = int(lengths.sum())
        if total + self.size * _LENGTH_BYTES > LIMIT:
            raise OverflowError(
                f"the messages of {self.size} ranks add up to {total} bytes, one exchange carries {LIMIT}: "
                "choose a smaller ratio or k"
            )
        forecast.learn(lengths)
        received = [p[_LENGTH_BYTES:][:length] for p, length in zip(parts, lengths, strict=True)]
        missing = np.maximum(lengths - expected, 0)
        if missing.any():
            rest = self._gather(buffer[begin:], missing)
            received = [
                np.concatenate(pair) if len(pair[1]) else pair[0] for pair in zip(received, rest, strict=True)
            ]
        return received

    def _gather(self, buffer: Bytes, lengths: Lengths) -> list[Bytes]:
        self.sent += buffer.nbytes
        if self._relays is None:
            return _cut(_gathered(self._communicator, buffer, lengths), lengths)
        parts, within = self._relays.gather(buffer, lengths)
        self.within += within
        return parts


class _Relays:
    """The way of buffers between ranks that share network cards.

    Of each node as many ranks are relays as every node has. The other ranks of a node hand their buffers to one of
    its relays. The relays with one number, one on each node, exchange what they have, and each passes on within its
    node what it has received.
    """

    def __init__(self, communicator: MPI.Intracomm, topology: Topology) -> None:
        width, nodes = topology.shards, len(topology.nodes)
        node, place = topology.place(communicator.Get_rank())
        number = place % width  # of the relay that this rank gives to
        givers = [ranks[n::width] for n in range(width) for ranks in topology.nodes]  # by number, then by node
        order = [rank for ranks in givers for rank in ranks]
        # Configuration
        self._shape = width, nodes
        self._number = number
        self._is_relay = place < width
        self._order = np.array(order)  # in which all buffers arrive
        self._arrival = np.argsort(order).tolist()  # of each rank's
        self._relay = np.repeat(np.arange(width * nodes), [*map(len, givers)])[self._arrival]  # of each rank
        self._givers = list(givers[number * nodes + node])  # to the same relay on this node, this rank among them
        all_are_relays = len(order) == width * nodes
        self._giving = None if all_are_relays else communicator.Split(node * width + number, place)
        self._across = communicator.Split(number if self._is_relay else MPI.UNDEFINED, node)
        self._within = communicator.Split(node, place)

    def gather(self, buffer: Bytes, lengths: Lengths) -> tuple[list[Bytes], int]:
        """Every rank's buffer in rank order, and the bytes that this rank has handed on within its node. Collective.

        Args:
            buffer: this rank's.
            lengths: of all ranks' buffers.
        """
        handed_on = 0
        if self._giving is not None:
            handed_on += buffer.nbytes
            buffer = _gathered(self._giving, buffer, lengths[self._givers])
        sums = np.bincount(self._relay, lengths).astype(np.int64).reshape(self._shape)  # of each relay's givers
        if self._is_relay:
            buffer = _gathered(self._across, buffer, sums[self._number])
            handed_on += buffer.nbytes
        else:
            buffer = buffer[:0]
        passed_on = np.zeros(self._within.Get_size(), np.int64)  # by the relays, which are the first of the node
        passed_on[: len(sums)] = sums.sum(axis=1)
        parts = _cut(_gathered(self._within, buffer, passed_on), lengths[self._order])
        return [parts[at] for at in self._arrival], handed_on


def _gathered(communicator: MPI.Comm, buffer: Bytes, lengths: Lengths) -> Bytes:
    """All ranks' buffers, one after the other."""
    gathered = np.empty(int(lengths.sum()), np.uint8)
    starts = np.cumsum(lengths) - lengths
    _wait(communicator.Iallgatherv(buffer, [gathered, lengths, starts, MPI.BYTE]))
    return gathered


def _cut(data: Bytes, lengths: Lengths) -> list[Bytes]:
    sizes = lengths.tolist()
    return [data[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


class _Forecast:
    """How many bytes each rank will send.

    As many as last time, give or take twice what their number has changed by of late. More where that is little, so
    that one collective is enough; less where it is much: a second collective carries the rest, and hardly a byte
    travels in vain.
    """

    def __init__(self, size: int) -> None:
        self.lengths = np.zeros(size, np.int64)
        self._last: Lengths | None = None
        self._spread = np.zeros(size, np.int64)  # the largest change of late

    def learn(self, lengths: Lengths) -> None:
        """These were sent."""
        if self._last is not None:
            self._spread = np.maximum(np.abs(lengths - self._last), self._spread * 7 // 8)
        self._last = lengths
        is_steady = self._spread <= lengths // 64
        self.lengths = np.maximum(np.where(is_steady, lengths + 2 * self._spread, lengths - 2 * self._spread), 0)
        if self.lengths.sum() + len(lengths) * _LENGTH_BYTES > LIMIT:
            self.lengths = np.zeros_like(lengths)


def _wait(request: MPI.Request) -> None:
    """Without holding a core, or Python's lock, that the computation could use."""
    looks, pause = 0, _SHORTEST
    while not request.Test():
        looks += 1
        if looks > _IMPATIENT_LOOKS:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
