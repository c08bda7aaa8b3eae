"""What is said of an epoch, in the metrics file and in words, and where its time went."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import horovod.torch as hvd
from imagenet_data import Batch
from rich.table import Table

from hvd_compress import Ledger

INPUT_LIMIT = 0.1  # part of the time that may be spent waiting for images before it is called a bottleneck


@dataclass(frozen=True)
class Epoch:
    """What a run had reached at the end of an epoch; a line of the metrics file."""

    run: str
    epoch: int
    train_loss: float
    val_loss: float
    accuracy: float
    accuracy_top5: float
    megabytes_sent: float  # by one rank, since the start
    ratio_to_fp32: float | None  # than plain Horovod in fp32 would have sent for the same steps
    exchanges: int
    seconds: float  # since the start, validation included
    lr: float  # of the next step
    images_per_second: float  # on all ranks, in this epoch's training
    seconds_input: float  # of this epoch's training on the first rank: waiting for images,
    seconds_compute: float  # forward and backward passes, the optimizer,
    seconds_compress: float  # compressing, decompressing, memories,
    seconds_exchange: float  # MPI and Horovod, and waiting for other ranks there
    loader_images_per_second: float  # what the first rank's readers could give
    unreadable: int  # images of this epoch that could not be read, on all ranks
    ranks: int


class Times:
    """Where an epoch's time goes on this rank, from now on."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._before = dict(ledger.seconds)
        self._start = time.perf_counter()
        self._input = 0.0
        self._reading = 0.0  # in the processes that read, all together
        self._images = 0
        self.problems: list[str] = []

    def waiting_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the time until each one is there is that of the input."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._input += time.perf_counter() - start
            if batch is None:
                return
            self._images += len(batch.labels)
            self._reading += batch.seconds
            self.problems += batch.problems
            yield batch

    def spent(self, workers: int) -> dict[str, float]:
        """Those fields of an :class:`Epoch` that tell of speed; all ranks have as many images, and ``workers``."""
        compress, exchange = (
            self._ledger.seconds.get(what, 0.0) - self._before.get(what, 0.0) for what in ("compress", "exchange")
        )
        total = time.perf_counter() - self._start
        return {
            "images_per_second": hvd.size() * self._images / total,
            "seconds_input": self._input,
            "seconds_compute": total - self._input - compress - exchange,
            "seconds_compress": compress,
            "seconds_exchange": exchange,
            "loader_images_per_second": max(1, workers) * self._images / self._reading if self._reading else 0.0,
        }


def describe_model(name: str, args: argparse.Namespace) -> str:
    """What is done with batch-norm statistics and which weights are validated, in words."""
    own = "each rank's own" if args.batch_norm == "local" else "averaged over ranks in each exchange"
    weights = f"a moving average (decay {args.ema:g}) of the weights is" if args.ema else "the weights are"
    return f"{name}: batch-norm statistics are {own} in training, and averaged for validation; {weights} validated"


def describe(reached: Epoch, args: argparse.Namespace) -> str:
    """An epoch in words."""
    kinds = ("input", "compute", "compress", "exchange")
    seconds = {kind: getattr(reached, f"seconds_{kind}") for kind in kinds}
    total = sum(seconds.values()) or 1.0
    shares = ", ".join(f"{kind} {value / total:.0%}" for kind, value in seconds.items())
    text = (
        f"{reached.run}, epoch {reached.epoch}/{args.epochs}: train loss {reached.train_loss:.3f}, "
        f"validation accuracy {reached.accuracy:.2%}, {reached.megabytes_sent:,.1f} MB sent, "
        f"{reached.seconds:.0f} s\n"
        f"  {reached.images_per_second:,.0f} images/s ({shares}); "
        f"each rank's loader could give {reached.loader_images_per_second:,.0f} images/s"
    )
    if seconds["input"] > INPUT_LIMIT * total:
        text += f"\n  The input is a bottleneck: try more --workers (now {args.workers}), or tar shards."
    return text


def summary(arch: str, last_epochs: list[Epoch]) -> Table:
    """The closing table."""
    table = Table(title=f"{arch}, after the last epoch")
    table.add_column("run")
    for column in ("accuracy", "MB sent\nper rank", "less than\nfp32", "exchanges", "time"):
        table.add_column(column, justify="right")
    for last in last_epochs:
        table.add_row(
            last.run,
            f"{last.accuracy:.2%}",
            f"{last.megabytes_sent:,.1f}",
            "–" if last.ratio_to_fp32 is None else f"{last.ratio_to_fp32:,.1f}×",
            f"{last.exchanges:,}",
            f"{last.seconds:,.0f} s",
        )
    return table
