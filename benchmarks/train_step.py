"""Seconds for a training step of ResNet-50, by method of exchange; what slow_link.py runs at each rate.

mpirun -np 2 python benchmarks/train_step.py --steps 8
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torchvision.models import resnet50

from hvd_compress import Compression, QsparseLocalSGD

METHODS: dict[str, Callable[[Any, torch.optim.Optimizer], Any]] = {
    "compute only": lambda model, inner: inner,
    "Horovod, fp32": lambda model, inner: distributed(model, inner, Compression.none),
    "Horovod, fp16": lambda model, inner: distributed(model, inner, Compression.fp16),
    "Top_k 1 %": lambda model, inner: distributed(model, inner, Compression.topk(ratio=0.01, **names(model))),
    "4-bit QTop_k 1 %": lambda model, inner: distributed(model, inner, Compression.qtopk(ratio=0.01, **names(model))),
    "Qsparse-local-SGD, Top_k 1 %, H = 8": lambda model, inner: QsparseLocalSGD(
        inner, **names(model), compression=Compression.topk(ratio=0.01), sync_every=8
    ),
}
DENSE = ("Horovod, fp32", "Horovod, fp16")
DENSE_ROUNDS = 2  # a step takes seconds where links are slow


def names(model: torch.nn.Module) -> dict[str, Any]:
    """For what wants to know the parameters."""
    return {"named_parameters": model.named_parameters()}


def distributed(model: torch.nn.Module, inner: torch.optim.Optimizer, compression: Any) -> Any:
    """Horovod's own optimizer."""
    return hvd.DistributedOptimizer(inner, **names(model), compression=compression)


def main() -> None:
    """Measure each method; rank 0 prints one line of JSON, seconds for a step by method."""
    parser = argparse.ArgumentParser(description="Seconds for a training step of ResNet-50, by method of exchange.")
    parser.add_argument("--steps", type=int, default=8, help="of each method in a round (default: %(default)s)")
    parser.add_argument("--dense-steps", type=int, default=None, help="of plain Horovod; as --steps if not given")
    parser.add_argument(
        "--rounds",
        type=int,
        default=6,
        help="in turn with the others; plain Horovod takes part in two (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images of each rank (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="of an image's side (default: %(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("HOROVOD_CACHE_CAPACITY", "8192")  # several models' tensors: Horovod warns of less
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(hvd.rank())
    images, labels = torch.randn(args.batch_size, 3, args.size, args.size), torch.randint(0, 1000, (args.batch_size,))

    def step(model: torch.nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    runs: dict[str, tuple[torch.nn.Module, Any]] = {}
    for name, wrap in METHODS.items():
        torch.manual_seed(0)
        model = resnet50()
        model.train()
        # Horovod tells operations apart by their names, and there are several models.
        prefixed = torch.nn.ModuleDict({str(len(runs)): model})
        optimizer = wrap(prefixed, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
        # Meets the other ranks, makes buffers. Under local SGD whole rounds, after which lengths can be foretold.
        for _ in range(2 * args.steps if isinstance(optimizer, QsparseLocalSGD) else 1):
            step(model, optimizer)
        runs[name] = (model, optimizer)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds):
        for name, (model, optimizer) in runs.items():
            if name in DENSE and number >= DENSE_ROUNDS:
                continue
            steps = args.dense_steps or args.steps if name in DENSE else args.steps
            hvd.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                step(model, optimizer)
            hvd.barrier()
            seconds[name].append((time.perf_counter() - start) / steps)
    if hvd.rank() == 0:
        print(json.dumps({name: statistics.median(values) for name, values in seconds.items()}))


if __name__ == "__main__":
    main()
