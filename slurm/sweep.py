"""Sweeps: one job for each point of a grid, and one table and one picture of those that have finished.

A grid file has one mapping, or a list of them where not all combinations make sense::

    - {compression: [topk], ratio: [0.001, 0.01], sync-every: [1, 8], seed: [0, 1]}
    - {optimizer: [gradient], compression: [none], seed: [0, 1]}

Each name is an option of the script, each combination of values a job.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from profiles import ProfileError
from rich.table import Column, Table

RECORD = "sweep.json"
RUN = "{run}"  # in the script's arguments: the directory of this point
Settings = dict[str, str | int | float]


@dataclass(frozen=True)
class Point:
    """One job of a sweep."""

    job: str
    directory: str
    settings: Settings
    folder: str = "runs/slurm"  # of its logs; earlier records do not name it


@dataclass(frozen=True)
class Result:
    """What a finished run had reached, from the last line of its ``metrics.jsonl``."""

    settings: Settings
    accuracy: float
    megabytes_sent: float


def read_grid(path: Path) -> list[Settings]:
    """All points of a grid file.

    Raises:
        ProfileError: it cannot be read, or is no grid.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ProfileError(f"{path}: {error}") from None
    points: list[Settings] = []
    for grid in content if isinstance(content, list) else [content]:
        if not isinstance(grid, dict) or not grid:
            raise ProfileError(f"{path}: a grid is a mapping from options to lists of values, got {grid!r}")
        for name, values in grid.items():
            if not isinstance(values, list) or not values or any(isinstance(v, (list, dict, bool)) for v in values):
                raise ProfileError(f"{path}: {name} needs a list of numbers or texts, got {values!r}")
        points += [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = [directory_name(point) for point in points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ProfileError(f"{path}: a point occurs twice: {', '.join(sorted(twice))}")
    return points


def directory_name(settings: Settings) -> str:
    """Tells the points of a sweep apart."""
    return ",".join(f"{name}={value}" for name, value in settings.items()).replace("/", "-")


def arguments(script: Sequence[str], settings: Settings, directory: Path) -> list[str]:
    """The script's command line at one point."""
    options = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in settings.items())
    return [argument.replace(RUN, str(directory)) for argument in (*script, *options)]


def write_record(directory: Path, points: Sequence[Point]) -> None:
    """So that :func:`read_record` finds them."""
    text = json.dumps([asdict(point) for point in points], indent=1)
    (directory / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(directory: Path) -> list[Point]:
    """The points of the sweep in ``directory``.

    Raises:
        ProfileError: there is none, or its record cannot be read.
    """
    record = directory / RECORD
    try:
        points = [Point(**point) for point in json.loads(record.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise ProfileError(f"there is no sweep in {directory} ({RECORD} is missing)") from None
    except (OSError, TypeError, ValueError) as error:
        raise ProfileError(f"{record} cannot be read ({error}); the runs themselves are beside it") from None
    if not points:
        raise ProfileError(f"{record} holds no runs")
    return points


def read_result(point: Point, state: str) -> Result:
    """Of a run whose job is in ``state``.

    Raises:
        ProfileError: it has not finished, or its script wrote no metrics, or measured no accuracy at its end.
    """
    if state != "COMPLETED":
        raise ProfileError(f"it is {state}")
    metrics = Path(point.directory) / "metrics.jsonl"
    try:
        last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
        numbers = {name: last[name] for name in ("accuracy", "megabytes_sent")}
    except (OSError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ProfileError(
            f"{metrics}: no line with accuracy and megabytes_sent ({error}); is {RUN} in the arguments?"
        ) from None
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ProfileError(f"{metrics}: in the last line {name} must be a number, got {json.dumps(value)}")
    return Result(point.settings, **numbers)


def over_seeds(results: Sequence[Result]) -> list[tuple[Settings, list[Result]]]:
    """Results that differ in nothing but their ``seed``, together."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[directory_name(_without_seed(result.settings))].append(result)
    return [(_without_seed(group[0].settings), group) for group in groups.values()]


def table(results: Sequence[Result]) -> Table:
    """One line for each point, seeds together."""
    groups = over_seeds(results)
    names = list(dict.fromkeys(name for settings, _ in groups for name in settings))
    rendered = Table(*(Column(name, overflow="fold") for name in names), title="Finished runs", show_edge=False)
    for column in ("seeds", "accuracy", "MB sent\nper rank"):
        rendered.add_column(column, justify="right", no_wrap=True)
    for settings, group in groups:
        accuracy, megabytes = _statistics(group)
        spread = f" ± {accuracy[1]:.1%}".replace("%", "") if len(group) > 1 else ""
        row = [str(settings.get(name, "")) for name in names]
        rendered.add_row(*row, str(len(group)), f"{accuracy[0]:.1%}{spread}", f"{megabytes[0]:,.1f}")
    return rendered


def draw(results: Sequence[Result], path: Path) -> None:
    """Accuracy against megabytes sent; a bar is one standard deviation over the seeds."""
    # Here, since it takes a second, which every other command would have to wait too.
    import matplotlib as mpl

    mpl.use("Agg")  # login nodes have no display
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
        for number, (settings, group) in enumerate(over_seeds(results)):
            accuracy, megabytes = _statistics(group)
            label = ", ".join(f"{name} {value}" for name, value in settings.items()) or "all"
            marker = "osD^vP"[number // 10 % 6]
            axes.errorbar(megabytes[0], 100 * accuracy[0], 100 * accuracy[1], fmt=marker, capsize=3, label=label)
        if all(result.megabytes_sent > 0 for result in results):
            axes.set_xscale("log")
        axes.set_xlabel("Megabytes sent per rank")
        axes.set_ylabel("Accuracy (%)")
        axes.grid(which="major", alpha=0.3)
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, dpi=200)
        plt.close(figure)


def _without_seed(settings: Mapping[str, Any]) -> Settings:
    return {name: value for name, value in settings.items() if name != "seed"}


def _statistics(group: Sequence[Result]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Mean and standard deviation of accuracy and of megabytes."""

    def of(numbers: list[float]) -> tuple[float, float]:
        return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0

    return of([result.accuracy for result in group]), of([result.megabytes_sent for result in group])
