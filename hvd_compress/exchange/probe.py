"""How fast the links are."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from .topology import Topology

_LARGE = 1 << 20  # bytes
_TIMES = 5

Measured = tuple[float, float]  # seconds for an empty message, bytes per second


def probe(
    communicator: MPI.Intracomm, topology: Topology, within: Callable[[], Measured]
) -> tuple[tuple[Measured, Measured], int]:
    """Latency and bandwidth between the first ranks of two nodes, and within a node. Collective; takes milliseconds.

    Args:
        communicator: of all ranks.
        topology: which of them share a node.
        within: measures in this rank's node, while all nodes do.

    Returns:
        The two, the slowest of any rank's, the same on every rank, and the bytes that this one has handed to MPI; a
        link that does not exist is infinitely fast.
    """
    rank = communicator.Get_rank()
    sent = 0
    between = (0.0, float("inf"))
    if len(topology.nodes) > 1:
        pair = [node[0] for node in topology.nodes[:2]]
        if rank in pair:
            between, sent = _ping_pong(communicator, pair)
    communicator.Barrier()
    mine = np.array([*between, *within()])
    table = np.empty((communicator.Get_size(), 4))
    communicator.Allgather(mine, table)
    slowest = (table[:, 0].max(), table[:, 1].min(), table[:, 2].max(), table[:, 3].min())
    return ((slowest[0], slowest[1]), (slowest[2], slowest[3])), sent + mine.nbytes


def union(communicator: MPI.Intracomm, mask: np.ndarray) -> tuple[int, int, int]:
    """How many places are true on any rank, how many on all ranks added up, and the bytes handed to MPI. Collective.

    Args:
        mask: bool ``[n]``, n a multiple of 8.
    """
    packed = np.packbits(mask)
    anywhere = np.empty_like(packed)
    communicator.Allreduce(packed, anywhere, op=MPI.BOR)
    count = np.array([mask.sum()], np.int64)
    total = np.empty_like(count)
    communicator.Allreduce(count, total)
    return int(np.unpackbits(anywhere).sum()), int(total[0]), packed.nbytes + count.nbytes


def _ping_pong(communicator: MPI.Intracomm, pair: list[int]) -> tuple[Measured, int]:
    rank = communicator.Get_rank()
    other = pair[1] if rank == pair[0] else pair[0]
    seconds = []
    sent = 0
    for buffer in (np.zeros(1, np.uint8), np.zeros(_LARGE, np.uint8)):
        best = float("inf")
        for _ in range(_TIMES):
            start = time.perf_counter()
            if rank == pair[0]:
                communicator.Send(buffer, dest=other)
                communicator.Recv(buffer, source=other)
            else:
                communicator.Recv(buffer, source=other)
                communicator.Send(buffer, dest=other)
            best = min(best, (time.perf_counter() - start) / 2)
            sent += buffer.nbytes
        seconds.append(best)
    return (seconds[0], _LARGE / max(seconds[1] - seconds[0], 1e-9)), sent
