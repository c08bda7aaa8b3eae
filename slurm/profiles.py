"""What a cluster needs to know about a job, from three sources: defaults, a profile in YAML, the command line."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

CLUSTERS = Path(__file__).parent / "clusters"
Launcher = Literal["srun", "mpirun"]
GpuBinding = Literal["node", "task"]


class ProfileError(ValueError):
    """A setting that cannot be; the text says which and what would be right."""


@dataclass(frozen=True)
class Profile:
    """The settings of a job; in a profile, each of them may be given or left out."""

    # What the job asks for
    partition: str | None = None  # None: the cluster's default
    account: str | None = None
    nodes: int = 1
    gpus_per_node: int = 0
    gpu_type: str | None = None  # where a partition has several
    ranks_per_node: int | None = None  # None: one for each GPU, or one
    cpus_per_task: int | None = None
    time: str = "1:00:00"  # minutes, h:mm:ss or d-hh:mm:ss
    sbatch: Mapping[str, Any] = field(default_factory=dict)  # more options of sbatch, by their long names
    # How it starts
    launcher: Launcher = "srun"
    mpi: str | None = "pmix"  # srun --mpi=…; None: the cluster's default
    cpu_bind: str | None = "cores"  # srun --cpu-bind=…
    gpu_binding: GpuBinding = "node"  # each rank sees all GPUs of its node, or only its own
    srun: tuple[str, ...] = ()  # more arguments
    mpirun: tuple[str, ...] = ()  # more arguments
    modules: tuple[str, ...] = ()  # to load
    setup: tuple[str, ...] = ()  # shell lines before all else
    environment: Mapping[str, str] = field(default_factory=dict)
    container: tuple[str, ...] = ()  # command before the script's Python: apptainer exec --nv image.sif
    python: str | None = None  # that runs the script; None: the one that submits
    # When it is interrupted
    signal_seconds: int = 120  # before the time is over
    max_requeues: int = 20

    @property
    def tasks_per_node(self) -> int:
        """MPI ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * self.tasks_per_node

    @property
    def minutes(self) -> int:
        """The time limit, rounded up."""
        return parse_time(self.time)

    @property
    def variables(self) -> dict[str, Any]:
        """Of the environment, but for those that a later source took back by giving nothing."""
        return {name: value for name, value in self.environment.items() if value is not None}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Profile)
        for setting in dataclasses.fields(self):
            _check(setting.name, getattr(self, setting.name), hints[setting.name])
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("max_requeues", 0), ("signal_seconds", 1)):
            if getattr(self, name) < least:
                raise ProfileError(f"{name} must be {least} or more, got {getattr(self, name)}")
        for name in ("ranks_per_node", "cpus_per_task"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ProfileError(f"{name} must be 1 or more, got {value}")
        if 60 * self.minutes <= self.signal_seconds:
            raise ProfileError(f"signal_seconds={self.signal_seconds} must be less than time={self.time}")
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ProfileError(f"gpu_type={self.gpu_type} needs gpus_per_node")
        if self.gpu_binding == "task" and self.launcher == "mpirun":
            raise ProfileError("gpu_binding=task is srun's, and launcher=mpirun: leave it out, or use srun")
        if self.gpu_binding == "task" and self.tasks_per_node != self.gpus_per_node:
            raise ProfileError(
                f"gpu_binding=task needs as many ranks as GPUs on each node, not {self.tasks_per_node} and "
                f"{self.gpus_per_node}"
            )
        _check_names(self.sbatch, self.environment)
        own = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "partition", "account"}
        instead = {"no-requeue": "requeue: false", "job-name": "--name on the command line"}
        for name in self.sbatch:
            option = name.replace("_", "-")
            if option in own:
                raise ProfileError(f"sbatch: {name} has a setting of its own, outside of sbatch")
            if option in instead:
                raise ProfileError(f"sbatch: {name} cannot be set; what you mean is {instead[option]}")
            if option in ("output", "error", "array"):
                raise ProfileError(f"sbatch: {name} cannot be set, since logs are found and sweeps are made with it")


def load(name: str) -> dict[str, Any]:
    """A profile's settings.

    Args:
        name: of a file in ``slurm/clusters`` without its ending, or the path of any file.

    Raises:
        ProfileError: there is no such profile, or it is not in order.
    """
    path = CLUSTERS / f"{name}.yaml" if re.fullmatch(r"[\w-]+", name) else Path(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = sorted(file.stem for file in CLUSTERS.glob("*.yaml"))
        raise ProfileError(f"no profile {path} ({error.strerror}); there are {', '.join(known)}") from None
    except yaml.YAMLError as error:
        raise ProfileError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ProfileError(f"{path} must hold settings as 'name: value'")
    return content


def merge(*sources: tuple[str, Mapping[str, Any]]) -> Profile:
    """The defaults, changed by one source after the other.

    ``sbatch`` and ``environment`` are merged name by name, every other setting is replaced.

    Args:
        sources: each with what it is called in errors.

    Raises:
        ProfileError: a setting is unknown, of the wrong type, or out of its range.
    """
    known = [setting.name for setting in dataclasses.fields(Profile)]
    merged: dict[str, Any] = {}
    for source, settings in sources:
        for name, value in settings.items():
            if name not in known:
                raise ProfileError(
                    f"{source}: unknown setting {name!r}{did_you_mean(str(name).replace('-', '_'), known)}"
                )
            if isinstance(value, list):
                value = tuple(value)
            if isinstance(value, dict) and isinstance(merged.get(name), dict):
                value = {**merged[name], **value}
            merged[name] = value
    try:
        return Profile(**merged)
    except ProfileError as error:
        raise ProfileError(f"{' + '.join(dict.fromkeys(source for source, _ in sources))}: {error}") from None


def did_you_mean(name: str, known: list[str]) -> str:
    """The nearest known name, to end an error with."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f": did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def parse_time(text: str) -> int:
    """Slurm's forms of a time limit, in minutes.

    Raises:
        ProfileError: it is none of them.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ProfileError(f"time must be minutes, h:mm:ss or d-hh:mm:ss, got {text!r}")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        hours, minutes, seconds = first or 0, second or 0, third or 0
    elif third is not None:
        hours, minutes, seconds = first or 0, second or 0, third
    else:
        hours, minutes, seconds = 0, first or 0, second or 0
    total = ((days or 0) * 24 + hours) * 60 + minutes + (seconds + 59) // 60
    if total < 1:
        raise ProfileError(f"time must be 1 minute or more, got {text!r}")
    return total


def _check(name: str, value: Any, hint: Any) -> None:
    """YAML gives what it likes: 12:00:00 without quotes is a number, yes is True."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is Literal:
            if value in typing.get_args(option):
                return
        elif origin is tuple:
            if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
                return
        elif isinstance(value, origin) and not (isinstance(value, bool) and origin is int):
            return
    wanted = " or ".join(_describe(option) for option in options)
    hint_time = " (in YAML, write it in quotes)" if name == "time" else ""
    raise ProfileError(f"{name} must be {wanted}, got {value!r}{hint_time}")


def _check_names(sbatch: Mapping[Any, Any], environment: Mapping[Any, Any]) -> None:
    """YAML takes qos:long, without a space, for a name without a value, and 1:00:00 for a number of seconds."""
    for name, value in sbatch.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            raise ProfileError(f"sbatch: {name!r} is no option's name; in 'name: value', a space follows the colon")
        if isinstance(value, (list, dict)):
            raise ProfileError(f"sbatch: {name} must be one value, got {value!r}; several are one text, 'a,b'")
        if (
            name.replace("_", "-") in ("time-min", "deadline", "begin")
            and value is not None
            and type(value) is not str
        ):
            raise ProfileError(f"sbatch: {name} must be a text, got {value!r} (in YAML, write it in quotes)")
    for name, value in environment.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ProfileError(
                f"environment: {name!r} is no variable's name; in 'name: value', a space follows the colon"
            )
        if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int, float))):
            raise ProfileError(f"environment: {name} must be a text, got {value!r}: put it in quotes")


def _describe(option: Any) -> str:
    origin = typing.get_origin(option) or option
    if origin is Literal:
        return " or ".join(typing.get_args(option))
    names = {int: "a whole number", str: "a text", tuple: "a list of texts", types.NoneType: "nothing"}
    return names.get(origin, "a list of 'name: value'")
