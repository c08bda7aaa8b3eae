"""The settings of ``imagenet_resnet50.py``: defaults, changed by a recipe in YAML, changed by the command line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import horovod.torch as hvd
import torchvision
import yaml
from ranks import fail

from hvd_compress.settings import EXCHANGES

RECIPES = Path(__file__).parent / "recipes"
PLACES = {"recipe", "output", "checkpoint", "resume", "no_checkpoint", "evaluate", "compare"}
"""Options that say where and whether, not how: a recipe has none of them."""
ONE_OF = {"k": "ratio", "ratio": "k"}
"""Given one of these, the other one from a recipe no longer counts."""


@dataclass(frozen=True)
class Method:
    """How the ranks come to an agreement."""

    optimizer: str
    compression: str
    sync_every: int


PLAIN_HOROVOD = Method("gradient", "none", sync_every=1)


def chosen_method(args: argparse.Namespace) -> Method:
    """The settings'."""
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


def parse_arguments(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """All settings: the command line beats the recipe, the recipe beats the defaults.

    Args:
        description: of the program, for ``--help``.
        arguments: in place of the program's.

    Ends the program on all ranks if something is not in order.
    """
    parser, defaults = make_parser(description)
    line = vars(parser.parse_args(arguments))
    name = line.get("recipe") or ("paper" if "data" in line else "digits")
    recipe = read_recipe(name, parser, defaults)
    settings = dict(defaults)
    for source in (recipe, line):
        for given in ONE_OF.keys() & source.keys():
            settings.pop(ONE_OF[given], None)
        settings |= source
    args = argparse.Namespace(**{**dict.fromkeys(defaults), **settings, "recipe": name})
    if args.checkpoint is None and not (args.no_checkpoint or args.compare):
        args.checkpoint = args.output / "checkpoint"
    check(args, parser, line)
    if args.optimizer == "gradient":
        args.sync_every = 1
    return args


def read_recipe(name: str, parser: Parser, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a recipe: of ``examples/recipes``, or in any file, a run's ``config.yaml`` for instance."""
    path = RECIPES / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.error(f"--recipe {name}: {error.strerror}; {hint}there are {', '.join(known)}")
    except yaml.YAMLError as error:
        parser.error(f"--recipe {name} is not YAML: {error}")
    if not isinstance(content, dict):
        parser.error(f"--recipe {name} must hold settings as 'name: value'")
    words = []
    for key, value in content.items():
        option = str(key).replace("_", "-")
        dest = option.replace("-", "_")
        if dest in PLACES:
            parser.error(f"--recipe {name}: {key} belongs on the command line")
        if dest not in defaults:
            known = [known.replace("_", "-") for known in defaults if known not in PLACES]
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            parser.error(f"--recipe {name}: unknown setting {key!r}; {hint}")
        if isinstance(value, bool) or isinstance(defaults[dest], bool):
            if not (isinstance(value, bool) and isinstance(defaults[dest], bool)):
                wanted = "true or false" if isinstance(defaults[dest], bool) else "a value"
                parser.error(f"--recipe {name}: {key} must be {wanted}, got {value!r}")
            words += [f"--{option}" if value else f"--no-{option}"]
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)]
        elif value is not None:
            words += [f"--{option}={value}"]
    return vars(parser.parse_args(words))


def check(args: argparse.Namespace, parser: Parser, line: Mapping[str, Any]) -> None:
    """Complain of settings that contradict each other, or that nothing can be done with."""
    if args.optimizer == "gradient" and "sync_every" in line:
        parser.error("--sync-every is for --optimizer local-sgd; the gradient path exchanges in each step")
    if args.batch_size % args.accumulate:
        parser.error(f"--accumulate {args.accumulate} must divide --batch-size {args.batch_size}")
    for name in ("momentum", "weight_decay", "workers"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(args, name)}")
    if not 0 <= args.label_smoothing <= 1:
        parser.error(f"--label-smoothing must be between 0 and 1, got {args.label_smoothing}")
    if args.nesterov and not args.momentum:
        parser.error("--nesterov needs a --momentum; --no-nesterov goes without")
    if args.compare and chosen_method(args) == PLAIN_HOROVOD:
        parser.error("--compare trains with plain Horovod too: choose another --optimizer or --compression")
    if args.compare and args.checkpoint is not None:
        parser.error("--checkpoint is for one run, --compare makes two: start them one by one")
    if args.no_checkpoint and args.checkpoint is not None:
        parser.error("--no-checkpoint contradicts --checkpoint")
    if args.compare and hvd.size() == 1:
        parser.error("--compare needs 2 ranks or more, since one sends nothing: start it with mpirun -np 2")


def make_parser(description: str | None) -> tuple[Parser, dict[str, Any]]:
    """What understands the command line, leaving out what is not in it; and the defaults of all options."""
    parser = Parser(
        usage="mpirun -np RANKS python %(prog)s [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    defaults: dict[str, Any] = {}
    group: Any = None

    def option(name: str, default: Any, text: str, **how: Any) -> None:
        if isinstance(default, bool):
            how.setdefault("action", argparse.BooleanOptionalAction)
            shown = "yes" if default else "no"
        else:
            shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        words = [text, "" if default is None or how.get("action") == "store_true" else f"({shown})"]
        group.add_argument(name, default=argparse.SUPPRESS, help=" ".join(filter(None, words)), **how)
        defaults[name[2:].replace("-", "_")] = default

    group = parser.add_argument_group("recipe, whose settings the command line may change; (defaults) change with it")
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    option("--recipe", None, f"{known}, or a file such as a run's config.yaml (digits; with --data: paper)")

    group = parser.add_argument_group("images")
    option(
        "--data",
        None,
        "directory with train/ and val/, of images or of tar shards (scikit-learn's digits)",
        type=Path,
    )
    option("--image-size", 224, "pixels, height and width, in training", type=positive)
    option("--grow-from", None, "image size of the first epoch, from where it grows in steps of 32", type=positive)
    option("--grow-until", 2, "the epoch that first has --image-size", type=positive)
    option("--eval-size", None, "image size in validation (--image-size)", type=positive)
    option(
        "--augment",
        "crop",
        "crop: random crops and flips, validation of the centre; none: whole images",
        choices=["crop", "none"],
    )
    option("--workers", 8, "processes that read images, for each rank", type=int)

    group = parser.add_argument_group("communication")
    option(
        "--optimizer",
        "local-sgd",
        "local-sgd: exchange what some local steps changed (Qsparse-local-SGD); gradient: exchange each gradient, in "
        "an unmodified hvd.DistributedOptimizer",
        choices=["local-sgd", "gradient"],
    )
    option("--compression", "topk", "none, fp16, or of hvd_compress.Compression: topk, qtopk, signtopk, qsgd, …")
    communication, group = group, group.add_mutually_exclusive_group()
    option("--k", None, "elements of each tensor that are sent", type=positive)
    option("--ratio", None, "part of each tensor that is sent, instead of --k: 0.01, say", type=float)
    group = communication
    option("--bits", 4, "of each value, for compressors that quantize", type=positive)
    option("--dense-below", 1000, "tensors with fewer elements are sent whole", type=int)
    option("--exchange", "allgather", "how messages travel; for many ranks see docs/scale.md", choices=EXCHANGES)
    option("--sync-every", 8, "local steps per exchange", type=positive)
    option(
        "--batch-norm",
        "local",
        "statistics: each rank's own, or averaged in each exchange; in validation the average is used anyway",
        choices=["local", "averaged"],
    )
    option(
        "--compare",
        False,
        "train once more, from the same seed, with plain Horovod in fp32, and draw both",
        action="store_true",
    )

    group = parser.add_argument_group("training")
    option(
        "--arch",
        "resnet50",
        "of torchvision: resnet18, resnet50, resnext50_32x4d, …",
        choices=architectures(),
        metavar="NAME",
    )
    option("--epochs", 90, "", type=positive)
    option("--batch-size", 256, "images per rank and step", type=positive)
    option("--accumulate", 1, "parts in which they pass through the model, to save memory", type=positive)
    option("--lr", 0.032, "learning rate for each 256 images of a step on all ranks", type=float)
    option("--schedule", "step", "of the learning rate, after the warm-up", choices=["step", "linear", "cosine"])
    option("--warmup-epochs", 5.0, "the learning rate grows linearly", type=float)
    option("--drop-at", [30, 60, 80], "epochs at which it drops to a tenth (step)", type=float, nargs="*")
    option("--momentum", 0.9, "of the optimizer; with --compression dgc, of the compressor", type=float)
    option("--nesterov", True, "Nesterov's momentum")
    option("--weight-decay", 1e-4, "", type=float)
    option("--decay-norm", True, "weight decay on batch norm too")
    option("--zero-init", True, "residual branches start as zero, so that a larger learning rate works")
    option("--label-smoothing", 0.0, "", type=float)
    option(
        "--ema",
        0.0,
        "decay per step of a moving average of the weights, which is validated then; 0.9999, say",
        type=float,
    )
    option("--amp", "none", "16-bit computations", choices=["none", "bf16", "fp16"])
    option("--channels-last", False, "layout of images and activations")
    option("--compile", False, "torch.compile")
    option("--seed", 0, "", type=int)
    option("--limit-train-batches", None, "stop each epoch early, for a trial", type=positive)

    group = parser.add_argument_group("output")
    option(
        "--output", Path("runs/imagenet-resnet50"), "directory of settings, metrics, TensorBoard, weights", type=Path
    )
    option(
        "--checkpoint",
        None,
        "directory that all nodes see: save there, also when the job is told to end, and go "
        "on from there (OUTPUT/checkpoint)",
        type=Path,
    )
    option("--no-checkpoint", False, "save none: an interrupted run is lost", action="store_true")
    option("--checkpoint-every", 500, "steps, in case that a node fails", type=positive)
    option(
        "--resume",
        "auto",
        "auto: go on from the newest checkpoint, if any; never: delete them and begin anew",
        choices=["auto", "never"],
    )
    option("--evaluate", None, "train nothing: validate these weights, a run's best.pt for instance", type=Path)
    return parser, defaults


def architectures() -> list[str]:
    """What ``--arch`` may be: the residual networks of torchvision, which share their options."""
    names = torchvision.models.list_models(torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])
    return sorted(names)


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
    parts = [method.compression]
    if "topk" in method.compression or "rand" in method.compression:
        parts.append(f"k={args.k}" if args.ratio is None else f"{args.ratio:.4g}")
    if method.compression.startswith("q"):
        parts.append(f"{args.bits} bits")
    return " ".join(parts) + (f", H={method.sync_every}" if method.optimizer == "local-sgd" else ", each gradient")


def settings_of_a_run(args: argparse.Namespace) -> dict[str, Any]:
    """Those that decide what is computed, and must stay when a run goes on."""
    free = {*PLACES, "data", "checkpoint_every", "workers"} | ({"epochs"} if args.schedule == "step" else set())
    return {name: value for name, value in vars(args).items() if name not in free}


def as_recipe(args: argparse.Namespace) -> str:
    """All settings as a recipe, which repeats the run."""
    settings = {
        name.replace("_", "-"): str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in PLACES and value is not None
    }
    return yaml.safe_dump(settings, sort_keys=False)


def settings_in_use(args: argparse.Namespace) -> str:
    """All of them, defaults included, in a line."""
    return ", ".join(f"{name}={value}" for name, value in vars(args).items() if value is not None)
