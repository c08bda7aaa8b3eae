"""A buffer of its own for each other rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from .gather import LIMIT, Bytes, Exchange


class Scatter(Exchange):
    """An :class:`Exchange` in which ranks also send each other different buffers, and add up counts."""

    def sum(self, numbers: np.ndarray) -> np.ndarray:
        """The sum over ranks of int64 ``[n]``. Collective."""
        total = np.empty_like(numbers)
        self._communicator.Allreduce(numbers, total)
        self.sent += numbers.nbytes
        return total

    @staticmethod
    def check(buffers: Sequence[Bytes]) -> None:
        """Raise OverflowError if one is longer than MPI carries; before :meth:`alltoall`, so that others are told."""
        for rank, buffer in enumerate(buffers):
            if buffer.nbytes > LIMIT:
                raise OverflowError(f"the message to rank {rank} has {buffer.nbytes} bytes, MPI carries {LIMIT}")

    def stays_within(self, rank: int) -> bool:
        """Whether what :meth:`alltoall` brings to ``rank`` stays within this rank's node, and is counted so.

        Where all ranks are on one node, their messages count as on a network of several: nothing is spared.
        """
        return self.nodes > 1 and bool(self._neighbours[rank])

    def alltoall(self, buffers: Sequence[Bytes]) -> list[Bytes]:
        """What each rank has for this one, in rank order, given what this one has for each. Collective.

        A buffer for oneself is handed back as it is. The others are those that :meth:`check` lets pass.
        """
        lengths = np.array([buffer.nbytes for buffer in buffers], np.int64)
        expected = np.empty_like(lengths)
        self._communicator.Alltoall(lengths, expected)
        received = [np.empty(length, np.uint8) for length in expected]
        received[self.rank] = buffers[self.rank]
        others = [(self.rank + shift) % self.size for shift in range(1, self.size)]  # not all to rank 0 first
        requests = [self._communicator.Irecv([received[r], MPI.BYTE], source=r) for r in reversed(others)]
        requests += [self._communicator.Isend([buffers[r], MPI.BYTE], dest=r) for r in others]
        MPI.Request.Waitall(requests)
        within = sum(int(lengths[rank]) for rank in others if self.stays_within(rank))
        self.within += within
        self.sent += lengths.nbytes + int(lengths.sum() - lengths[self.rank]) - within
        return received
