"""Train a small network with every compressor of hvd_compress, and compare what each one sends and reaches.

    mpirun -np 2 python examples/every_compressor.py
    mpirun -np 4 python examples/every_compressor.py --only topk dgc ef21 --epochs 30

Each run is plain Horovod training of scikit-learn's digits with ``hvd.DistributedOptimizer(compression=…)``, from the
same initial weights and with the same batches. The settings below are one sensible choice for each, not the best.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from tqdm import tqdm

from hvd_compress import CDAdam, Compression

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {},
    "topk": {"ratio": 0.01},
    "adaptive_topk": {"ratio": 0.01, "exchanges": 100},
    "accordion": {"high": 0.05, "low": 0.005},
    "hard_threshold": {"ratio": 0.01, "exchanges": 100},
    "cat": {},
    "qtopk": {"ratio": 0.01, "bits": 4},
    "signtopk": {"ratio": 0.01},
    "randk": {"ratio": 0.05},
    "random_block": {"ratio": 0.05},
    "threshold": {"threshold": 0.01},
    "qsgd": {"bits": 4},
    "minmax": {"bits": 4},
    "rotated": {"bits": 4},
    "sign": {},
    "terngrad": {},
    "onebit": {},
    "tqsgd": {"bits": 3},
    "tnqsgd": {"bits": 3},
    "tbqsgd": {"bits": 3},
    "dgc": {"ratio": 0.01, "momentum": 0.9, "warmup": 100},
    "ef21": {"ratio": 0.05, "momentum": 0.9},
    "cd_adam": {},
}


@dataclass(frozen=True)
class Result:
    """What one run has come to."""

    name: str
    accuracy: float  # of 360 images that were not trained on
    bytes_per_step: float  # handed to MPI and Horovod by this rank


def main() -> None:
    """Train with each, then print a table."""
    args = parse_arguments()
    hvd.init()
    if hvd.size() == 1:
        raise SystemExit(
            "Horovod compresses nothing on a single rank: mpirun -np 2 python examples/every_compressor.py"
        )
    torch.set_num_threads(max(1, torch.get_num_threads() // hvd.local_size()))
    results = [train(name, args) for name in tqdm(args.only, unit="run", disable=True if hvd.rank() else None)]
    if hvd.rank() == 0:
        Console(force_terminal=False, width=100).print(table(results))


def train(name: str, args: argparse.Namespace) -> Result:
    """One run from the same start."""
    torch.manual_seed(args.seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    settings = dict(SETTINGS[name])
    if name not in ("none", "fp16"):
        settings["named_parameters"] = model.named_parameters()
    compression = Compression.by_name(name, **settings)
    optimizer = hvd.DistributedOptimizer(
        inner_optimizer(name, model, args.lr), named_parameters=model.named_parameters(), compression=compression
    )
    train_images, train_labels, test_images, test_labels = digits()
    generator = torch.Generator().manual_seed(args.seed + 1)
    steps = 0
    for _ in range(args.epochs):
        order = torch.randperm(len(train_images), generator=generator)
        for batch in order.split(args.batch_size * hvd.size())[:-1]:
            own = batch[hvd.rank() :: hvd.size()]
            optimizer.zero_grad()
            F.cross_entropy(model(train_images[own]), train_labels[own]).backward()
            optimizer.step()
            steps += 1
    if steps == 0:
        raise SystemExit(
            f"every_compressor.py: no steps: --epochs {args.epochs} of {len(train_images)} images, --batch-size "
            f"{args.batch_size} on {hvd.size()} ranks; take more epochs, or smaller batches"
        )
    accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    elements = sum(p.numel() for p in model.parameters())
    if name in ("none", "fp16"):
        sent = elements * (4.0 if name == "none" else 2.0)
    else:
        sent = compression.ledger.total.sent / steps
    return Result(name, accuracy, sent)


def inner_optimizer(name: str, model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum, except where the compressor has its own ideas."""
    if name == "cd_adam":
        return CDAdam(model.parameters(), lr=0.001)
    # DGC and EF21 have their momentum before the compression; noisy and biased messages want none at all.
    momentum = 0.0 if name in ("dgc", "ef21", "onebit", "randk", "random_block") else 0.9
    return torch.optim.SGD(model.parameters(), lr=lr if momentum or name == "dgc" else 4 * lr, momentum=momentum)


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and labels to train on, and to test with."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    test = torch.arange(len(images)) % 5 == 4
    return images[~test], labels[~test], images[test], labels[test]


def table(results: list[Result]) -> Table:
    """One row for each run, in the order in which they ran."""
    rows = Table(title=f"{hvd.size()} ranks, hvd.DistributedOptimizer(compression=Compression.<name>(…))")
    for heading in ("compressor", "settings", "accuracy", "bytes per step", "less than fp32"):
        rows.add_column(heading, justify="left" if heading in ("compressor", "settings") else "right")
    dense = next((r.bytes_per_step for r in results if r.name == "none"), None)
    for r in results:
        settings = ", ".join(f"{key}={value}" for key, value in SETTINGS[r.name].items())
        less = f"{dense / r.bytes_per_step:.1f}×" if dense else ""
        rows.add_row(r.name, settings, f"{r.accuracy:.1%}", f"{r.bytes_per_step:,.0f}", less)
    return rows


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME", help="run these"
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the 1,438 images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="of each rank (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of SGD (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
