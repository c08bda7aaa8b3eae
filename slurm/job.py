"""What runs on the nodes, around the script: once for each rank under srun, once for all under mpirun.

It starts the ranks, hands signals on to them, and decides by their exit status what becomes of the job: 0 is success,
75 (``os.EX_TEMPFAIL``) means that they have saved their state and the job is to be requeued, all else is an error.

The module travels with the job, pickled by value: it must not import others of this folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import submitit
from submitit.helpers import DelayedSubmission

REQUEUE_SECONDS = 60  # in which Slurm ends the tasks of a job that is requeued


@dataclass(frozen=True)
class Job:
    """Called by submitit in each task."""

    command: tuple[str, ...]
    max_requeues: int
    stop_after: float | None = None  # seconds; None: Slurm sends the signal
    restarts: int = 0  # without Slurm, which counts by itself

    def __call__(self) -> None:
        """Run the ranks to their end; ends this process with an error if they failed or were restarted too often."""
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", self.restarts))
        if restarts > self.max_requeues:
            fail(
                f"this is restart {restarts}, and max_requeues={self.max_requeues}: a job that gets no further, or "
                "ends its nodes, would be requeued for ever. Look at the log, then submit it again"
            )
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        environment = {**os.environ, "SLURM_RESTART_COUNT": str(restarts)}
        # With pmi2, srun speaks to MPI through PMI_FD.
        ranks = subprocess.Popen(self._found(), close_fds=False, env=environment)
        # Slurm signals every process of the job, but mpirun's ranks on other nodes get it through mpirun only.
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda *_: ranks.send_signal(signal.SIGUSR2))
        try:
            status = self._wait(ranks)
        finally:
            if ranks.poll() is None:
                ranks.terminate()
            # From here to the end of this process they would end it, as Python takes its handlers away first.
            for number in (signal.SIGUSR2, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        if status == os.EX_TEMPFAIL:
            _requeue(requeue)
        elif status:
            why = f"signal {-status}" if status < 0 else f"exit status {status}"
            fail(f"the script ended with {why}; what it said is above, or in another rank's log")

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after the requeue: the same; the script finds its own checkpoint."""
        return DelayedSubmission(replace(self, restarts=self.restarts + 1))

    def _wait(self, ranks: subprocess.Popen[bytes]) -> int:
        try:
            return ranks.wait(self.stop_after)
        except subprocess.TimeoutExpired:
            ranks.send_signal(signal.SIGUSR2)
            return ranks.wait()

    def _found(self) -> list[str]:
        """The command, its program looked for beside Python first: virtual environments bring their own mpirun."""
        beside = shutil.which(self.command[0], path=str(Path(sys.executable).parent))
        return [beside or self.command[0], *self.command[1:]]


def _requeue(by_submitit: Any) -> None:
    """Ask for a requeue in the first task; the others wait for the end that it brings them."""
    environment = submitit.JobEnvironment()
    if environment.global_rank == 0:
        if environment.cluster == "slurm" and (why := _why_not(environment.raw_job_id)):
            fail(f"the ranks have saved their state; the job is not requeued, since {why}")
        by_submitit(signal.SIGUSR2, None)
    time.sleep(REQUEUE_SECONDS)
    fail("the ranks have saved their state, but the job was not requeued")


def fail(message: str) -> NoReturn:
    """Not by an exception: submitit would bury the script's own error below two tracebacks."""
    environment = submitit.JobEnvironment()
    sys.exit(f"error: task {environment.global_rank} on {environment.hostname}: {message}")


def _why_not(job_id: str) -> str | None:
    """What speaks against a requeue, if anything: Slurm's own record knows it, whoever has set it."""
    try:
        shown = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "its state is unknown (there is no scontrol here; if this is a container, it needs one)"
    state = re.search(r"JobState=(\w+)", shown.stdout)
    if not state:
        return f"its state is unknown ({shown.stderr.strip()})"
    if state[1] != "RUNNING":  # scancel sends the same signal, and a requeue would bring the job back
        return f"it is {state[1]}"
    if "Requeue=0" in shown.stdout.split():
        return "that is off (sbatch: {requeue: false}); the same command goes on from there"
    return None
