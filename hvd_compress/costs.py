"""What an exchange costs, in closed form: an α–β model of links, and time by element and by packet for the processor.

All ranks of a node share one network card, full duplex; within the node each rank copies at the node's bandwidth. The
volumes are those of the algorithms that Open MPI uses: pairwise messages for alltoall, neighbour exchange, Bruck's
algorithm or a ring, by the number of ranks, for allgather, and a ring for a dense allreduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

NEIGHBOURS_BELOW, BRUCK_BELOW = 8, 16
"""Ranks below which Open MPI gathers large buffers by neighbour exchange and by Bruck's algorithm; else in a ring."""


@dataclass(frozen=True)
class Link:
    """A way from one rank to another."""

    latency: float  # α, seconds for an empty message
    bandwidth: float  # 1/β, bytes per second: of a node's card, or of one rank's copies within a node


@dataclass(frozen=True)
class Cluster:
    """Nodes with equally many ranks."""

    nodes: int
    ranks_per_node: int
    between: Link
    within: Link

    @property
    def ranks(self) -> int:
        """In all."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Work:
    """What each rank has to send, and how fast it computes."""

    elements: int
    dense: float  # bytes of all elements, as they are summed within a node
    message: float  # bytes of a rank's message about all elements
    union: float = 1.0  # elements of a reduce-scattered sum, as a multiple of ``kept``: up to R where ranks differ
    select: float = 0.0  # seconds for each element to choose the message's
    pack: float = 0.0  # seconds to pack a message
    open: float = 0.0  # seconds to open a message and add it up
    packet: float = 0.0  # seconds to pack and open a packet with nothing in it


@dataclass(frozen=True)
class Cost:
    """Of one exchange."""

    between: float  # bytes that one node's card sends
    within: float  # bytes that one rank sends to ranks of its node
    seconds: float


def allgather(cluster: Cluster, work: Work) -> Cost:
    """Every rank receives every other rank's message."""
    ranks = cluster.ranks
    volume, latency = _gather(cluster, work.message)
    seconds = _on(cluster, volume, latency)
    return Cost(volume, 0.0, work.elements * work.select + work.pack + seconds + ranks * work.open)


def hierarchical(cluster: Cluster, work: Work) -> Cost:
    """Dense within a node, shard by shard between nodes."""
    shards = cluster.ranks_per_node
    shard = replace(
        work,
        elements=work.elements // shards,
        message=work.message / shards,
        pack=work.pack / shards,
        open=work.open / shards,
    )
    one_rank_each = replace(cluster, ranks_per_node=1)
    across = allgather(one_rank_each, shard)
    # The card is shared by the owners of all shards.
    more = (shards - 1) * across.between / cluster.between.bandwidth
    inside = 2 * work.dense * (shards - 1) / shards
    dense = inside / cluster.within.bandwidth + 4 * (shards - 1) * cluster.within.latency
    return Cost(shards * across.between, inside, across.seconds + more + dense)


def reduce_scatter(cluster: Cluster, work: Work) -> Cost:
    """Each rank sums a region; the sum has ``union`` times as many elements as a message."""
    ranks, remote = cluster.ranks, cluster.ranks - cluster.ranks_per_node
    scattered = cluster.ranks_per_node * work.message * remote / ranks
    gathered, latency = _gather(cluster, work.message * work.union / ranks)
    rounds = 2 * math.log2(max(ranks, 2)) * cluster.between.latency + (ranks - 1) * cluster.between.latency / 4
    seconds = _on(cluster, scattered + gathered, rounds + latency)
    packing = work.pack * (1 + work.union / ranks) + work.open * (1 + work.union) + 2 * ranks * work.packet
    return Cost(scattered + gathered, 0.0, work.elements * work.select + packing + seconds)


def dense(cluster: Cluster, work: Work, itemsize: float = 4) -> Cost:
    """A ring allreduce over all ranks in the order of nodes, of elements of ``itemsize`` bytes."""
    ranks, size = cluster.ranks, work.elements * itemsize
    volume = 0.0 if cluster.nodes == 1 else 2 * size * (ranks - 1) / ranks
    inside = 2 * size * (ranks - 1) / ranks if cluster.ranks_per_node > 1 else 0.0
    latency = 2 * math.ceil(math.log2(max(ranks, 2))) * cluster.between.latency  # trees have it, for the same volume
    slowest = max(volume / cluster.between.bandwidth, inside / cluster.within.bandwidth)
    return Cost(volume, inside, slowest + latency)


EXCHANGES = {"allgather": allgather, "hierarchical": hierarchical, "reduce_scatter": reduce_scatter}


def _on(cluster: Cluster, volume: float, latency: float) -> float:
    return volume / cluster.between.bandwidth + latency if cluster.nodes > 1 else 0.0


def _gather(cluster: Cluster, buffer: float) -> tuple[float, float]:
    """Bytes that a node's card sends in an allgather of ``buffer`` bytes from each rank, and its latency."""
    ranks, local = cluster.ranks, cluster.ranks_per_node
    if cluster.nodes == 1:
        return 0.0, 0.0
    if ranks < NEIGHBOURS_BELOW and local % 2 == 0:
        # A rank exchanges two blocks with its left and its right neighbour in turn; every other time it is local.
        return 4 * math.ceil((ranks // 2 - 1) / 2) * buffer, ranks / 2 * cluster.between.latency
    if ranks < NEIGHBOURS_BELOW or ranks >= BRUCK_BELOW:
        return (ranks - 1) * buffer, (ranks - 1) * cluster.between.latency
    volume, distance = 0.0, 1
    while distance < ranks:
        blocks = min(distance, ranks - distance)
        volume += min(distance, local) * blocks * buffer
        distance *= 2
    return volume, math.ceil(math.log2(ranks)) * cluster.between.latency
