"""From measurements to advice: arithmetic only.

With R ranks, B bytes of gradients and messages of m bytes, a step takes

- with Horovod, ``compute + e − overlap · min(e, backward pass)``, where e of a ring allreduce is
  ``2 (R − 1) (latency + B / (R bandwidth))``. Overlap is 1 where the backward pass hides all that it can, and less
  where processors have both to do.
- compressed, ``compute + (compress + R decompress + (R − 1) m / bandwidth) / H``: each rank receives the messages of
  all others, so that the cost grows with R, and nothing is hidden.

Latency and bandwidth are those that were measured, of each kind of exchange by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
PERIODS = (2, 4, 8, 16)
BACKWARD = 2 / 3
"""Part of a step's computing that is the backward pass: a forward pass costs half of it."""
PAYS = 0.9
"""Compression pays if a step takes at most this part of the time: less is within what a forecast may be wrong by."""
NEAR = 1.05
"""Of those that are nearly as fast as the fastest, the one that changes the gradients least is advised."""


@dataclass(frozen=True)
class Candidate:
    """A way to send gradients, as it was measured between the ranks at hand. Seconds are of one exchange."""

    name: str
    how: str  # as one writes it
    message: int  # bytes that a rank sends
    compress: float  # memory, operator, packing
    decompress: float  # of one rank's message, and adding it up
    exchange: float
    dense: bool = False  # Horovod's own, as in the first of the formulas


@dataclass(frozen=True)
class Measurements:
    """What was found out, before anything is concluded."""

    model: str
    tensors: int
    elements: int
    compute: float  # seconds of a step without communication
    ranks: int
    nodes: int  # that they are on
    ranks_per_node: int  # on each; 1 if there is one node, whose ranks are taken for a node each
    bandwidth: float  # of Horovod's allreduce: bytes of gradients per second
    latency: float  # of one allreduce, seconds
    overlap: float  # from 0 to 1
    candidates: tuple[Candidate, ...]  # Horovod's own first; then those that change gradients least first


@dataclass(frozen=True)
class Advice:
    """A conclusion for one number of nodes."""

    nodes: int
    horovod: str  # the name of the fastest of Horovod's own
    horovod_seconds: float  # of a step
    best: str  # the name of the compressor that is advised if any is
    best_seconds: float
    pays: bool
    sync_every: int  # local steps that make communication a tenth of computing; 1 if it is less, or none are enough


def step_seconds(candidate: Candidate, found: Measurements, ranks: int, sync_every: int = 1) -> float:
    """How long a step takes, by the formulas above.

    Args:
        candidate: one of those measured.
        found: among what.
        ranks: 1 or more.
        sync_every: local steps for an exchange, H.
    """
    if ranks == 1:
        return found.compute
    there, here = ranks - 1, found.ranks - 1
    if candidate.dense:
        latency = candidate.exchange - candidate.message / found.bandwidth
        moved = candidate.message / found.bandwidth * (there / ranks) / (here / found.ranks)
        exchange = candidate.compress + max(0.0, latency) * there / here + moved
        hidden = found.overlap * min(exchange, BACKWARD * found.compute) if sync_every == 1 else 0.0
        return found.compute + (exchange - hidden) / sync_every
    cost = candidate.compress + ranks * candidate.decompress + candidate.exchange * there / here
    return found.compute + cost / sync_every


def advise(found: Measurements, nodes: Sequence[int] = NODES) -> list[Advice]:
    """For each number of nodes, with as many ranks on each as were measured."""
    return [_advise(found, number) for number in nodes]


def _advise(found: Measurements, nodes: int) -> Advice:
    ranks = nodes * found.ranks_per_node
    seconds = {c.name: step_seconds(c, found, ranks) for c in found.candidates}
    plain = min((c for c in found.candidates if c.dense), key=lambda c: seconds[c.name])
    others = [c for c in found.candidates if not c.dense]
    fastest = min(seconds[c.name] for c in others)
    best = next(c for c in others if seconds[c.name] <= NEAR * fastest)
    pays = seconds[best.name] <= PAYS * seconds[plain.name]
    enough = [h for h in PERIODS if step_seconds(best, found, ranks, h) <= 1.1 * found.compute]
    is_little = seconds[best.name] <= 1.1 * found.compute
    sync_every = 1 if is_little else enough[0] if enough else PERIODS[-1]
    return Advice(nodes, plain.name, seconds[plain.name], best.name, seconds[best.name], pays, sync_every)


def spans(advice: Sequence[Advice]) -> list[tuple[int, int]]:
    """The numbers of nodes, first and last of each row without a gap, for which compression pays."""
    found: list[tuple[int, int]] = []
    before = False
    for one in advice:
        if one.pays:
            found = [*found[:-1], (found[-1][0], one.nodes)] if before else [*found, (one.nodes, one.nodes)]
        before = one.pays
    return found
