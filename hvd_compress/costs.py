"""What an exchange costs, in closed form: an α–β model of links, and time by element and by packet for the processor.

All ranks of a node share one network card, full duplex; within the node each rank copies at the node's bandwidth.
Messages for alltoall go from rank to rank; an allgather brings each to each other node once, where it is passed on
(:class:`hvd_compress.exchange.Exchange`); a dense allreduce is a ring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

TRAFFIC = 1.25  # messages that a rank sends to other nodes in a reduce-scatter, or more where the sum needs more


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
    between, within, seconds = _gather(cluster, work.message)
    computing = work.elements * work.select + work.pack + cluster.ranks * work.open
    return Cost(between, within, computing + seconds)


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
    ranks, local = cluster.ranks, cluster.ranks_per_node
    scattered, kept = local * work.message * (ranks - local) / ranks, work.message * (local - 1) / ranks
    gathered, passed_on, seconds = _gather(cluster, work.message * work.union / ranks)
    if cluster.nodes > 1:
        rounds = 2 * math.log2(ranks) + (ranks - 1) / 4
        seconds += scattered / cluster.between.bandwidth + rounds * cluster.between.latency
    seconds += kept / cluster.within.bandwidth
    packing = work.pack * (1 + work.union / ranks) + work.open * (1 + work.union) + 2 * ranks * work.packet
    return Cost(scattered + gathered, kept + passed_on, work.elements * work.select + packing + seconds)


def dense(cluster: Cluster, work: Work, itemsize: float = 4) -> Cost:
    """A ring allreduce over all ranks in the order of nodes, of elements of ``itemsize`` bytes."""
    ranks, size = cluster.ranks, work.elements * itemsize
    volume = 0.0 if cluster.nodes == 1 else 2 * size * (ranks - 1) / ranks
    inside = 2 * size * (ranks - 1) / ranks if cluster.ranks_per_node > 1 else 0.0
    latency = 2 * math.ceil(math.log2(max(ranks, 2))) * cluster.between.latency  # trees have it, for the same volume
    slowest = max(volume / cluster.between.bandwidth, inside / cluster.within.bandwidth)
    return Cost(volume, inside, slowest + latency)


def room(ranks: int, nodes: int) -> float:
    """How many elements a reduce-scattered sum may have, as a multiple of what one rank has selected; at least 1.

    As many as let a rank send :data:`TRAFFIC` messages to other nodes in all: L of R ranks being on a node, it is
    (R − L)/R of one to the owners of regions, and (R − L)/R · ``room``/L for its own region of the sum. A sum of one
    message's elements alone makes it (1 + 1/L) · (R − L)/R, that is 1 on two nodes with a rank each, 1.75 on eight,
    and 0.63 on two nodes with four ranks each. With what is free there, less of the sum is left out.

    Args:
        ranks: in all, R.
        nodes: that they are on. Those of a single node are taken for one node each.
    """
    nodes = nodes if nodes > 1 else ranks
    if nodes == 1:
        return 1.0
    return max(1.0, ranks / nodes * (TRAFFIC * nodes / (nodes - 1) - 1))


EXCHANGES = {"allgather": allgather, "hierarchical": hierarchical, "reduce_scatter": reduce_scatter}


def _gather(cluster: Cluster, buffer: float) -> tuple[float, float, float]:
    """Of an allgather of ``buffer`` bytes from each rank: see :class:`Cost`."""
    others, neighbours = cluster.nodes - 1, cluster.ranks_per_node - 1
    between = cluster.ranks_per_node * others * buffer
    within = neighbours * cluster.nodes * buffer
    latency = others * cluster.between.latency + neighbours * cluster.within.latency
    return between, within, between / cluster.between.bandwidth + within / cluster.within.bandwidth + latency
