"""Messages from each rank to each other, without MPI's collectives."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from .gather import Bytes, Exchange, Lengths

_PAUSE = 5e-5  # seconds between two looks


class Direct(Exchange):
    """An :class:`Exchange` among few ranks, for a thread beside that of another one.

    Two threads of a process that have nonblocking collectives under way at once, on whatever communicators, made Open
    MPI 5.0.11 lose one of them, once in some thousand on a busy machine. Single messages can be waited for anywhere.
    """

    def _gather(self, buffer: Bytes, lengths: Lengths) -> list[Bytes]:
        parts = [np.empty(length, np.uint8) for length in lengths]
        parts[self.rank][:] = buffer
        self.sent += swap(self._communicator, [buffer] * self.size, parts)
        return parts


def swap(communicator: MPI.Intracomm, outgoing: Sequence[npt.NDArray], incoming: Sequence[npt.NDArray]) -> int:
    """Send each other rank its buffer and receive one from it; of empty ones neither. Collective.

    Returns:
        The bytes that were handed to MPI.
    """
    rank, size = communicator.Get_rank(), communicator.Get_size()
    others = [(rank + shift) % size for shift in range(1, size)]  # not all to rank 0 first
    requests = [communicator.Irecv(incoming[other], source=other) for other in others if incoming[other].size]
    requests += [communicator.Isend(outgoing[other], dest=other) for other in others if outgoing[other].size]
    while requests := [request for request in requests if not request.Test()]:
        time.sleep(_PAUSE)
    return sum(outgoing[other].nbytes for other in others)
