"""Buffers of different lengths between ranks."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

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
    """

    library = "mpi"

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self._communicator = communicator
        self.rank: int = communicator.Get_rank()
        self.size: int = communicator.Get_size()
        self._cards_are_shared = _cards_are_shared(communicator)
        # State
        self.sent = 0  # bytes of all send buffers handed to MPI so far
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
        gathered = np.empty(int(lengths.sum()), np.uint8)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        where = [gathered, lengths, starts, MPI.BYTE]
        if self._cards_are_shared:
            # Open MPI's nonblocking gather sends each message to each rank by itself. Its blocking ones send several
            # times fewer bytes over a card that ranks share, but hold a core: so only once all ranks are there.
            _wait(self._communicator.Ibarrier())
            self._communicator.Allgatherv(buffer, where)
        else:
            _wait(self._communicator.Iallgatherv(buffer, where))
        self.sent += buffer.nbytes
        return np.split(gathered, starts[1:])


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


def _cards_are_shared(communicator: MPI.Intracomm) -> bool:
    """Whether there are several nodes, some of them with several ranks. Collective."""
    node = communicator.Split_type(MPI.COMM_TYPE_SHARED)
    largest = communicator.allreduce(node.Get_size(), MPI.MAX)
    node.Free()
    return 1 < largest < communicator.Get_size()


def _wait(request: MPI.Request) -> None:
    """Without holding a core, or Python's lock, that the computation could use."""
    looks, pause = 0, _SHORTEST
    while not request.Test():
        looks += 1
        if looks > _IMPATIENT_LOOKS:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
