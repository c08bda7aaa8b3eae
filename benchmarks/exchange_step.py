"""Bytes over the network card and seconds for one exchange of gradients, by exchange; what scale.py runs in a lab.

The first rank prints one line of JSON. Run it with benchmarks/lab.py, or with any mpirun on machines whose network
card is given with --card.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from mpi4py import MPI
from tensors import resnet50_shapes

from hvd_compress import Compression, Ledger
from hvd_compress.exchanges import reducer
from hvd_compress.operators import Operator

EXCHANGES = ("allgather", "hierarchical", "reduce_scatter")
WORLD = MPI.COMM_WORLD


class Card:
    """This node's network card, as the kernel counts."""

    def __init__(self, name: str) -> None:
        self._counters = [Path(f"/sys/class/net/{name}/statistics/{way}_bytes") for way in ("tx", "rx")]
        node = WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        self._is_first = node.Get_rank() == 0
        self.nodes: int = WORLD.allreduce(int(self._is_first))

    def sent_by_nodes(self, steps: int, work: Callable[[], object]) -> float:
        """Bytes that a node sends for one ``work``, on average over nodes."""
        before = self._read()
        for _ in range(steps):
            work()
        return (self._read() - before) / steps / self.nodes

    def _read(self) -> int:
        WORLD.Barrier()
        time.sleep(0.05)  # for what is still in the kernel's queues
        sent = int(self._counters[0].read_text()) if self._is_first else 0
        return WORLD.allreduce(sent)


def gradients(shapes: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """One for each rank: what they have in common, and as much noise of their own."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + WORLD.Get_rank())
    return {
        str(i): torch.randn(shape, generator=common) + torch.randn(shape, generator=own)
        for i, shape in enumerate(shapes)
    }


def compressed(
    exchange: str, ratio: float, mine: dict[str, torch.Tensor]
) -> tuple[Callable[[], Mapping[str, torch.Tensor]], Ledger]:
    """What exchanges ``mine`` once, and its ledger."""
    settings = Compression.topk(ratio=ratio, exchange=exchange).settings
    ledger = Ledger()
    one = reducer(settings, {name: torch.nn.Parameter(t) for name, t in mine.items()}, ledger)
    one.open(WORLD, range(WORLD.Get_size()), "benchmark", 120)

    def step() -> Mapping[str, torch.Tensor]:
        for name, tensor in reversed(mine.items()):  # as a backward pass makes them
            one.add(name, tensor.clone())
        return one.reduce().sums

    return step, ledger


def elements_of_a_message(mine: dict[str, torch.Tensor], ratio: float) -> int:
    """How many elements one rank's messages have."""
    settings = Compression.topk(ratio=ratio).settings
    assert isinstance(settings.operator, Operator)
    large = [t.flatten() for t in mine.values() if t.numel() >= settings.dense_below]
    small = sum(t.numel() for t in mine.values()) - sum(map(len, large))
    return small + sum(len(settings.operator.encode(t).values) for t in large)


def horovod(compression: str, mine: dict[str, torch.Tensor]) -> Callable[[], None]:
    """The same by Horovod."""
    chosen = getattr(hvd.Compression, compression)

    def step() -> None:
        hvd.grouped_allreduce([t.clone() for t in mine.values()], name=compression, compression=chosen)

    return step


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="One exchange of ResNet-50's gradients, by exchange.")
    parser.add_argument("--ratio", type=float, default=0.01, help="of the elements (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="whose bytes are counted (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=0, help="of one step each that are timed (default: %(default)s)"
    )
    parser.add_argument("--elements", type=int, help="take the first tensors with so many (default: all)")
    parser.add_argument("--card", default="eth0", help="network card (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes, total = [], 0
    for shape in resnet50_shapes():
        if args.elements is None or total + torch.Size(shape).numel() <= args.elements:
            shapes.append(shape)
            total += torch.Size(shape).numel()
    mine = gradients(shapes)
    card = Card(args.card)
    steps: dict[str, Callable[[], Any]] = {}
    sent, handed, within = {}, {}, {}
    for exchange in EXCHANGES:
        step, ledger = compressed(exchange, args.ratio, mine)
        step()
        ledger.reset()
        sent[exchange] = card.sent_by_nodes(args.steps, step)
        mean = [WORLD.allreduce(n) / WORLD.Get_size() / args.steps for n in (ledger.total.mpi, ledger.total.node)]
        handed[exchange], within[exchange] = mean
        steps[exchange] = step
    summed = sum(int(torch.count_nonzero(total)) for total in steps["reduce_scatter"]().values())
    seconds: dict[str, list[float]] = {}
    if args.rounds:
        os.environ.setdefault("HOROVOD_CACHE_CAPACITY", "8192")
        hvd.init()
        for compression in ("none", "fp16"):
            steps[f"Horovod, {compression}"] = horovod(compression, mine)
            steps[f"Horovod, {compression}"]()
            sent[f"Horovod, {compression}"] = card.sent_by_nodes(1, steps[f"Horovod, {compression}"])
    for _ in range(args.rounds):
        for name, step in steps.items():
            WORLD.Barrier()
            start = time.perf_counter()
            step()
            WORLD.Barrier()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    if WORLD.Get_rank() == 0:
        result = {
            "nodes": card.nodes,
            "ranks": WORLD.Get_size(),
            "elements": total,
            "union": summed / elements_of_a_message(mine, args.ratio),
            "bytes per node": sent,
            "bytes handed over per rank": handed,
            "bytes within the node per rank": within,
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
