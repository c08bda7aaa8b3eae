"""From settings and a script to submitit: the command of each rank, the executor, the sbatch file."""

from __future__ import annotations

import copy
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import job as job_module
import submitit
from job import Job
from profiles import Profile

HERE = Path(__file__).resolve().parent
RANK = HERE / "rank.py"
BOOTSTRAP = HERE.parent / "scripts" / "bootstrap.py"

# When a node is lost, the other ranks fail within seconds, and a job that ended then would have failed by itself.
# Slurm notices after SlurmdTimeout (some minutes), and requeues the job if it is still there.
TEARDOWN = """\
status=$?
alive="srun --overlap --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --mpi=none --output=/dev/null true"
if [ $status -ne 0 ] && ! timeout 60 $alive; then
  echo "error: a node does not answer; waiting for Slurm to notice and to requeue the job" >&2
  sleep 1800
fi
exit $status"""

# A job that waits in the queue keeps the launcher that it was submitted with.
cloudpickle.register_pickle_by_value(job_module)


def make_job(profile: Profile, script: Sequence[str], *, local: bool = False) -> Job:
    """What the nodes are to run.

    Args:
        profile: the settings.
        script: a Python program and its arguments.
        local: on this machine, without Slurm.
    """
    python = profile.python or sys.executable
    rank = [*profile.container, python, "-u", str(RANK), str(profile.ranks), *script]
    if local:
        rank = [*_local_environment(profile), sys.executable, str(BOOTSTRAP), "--mpirun", str(profile.ranks), *rank]
    elif profile.launcher == "mpirun":
        rank = ["mpirun", "-np", str(profile.ranks), *profile.mpirun, *rank]
        return Job(tuple(rank), profile.max_requeues, stop_after=60 * profile.minutes - profile.signal_seconds)
    return Job(tuple(rank), profile.max_requeues)


class _Executor(submitit.SlurmExecutor):
    """submitit's, which can also say what it would submit."""

    @classmethod
    def affinity(cls) -> int:
        """A dry run needs no Slurm; where it is missing, sbatch says so."""
        return 2

    def sbatch_file(self, jobs: int = 1) -> str:
        """As :meth:`submit` hands it to sbatch, or ``submit_array`` for several jobs."""
        executor = copy.copy(self)
        if jobs > 1:
            executor.parameters = {**self.parameters, "map_count": jobs}
        return executor._make_submission_file_text(self._submitit_command_str, "")


def slurm_executor(profile: Profile, folder: Path, name: str, *, parallel: int = 256) -> _Executor:
    """For jobs of ``profile`` under Slurm.

    Args:
        profile: the settings.
        folder: for logs and submitit's files; all nodes must see it.
        name: the job's.
        parallel: how many jobs of an array may run at once.
    """
    # A container around the script leaves the launcher outside, with the Python that submits.
    python = profile.python if profile.python and not profile.container else sys.executable
    gpus: int | str = profile.gpus_per_node
    if profile.gpu_type is not None:
        gpus = f"{profile.gpu_type}:{gpus}"
    sbatch = _sbatch(profile)
    executor = _Executor(folder, max_num_timeout=profile.max_requeues, python=shlex.quote(python))
    parameters = {
        "job_name": name,
        "partition": profile.partition,
        "account": profile.account,
        "time": profile.minutes,
        "nodes": profile.nodes,
        "ntasks_per_node": profile.tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "gpus_per_node": gpus or None,
        "signal_delay_s": profile.signal_seconds,
        "setup": _setup(profile),
        "teardown": None if "no-requeue" in sbatch else TEARDOWN.splitlines(),
        "srun_args": _srun_arguments(profile),
        "use_srun": profile.launcher == "srun",
        "array_parallelism": parallel,
        "additional_parameters": sbatch,
    }
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor


def local_executor(profile: Profile, folder: Path) -> submitit.LocalExecutor:
    """For jobs of ``profile`` on this machine: one task, which calls mpirun."""
    executor = submitit.LocalExecutor(folder, max_num_timeout=profile.max_requeues)
    executor.update_parameters(timeout_min=profile.minutes, signal_delay_s=profile.signal_seconds, tasks_per_node=1)
    return executor


def _local_environment(profile: Profile) -> list[str]:
    """What gives the ranks the profile's variables, and the GPUs that this process sees.

    submitit's local executor sets CUDA_VISIBLE_DEVICES, which hides all GPUs or takes the place of the user's choice.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    restored = ["-u", "CUDA_VISIBLE_DEVICES"] if visible is None else [f"CUDA_VISIBLE_DEVICES={visible}"]
    return ["env", *restored, *(f"{name}={value}" for name, value in profile.variables.items())]


def _setup(profile: Profile) -> list[str]:
    environment = profile.variables
    if profile.cpus_per_task is not None:
        environment.setdefault("OMP_NUM_THREADS", str(profile.cpus_per_task))
    return [
        *profile.setup,
        *(f"module load {shlex.quote(module)} || exit 1" for module in profile.modules),
        *(f"export {name}={shlex.quote(str(value))}" for name, value in environment.items()),
    ]


def _srun_arguments(profile: Profile) -> list[str]:
    arguments = ["--kill-on-bad-exit=1"]  # or the other ranks wait for the one that failed
    if profile.mpi is not None:
        arguments.append(f"--mpi={profile.mpi}")
    if profile.cpus_per_task is not None:
        arguments.append(f"--cpus-per-task={profile.cpus_per_task}")  # since 22.05 srun does not take sbatch's
    if profile.cpu_bind is not None:
        arguments.append(f"--cpu-bind={profile.cpu_bind}")
    if profile.gpu_binding == "task":
        arguments.append("--gpus-per-task=1")
    return [*arguments, *profile.srun]


def _sbatch(profile: Profile) -> dict[str, Any]:
    """The launcher's options, then the profile's, by sbatch's own names."""
    options: dict[str, Any] = {"requeue": True}
    if profile.launcher == "mpirun":
        # submitit's signal would end mpirun's helpers on the other nodes; one that does nothing replaces it.
        options["signal"] = f"B:CONT@{profile.signal_seconds}"
    options |= {name.replace("_", "-"): value for name, value in profile.sbatch.items()}
    # Without either of both, most clusters requeue.
    options["no-requeue"] = options["requeue"] is False
    # A switch that a profile sets and the command line takes back is false, which sbatch does not know.
    return {name: value for name, value in options.items() if value is not False and value is not None}
