"""Jobs that were submitted: their states, their logs, and how to end them."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.table import Table
from submitit.core.utils import JobPaths, pickle_load

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
PATIENCE_SECONDS = 300  # in which Slurm must answer those who wait: a busy slurmctld does not always


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


def tasks(array: str, folder: Path) -> list[str]:
    """The jobs of an array whose files are in ``folder``; none, if it is a single job."""
    return [job for job in submitted(folder) if job.startswith(f"{array}_")]


def states(jobs: Sequence[str], folder: Path) -> list[State]:
    """The present state of each job: from squeue, then from sacct, then from what it has left in its folder.

    Raises:
        SlurmError: Slurm does not answer.
    """
    known = _known(jobs)
    return [known.get(job) or _left(job, folder) for job in jobs]


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
    ended = ended or _EndUnderSlurm(job, folder)
    while True:
        state = ended()
        for stream in streams:
            stream.copy()
        if state is not None:
            return state
        time.sleep(1)


def wait(jobs: Sequence[str], folder: Path, show: Callable[[int], None]) -> list[State]:
    """Until all have ended.

    Args:
        jobs: their ids.
        folder: where their files are.
        show: is told now and then how many have.

    Returns:
        The states that they ended in.
    """
    since = dict.fromkeys(jobs, time.monotonic())  # when Slurm has last known each
    patience, pause = _Patience(), 0.0
    while True:
        found = patience.try_to(lambda: states(jobs, folder))
        if found is not None:
            now = time.monotonic()
            since.update((one.job, now) for one in found if one.state != "UNKNOWN")
            ended = sum(one.state in FINAL or now - since[one.job] > UNKNOWN_SECONDS for one in found)
            show(ended)
            if ended == len(jobs):
                return found
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

    def __init__(self, job: str, folder: Path) -> None:
        self._job = job
        self._folder = folder
        self._patience = _Patience()
        self._next = self._pause = 0.0
        self._last = ""
        self._since = time.monotonic()

    def __call__(self) -> str | None:
        now = time.monotonic()
        if now < self._next:
            return None
        self._pause = min(30.0, self._pause + 1)
        self._next = now + self._pause
        answer = self._patience.try_to(lambda: states([self._job], self._folder))
        if answer is None:
            return None
        (found,) = answer
        if found.state != self._last:
            print(f"[job {self._job}: {found.state} {found.nodes}]", file=sys.stderr, flush=True)
            self._last, self._since, self._pause = found.state, now, 1.0
        if found.state == "UNKNOWN" and now - self._since > UNKNOWN_SECONDS:
            return found.state
        return found.state if found.state in FINAL else None


class _Patience:
    """With a Slurm that does not answer for a while."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def try_to(self, ask: Callable[[], list[State]]) -> list[State] | None:
        """What it returns, or None if Slurm does not answer now.

        Raises:
            SlurmError: it has not for too long.
        """
        try:
            found = ask()
        except SlurmError as error:
            if time.monotonic() - self._since > PATIENCE_SECONDS:
                raise
            _say_once(f"{error}; asking again for {PATIENCE_SECONDS // 60} minutes")
            return None
        self._since = time.monotonic()
        return found


def _known(jobs: Sequence[str]) -> dict[str, State]:
    """By number; these jobs if Slurm knows them, and others."""
    # Of jobs that have ended, the controller knows those of the last minutes (MinJobAge).
    command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%j|%M|%R"]
    known = _parsed(_output(*command))
    ended = {job.partition("_")[0] for job in jobs if job not in known}
    return {**_accounted(sorted(ended)), **known} if ended else known


def _accounted(jobs: Sequence[str]) -> dict[str, State]:
    """What the accounting knows of jobs and arrays; nothing where there is none, as on many small clusters."""
    columns = "JobID,State,JobName,Elapsed,NodeList"
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(jobs)}"]
    try:
        return _parsed(_output(*command, f"--format={columns}"))
    except (SlurmError, FileNotFoundError) as error:
        _say_once(f"no accounting ({error}): of jobs that ended some time ago, only what their files say is known")
        return {}


def _left(job: str, folder: Path) -> State:
    """From the result that submitit writes when the first rank has ended, and so the script on all of them."""
    result = JobPaths(folder, job).result_pickle
    if not result.exists():  # which most failures, too, do not come to
        return State(job, "UNKNOWN")
    outcome, _ = pickle_load(result)
    return State(job, "COMPLETED" if outcome == "success" else "FAILED")


def _parsed(text: str) -> dict[str, State]:
    """Lines of squeue or sacct."""
    rows = (line.split("|", 4) for line in text.splitlines())
    return {job: State(job, state.split()[0], name, elapsed, nodes) for job, state, name, elapsed, nodes in rows}


@functools.cache
def _say_once(warning: str) -> None:
    """Those who wait ask again and again."""
    print(f"warning: {warning}", file=sys.stderr, flush=True)


def _output(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SlurmError(f"{command[0]}: {ended.stderr.strip()}")
    return ended.stdout


def _key(job: str) -> tuple[int, int]:
    number, _, place = job.partition("_")
    return int(number), int(place or 0)
