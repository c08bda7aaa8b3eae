"""How much one slow rank slows down the others: synchronous against asynchronous Qsparse-local-SGD.

    mpirun -np 4 python benchmarks/straggler.py

A step's computation is a sleep, so that ranks do not compete for cores and the seconds are those of communication and
waiting. Each rank's speed is that of its own steps, until its last exchange and without the final meeting of all. It
is compared with its own speed alone, that is with the same steps and no exchange at all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import AsyncQsparseLocalSGD, Compression, QsparseLocalSGD


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    steps: int
    sync_every: int
    seconds: float  # a step's computation, on a rank of usual speed
    slowdown: float  # of the last rank
    elements: int  # of the model
    ratio: float
    max_staleness: int | None


def model_of(elements: int) -> torch.nn.ParameterList:
    """Eight tensors of one size."""
    return torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(elements // 8)) for _ in range(8)])


def alone(setting: Setting, model: torch.nn.Module, sgd: torch.optim.Optimizer) -> Any:
    """Local steps only."""
    return sgd


def synchronous(setting: Setting, model: torch.nn.Module, sgd: torch.optim.Optimizer) -> Any:
    """Algorithm 1."""
    compression = Compression.topk(ratio=setting.ratio)
    return QsparseLocalSGD(
        sgd, named_parameters=model.named_parameters(), compression=compression, sync_every=setting.sync_every
    )


def asynchronous(setting: Setting, model: torch.nn.Module, sgd: torch.optim.Optimizer) -> Any:
    """Algorithm 2 in real time."""
    return AsyncQsparseLocalSGD(
        sgd,
        named_parameters=model.named_parameters(),
        compression=Compression.topk(ratio=setting.ratio),
        sync_every=setting.sync_every,
        max_staleness=setting.max_staleness,
    )


def speeds(setting: Setting, make: Callable[..., Any], slowdown: float) -> list[float]:
    """Steps per second of each rank; the last rank's computation takes ``slowdown`` times as long."""
    model = model_of(setting.elements)
    optimizer = make(setting, model, torch.optim.SGD(model.parameters(), lr=0.1))
    seconds = setting.seconds * (slowdown if hvd.rank() == hvd.size() - 1 else 1)
    generator = torch.Generator().manual_seed(hvd.rank())
    gradient = torch.randn(setting.elements // 8, generator=generator)
    started = 0.0
    with optimizer if isinstance(optimizer, AsyncQsparseLocalSGD) else nullcontext():
        # A round first, in which the ranks meet.
        for step in range(-setting.sync_every, setting.steps):
            if step == 0:
                hvd.barrier()
                started = time.perf_counter()
            for p in model.parameters():
                p.grad = gradient
            if step >= 0:
                time.sleep(seconds)
            optimizer.step()
        taken = time.perf_counter() - started
    return [float(speed) for speed in hvd.allgather(torch.tensor([setting.steps / taken]), name="speeds")]


def compare(setting: Setting) -> dict[str, list[float]]:
    """Speeds of all ranks, by the name of what was measured. Collective."""
    return {
        "alone": speeds(setting, alone, setting.slowdown),
        "synchronous, equal ranks": speeds(setting, synchronous, 1),
        "synchronous, one slow": speeds(setting, synchronous, setting.slowdown),
        "asynchronous, equal ranks": speeds(setting, asynchronous, 1),
        "asynchronous, one slow": speeds(setting, asynchronous, setting.slowdown),
    }


def table(measured: dict[str, list[float]], slowdown: float) -> str:
    """The speeds in Markdown; of the usual ranks, the slowest."""
    usual = min(measured["alone"][:-1])
    rows = [
        f"| | slowest of the others, steps/s | of its speed alone | the rank slowed {slowdown:g}×, steps/s |",
        "|---|---|---|---|",
    ]
    for name, each in measured.items():
        other = min(each[:-1])
        rows.append(f"| {name} | {other:.1f} | {other / usual:.0%} | {each[-1]:.1f} |")
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="of each rank (default %(default)s)")
    parser.add_argument("--sync-every", type=int, default=8, help="H (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.1, help="of a step's computation (default %(default)s)")
    parser.add_argument("--slowdown", type=float, default=4.0, help="of the last rank (default %(default)s)")
    parser.add_argument("--elements", type=int, default=100_000, help="of the model (default %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.01, help="of elements sent (default %(default)s)")
    parser.add_argument("--max-staleness", type=int, help="bound in steps (default: none)")
    setting = Setting(**vars(parser.parse_args()))
    hvd.init()
    if hvd.size() < 2:
        parser.error("start at least two ranks: mpirun -np 4 python benchmarks/straggler.py")
    measured = compare(setting)
    if hvd.rank() == 0:
        print(f"{hvd.size()} ranks, {setting}\n\n{table(measured, setting.slowdown)}")


if __name__ == "__main__":
    main()
