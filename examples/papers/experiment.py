"""What the experiments share: ranks that train case after case, and results that a killed run goes on from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from images import Images, open_images
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]

Case = Mapping[str, Any]
"""All that one training depends on: plain values, by name."""


class Point(NamedTuple):
    """A moment of a training."""

    step: int
    sent: float  # bytes that left a rank, the mean over ranks
    upward: float  # of them, those that are not a server's answers
    error: float  # part of the test images that is taken for something else
    loss: float  # on the test images


@dataclass(frozen=True)
class Run:
    """A finished training."""

    case: Case
    curve: list[Point]
    notes: dict[str, Any]  # what else was measured


class Results:
    """A file with a line for each finished run, which the next start skips."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Run]:
        """All that is there; a last line that was cut off by a kill is not."""
        if not self.path.exists():
            return []
        runs = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            runs.append(Run(record["case"], [Point(*point) for point in record["curve"]], record["notes"]))
        return runs

    def add(self, run: Run) -> None:
        """As the last line, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        curve = [[p.step, round(p.sent), round(p.upward), round(p.error, 5), round(p.loss, 5)] for p in run.curve]
        line = json.dumps({"case": run.case, "curve": curve, "notes": run.notes}, separators=(",", ":"))
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            text = file.read()
            file.seek(text.rfind(b"\n") + 1)
            file.truncate()
            file.write(line.encode() + b"\n")


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    case: Case,
    sent: Callable[[], int],
    after_step: Callable[[int], None] = lambda step: None,
) -> list[Point]:
    """Train on this rank's part of the images, and look at the test images again and again.

    Every rank tests the model that it has on its part of the test images; only after the last step are the ranks
    asked what they have seen, so that nothing is exchanged but for training.

    Args:
        case: has ``steps``, ``batch_size``, ``evaluate_every`` and ``seed``; the last sets which images come when.
        sent: bytes that this rank has sent so far.
        after_step: called with each step's number.

    Returns:
        The curve of all ranks together.
    """
    generator = torch.Generator().manual_seed(1_000 * case["seed"] + hvd.rank())
    seen = []
    for step in range(1, case["steps"] + 1):
        batch = torch.randint(len(images.train_labels), (case["batch_size"],), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images.train_images[batch]), images.train_labels[batch]).backward()
        optimizer.step()
        after_step(step)
        if step % case["evaluate_every"] == 0 or step == case["steps"]:
            seen.append((step, sent(), *_test(model, images)))
    of_all = hvd.allgather_object(seen, name="seen")
    curve = []
    for moments in zip(*of_all, strict=True):
        steps, bytes_, wrong, loss = zip(*moments, strict=True)
        # The first rank is the one that serves others, if one does.
        curve.append(
            Point(steps[0], mean(bytes_), mean(bytes_[1:]), sum(wrong) / images.tests, sum(loss) / images.tests)
        )
    return curve


@torch.no_grad()
def _test(model: torch.nn.Module, images: Images) -> tuple[int, float]:
    """How many of this rank's test images are taken for something else, and the sum of the losses."""
    model.eval()
    logits, labels = model(images.test_images), images.test_labels
    model.train()
    return int((logits.argmax(1) != labels).sum()), float(F.cross_entropy(logits, labels, reduction="sum"))


def run_cases(
    cases: Sequence[Case], images: Images, results: Results, train_case: Callable[[Case, Images], Run]
) -> None:
    """Train those whose results are not there yet. Collective; the first rank writes."""
    done = hvd.broadcast_object([run.case for run in results.read()], name="done")
    due = [case for case in cases if case not in done]
    bar = tqdm(due, disable=hvd.rank() != 0, unit="run", initial=len(cases) - len(due), total=len(cases))
    for case in bar:
        bar.set_postfix_str(" ".join(str(value) for value in list(case.values())[:5]))
        run = train_case(case, images)
        if hvd.rank() == 0:
            results.add(run)


def initial_model(model: torch.nn.Module) -> torch.nn.Module:
    """The same on all ranks."""
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return model


def decay(optimizer: torch.optim.Optimizer, case: Case) -> Callable[[int], None]:
    """After each step, the learning rate ``lr · (1 − step/steps)``, not below a hundredth of lr."""

    def after_step(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = case["lr"] * max(0.01, 1 - step / case["steps"])

    return after_step


# ------------------------------------------------------------------------------------------------ the command line


def main(
    description: str,
    *,
    ranks: Mapping[str, int],
    cases: Callable[[str, str, int, Sequence[int], bool], list[Case]],
    train_case: Callable[[Case, Images], Run],
    report: Callable[[list[Run]], Mapping[str, str]],
    draw: Callable[[list[Run], Path], None],
) -> None:
    """Run one experiment; without ranks of its own, start them.

    Args:
        ranks: of each part of the experiment.
        cases: of a part, images, a number of ranks, seeds; short or not.
        train_case: on all ranks.
        report: Markdown tables by name.
        draw: the figure.
    """
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of IDX files (default: scikit-learn's digits)")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "runs" / "papers" / f"{name}.jsonl", help="(%(default)s)"
    )
    parser.add_argument("--page", type=Path, help="write the tables into this page, and the figure beside it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--short", action="store_true", help="a few steps of a few cases on two ranks")
    parser.add_argument("--report", action="store_true", help="only print and draw what the results file holds")
    parser.add_argument("--part", choices=list(ranks), help="be one rank of this part; started by mpirun")
    args = parser.parse_args()
    results = Results(args.results)
    if args.part:
        hvd.init()
        torch.set_num_threads(1)
        images = open_images(args.data, hvd.rank(), hvd.size(), tests=2000)
        run_cases(cases(args.part, images.name, hvd.size(), args.seeds, args.short), images, results, train_case)
        return
    for part, number in ranks.items():
        if not args.report:
            start_ranks(2 if args.short else number, [sys.argv[0], *sys.argv[1:], "--part", part])
    runs = results.read()
    if not runs:
        sys.exit(f"{name}.py: error: {args.results} holds no results: run this without --report first")
    tables = report(runs)
    for title, table in tables.items():
        print(f"\n{title}\n\n{table}")
    page = args.page or args.results.with_suffix(".md")
    draw(runs, page.with_suffix(".png"))
    if args.page:
        write_tables(page, tables)
    print(f"\n{page.with_suffix('.png')}")


def start_ranks(number: int, command: Sequence[str]) -> None:
    """Run a command on so many ranks of this machine.

    Raises:
        SystemExit: it failed.
    """
    launcher = [sys.executable, str(ROOT / "scripts" / "bootstrap.py"), "--mpirun", str(number)]
    ended = subprocess.run([*launcher, sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ended.returncode:
        sys.exit(f"the ranks ended with status {ended.returncode}; the same command goes on with what is missing")


def environment() -> dict[str, Any]:
    """Where a result comes from."""
    versions = {package: version(package) for package in ("torch", "horovod", "mpi4py")}
    return {"machine": platform.machine(), "cores": os.cpu_count(), **versions}


# ------------------------------------------------------------------------------------------------------- reporting


def spread(values: Iterable[float], form: str) -> str:
    """Mean ± standard deviation; a mean alone for a single value."""
    values = list(values)
    text = f"{mean(values):{form}}"
    return f"{text} ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else text


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table between its two marks in the page, ``<!-- table: NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: the page has no marks for one of them.
    """
    text = page.read_text()
    for name, table in tables.items():
        before, found, rest = text.partition(f"<!-- table: {name} -->\n")
        if not found:
            raise ValueError(f"{page} has no mark <!-- table: {name} -->")
        text = f"{before}{found}\n{table}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    page.write_text(text)
