"""Functions on real MPI ranks.

Starting ranks takes seconds, a test's function mostly less than one. So a :class:`World` keeps its ranks, hands them
one function after the other, and collects what each returns or raises. A rank that hangs or dies costs the whole
world, which is killed and started anew for the next test.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
START_SECONDS = 180  # for the imports of several ranks on a busy machine
GRACE_SECONDS = 10  # for the other ranks to end after one has failed


class RankFailedError(AssertionError):
    """At least one rank raised, died or hung; the text has each one's story."""


def mpirun_command(ranks: int) -> list[str]:
    """How ``ranks`` processes are started on this machine, whatever its number of cores."""
    beside_python = shutil.which("mpirun", path=str(Path(sys.executable).parent))
    mpirun = beside_python or shutil.which("mpirun")
    assert mpirun, "no mpirun next to this Python nor on PATH"
    command = [mpirun, "-np", str(ranks)]
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=True).stdout
    if "Open MPI" in version or "open-mpi" in version:
        command += ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        command += ["--mca", "mpi_yield_when_idle", "1"]  # ranks that share a core must not spin on it
        if not re.search(r"Open MPI\) [1-4]\.", version):
            # Killed, it leaves files that are named after its process number, and refuses to start where it finds
            # them. With thousands of processes in the tests, the next one of that number comes soon.
            command += ["--prtemca", "prte_tmpdir_base", tempfile.mkdtemp(dir=_scratch().name)]
    return command


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="hvd-compress-tests-", ignore_cleanup_errors=True)


def environment() -> dict[str, str]:
    """For the ranks: this one's, one thread each, and the test modules importable."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "HOROVOD_DYNAMIC_PROCESS_SETS": "1", "PYTHONPATH": path}


def launch(ranks: int, script: str | Sequence[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a script (its source, or a command line) on ranks of its own; stdout and stderr come together.

    Raises:
        RankFailedError: it did not end in time, and was killed.
    """
    program = ["-c", script] if isinstance(script, str) else list(script)
    command = [*mpirun_command(ranks), sys.executable, *program]
    process = subprocess.Popen(
        command,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        output, _ = process.communicate()
        raise RankFailedError(f"{ranks} ranks did not end within {timeout:g} s. Output:\n{output}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def _kill(mpirun: subprocess.Popen[Any]) -> None:
    """With its ranks, which it ends if it is asked to, and which are not of its process group."""
    mpirun.terminate()
    try:
        mpirun.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(mpirun.pid, signal.SIGKILL)
        mpirun.wait()


class World:
    """``ranks`` processes with Horovod initialised that run functions of the test modules."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._directory = Path(tempfile.mkdtemp(dir=_scratch().name))
        self._log = (self._directory / "log").open("w+")
        self._jobs = 0
        self._process = subprocess.Popen(
            [
                *mpirun_command(ranks),
                sys.executable,
                str(TESTS / "world_rank.py"),
                str(self._directory),
                str(os.getpid()),
            ],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.usable = True

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
        """Call a module-level function on every rank.

        Returns:
            What it returned on each rank, in rank order.

        Raises:
            RankFailedError: it raised on a rank, or a rank did not come back within ``timeout`` seconds.
        """
        limit = timeout if self._jobs else timeout + START_SECONDS
        job = self._directory / f"job-{self._jobs}"
        replies = [self._directory / f"reply-{self._jobs}-{rank}" for rank in range(self.ranks)]
        self._jobs += 1
        draft = job.with_suffix(".draft")
        draft.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments, limit)))
        draft.rename(job)  # a rank must not see half a file

        deadline = time.monotonic() + limit
        failed = False
        while not all(reply.exists() for reply in replies):
            if time.monotonic() > deadline or self._process.poll() is not None:
                break
            if not failed and any(reply.exists() and not pickle.loads(reply.read_bytes())[0] for reply in replies):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
            time.sleep(0.005)
        outcomes = [pickle.loads(r.read_bytes()) if r.exists() else (False, "no answer") for r in replies]
        if all(good for good, _ in outcomes):
            return [value for _, value in outcomes]
        stories = [f"--- rank {rank}\n{text}" for rank, (good, text) in enumerate(outcomes) if not good]
        if not all(reply.exists() for reply in replies):
            self.close()
            self._log.seek(0)
            stories.append(f"--- output\n{self._log.read()[-40_000:]}")
        raise RankFailedError("\n".join([f"{function.__qualname__} failed on {self.ranks} ranks", *stories]))

    def close(self) -> None:
        """End the ranks, by force if need be."""
        self.usable = False
        (self._directory / "stop").touch()
        try:
            self._process.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _kill(self._process)
