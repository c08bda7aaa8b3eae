"""Jobs that were submitted: their states, their logs, and how to end them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.table import Table
from submitit.core.utils import JobPaths

# Final only when squeue or sacct has nothing newer: a job whose node failed shows NODE_FAIL before it is requeued.
FINAL = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
UNKNOWN_SECONDS = 30  # after which a job that Slurm does not know is given up


class SlurmError(RuntimeError):
    """A command of Slurm failed; the text is what it said."""


@dataclass(frozen=True)
class State:
    """Of one job."""

    job: str  # 12, or 12_3 in an array
    state: str
    name: str = ""
    elapsed: str = ""
    nodes: str = ""  # or why there are none
    restarts: str = ""


def submitted(folder: Path) -> list[str]:
    """All jobs whose files are in ``folder``, in the order of their numbers."""
    found = [file.name.removesuffix("_submitted.pkl") for file in folder.glob("*_submitted.pkl")]
    return sorted((job for job in found if re.fullmatch(r"\d+(_\d+)?", job)), key=_key)


def states(jobs: Sequence[str]) -> list[State]:
    """The present state of each job: from squeue while it lives, then from sacct.

    Raises:
        SlurmError: Slurm does not answer.
    """
    known = _known(jobs)
    return [known.get(job, State(job, "UNKNOWN")) for job in jobs]


def table(rows: Iterable[State]) -> Table:
    """For a terminal."""
    result = Table("job", "name", "state", "time", "nodes or reason")
    for row in rows:
        result.add_row(row.job, row.name, row.state, row.elapsed, row.nodes)
    return result


def cancel(jobs: Sequence[str]) -> None:
    """End jobs; one of an array's ``12`` means all of it.

    Raises:
        SlurmError: there is no such job, or it is another user's.
    """
    # scancel says nothing about numbers that it does not know.
    known = {number for job in _known(jobs) for number in (job, job.partition("_")[0])}
    if unknown := [job for job in jobs if job not in known]:
        raise SlurmError(f"there is no job {', '.join(unknown)}")
    _output("scancel", *jobs)


def follow(job: str, folder: Path, ended: Callable[[], str | None] | None = None) -> str:
    """Print what the first rank says until the job ends, through all its requeues.

    Args:
        job: its id.
        folder: where its logs are.
        ended: says how it ended, None as long as it has not; without it Slurm is asked.

    Returns:
        The state that it ended in.
    """
    paths = JobPaths(folder, job_id=job, task_id=0)
    streams = [_Tail(paths.stdout, sys.stdout), _Tail(paths.stderr, sys.stderr)]
    ended = ended or _EndUnderSlurm(job)
    while True:
        state = ended()
        for stream in streams:
            stream.copy()
        if state is not None:
            return state
        time.sleep(1)


def wait(jobs: Sequence[str], show: Callable[[int], None]) -> None:
    """Until all have ended.

    Args:
        jobs: their ids.
        show: is told now and then how many have.
    """
    since = dict.fromkeys(jobs, time.monotonic())  # when Slurm has last known each
    pause = 0.0
    while True:
        found = states(jobs)
        now = time.monotonic()
        since.update((one.job, now) for one in found if one.state != "UNKNOWN")
        ended = sum(one.state in FINAL or now - since[one.job] > UNKNOWN_SECONDS for one in found)
        show(ended)
        if ended == len(jobs):
            return
        pause = min(30.0, pause + 1)  # less and less often, as Slurm's administrators want it
        time.sleep(pause)


class _Tail:
    """The part of a file that has not been copied yet."""

    def __init__(self, path: Path, to: TextIO) -> None:
        self._path = path
        self._to = to
        self._position = 0

    def copy(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            new = file.read()
            self._position = file.tell()
        self._to.write(new.decode(errors="replace"))
        self._to.flush()


class _EndUnderSlurm:
    """Asks less and less often, as Slurm's administrators want it."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._next = self._pause = 0.0
        self._last = ""
        self._since = time.monotonic()

    def __call__(self) -> str | None:
        now = time.monotonic()
        if now < self._next:
            return None
        self._pause = min(30.0, self._pause + 1)
        self._next = now + self._pause
        (found,) = states([self._job])
        if found.state != self._last:
            print(f"[job {self._job}: {found.state} {found.nodes}]", file=sys.stderr, flush=True)
            self._last, self._since, self._pause = found.state, now, 1.0
        if found.state == "UNKNOWN" and now - self._since > UNKNOWN_SECONDS:
            return found.state
        return found.state if found.state in FINAL else None


def _known(jobs: Sequence[str]) -> dict[str, State]:
    """By number; these jobs if Slurm knows them, and others."""
    known: dict[str, State] = {}
    for line in _output("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%j|%M|%R").splitlines():
        job, state, name, elapsed, nodes = line.split("|", 4)
        known[job] = State(job, state, name, elapsed, nodes)
    ended = sorted({job.partition("_")[0] for job in jobs if job not in known})
    if ended:
        columns = "JobID,State,JobName,Elapsed,NodeList"
        command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(ended)}"]
        for line in _output(*command, f"--format={columns}").splitlines():
            job, state, name, elapsed, nodes = line.split("|", 4)
            known.setdefault(job, State(job, state.split()[0], name, elapsed, nodes))
    return known


def _output(*command: str) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SlurmError(f"there is no {command[0]} here: is this a login node of a Slurm cluster?") from None
    if ended.returncode:
        raise SlurmError(f"{command[0]}: {ended.stderr.strip()}")
    return ended.stdout


def _key(job: str) -> tuple[int, int]:
    number, _, place = job.partition("_")
    return int(number), int(place or 0)
