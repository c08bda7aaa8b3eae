"""Buffers of different lengths between ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

Bytes = npt.NDArray[np.uint8]

LIMIT = 2**31 - 1  # MPI counts and displacements are C ints before MPI 4


class Exchange:
    """All-to-all exchange of one buffer per rank over an mpi4py communicator that nobody else uses."""

    library = "mpi"

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self._communicator = communicator
        self.rank: int = communicator.Get_rank()
        self.size: int = communicator.Get_size()
        # State
        self.sent = 0  # bytes of all send buffers handed to MPI so far

    def allgatherv(self, buffer: Bytes) -> list[Bytes]:
        """Every rank's ``buffer`` in rank order, this rank's own among them. Collective.

        Raises:
            OverflowError: the buffers of all ranks together have more than 2^31 − 1 bytes; on every rank.
        """
        lengths = np.empty(self.size, np.int64)
        length = np.array([buffer.nbytes], np.int64)
        self._communicator.Allgather(length, lengths)
        self.sent += length.nbytes
        total = int(lengths.sum())
        if total > LIMIT:
            raise OverflowError(
                f"the messages of {self.size} ranks add up to {total} bytes, one exchange carries {LIMIT}: "
                "choose a smaller ratio or k"
            )
        gathered = np.empty(total, np.uint8)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self._communicator.Allgatherv(buffer, [gathered, lengths, starts, MPI.BYTE])
        self.sent += buffer.nbytes
        return np.split(gathered, starts[1:])
