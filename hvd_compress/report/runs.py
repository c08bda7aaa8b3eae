"""Runs as they lie on the disk, and what is said of them in a table."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("input", "compute", "compress", "exchange")
"""What an epoch's time is spent on."""
ALWAYS = ("epoch", "megabytes_sent")
"""Numbers that each line has."""
PERHAPS = (
    *("seconds", "val_loss", "train_loss", "images_per_second", "ratio_to_fp32", "ranks"),
    *(f"seconds_{kind}" for kind in KINDS),
)
"""Numbers that a line may lack."""


class RunError(ValueError):
    """A directory that is no run, or a name that is none's."""


class NotYetError(RunError):
    """A run that has nothing to show yet, or a directory beside some that is none."""


@dataclass(frozen=True)
class Run:
    """The epochs of one training, and its settings if they are known."""

    name: str
    epochs: tuple[Mapping[str, Any], ...]  # lines of metrics.jsonl, in their order; what is null or NaN is absent
    directory: str = ""
    settings: str = ""  # config.yaml

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], directory: str = "", settings: str = "") -> Run:
        """From the lines of one run, at least one; an accuracy, say, may be null where none was measured."""
        epochs = tuple({key: value for key, value in record.items() if _is_there(value)} for record in records)
        return cls(str(epochs[0]["run"]), epochs, directory, settings)

    def column(self, key: str) -> list[float]:
        """A number of each epoch; NaN where an epoch lacks it.

        Args:
            key: of the metrics file, or ``"megabytes"``, ``"minutes"`` (since the start), ``"loss"`` (validation's,
                or training's where no epoch has any, so that
                a curve is of one kind).
        """
        if key == "loss":
            key = "val_loss" if any("val_loss" in epoch for epoch in self.epochs) else "train_loss"
        return [_number(epoch, key) for epoch in self.epochs]

    @property
    def best(self) -> float:
        """The highest accuracy; of the epochs, one at least must have one."""
        return max(self._accuracies)

    @property
    def last(self) -> float:
        """The accuracy that was measured last."""
        return self._accuracies[-1]

    @property
    def _accuracies(self) -> list[float]:
        return [epoch["accuracy"] for epoch in self.epochs if "accuracy" in epoch]


def _is_there(value: Any) -> bool:
    """Not so null, and the NaN and infinity that Python writes into JSON."""
    return math.isfinite(value) if isinstance(value, float) else value is not None


def _number(epoch: Mapping[str, Any], key: str) -> float:
    if key == "megabytes":
        return float(epoch["megabytes_sent"])
    if key == "minutes":
        return epoch["seconds"] / 60 if "seconds" in epoch else float("nan")
    return float(epoch.get(key, "nan"))


def read(path: Path) -> list[Run]:
    """The runs in a directory, or in a ``metrics.jsonl``.

    A last line that is cut off, by a job that writes it just now, is left out.

    Raises:
        NotYetError: a directory has none, or no epochs of one, or no accuracy.
        RunError: there is nothing there, or a line has something else where a number must be.
    """
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    config = metrics.with_name("config.yaml")
    try:
        text = metrics.read_text(encoding="utf-8")
        settings = config.read_text(encoding="utf-8") if config.is_file() else ""
        lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for number, line in enumerate(lines, start=1):
            record = json.loads(line)
            problem = _problem(record)
            if problem:
                raise RunError(f"{metrics}, line {number}: {problem}")
            groups.setdefault(str(record["run"]), []).append(record)
    except OSError as error:
        kind = NotYetError if path.is_dir() and not metrics.exists() else RunError
        raise kind(f"{path} is no run: {error.strerror} ({metrics})") from None
    except (ValueError, AttributeError) as error:
        raise error if isinstance(error, RunError) else RunError(f"{metrics} is no metrics file: {error}") from None
    if not groups:
        raise NotYetError(f"{metrics} has no epochs yet")
    for name, group in groups.items():
        if not any(_is_there(record["accuracy"]) for record in group):
            raise NotYetError(f"{metrics}: {name} has no accuracy yet")
    return [Run.of(group, str(metrics.parent), settings) for group in groups.values()]


def _problem(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a line, and what is expected there."""
    absent = {"run", "accuracy", *ALWAYS} - record.keys()
    if absent:
        return f"lacks {', '.join(sorted(absent))}"
    accuracy = record["accuracy"]
    if accuracy is not None and not (_is_number(accuracy) and (math.isnan(accuracy) or 0 <= accuracy <= 1)):
        return f"accuracy must be from 0 to 1, 0.75 for 75 %, or null if it was not measured; got {accuracy!r}"
    for key in ALWAYS:
        if not (_is_number(record[key]) and math.isfinite(record[key])):
            return f"{key} must be a number, got {record[key]!r}"
    for key in PERHAPS:
        if record.get(key) is not None and not _is_number(record[key]):
            return f"{key} must be a number or null, got {record[key]!r}"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # no bool


def label(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs by names that tell them apart: their own, with the directory where two are alike."""
    names = [run.name for run in runs]
    labels: dict[str, Run] = {}
    for run in runs:
        name = run.name if names.count(run.name) == 1 else f"{Path(run.directory).name}: {run.name}"
        if name in labels:
            name = f"{run.directory}: {run.name}"
        number = 2
        while name in labels:
            name, number = f"{run.directory}: {run.name} ({number})", number + 1
        labels[name] = run
    return labels


def find(name: str, runs: Mapping[str, Run]) -> str:
    """The label that is meant by a label, a run's own name, or its directory.

    Raises:
        RunError: none or several are.
    """
    if name in runs:
        return name
    meant = [key for key, run in runs.items() if name in (run.name, run.directory, Path(run.directory).name)]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise RunError(f"{name!r} could be any of {', '.join(map(repr, meant))}")
    near = difflib.get_close_matches(name, runs, n=1)
    raise RunError(f"no run is called {name!r}; " + (f"did you mean {near[0]!r}? " if near else "") + _known(runs))


def _known(runs: Iterable[str]) -> str:
    return f"There are {', '.join(map(repr, runs))}"


@dataclass(frozen=True)
class Summary:
    """One run in a table; None where there is nothing to say."""

    label: str
    ranks: int | None
    epochs: int
    best: float  # accuracy, from 0 to 1
    last: float
    megabytes: float  # sent by each rank
    ratio_to_fp32: float | None
    seconds: float | None
    images_per_second: float | None  # mean over epochs
    shares: Mapping[str, float]  # of training time, by kind; empty if not known
    target_epoch: int | None  # the first that reached the target
    target_bits: float | None  # sent by each rank until its end
    target_seconds: float | None
    saving: float | None  # how many times fewer bits than the baseline until the target
    faster: float | None  # how many times less time


def default_target(runs: Iterable[Run]) -> float:
    """The highest accuracy that all of them reach."""
    return min(run.best for run in runs)


def summarise(runs: Mapping[str, Run], target: float, baseline: str | None) -> list[Summary]:
    """All runs, in their order.

    Args:
        runs: by label.
        target: accuracy, from 0 to 1.
        baseline: the label of the run that savings are against; None for none.
    """
    reached = {name: _reached(run, target) for name, run in runs.items()}
    against = (None, None, None) if baseline is None else reached[baseline]
    return [_summary(name, run, reached[name], against) for name, run in runs.items()]


def _reached(run: Run, target: float) -> tuple[int | None, float | None, float | None]:
    """Epoch, bits and seconds at the end of the first epoch that was as good as that."""
    for epoch in run.epochs:
        if epoch.get("accuracy", -1.0) >= target:
            return epoch["epoch"], 8e6 * epoch["megabytes_sent"], epoch.get("seconds")
    return None, None, None


def _summary(
    name: str,
    run: Run,
    reached: tuple[int | None, float | None, float | None],
    against: tuple[int | None, float | None, float | None],
) -> Summary:
    last = run.epochs[-1]
    rates = [e["images_per_second"] for e in run.epochs if e.get("images_per_second")]
    seconds = {kind: sum(e.get(f"seconds_{kind}", 0.0) for e in run.epochs) for kind in KINDS}
    total = sum(seconds.values())
    return Summary(
        label=name,
        ranks=last.get("ranks"),
        epochs=len(run.epochs),
        best=run.best,
        last=run.last,
        megabytes=last["megabytes_sent"],
        ratio_to_fp32=last.get("ratio_to_fp32"),
        seconds=last.get("seconds"),
        images_per_second=sum(rates) / len(rates) if rates else None,
        shares={kind: value / total for kind, value in seconds.items()} if total else {},
        target_epoch=reached[0],
        target_bits=reached[1],
        target_seconds=reached[2],
        saving=_times(against[1], reached[1]),
        faster=_times(against[2], reached[2]),
    )


def _times(baseline: float | None, own: float | None) -> float | None:
    return baseline / own if baseline and own else None


def bits(number: float | None) -> str:
    """A number of bits, with three digits and a unit."""
    if number is None:
        return "–"
    for power, unit in ((12, "Tbit"), (9, "Gbit"), (6, "Mbit"), (3, "kbit")):
        if number >= 10**power:
            scaled = number / 10**power
            return f"{scaled:.0f} {unit}" if scaled >= 99.95 else f"{scaled:.3g} {unit}"
    return f"{number:.0f} bit"


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds, as far as they matter."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
