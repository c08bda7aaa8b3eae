"""Train ResNet-50 on ImageNet, or on any ImageFolder tree, with compressed communication.

Without arguments it trains on a small set of real images that comes with scikit-learn, and needs no GPU:

    mpirun -np 2 python examples/imagenet_resnet50.py --compare

The Qsparse-local-SGD paper's set-up (arXiv 1906.02367), on 8 GPUs:

    mpirun -np 8 python examples/imagenet_resnet50.py --data /path/to/imagenet

``--data`` names a directory with ``train/<class>/*`` and ``val/<class>/*``. With ``--checkpoint`` the same command
goes on, bit for bit, where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, TextIO

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from curves import draw
from embedded_images import write_digits
from imagenet_data import Augmented, EpochSampler, Images, loader, open_images, shard
from imagenet_options import (
    PLAIN_HOROVOD,
    Method,
    chosen_method,
    parse_arguments,
    run_name,
    settings_in_use,
    settings_of_a_run,
)
from ranks import device, fail, on_all_ranks, on_device, progress, say, use_device
from resumable import Resumable
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet50

from hvd_compress import Compression, GradientCompressor, Ledger, NonFiniteError, QsparseLocalSGD


def main() -> None:
    """Train once, or with ``--compare`` twice, and report."""
    hvd.init()
    args = parse_arguments(__doc__)
    use_device()
    if args.data is None:
        args.data = args.output / "digits"
        say(f"No ImageNet was given (--data): training on scikit-learn's handwritten digits, in {args.data}.")
        on_all_ranks(lambda: write_digits(args.data) if hvd.rank() == 0 else None)
    images = on_all_ranks(lambda: open_images(args))
    methods = [chosen_method(args), PLAIN_HOROVOD] if args.compare else [chosen_method(args)]
    say(f"{hvd.size()} ranks, {torch.get_num_threads()} threads each, {device()}; settings: {settings_in_use(args)}")

    curves = []
    on_all_ranks(lambda: args.output.mkdir(parents=True, exist_ok=True))
    with open(args.output / "metrics.jsonl" if hvd.rank() == 0 else os.devnull, "w") as metrics:
        for method in methods:
            curves.append(train(method, args, images, metrics))

    if hvd.rank() == 0:
        # mpirun shows each rank a terminal, even when all is written to a file: no colours, then.
        Console(force_terminal=False).print(summary([curve[-1] for curve in curves]))
        say(f"Metrics: {args.output / 'metrics.jsonl'}")
        if args.compare:
            picture = args.output / "accuracy-vs-megabytes.png"
            draw([asdict(epoch) for curve in curves for epoch in curve], picture)
            say(f"Curve:   {picture}")


@dataclass(frozen=True)
class Epoch:
    """What a run had reached at the end of an epoch; a line of the metrics file."""

    run: str
    epoch: int
    train_loss: float
    accuracy: float
    megabytes_sent: float  # by one rank, since the start
    ratio_to_fp32: float | None  # than plain Horovod in fp32 would have sent for the same steps
    exchanges: int
    seconds: float


def train(method: Method, args: argparse.Namespace, images: Images, metrics: TextIO) -> list[Epoch]:
    """One run, from its seed or its last checkpoint to its last epoch."""
    train_set, val_set = images
    torch.manual_seed(args.seed)
    # Each residual branch starts as zero, so that the network starts shallow and takes a larger learning rate.
    model = resnet50(num_classes=len(train_set.classes), zero_init_residual=True).to(device())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    # The incomplete last batch is left out, so that all ranks take the same number of steps and batch norm never
    # meets a single image.
    augmented = Augmented(train_set, args.seed)
    sampler = EpochSampler(augmented, hvd.rank(), hvd.size(), seed=args.seed, batch_size=args.batch_size)
    batches = loader(augmented, args, sampler=sampler, drop_last=True)
    val_batches = loader(shard(val_set, hvd.rank(), hvd.size()), args)
    steps = min(len(batches), args.limit_train_batches or len(batches))
    if steps == 0:
        fail(f"{len(train_set)} images are too few for {hvd.size()} ranks of --batch-size {args.batch_size}")

    optimizer, books, after_step = make_optimizer(method, model, args)
    ledger = books if isinstance(books, Ledger) else books.ledger
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor((step + 1) / steps, args))
    resumable = Resumable(
        args.checkpoint,
        {"model": model, "optimizer": optimizer, "schedule": schedule, "books": books},
        settings_of_a_run(args),
        save_every=args.checkpoint_every,
        ask_every=method.sync_every,
    )
    done = resumable.load() or {"epoch": 1, "step": 0, "loss": 0.0, "seconds": 0.0, "curve": []}
    curve = [Epoch(**record) for record in done["curve"]]
    for reached in curve:
        write(reached, metrics)
    name = run_name(method, args)
    start = time.perf_counter() - done["seconds"]

    def save_if_due(epoch: int, step: int, loss: torch.Tensor | float, *, always: bool = False) -> None:
        seconds = time.perf_counter() - start
        records = [asdict(reached) for reached in curve]
        progress = {"epoch": epoch, "step": step, "loss": loss, "seconds": seconds, "curve": records}
        number = (epoch - 1) * (steps + 1) + step  # the validation counts as a step, it may bring an exchange
        (resumable.save if always else resumable.after_step)(number, progress)

    for epoch in range(done["epoch"], args.epochs + 1):
        first, total_loss = (done["step"], done["loss"]) if epoch == done["epoch"] else (0, 0.0)
        total_loss = torch.as_tensor(total_loss, device=device())
        model.train()
        sampler.begin(epoch, skip=first)
        with progress(f"{name}, epoch {epoch}/{args.epochs}", steps, first) as bar:
            for step, (inputs, labels) in enumerate(on_device(islice(batches, steps - first)), start=first + 1):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                after_step()
                schedule.step()
                total_loss += loss.detach()
                if bar.update():  # only when it has been drawn: to read the loss waits for the GPU
                    lr, sent = schedule.get_last_lr()[0], ledger.total.sent / 1e6
                    bar.set_postfix_str(f"loss {loss.item():.3f}, lr {lr:.4f}, {sent:.1f} MB sent")
                save_if_due(epoch, step, total_loss)
        # Between exchanges local SGD has a model for each rank. Validation should see the one that they agree on;
        # that may take an exchange more, which is counted as all others are.
        if isinstance(optimizer, QsparseLocalSGD):
            optimizer.synchronize()
        train_loss = mean_over_ranks(total_loss / steps)
        if not math.isfinite(train_loss):
            fail(f"the loss became {train_loss}: try a smaller --lr or a longer --warmup-epochs")
        traffic = ledger.total
        reached = Epoch(
            run=name,
            epoch=epoch,
            train_loss=train_loss,
            accuracy=count_correct(model, val_batches) / len(val_set),
            megabytes_sent=traffic.sent / 1e6,
            ratio_to_fp32=traffic.ratio if traffic.sent else None,
            exchanges=ledger.exchanges,
            seconds=time.perf_counter() - start,
        )
        curve.append(reached)
        write(reached, metrics)
        say(
            f"{name}, epoch {epoch}/{args.epochs}: train loss {train_loss:.3f}, validation accuracy "
            f"{reached.accuracy:.2%}, {reached.megabytes_sent:,.1f} MB sent, {reached.seconds:.0f} s"
        )
    save_if_due(args.epochs + 1, 0, 0.0, always=True)
    return curve


def write(reached: Epoch, metrics: TextIO) -> None:
    """As a line of the metrics file, at once."""
    metrics.write(json.dumps(asdict(reached)) + "\n")
    metrics.flush()


def make_optimizer(
    method: Method, model: nn.Module, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, Ledger | GradientCompressor, Callable[[], None]]:
    """The optimizer, what counts its bytes and is to be saved beside it, and what is to be called after each step."""
    # Linear scaling: the paper's 0.128 · (256 · ranks) / 1024 at a batch size of 256.
    lr = args.lr * args.batch_size * hvd.size() / 256
    sgd = torch.optim.SGD(
        model.parameters(),
        lr,
        momentum=args.momentum,
        nesterov=args.momentum > 0,
        weight_decay=args.weight_decay,
        fused=True,
    )
    compression = on_all_ranks(lambda: make_compression(method, model, args))
    if method.optimizer == "local-sgd":
        local = QsparseLocalSGD(
            sgd,
            named_parameters=model.named_parameters(),
            compression=compression,
            sync_every=method.sync_every,
        )
        return local, local.ledger, lambda: None
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters(), compression=compression)
    if method.compression not in ("none", "fp16"):
        return optimizer, compression, lambda: None

    # Horovod's own compressors keep no ledger. What they hand over has the parameters' shapes in each step.
    ledger = Ledger()
    dense = {name: p.nbytes for name, p in model.named_parameters()}
    handed = {name: compression.compress(p.detach())[0].nbytes for name, p in model.named_parameters()}

    def count() -> None:
        if hvd.size() == 1:  # a single rank's gradients never get to Horovod
            return
        ledger.exchanges += 1
        for name in dense:
            ledger.tensors[name].dense += dense[name]
            ledger.tensors[name].horovod += handed[name]

    return optimizer, ledger, count


def make_compression(method: Method, model: nn.Module, args: argparse.Namespace) -> Any:
    """By its name on the command line."""
    if method.compression in ("none", "fp16"):
        return Compression.by_name(method.compression)
    return Compression.by_name(
        method.compression,
        k=args.k,
        ratio=args.ratio,
        dense_below=args.dense_below,
        exchange=args.exchange,
        named_parameters=model.named_parameters(),
    )


def lr_factor(epoch: float, args: argparse.Namespace) -> float:
    """A linear warm-up, then a tenth after each of ``--drop-at``.

    Args:
        epoch: with its fraction, at the end of the step that is to be taken.
    """
    warm = min(1.0, epoch / args.warmup_epochs) if args.warmup_epochs else 1.0
    return warm * 0.1 ** sum(epoch > drop for drop in args.drop_at)


@torch.no_grad()
def count_correct(model: nn.Module, batches: DataLoader) -> int:
    """How many images all ranks together get right, each of its own ``batches``.

    Batch-norm statistics are not exchanged, as in the paper: each rank uses its own.
    """
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device())
    for inputs, labels in on_device(batches):
        correct += (model(inputs).argmax(dim=1) == labels).sum()
    return int(hvd.allreduce(correct, name="correct", op=hvd.Sum))


def mean_over_ranks(value: torch.Tensor) -> float:
    """The same on all ranks."""
    return hvd.allreduce(value, name="mean", op=hvd.Average).item()


def summary(last_epochs: list[Epoch]) -> Table:
    """The closing table."""
    table = Table(title="ResNet-50, after the last epoch")
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


if __name__ == "__main__":
    try:
        main()
    except NonFiniteError as error:  # raised by every rank
        fail(str(error))
