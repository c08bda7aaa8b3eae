#!/usr/bin/env python3
"""Submit training to Slurm, watch it, and collect what came out.

    python slurm/submit.py --nodes 4 --gpus-per-node 8 --partition gpu --time 12:00:00 -- \\
        examples/imagenet_resnet50.py --data /path/to/imagenet --output runs/first

What comes after -- is any Python program and its arguments; it runs once for each GPU, as one MPI job. If it ends
with status 75 (it has saved its state, see docs/slurm.md) the job is requeued and the same command goes on.

What your cluster always needs (account, modules, a container) goes into a profile, a file of settings:
slurm/clusters/gpu.yaml explains each of them. The command line beats the profile. More commands:

    python slurm/submit.py status                     what became of the jobs
    python slurm/submit.py logs 1234                  print a job's output until it ends
    python slurm/submit.py cancel 1234                end it
    python slurm/submit.py sweep GRID.yaml --output runs/sweep -- SCRIPT --output {run} ...
    python slurm/submit.py collect --wait runs/sweep  one table and one picture of a sweep's finished runs
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jobs
import profiles
import submitit
import sweep
import yaml
from launch import local_executor, make_job, slurm_executor
from profiles import Profile, ProfileError
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from submitit.core.utils import FailedJobError

COMMANDS = ("submit", "sweep", "status", "logs", "cancel", "collect")
SLURM = ("sbatch", "squeue", "sacct", "scancel")
SETTINGS = {setting.name for setting in dataclasses.fields(Profile)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0] not in COMMANDS and given[0] not in ("-h", "--help")):
        given.insert(0, "submit")
    own, script = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    args, unknown = make_parser().parse_known_args(own)
    try:
        if unknown:
            refuse(unknown[0], args)
        return globals()[f"do_{args.command}"](args, script)
    except (ProfileError, jobs.SlurmError) as error:
        fail(str(error))
    except FailedJobError as error:  # submitit's, when sbatch refuses
        said = re.findall(r"sbatch: error: (.*)", str(error)) or [str(error)]
        fail(f"sbatch refused the job: {'; '.join(said)}")
    except OSError as error:
        if getattr(args, "cluster", None) == "debug":
            raise  # the script's own, which a debugger is to see
        if isinstance(error, FileNotFoundError) and error.filename in SLURM:
            fail(f"there is no {error.filename} here: is this a login node of a Slurm cluster?")
        fail(str(error))


def do_submit(args: argparse.Namespace, script: list[str]) -> int:
    """Submit one job."""
    profile = profile_of(args)
    check_script(script)
    name = args.name or Path(script[0]).stem
    if args.cluster == "debug":
        return run_here(args, script)
    if args.cluster == "local":
        return run_locally(profile, args, script)
    executor = slurm_executor(profile, args.folder, name)
    job = make_job(profile, script)
    if args.dry_run:
        print(executor.sbatch_file())
        print("# which starts\n# " + shlex.join(job.command))
        return 0
    submitted = executor.submit(job)
    print(f"Submitted job {submitted.job_id} ({name}, {profile.nodes} nodes, {profile.ranks} ranks).")
    print(f"Log: {submitted.paths.stdout}")
    return follow(submitted.job_id, args.folder) if args.follow else 0


def do_sweep(args: argparse.Namespace, script: list[str]) -> int:
    """Submit a grid as a job array."""
    profile = profile_of(args)
    check_script(script)
    points = sweep.read_grid(args.grid)
    directories = [(args.output / sweep.directory_name(point)).absolute() for point in points]
    commands = [sweep.arguments(script, p, d) for p, d in zip(points, directories, strict=True)]
    if not all(str(d) in " ".join(command) for d, command in zip(directories, commands, strict=True)):
        print(
            f"warning: {sweep.RUN} is not among the script's arguments: all runs write to the same place, and "
            f"collect looks into {args.output}. Usually --output {sweep.RUN} is meant",
            file=sys.stderr,
        )
    executor = slurm_executor(profile, args.folder, args.name or args.output.name, parallel=args.parallel)
    if args.dry_run:
        print(executor.sbatch_file(len(commands)))
        for command in commands:
            print("# " + shlex.join(command))
        return 0
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
    submitted = executor.submit_array([make_job(profile, command) for command in commands])
    record = [
        sweep.Point(job.job_id, str(directory), point, str(args.folder.absolute()))
        for job, directory, point in zip(submitted, directories, points, strict=True)
    ]
    sweep.write_record(args.output, record)
    print(f"Submitted {len(record)} jobs, {record[0].job} to {record[-1].job}.")
    print(f"To wait for them, and see what came out: python {sys.argv[0]} collect --wait {args.output}")
    return 0


def do_status(args: argparse.Namespace, script: list[str]) -> int:
    """Print a table of jobs."""
    known = jobs.submitted(args.folder)
    wanted = [job for job in known if not args.jobs or {job, job.partition("_")[0]} & {*args.jobs}]
    wanted += [job for job in args.jobs if not any(job in (one, one.partition("_")[0]) for one in wanted)]
    states = jobs.states(wanted, args.folder) if wanted else []
    Console().print(jobs.table(states) if states else f"No job was submitted from {args.folder}.")
    return 0


def do_logs(args: argparse.Namespace, script: list[str]) -> int:
    """Print a job's output until it ends."""
    if of_array := jobs.tasks(args.job, args.folder):
        raise ProfileError(f"{args.job} is an array: ask for one of its jobs, {of_array[0]} to {of_array[-1]}")
    return follow(args.job, args.folder)


def do_cancel(args: argparse.Namespace, script: list[str]) -> int:
    """End jobs."""
    jobs.cancel(args.jobs)
    return 0


def do_collect(args: argparse.Namespace, script: list[str]) -> int:
    """Print and draw a sweep's results."""
    record = sweep.read_record(args.directory)
    numbers, folder = [point.job for point in record], Path(record[0].folder)
    if args.wait:
        with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()) as progress:
            task = progress.add_task("Waiting for the runs", total=len(record))
            states = jobs.wait(numbers, folder, lambda ended: progress.update(task, completed=ended))
    else:
        states = jobs.states(numbers, folder)
    results = []
    for point, state in zip(record, states, strict=True):
        try:
            results.append(sweep.read_result(point, state.state))
        except ProfileError as error:
            print(f"Left out: job {point.job} ({sweep.directory_name(point.settings)}): {error}", file=sys.stderr)
    if not results:
        fail("no run has finished with a result yet")
    Console().print(sweep.table(results))
    picture = args.directory / "accuracy-vs-megabytes.png"
    sweep.draw(results, picture)
    print(f"Picture: {picture}")
    return 0


def follow(job: str, folder: Path) -> int:
    """Print its output; Ctrl-C leaves it running."""
    try:
        state = jobs.follow(job, folder)
    except KeyboardInterrupt:
        print(f"\nJob {job} goes on. To end it: python {sys.argv[0]} cancel {job}")
        return 130
    print(f"Job {job} ended: {state}.")
    if state == "COMPLETED":
        return 0
    print(f"Logs of all ranks: {folder}/{job}_*_log.err", file=sys.stderr)
    return 1


def run_locally(profile: Profile, args: argparse.Namespace, script: list[str]) -> int:
    """All ranks on this machine, by mpirun, until they end; Ctrl-C ends them."""
    folder, job = args.folder / "local", make_job(profile, script, local=True)  # their numbers are no job's of Slurm
    if args.dry_run:
        print(shlex.join(job.command))
        return 0
    submitted = local_executor(profile, folder).submit(job)

    def ended() -> str | None:
        return "over" if submitted.done() else None

    try:
        jobs.follow(submitted.job_id, folder, ended)
    except KeyboardInterrupt:
        submitted.cancel()
        return 130
    return 1 if submitted.exception() else 0


def run_here(args: argparse.Namespace, script: list[str]) -> int:
    """One rank, in this process."""
    if args.dry_run:
        print(shlex.join([sys.executable, *script]))
        return 0

    def in_process() -> None:
        sys.argv = script
        sys.path[0] = str(Path(script[0]).resolve().parent)
        runpy.run_path(script[0], run_name="__main__")

    submitit.DebugExecutor(args.folder / "local").submit(in_process).result()
    return 0


def profile_of(args: argparse.Namespace) -> Profile:
    """Defaults, profile and command line together."""
    sources: list[tuple[str, dict[str, Any]]] = []
    if args.profile is not None:
        sources.append((f"profile {args.profile}", profiles.load(args.profile)))
    options = {name: value for name, value in vars(args).items() if name in SETTINGS and value is not None}
    sources += [("command line", settings) for settings in (*map(parse_setting, args.set), options)]
    return profiles.merge(*sources)


def parse_setting(text: str) -> dict[str, Any]:
    """What one --set says."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ProfileError(f"--set needs NAME=VALUE, got {text!r}")
    try:
        return {name.replace("-", "_"): yaml.safe_load(value) if value else None}
    except yaml.YAMLError as error:
        raise ProfileError(f"--set {text} is not YAML: {error}") from None


def refuse(argument: str, args: argparse.Namespace) -> NoReturn:
    """What no command knows, with what was meant."""
    name = argument.partition("=")[0].lstrip("-").replace("-", "_")
    if argument.endswith(".py"):
        raise ProfileError(f"-- is missing before {argument}")
    if not argument.startswith("-"):
        raise ProfileError(f"unknown command {argument!r}{profiles.did_you_mean(argument, [*COMMANDS])}")
    if "profile" in args and name in SETTINGS:
        raise ProfileError(f"{argument} has no option of its own: --set {name}=VALUE")
    known = [f"--{option.replace('_', '-')}" for option in vars(args) if option != "command"]
    raise ProfileError(f"unknown option {argument}{profiles.did_you_mean(argument, known)}")


def check_script(script: list[str]) -> None:
    """It is there, and a Python program."""
    if not script:
        raise ProfileError("nothing to run: end the line with -- SCRIPT.py and its arguments")
    if not Path(script[0]).is_file() or not script[0].endswith(".py"):
        raise ProfileError(f"{script[0]} is no Python program here; paths are seen from {Path.cwd()}")


def make_parser() -> argparse.ArgumentParser:
    """All commands."""
    parser = argparse.ArgumentParser(
        prog="slurm/submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    submit = commands.add_parser("submit", help="submit a job (also without this word)")
    grid = commands.add_parser("sweep", help="submit a job for each point of a grid")
    status = commands.add_parser("status", help="a table of jobs and their states")
    logs = commands.add_parser("logs", help="print a job's output until it ends")
    cancel = commands.add_parser("cancel", help="end jobs")
    collect = commands.add_parser("collect", help="one table and one picture of a sweep")
    for command in (submit, grid, status, logs):
        command.add_argument(
            "--folder", type=Path, default=Path("runs/slurm"), help="of logs, which all nodes see (%(default)s)"
        )
    for command in (submit, grid):
        command.usage = f"{parser.prog} {command.prog.split()[-1]} [options] -- SCRIPT.py [arguments]"
        add_settings(command)
    submit.add_argument(
        "--cluster",
        choices=["slurm", "local", "debug"],
        default="slurm",
        help="local: the same ranks on this machine, by mpirun; debug: one rank in this process (%(default)s)",
    )
    submit.add_argument("--follow", action="store_true", help="print the output until the job ends")
    grid.usage = f"{parser.prog} sweep GRID.yaml --output DIR [options] -- SCRIPT.py [arguments, with {{run}}]"
    grid.add_argument("grid", type=Path, help="options of the script and lists of their values, in YAML")
    grid.add_argument("--output", type=Path, required=True, help="directory; each run gets one in it, {run}")
    grid.add_argument("--parallel", type=int, default=256, help="jobs that may run at once (%(default)s)")
    status.add_argument("jobs", nargs="*", help="their numbers (all that were submitted)")
    logs.add_argument("job", help="its number")
    cancel.add_argument("jobs", nargs="+", help="their numbers")
    collect.add_argument("directory", type=Path, help="the sweep's --output")
    collect.add_argument("--wait", action="store_true", help="until all runs have ended")
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What a profile may hold too."""
    group = parser.add_argument_group("settings, which may stand in a profile too")
    group.add_argument("--profile", help=f"a file, or the name of one in {profiles.CLUSTERS}")
    group.add_argument("--nodes", type=int, help=f"({Profile.nodes})")
    group.add_argument("--gpus-per-node", type=int, help=f"({Profile.gpus_per_node})")
    group.add_argument("--ranks-per-node", type=int, help="MPI ranks (one for each GPU, or one)")
    group.add_argument("--cpus-per-task", type=int, help="cores for each rank")
    group.add_argument("--partition", help="(the cluster's default)")
    group.add_argument("--account", help="that pays")
    group.add_argument("--time", help=f"limit: minutes, h:mm:ss or d-hh:mm:ss ({Profile.time})")
    group.add_argument("--launcher", choices=["srun", "mpirun"], help=f"({Profile.launcher})")
    group.add_argument("--mpi", help=f"how srun connects the ranks: pmix, pmi2 … ({Profile.mpi})")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting of a profile, in YAML"
    )
    parser.add_argument("--name", help="of the job (the script's)")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch file and submit nothing")


def fail(message: str) -> NoReturn:
    """End with an error."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
