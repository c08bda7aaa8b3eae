"""Dense sums among the ranks of one node, in rank order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

Vector = npt.NDArray[Any]  # one-dimensional, float32 or float64
Parts = Sequence[Sequence[Vector]]  # for each of the first ranks, the vectors that it owns

_STAGED = 1 << 22  # elements that are on their way at a time, for all owners together


class Node:
    """Sums vectors over the ranks of a communicator that nobody else uses, each at its owner, and hands them back.

    The first ranks each own some of the vectors. All are summed in rank order, so that the result does not depend on
    which algorithm MPI would choose; buffers in between are small, however long the vectors are.
    """

    def __init__(self, communicator: MPI.Intracomm, staged: int = _STAGED) -> None:
        self._communicator = communicator
        self.rank: int = communicator.Get_rank()
        self.size: int = communicator.Get_size()
        self._staged = staged
        # State
        self.sent = 0  # bytes of all send buffers handed to MPI so far

    def sum_at_owners(self, parts: Parts) -> None:
        """``parts[self.rank]`` becomes the sum over ranks, in place. Collective.

        Args:
            parts: of the same lengths and one dtype on all ranks; nothing is handed to MPI for an own part.
        """
        for ranges, dtype in self._rounds(parts):
            lengths = [stop - start for start, stop in ranges]
            counts = [0 if owner == self.rank else n for owner, n in enumerate(lengths)]
            counts += [0] * (self.size - len(parts))
            outgoing = np.empty(sum(counts), dtype)
            starts = _starts(counts)
            for owner, (start, stop) in enumerate(ranges):
                if owner != self.rank:
                    _read(parts[owner], start, stop, outgoing[starts[owner] :])
            mine = lengths[self.rank] if self.rank < len(parts) else 0
            rows = np.empty((self.size, mine), dtype)
            expected = [0 if r == self.rank else mine for r in range(self.size)]
            places = [r * mine for r in range(self.size)]
            self._communicator.Alltoallv([outgoing, (counts, starts)], [rows.reshape(-1), (expected, places)])
            self.sent += outgoing.nbytes
            if mine:
                start, stop = ranges[self.rank]
                _read(parts[self.rank], start, stop, rows[self.rank])
                with np.errstate(all="ignore"):  # inf and NaN are the caller's affair
                    for row in rows[1:]:
                        rows[0] += row
                _write(parts[self.rank], start, stop, rows[0])

    def share(self, parts: Parts) -> None:
        """``parts[owner]`` becomes what it is on its owner, in place. Collective; see :meth:`sum_at_owners`."""
        for ranges, dtype in self._rounds(parts):
            counts = [stop - start for start, stop in ranges] + [0] * (self.size - len(parts))
            starts = _starts(counts)
            gathered = np.empty(sum(counts), dtype)
            outgoing = np.empty(counts[self.rank], dtype)
            if len(outgoing):
                _read(parts[self.rank], *ranges[self.rank], outgoing)
            self._communicator.Allgatherv(outgoing, [gathered, (counts, starts)])
            self.sent += outgoing.nbytes
            for owner, (start, stop) in enumerate(ranges):
                if owner != self.rank:
                    _write(parts[owner], start, stop, gathered[starts[owner] :])

    def _rounds(self, parts: Parts) -> Iterator[tuple[list[tuple[int, int]], np.dtype]]:
        """For each owner the elements that go in this round; the same on all ranks."""
        dtype = next((v.dtype for vectors in parts for v in vectors), None)
        if self.size == 1 or dtype is None:
            return
        lengths = [sum(map(len, vectors)) for vectors in parts]
        step = max(1, self._staged // len(parts))
        for start in range(0, max(lengths), step):
            yield [(min(start, n), min(start + step, n)) for n in lengths], dtype


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts)[:-1].tolist()]


def _overlaps(vectors: Sequence[Vector], start: int, stop: int) -> Iterator[tuple[Vector, int]]:
    """Pieces of the vectors that cover [start, stop) of their concatenation, and where each begins from start on."""
    offset = 0
    for vector in vectors:
        low, high = max(start, offset), min(stop, offset + len(vector))
        if low < high:
            yield vector[low - offset : high - offset], low - start
        offset += len(vector)


def _read(vectors: Sequence[Vector], start: int, stop: int, into: Vector) -> None:
    for piece, place in _overlaps(vectors, start, stop):
        into[place : place + len(piece)] = piece


def _write(vectors: Sequence[Vector], start: int, stop: int, source: Vector) -> None:
    for piece, place in _overlaps(vectors, start, stop):
        piece[:] = source[place : place + len(piece)]
