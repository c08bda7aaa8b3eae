"""The command ``hvd-compress advise``: starts a short MPI job, or is one rank of it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from .predict import BACKWARD, Measurements, advise, spans, step_seconds

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

INSIDE_A_JOB = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Environment variables that mpirun and srun set."""


def add_advise(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "advise",
        help="whether compression pays for a model, on this machine and link",
        description=(
            "Measure, in a short MPI job, how long this machine takes to compress a model's gradients and how fast\n"
            "the link between the ranks is; say whether compression makes steps shorter, with which compressor, and\n"
            "from how many nodes on. It speaks of time only: what compression does to accuracy, a training shows."
        ),
        epilog=(
            "examples:\n"
            "  hvd-compress advise --model resnet50 --batch-size 64\n"
            '  hvd-compress advise --mpirun "mpirun -np 2 -H node1,node2" --step-seconds 0.21\n'
            "  srun --mpi=pmix -N 4 --ntasks-per-node 4 hvd-compress advise --model my.package:make_model \\\n"
            "      --step-seconds 0.35"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="resnet50",
        metavar="NAME",
        help="of torchvision, or MODULE:FUNCTION that makes one (default: resnet50)",
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="images of a rank (default: 32)"
    )
    parser.add_argument("--image-size", type=_positive, default=224, metavar="N", help="pixels (default: 224)")
    parser.add_argument(
        "--step-seconds",
        type=float,
        metavar="S",
        help="of a training step without communication, in place of measuring it here with random images",
    )
    parser.add_argument("--ratio", type=float, default=0.01, metavar="R", help="of top-k (default: 0.01)")
    parser.add_argument(
        "--mpirun", metavar="COMMAND", help='that starts ranks, with its options (default: "mpirun -np 2" here)'
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, too")
    parser.set_defaults(run=lambda options: _advise(options, parser))


def _advise(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if not 0 < options.ratio <= 1:
        parser.error(f"--ratio must be in (0, 1], got {options.ratio}")
    if options.step_seconds is not None and not options.step_seconds > 0:
        parser.error(f"--step-seconds must be positive, got {options.step_seconds}")
    try:
        make = maker(options.model)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in make().named_parameters()}
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        parser.error(f"--model {options.model}: {error}")
    if options.json is not None and not _can_be_written(options.json):
        parser.error(f"--json {options.json}: no file can be written there")
    if not any(name in os.environ for name in INSIDE_A_JOB):
        sys.exit(_start(options))
    found = _measure(options, parser, make, shapes)
    if found is None:
        return
    explain(found, Console(force_terminal=False, width=110))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


def _can_be_written(file: Path) -> bool:
    return file.parent.is_dir() and os.access(file if file.exists() else file.parent, os.W_OK) and not file.is_dir()


def maker(name: str) -> Callable[[], torch.nn.Module]:
    """What makes the model of that name.

    Raises:
        ValueError, ImportError, AttributeError: there is none.
    """
    module, colon, function = name.partition(":")
    if colon:
        sys.path.insert(0, "")
        return getattr(importlib.import_module(module), function)
    import torchvision

    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            "torchvision has no such model"
            + (f"; did you mean {near[0]!r}?" if near else "; MODULE:FUNCTION for yours")
        )
    return lambda: torchvision.models.get_model(name)


def _start(options: argparse.Namespace) -> int:
    """Start the ranks; their exit status."""
    own: list[str] = []
    for name in ("model", "batch_size", "image_size", "step_seconds", "ratio", "json"):
        value = getattr(options, name)
        own += [] if value is None else [f"--{name.replace('_', '-')}={value}"]
    command = shlex.split(options.mpirun) if options.mpirun else _mpirun()
    try:
        return subprocess.run([*command, sys.executable, "-m", "hvd_compress", "advise", *own]).returncode
    except FileNotFoundError:
        print(f'{command[0]} was not found: name it, --mpirun "/path/to/mpirun -np 2"', file=sys.stderr)
        return 2


def _mpirun() -> list[str]:
    """Two ranks on this machine."""
    beside_python = Path(sys.executable).parent / "mpirun"
    program = str(beside_python) if beside_python.exists() else shutil.which("mpirun") or "mpirun"
    command = [program, "-np", "2"]
    said = (
        subprocess.run([program, "--version"], capture_output=True, text=True).stdout if shutil.which(program) else ""
    )
    if "Open MPI" in said:
        command += ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return command


def _measure(
    options: argparse.Namespace, parser: argparse.ArgumentParser, make: Any, shapes: dict[str, torch.Size]
) -> Measurements | None:
    """On a rank; None on all but the first."""
    import horovod.torch as hvd

    from .measure import Workload, measure

    os.environ.setdefault("HOROVOD_CYCLE_TIME", "1")
    hvd.init()
    if hvd.size() < 2:
        parser.error("two ranks or more are needed to measure what is between them")
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // hvd.local_size()))
    if options.step_seconds is None and ":" in options.model:
        parser.error("what a step of this model computes is not known here: give --step-seconds")
    work: Workload | float = options.step_seconds or Workload(make(), options.batch_size, options.image_size)
    name = options.model if options.step_seconds else f"{options.model}, batches of {options.batch_size}"
    found = measure(name, shapes, work, options.ratio)
    return found if hvd.rank() == 0 else None


def explain(found: Measurements, console: Console) -> None:
    """Print what was measured, what follows from it, and why."""
    whole = 4 * found.elements
    seconds = {c.name: step_seconds(c, found, found.ranks) for c in found.candidates}
    plain = [c for c in found.candidates if c.dense]
    fp32 = plain[0]

    def say(text: str) -> None:
        console.print(text, highlight=False)

    say(
        f"[bold]Measured[/bold] between {found.ranks} ranks"
        + (
            f" on {found.nodes} nodes, {found.ranks_per_node} on each"
            if found.nodes > 1
            else ", all of them on this machine: each is taken for a node"
        )
    )
    say(
        f"• {found.model}: {found.elements:,} gradients in {found.tensors} tensors, {whole / 1e6:,.1f} MB in fp32.\n"
        f"• A step computes for {_time(found.compute)}. The backward pass, {BACKWARD:.0%} of that, hides "
        f"{found.overlap:.0%} of Horovod's traffic that it could hide.\n"
        f"• Horovod's allreduce carries {found.bandwidth / 1e6:,.1f} MB of gradients per second; the smallest one "
        f"takes {_time(found.latency)}.\n  So fp32 takes {_time(fp32.exchange)}, of which "
        f"{_time(seconds[fp32.name] - found.compute)} are not hidden."
    )
    table = Table(title=f"One step on {found.ranks} ranks")
    table.add_column("method")
    for heading in ("MB sent", "compress", "decompress", "exchange", "a step", "× compute"):
        table.add_column(heading, justify="right")
    for c in found.candidates:
        compress, decompress = _time(c.compress), _time(found.ranks * c.decompress)
        cells = [f"{c.message / 1e6:,.2f}", compress, decompress, _time(c.exchange), _time(seconds[c.name])]
        table.add_row(c.name, *cells, f"{seconds[c.name] / found.compute:.2f}")
    console.print(table)
    advice = advise(found)
    say(
        "[bold]Computed[/bold] for more nodes: Horovod's ring moves at most twice the gradients however many there\n"
        "are; compressed messages go from each rank to each, so their cost grows with the ranks."
    )
    table = Table()
    for heading in ("nodes", "Horovod", "a step", "compressed", "a step", "pays"):
        table.add_column(heading, justify="right" if heading in ("nodes", "a step") else "left")
    for a in advice:
        horovod, best = _time(a.horovod_seconds), _time(a.best_seconds)
        saved = f"{a.horovod_seconds / a.best_seconds:.1f}× as fast" if a.pays else "no"
        table.add_row(str(a.nodes), a.horovod, horovod, a.best, best, saved)
    console.print(table)
    say("[bold]Advice[/bold]: " + conclusion(found))


def conclusion(found: Measurements) -> str:
    """The advice in words."""
    advice = advise(found)
    paying = spans(advice)
    how = {c.name: c.how for c in found.candidates}
    if not paying:
        why = advice[0]
        horovod, best = _time(why.horovod_seconds), _time(why.best_seconds)
        if why.horovod_seconds <= 1.05 * found.compute:
            reason = f"Horovod's traffic hides behind the backward pass (a step of {horovod} with {why.horovod}"
            reason += f", {_time(found.compute)} of it computing)"
        elif why.best_seconds < why.horovod_seconds:
            reason = f"it saves too little (a step of {best} against {horovod} with {why.horovod})"
        else:
            reason = f"it costs more than it saves (a step of {best} against {horovod} with {why.horovod})"
        return f"do not compress: {reason}, and so it stays up to {advice[-1].nodes} nodes."
    first, last = paying[0][0], paying[-1][1]
    start = next(a for a in advice if a.nodes == first)
    until = "" if last == advice[-1].nodes else f" to {last}"
    text = (
        f"compress, from {first} nodes on{until}: {how[start.best]} takes a step from {_time(start.horovod_seconds)} "
        f"({start.horovod}) to {_time(start.best_seconds)}."
    )
    changes = [a for a in advice if a.pays and a.best != start.best]
    if changes:
        text += f" From {changes[0].nodes} nodes on, {how[changes[0].best]} is faster."
    local = [a for a in advice if a.pays and a.sync_every > 1]
    if local:
        text += (
            f" Communication is still more than a tenth of a step on {local[0].nodes} nodes: with local steps, "
            f"QsparseLocalSGD(…, compression={how[local[0].best]}, sync_every={local[0].sync_every}), it is "
            f"{'less' if local[0].sync_every < 16 else 'a sixteenth of that'}."
        )
    if last < advice[-1].nodes:
        text += f" Beyond {last} nodes the messages of all ranks add up to more than Horovod's ring moves."
    return text


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value
