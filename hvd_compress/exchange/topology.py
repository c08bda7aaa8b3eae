"""Which ranks share a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI


@dataclass(frozen=True)
class Topology:
    """The nodes of a communicator's ranks."""

    nodes: tuple[tuple[int, ...], ...]  # ranks of each node, ascending; nodes in the order of their first ranks

    @property
    def shards(self) -> int:
        """Into how many parts a node can divide work so that every node has a rank for each."""
        return min(map(len, self.nodes))

    def place(self, rank: int) -> tuple[int, int]:
        """The number of a rank's node, and the rank's number there."""
        return next((n, ranks.index(rank)) for n, ranks in enumerate(self.nodes) if rank in ranks)

    def __str__(self) -> str:
        sizes = sorted({len(ranks) for ranks in self.nodes})
        return f"{len(self.nodes)} node(s) of {' or '.join(map(str, sizes))} rank(s)"


def labels_of(nodes: Sequence[int] | None, ranks: Sequence[int]) -> list[int] | None:
    """The entries of ``nodes``, which has one for each of Horovod's ranks, for some of them.

    Raises:
        ValueError: there are too few.
    """
    if nodes is not None and len(nodes) <= max(ranks):
        raise ValueError(f"nodes=… says where {len(nodes)} ranks are, there are {max(ranks) + 1} or more")
    return None if nodes is None else [nodes[rank] for rank in ranks]


def topology(communicator: MPI.Intracomm, nodes: Sequence[int] | None = None) -> tuple[Topology, int]:
    """Which ranks of ``communicator`` share a node. Collective.

    Args:
        communicator: of all ranks.
        nodes: a number for each rank's node, equal for those on one node; None to ask MPI which ranks share memory.

    Returns:
        The topology, the same on every rank, and the bytes that were handed to MPI.
    """
    if nodes is not None:
        return Topology(_grouped(list(nodes))), 0
    together = communicator.Split_type(MPI.COMM_TYPE_SHARED, key=communicator.Get_rank())
    first = np.array([communicator.Get_rank()], np.int64)
    together.Bcast(first, root=0)
    together.Free()
    firsts = np.empty(communicator.Get_size(), np.int64)
    communicator.Allgather(first, firsts)
    return Topology(_grouped(firsts.tolist())), 2 * first.nbytes


def _grouped(labels: list[int]) -> tuple[tuple[int, ...], ...]:
    nodes: dict[int, list[int]] = {}
    for rank, label in enumerate(labels):
        nodes.setdefault(label, []).append(rank)
    return tuple(tuple(ranks) for ranks in nodes.values())
