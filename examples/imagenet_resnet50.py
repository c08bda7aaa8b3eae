"""Train ResNet-50 on ImageNet, or on any ImageFolder tree, with compressed communication.

Without arguments it trains on a small set of real images that comes with scikit-learn, and needs no GPU:

    mpirun -np 2 python examples/imagenet_resnet50.py --compare

The Qsparse-local-SGD paper's set-up (arXiv 1906.02367), on 8 GPUs:

    mpirun -np 8 python examples/imagenet_resnet50.py --data /path/to/imagenet

``--data`` names a directory with ``train/<class>/*`` and ``val/<class>/*``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, cast

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from curves import draw
from embedded_images import write_digits
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import resnet50
from torchvision.transforms import v2
from tqdm import tqdm

from hvd_compress import Compression, Ledger, NonFiniteError, QsparseLocalSGD

# The paper's settings for ImageNet, and what suits 1,442 small images on a CPU.
IMAGENET: dict[str, Any] = {
    "epochs": 90,
    "batch_size": 256,
    "lr": 0.032,
    "warmup_epochs": 5,
    "drop_at": [30, 60, 80],
    "image_size": 224,
    "k": 1000,
    "sync_every": 8,
    "workers": 8,
}
DIGITS: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 32,
    "lr": 0.08,
    "warmup_epochs": 1,
    "drop_at": [6, 7],
    "image_size": 32,
    "k": 1000,
    "sync_every": 4,
    "workers": 0,
}

T = TypeVar("T")
Images = tuple[ImageFolder, ImageFolder]
"""To train on, and to validate with."""


def main() -> None:
    """Train once, or with ``--compare`` twice, and report."""
    hvd.init()
    args = parse_arguments()
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


# ---------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Method:
    """How the ranks come to an agreement."""

    optimizer: str
    compression: str
    sync_every: int


PLAIN_HOROVOD = Method("gradient", "none", sync_every=1)


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


def chosen_method(args: argparse.Namespace) -> Method:
    """The command line's."""
    return Method(args.optimizer, args.compression, args.sync_every if args.optimizer == "local-sgd" else 1)


def train(method: Method, args: argparse.Namespace, images: Images, metrics: TextIO) -> list[Epoch]:
    """One run from its seed to its last epoch."""
    train_set, val_set = images
    torch.manual_seed(args.seed)
    # Each residual branch starts as zero, so that the network starts shallow and takes a larger learning rate.
    model = resnet50(num_classes=len(train_set.classes), zero_init_residual=True).to(device())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    torch.manual_seed(args.seed + hvd.rank())  # from here on each rank draws its own augmentations

    # Each rank takes its part of the images, shuffled anew in each epoch. The incomplete last batch is left out,
    # so that all ranks take the same number of steps and batch norm never meets a single image.
    sampler: DistributedSampler = DistributedSampler(train_set, hvd.size(), hvd.rank(), seed=args.seed)
    batches = loader(train_set, args, sampler=sampler, drop_last=True)
    val_batches = loader(shard(val_set, hvd.rank(), hvd.size()), args)
    steps = min(len(batches), args.limit_train_batches or len(batches))
    if steps == 0:
        fail(f"{len(train_set)} images are too few for {hvd.size()} ranks of --batch-size {args.batch_size}")

    optimizer, ledger, after_step = make_optimizer(method, model, args)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor((step + 1) / steps, args))
    name = run_name(method, args)
    curve = []
    start = time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        model.train()
        sampler.set_epoch(epoch)
        total_loss = torch.zeros((), device=device())
        with progress(f"{name}, epoch {epoch}/{args.epochs}", steps) as bar:
            for inputs, labels in on_device(islice(batches, steps)):
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
        metrics.write(json.dumps(asdict(reached)) + "\n")
        metrics.flush()
        say(
            f"{name}, epoch {epoch}/{args.epochs}: train loss {train_loss:.3f}, validation accuracy "
            f"{reached.accuracy:.2%}, {reached.megabytes_sent:,.1f} MB sent, {reached.seconds:.0f} s"
        )
    return curve


def make_optimizer(
    method: Method, model: nn.Module, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, Ledger, Callable[[], None]]:
    """The optimizer, where its bytes are written down, and what is to be called after each step."""
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
        return optimizer, compression.ledger, lambda: None

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


# ---------------------------------------------------------------------------------------------- images


def open_images(args: argparse.Namespace) -> Images:
    """Training and validation set.

    Raises:
        OSError, ValueError: there is no such tree, or it is not in order.
    """
    for split in ("train", "val"):
        if not (args.data / split).is_dir():
            raise FileNotFoundError(f"--data {args.data}: there is no directory {args.data / split}")
    for_training, for_validation = transforms(args)
    train_set = ImageFolder(args.data / "train", for_training)
    val_set = ImageFolder(args.data / "val", for_validation)
    if train_set.classes != val_set.classes:  # the labels would not mean the same
        different = sorted({*train_set.classes} ^ {*val_set.classes})
        raise ValueError(f"--data {args.data}: train and val differ in their classes: {', '.join(different[:5])}")
    return train_set, val_set


def transforms(args: argparse.Namespace) -> tuple[v2.Transform, v2.Transform]:
    """For training and for validation."""
    size = args.image_size
    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ]
    if args.is_embedded:  # flipped or cropped, a digit may become another one
        whole = v2.Compose([v2.Resize([size, size]), *to_tensor])
        return whole, whole
    cropped = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *to_tensor])
    centre = v2.Compose([v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size), *to_tensor])
    return cropped, centre


def loader(dataset: torch.utils.data.Dataset, args: argparse.Namespace, **options: Any) -> DataLoader:
    """Batches of ``dataset``."""
    if args.workers:  # a process that runs MPI should not be forked
        options |= {"multiprocessing_context": "forkserver", "persistent_workers": True}
    pinned = torch.cuda.is_available()
    return DataLoader(dataset, args.batch_size, num_workers=args.workers, pin_memory=pinned, **options)


def shard(dataset: ImageFolder, rank: int, size: int) -> Subset:
    """Every image on exactly one rank; DistributedSampler would repeat some to give all ranks as many."""
    return Subset(dataset, range(rank, len(dataset), size))


# ---------------------------------------------------------------------------------------------- ranks and devices


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


def on_device(batches: Iterable[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """The batches, one after the other, where the model is."""
    for batch in batches:
        yield [tensor.to(device(), non_blocking=True) for tensor in batch]


def say(text: str) -> None:
    """Print once, not once for each rank."""
    if hvd.rank() == 0:
        print(text, flush=True)


def progress(title: str, steps: int) -> tqdm:
    """A progress bar on the first rank; in a file, where each state takes a line's room, it moves more seldom."""
    seldom = 0.2 if sys.stderr.isatty() else 2.0
    return tqdm(desc=title, total=steps, disable=hvd.rank() != 0, leave=False, mininterval=seldom, dynamic_ncols=True)


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


# ---------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Speaks once, not once for each rank."""

    def error(self, message: str) -> NoReturn:
        """See the base class."""
        fail(f"{message}\nSee --help.", status=2)

    def print_help(self, file: Any = None) -> None:
        """See the base class."""
        if hvd.rank() == 0:
            super().print_help(file)


def parse_arguments() -> argparse.Namespace:
    """The command line, with the defaults filled in."""

    def default(name: str) -> str:
        return f"(ImageNet: {IMAGENET[name]}; digits: {DIGITS[name]})".replace("[", "").replace("]", "")

    parser = Parser(
        usage="mpirun -np RANKS python %(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    group = parser.add_argument_group("images")
    group.add_argument("--data", type=Path, help="directory with train/ and val/ (scikit-learn's digits)")
    group.add_argument("--image-size", type=positive, help=f"pixels, height and width {default('image_size')}")
    group.add_argument("--workers", type=int, help=f"processes that read images, for each rank {default('workers')}")

    group = parser.add_argument_group("communication")
    group.add_argument(
        "--optimizer",
        choices=["local-sgd", "gradient"],
        default="local-sgd",
        help="local-sgd: exchange what some local steps changed (Qsparse-local-SGD); gradient: exchange each "
        "gradient, in an unmodified hvd.DistributedOptimizer (%(default)s)",
    )
    group.add_argument("--compression", default="topk", help="topk, none or fp16 (%(default)s)")
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--k", type=int, help=f"elements of each tensor that are sent {default('k')}")
    amount.add_argument("--ratio", type=float, help="part of each tensor that is sent, instead of --k: 0.01, say")
    group.add_argument(
        "--dense-below", type=int, default=1000, help="tensors with fewer elements are sent whole (%(default)s)"
    )
    group.add_argument("--sync-every", type=positive, help=f"local steps per exchange {default('sync_every')}")
    group.add_argument(
        "--compare",
        action="store_true",
        help="train once more, from the same seed, with plain Horovod in fp32, and draw accuracy against megabytes",
    )

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive, help=default("epochs"))
    group.add_argument("--batch-size", type=positive, help=f"images per rank and step {default('batch_size')}")
    group.add_argument(
        "--lr", type=float, help=f"learning rate for each 256 images of a step on all ranks {default('lr')}"
    )
    group.add_argument("--momentum", type=float, default=0.9, help="Nesterov's (%(default)s)")
    group.add_argument("--weight-decay", type=float, default=1e-4, help="(%(default)s)")
    group.add_argument(
        "--warmup-epochs", type=float, help=f"the learning rate grows linearly {default('warmup_epochs')}"
    )
    group.add_argument(
        "--drop-at",
        type=float,
        nargs="*",
        help=f"epochs at which the learning rate drops to a tenth {default('drop_at')}",
    )
    group.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    group.add_argument("--limit-train-batches", type=positive, help="stop each epoch early, for a trial")

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, default=Path("runs/imagenet-resnet50"), help="directory of results (%(default)s)"
    )

    args = parser.parse_args()
    if args.optimizer == "gradient" and args.sync_every is not None:
        parser.error("--sync-every is for --optimizer local-sgd; the gradient path exchanges in each step")
    args.is_embedded = args.data is None
    for name, value in (DIGITS if args.is_embedded else IMAGENET).items():
        if getattr(args, name) is None and not (name == "k" and args.ratio is not None):
            setattr(args, name, value)
    if args.compare and chosen_method(args) == PLAIN_HOROVOD:
        parser.error("--compare trains with plain Horovod too: choose another --optimizer or --compression")
    if args.compare and hvd.size() == 1:
        parser.error("--compare needs 2 ranks or more, since one sends nothing: start it with mpirun -np 2")
    return args


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


# ---------------------------------------------------------------------------------------------- report


def run_name(method: Method, args: argparse.Namespace) -> str:
    """Short enough for a legend."""
    if method == PLAIN_HOROVOD:
        return "plain Horovod, fp32"
    amount = f"k={args.k}" if args.ratio is None else f"{args.ratio:.4g}"
    compression = method.compression + (f" {amount}" if method.compression not in ("none", "fp16") else "")
    return compression + (f", H={method.sync_every}" if method.optimizer == "local-sgd" else ", each gradient")


def settings_in_use(args: argparse.Namespace) -> str:
    """All of them, defaults included."""
    shown = {name: value for name, value in vars(args).items() if value is not None and name != "is_embedded"}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


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
