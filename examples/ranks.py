"""What every program on several ranks needs: its device, one voice, and errors that end all ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar, cast

import horovod.torch as hvd
import torch
from tqdm import tqdm

T = TypeVar("T")


def use_device() -> None:
    """This rank's GPU, or its share of the processor's cores."""
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())  # Slurm may show each rank its own only
    if "OMP_NUM_THREADS" not in os.environ:  # torch would also take the cores of this rank's neighbours
        share = max(1, (os.cpu_count() or 1) // hvd.local_size())
        torch.set_num_threads(min(share, torch.get_num_threads()))


def device() -> torch.device:
    """Where the model is."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def say(text: str) -> None:
    """Print once, not once for each rank."""
    if hvd.rank() == 0:
        print(text, flush=True)


def progress(title: str, steps: int, done: int = 0) -> tqdm:
    """A progress bar on the first rank; in a file, where each state takes a line's room, it moves more seldom."""
    seldom = 0.2 if sys.stderr.isatty() else 2.0
    return tqdm(
        desc=title,
        total=steps,
        initial=done,
        disable=hvd.rank() != 0,
        leave=False,
        mininterval=seldom,
        dynamic_ncols=True,
    )


def on_all_ranks(action: Callable[[], T]) -> T:
    """Do it on each rank; if it fails on one, end on all. A rank that went on alone would wait for ever."""
    result: T | None = None
    problem: str | None = None
    try:
        result = action()
    except (OSError, ValueError) as error:
        problem = str(error)
    problems = {rank: p for rank, p in enumerate(hvd.allgather_object(problem, name="problems")) if p}
    if problems:
        where = "" if len(problems) == hvd.size() else f"on rank {min(problems)}: "
        fail(where + problems[min(problems)])
    return cast(T, result)


def fail(message: str, status: int = 1) -> NoReturn:
    """End on all ranks; each has to call it."""
    if hvd.rank() == 0:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    hvd.barrier()  # mpirun ends the others as soon as one has ended: not before the message is out
    sys.exit(status)
