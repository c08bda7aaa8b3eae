"""Validation that finds the same on any number of ranks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from imagenet_data import EveryOther, Images, Transforms, Whole, loader
from imagenet_model import make_model, on_device
from ranks import device, fail, on_all_ranks, say
from run_directory import RunDirectory
from torch import nn
from torch.utils.data import DataLoader


def validation_batches(args: argparse.Namespace, images: Images) -> DataLoader:
    """This rank's part of the validation images."""
    every_other = EveryOther(len(images.validation), hvd.rank(), hvd.size(), args.batch_size)
    return loader(Whole(images.validation, Transforms(args)), args.workers, batch_sampler=every_other)


@dataclass(frozen=True)
class Found:
    """What a validation has found, on all ranks together."""

    correct: int
    correct_top5: int
    loss: float  # summed over images
    problems: list[str]  # of this rank


@torch.no_grad()
def validate(model: nn.Module, batches: DataLoader, args: argparse.Namespace) -> Found:
    """Count how many images all ranks together get right, each of its own ``batches``.

    An image that cannot be read counts as one that was not recognised.
    """
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=device())
    loss = torch.zeros((), dtype=torch.float64, device=device())
    problems: list[str] = []
    for batch in on_device(batches, args.channels_last):
        outputs = model(batch.images).float()
        best = outputs.topk(min(5, outputs.shape[1])).indices == batch.labels[:, None]
        counts += torch.stack([best[:, 0].sum(), best.sum()])
        loss += F.cross_entropy(outputs, batch.labels, reduction="sum", ignore_index=-1)
        problems += batch.problems
    correct, correct_top5 = hvd.allreduce(counts, name="correct", op=hvd.Sum).tolist()
    return Found(correct, correct_top5, hvd.allreduce(loss, name="loss", op=hvd.Sum).item(), problems)


def evaluate(args: argparse.Namespace, images: Images) -> None:
    """Validate saved weights; every number of ranks finds the same.

    Ends the program on all ranks if they are not of this program, or know other classes.
    """
    saved = on_all_ranks(lambda: read_weights(args.evaluate))
    if saved["classes"] != images.validation.classes:
        fail(f"{args.evaluate} knows other classes than {args.data}")
    args.arch = saved["arch"]
    model = make_model(args, len(saved["classes"]))
    on_all_ranks(lambda: fill(model, saved["model"], args.evaluate))
    found = validate(model.to(device()), validation_batches(args, images), args)
    report_unreadable(found.problems, None)
    number = len(images.validation)
    say(
        f"{args.evaluate}, epoch {saved['epoch']}: {found.correct} of {number} images are right, accuracy "
        f"{found.correct / number:.4%}, among the first five {found.correct_top5 / number:.4%}, "
        f"loss {found.loss / number:.4f}"
    )


def read_weights(file: Path) -> dict[str, Any]:
    """What training has written to ``best.pt`` or ``last.pt``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is another file.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"{file} is no best.pt or last.pt of this program") from error
    if not isinstance(saved, dict) or not {"model", "arch", "classes", "epoch"} <= saved.keys():
        raise ValueError(f"{file} is no best.pt or last.pt of this program")
    return saved


def fill(model: nn.Module, weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Load weights into a model.

    Raises:
        ValueError: they are another model's.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{file} is no best.pt or last.pt of this program") from error


def report_unreadable(problems: list[str], run: RunDirectory | None) -> int:
    """Name the images that could not be read on any rank, and count them."""
    everywhere = sorted({*chain.from_iterable(hvd.allgather_object(problems, name="unreadable"))})
    if everywhere and run is not None:
        on_all_ranks(lambda: run.add_lines("unreadable.txt", everywhere))
    if everywhere:
        rest = ["  …, see unreadable.txt"] if len(everywhere) > 5 and run is not None else []
        lines = [f"warning: {len(everywhere)} images could not be read:", *(f"  {p}" for p in everywhere[:5]), *rest]
        say("\n".join(lines))
    return len(everywhere)
