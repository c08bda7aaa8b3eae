"""The command line of ``imagenet_resnet50.py``, and what it chooses."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import horovod.torch as hvd
from ranks import fail

from hvd_compress.settings import EXCHANGES

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


@dataclass(frozen=True)
class Method:
    """How the ranks come to an agreement."""

    optimizer: str
    compression: str
    sync_every: int


PLAIN_HOROVOD = Method("gradient", "none", sync_every=1)


def chosen_method(args: argparse.Namespace) -> Method:
    """The command line's."""
    return Method(args.optimizer, args.compression, args.sync_every if args.optimizer == "local-sgd" else 1)


class Parser(argparse.ArgumentParser):
    """Speaks once, not once for each rank."""

    def error(self, message: str) -> NoReturn:
        """See the base class."""
        fail(f"{message}\nSee --help.", status=2)

    def print_help(self, file: Any = None) -> None:
        """See the base class."""
        if hvd.rank() == 0:
            super().print_help(file)


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The command line, with the defaults filled in."""

    def default(name: str) -> str:
        return f"(ImageNet: {IMAGENET[name]}; digits: {DIGITS[name]})".replace("[", "").replace("]", "")

    parser = Parser(
        usage="mpirun -np RANKS python %(prog)s [options]",
        description=description,
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
    group.add_argument(
        "--exchange",
        choices=EXCHANGES,
        default="allgather",
        help="how messages travel; for many ranks see docs/scale.md (%(default)s)",
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
    group.add_argument(
        "--checkpoint",
        type=Path,
        help="directory that all nodes see: save there, also when the job is told to end, and go on from there",
    )
    group.add_argument(
        "--checkpoint-every", type=positive, default=500, help="steps, in case that a node fails (%(default)s)"
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
    if args.compare and args.checkpoint is not None:
        parser.error("--checkpoint is for one run, --compare makes two: start them one by one")
    if args.compare and hvd.size() == 1:
        parser.error("--compare needs 2 ranks or more, since one sends nothing: start it with mpirun -np 2")
    return args


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def run_name(method: Method, args: argparse.Namespace) -> str:
    """Short enough for a legend."""
    if method == PLAIN_HOROVOD:
        return "plain Horovod, fp32"
    amount = f"k={args.k}" if args.ratio is None else f"{args.ratio:.4g}"
    compression = method.compression + (f" {amount}" if method.compression not in ("none", "fp16") else "")
    return compression + (f", H={method.sync_every}" if method.optimizer == "local-sgd" else ", each gradient")


def settings_of_a_run(args: argparse.Namespace) -> dict[str, Any]:
    """Those that decide what is computed, and must stay when a run goes on."""
    free = {"data", "output", "checkpoint", "checkpoint_every", "compare", "workers", "epochs"}
    return {name: value for name, value in vars(args).items() if name not in free}


def settings_in_use(args: argparse.Namespace) -> str:
    """All of them, defaults included."""
    shown = {name: value for name, value in vars(args).items() if value is not None and name != "is_embedded"}
    return ", ".join(f"{name}={value}" for name, value in shown.items())
