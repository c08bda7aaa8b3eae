"""A long run of everything that may differ between ranks, with a verdict at its end.

    mpirun -np 4 python benchmarks/soak.py

In each step each rank uses other branches of its model, sends messages of other sizes, and now and then has inf or
NaN in a gradient. One model is trained through ``hvd.DistributedOptimizer``, another by Qsparse-local-SGD. All along,
replicas must be the same bits on all ranks; memories must stay finite; and the process must not grow.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import horovod.torch as hvd
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from hvd_compress import Compression, NonFiniteError, QsparseLocalSGD
from hvd_compress.operators import Operator, TopK
from hvd_compress.wire import Message

WIDTHS = (1, 3, 17, 60, 100, 250, 400)  # of the branches, so that some tensors are sent whole
GROWTH_MB = 16  # that the allocators may take, from the end of the first quarter on


class AnyNumber(Operator):
    """The largest elements, as many as chance says: from one to all of them."""

    draws = True

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :class:`Operator`."""
        k = int(torch.randint(1, x.numel() + 1, (), generator=generator))
        return TopK(k=k).encode(x, generator=generator)


class Branches(torch.nn.Module):
    """Networks side by side, of which a step uses some."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = torch.nn.ModuleList([torch.nn.Linear(40, width) for width in WIDTHS])

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        """The loss."""
        return torch.stack([self.branches[i](x).square().mean() for i in used]).sum()


@dataclass
class Outcome:
    """What was seen on this rank."""

    steps: int = 0
    overflows: int = 0  # that this rank caused
    skipped: int = 0  # steps that no rank took, because some rank had an overflow
    dropped: int = 0  # rounds of local steps that were dropped for the same reason
    unused: int = 0  # branches
    least: int = 2**62  # bytes of one exchange
    most: int = 0
    megabytes: tuple[float, ...] = ()  # of this process, at each quarter
    wrong: str = ""  # the first thing that was


def soak(steps: int, seed: int, overflow: float, each: Callable[[range], Iterable[int]] = iter) -> Outcome:
    """Train, and compare the ranks. Collective.

    Args:
        steps: of both models.
        seed: of everything that is drawn.
        overflow: probability that a rank has inf or NaN in a step.
        each: shows the progress.
    """
    rng = random.Random(f"{seed} {hvd.rank()}")  # another one on each rank: nothing but the start is alike
    torch.manual_seed(seed)
    model, local_model = Branches(), Branches()
    compression = Compression.of(AnyNumber(), named_parameters=model.named_parameters(), seed=seed)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    local = QsparseLocalSGD(
        torch.optim.SGD(local_model.parameters(), lr=0.01),
        named_parameters=local_model.named_parameters(),
        compression=Compression.of(AnyNumber(), seed=seed),
        sync_every=3,
    )
    torch.manual_seed(seed + 1 + hvd.rank())
    seen = Outcome()
    megabytes = []
    for step in each(range(steps)):
        before = compression.ledger.total.mpi
        is_overflow = rng.random() < overflow
        for net, take in ((model, optimizer), (local_model, local)):
            used = rng.sample(range(len(WIDTHS)), rng.randint(1, len(WIDTHS)))
            seen.unused += len(WIDTHS) - len(used)
            take.zero_grad()
            x = torch.randn(4, 40)
            if is_overflow:
                x[rng.randrange(4), 0] = rng.choice([float("inf"), float("nan")])
            net(x, used).backward()
        seen.overflows += is_overflow
        optimizer.synchronize()
        if all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):  # alike on all ranks
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            seen.skipped += 1
        try:
            local.step()
        except NonFiniteError:
            seen.dropped += 1
        sent = compression.ledger.total.mpi - before
        seen.least, seen.most, seen.steps = min(seen.least, sent), max(seen.most, sent), step + 1
        if (step + 1) % max(1, steps // 4) == 0:
            megabytes.append(resident())
            local.synchronize()
            seen.wrong = seen.wrong or difference(model, local_model, optimizer)
    states = (compression.state_dict(), local.state_dict()["qsparse_local_sgd"]["average"])
    if not all(bool(m.isfinite().all()) for state in states for m in state["memory"].values()):
        seen.wrong = seen.wrong or "a memory is not finite"
    if len(megabytes) > 1 and megabytes[-1] - megabytes[0] > GROWTH_MB:
        seen.wrong = seen.wrong or f"the process has grown from {megabytes[0]:.0f} to {megabytes[-1]:.0f} MB"
    seen.megabytes = tuple(megabytes)
    return seen


def difference(*parts: torch.nn.Module | torch.optim.Optimizer) -> str:
    """What is not the same bits on all ranks; empty if all is."""
    for part in parts:
        state = part.state_dict()["state"] if isinstance(part, torch.optim.Optimizer) else part.state_dict()
        nested = (list(s.values()) if isinstance(s, dict) else [s] for s in state.values())
        tensors = [t.reshape(-1).view(torch.uint8) for ts in nested for t in ts if isinstance(t, Tensor)]
        flat = torch.cat(tensors)
        for rank, other in enumerate(hvd.allgather(flat[None], name="soak.replicas")):
            if not torch.equal(other, flat):
                return f"{type(part).__name__} differs between rank {rank} and rank {hvd.rank()}"
    return ""


def resident() -> float:
    """Megabytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def table(outcomes: list[Outcome]) -> Table:
    """One row for each rank."""
    shown = Table("rank", "steps", "overflows here", "steps skipped", "rounds dropped", "unused branches")
    for heading in ("bytes of an exchange", "MB at each quarter", "verdict"):
        shown.add_column(heading)
    for rank, o in enumerate(outcomes):
        numbers = (rank, o.steps, o.overflows, o.skipped, o.dropped, o.unused)
        memory = " ".join(f"{m:.0f}" for m in o.megabytes)
        shown.add_row(*map(str, numbers), f"{o.least:,} to {o.most:,}", memory, o.wrong or "good")
    return shown


def main() -> None:
    """Run and report; the exit status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument(
        "--overflow",
        type=float,
        default=0.02,
        help="probability of inf or NaN, per rank and step (default %(default)s)",
    )
    args = parser.parse_args()
    hvd.init()
    if hvd.size() < 2:
        parser.error("start at least two ranks: mpirun -np 4 python benchmarks/soak.py")
    torch.set_num_threads(1)

    def each(steps: range) -> Iterable[int]:
        return track(steps, "Training") if hvd.rank() == 0 else steps

    outcomes = hvd.allgather_object(soak(args.steps, args.seed, args.overflow, each), name="outcomes")
    if hvd.rank() == 0:
        Console(width=150).print(table(outcomes))
    sys.exit(any(o.wrong for o in outcomes))


if __name__ == "__main__":
    main()
