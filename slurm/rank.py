"""Runs on every rank, before the script and in its process: ``python rank.py RANKS SCRIPT [ARGUMENTS]``.

Checks that MPI sees the ranks that were asked for, reports the environment, and sees to it that a rank that fails
ends the job, where MPI_Finalize would wait for the others for ever.
"""

from __future__ import annotations

import signal

# Until the script has its own handlers, a signal waits. It would end the job else, or DataLoader's processes.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})

import os  # noqa: E402
import platform  # noqa: E402
import runpy  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from importlib import metadata  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NoReturn  # noqa: E402

from mpi4py import MPI  # noqa: E402

SHOWN = ("NCCL_", "HOROVOD_", "OMPI_MCA_", "PRTE_MCA_", "UCX_", "FI_", "OMP_", "CUDA_", "SLURM_CPU_BIND", "SLURM_MPI")


def main() -> None:
    """Check, report, run the script."""
    ranks, script, *arguments = sys.argv[1:]
    check_size(int(ranks))
    report()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if status in (0, os.EX_TEMPFAIL):  # on all ranks
            raise SystemExit(status) from None
        leave(status)
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_next and trace.tb_frame.f_code.co_filename != script:
            trace = trace.tb_next  # down to the script's own lines
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        leave(1)


def check_size(ranks: int) -> None:
    """End the job if MPI does not see ``ranks`` processes."""
    size = MPI.COMM_WORLD.Get_size()
    if size == ranks:
        return
    if os.environ.get("SLURM_PROCID", "0") != "0" or MPI.COMM_WORLD.Get_rank() > 0:
        time.sleep(10)  # the first one explains; whoever ends first ends all
        leave(1)
    print(
        f"error: MPI sees {size} rank(s), the job has {ranks}.\n"
        + (
            f"Each task is a world of its own: what starts it and this MPI ({library()}) do not speak the same "
            "language.\nUnder srun: `srun --mpi=list` shows what there is; set it with --mpi (Open MPI: pmix; MPICH, "
            "Intel MPI: pmi2), or let the MPI start its own ranks with --launcher mpirun.\nUnder mpirun: it belongs "
            "to another MPI than Python's mpi4py; load the modules with which you have installed."
            if size == 1
            else "Is there another mpirun or srun in the script or in the profile's setup?"
        ),
        file=sys.stderr,
    )
    leave(1)


def report() -> None:
    """Print what the job runs on, once."""
    world = MPI.COMM_WORLD
    hosts = world.gather((MPI.Get_processor_name(), gpus(), len(os.sched_getaffinity(0))))
    if hosts is None:
        return
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    print(f"Job {os.environ.get('SLURM_JOB_ID', '(no Slurm)')}, {world.Get_size()} ranks, restarted {restarts} times")
    for host, found in {name: found for name, found, _ in hosts}.items():
        ranks = [str(rank) for rank, (name, _, _) in enumerate(hosts) if name == host]
        cores = sorted({cores for name, _, cores in hosts if name == host})
        print(f"  {host}: ranks {', '.join(ranks)}; cores for each: {' to '.join(map(str, cores))}; {found}")
    print(f"  MPI: {library()}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("horovod", "torch", "mpi4py", "submitit"))
    print(f"  Python {platform.python_version()}, {versions}")
    for name, value in sorted(os.environ.items()):
        if name.startswith(SHOWN):
            print(f"  {name}={value}")
    sys.stdout.flush()


def library() -> str:
    """Name and version of the MPI."""
    return MPI.Get_library_version().splitlines()[0].partition(",")[0].strip("\0")


def gpus() -> str:
    """Of this host, as the driver counts them."""
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi, so no GPU"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    found = [name.strip() for name in names if name.strip()]
    return ", ".join(f"{found.count(name)} × {name}" for name in dict.fromkeys(found)) or "no GPU"


def version(package: str) -> str:
    """Its number, or that it is not here."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def leave(status: int) -> NoReturn:
    """End this process without waiting for other ranks; srun and mpirun then end those."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
