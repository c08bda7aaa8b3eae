"""The command ``hvd-compress report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from .page import cells, headings, verdict, write_page
from .runs import NotYetError, Run, RunError, default_target, find, label, read, summarise

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_report(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="a table, pictures and one HTML page of training runs",
        description=(
            "Compare training runs: accuracy and loss against bytes, time and epochs; bits to a target accuracy;\n"
            "savings against a baseline. Reads each run's metrics.jsonl, also while it is being written: one JSON\n"
            "object for each epoch, with run, epoch, accuracy (0 to 1, null if it was not measured) and\n"
            "megabytes_sent at least. Directories without any are left out, and named."
        ),
        epilog=(
            "examples:\n"
            "  hvd-compress report runs/paper runs/fp32 --baseline fp32\n"
            "  hvd-compress report runs/* --target 0.75 --output report"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, or a metrics.jsonl")
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="a run's name or directory (default: the one of plain Horovod in fp32, if it is there)",
    )
    parser.add_argument(
        "--target",
        type=_accuracy,
        metavar="A",
        help="accuracy, 0 < A ≤ 1 (default: the highest that all runs reach)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report"), metavar="DIR", help="of page and pictures (default: report)"
    )
    parser.set_defaults(run=lambda options: _report(options, parser))


PLAIN = "plain Horovod, fp32"
_NAMES_WIDTH = 16  # of the column that says what the others have


def _report(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    try:
        runs = label(_read_all(options.runs))
        target = default_target(runs.values()) if options.target is None else options.target
        wanted = options.baseline or next((name for name, run in runs.items() if run.name == PLAIN), None)
        baseline = None if wanted is None else find(wanted, runs)
        summaries = summarise(runs, target, baseline)
        page = write_page(runs, summaries, target, baseline, options.output)
    except (RunError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: pip install 'hvd-compress[train]' has what the report needs")
    console = Console()
    columns = [cells(summary, baseline is not None) for summary in summaries]
    for table in _tables(headings(target, baseline), columns, console.width):
        console.print(table)
    console.print(verdict(summaries, target, baseline), highlight=False)
    console.print(f"Page: {page}", highlight=False, soft_wrap=True)


def _tables(names: Sequence[str], columns: Sequence[Sequence[str]], width: int) -> Iterator[Table]:
    """A column for each run, since a dozen rows are wider than most terminals; so many that no word is cut."""
    longest = max(len(word) for column in columns for cell in column for word in cell.split())
    count = max(1, (width - _NAMES_WIDTH - 4) // (longest + 3))  # with the lines between them
    for start in range(0, len(columns), count):
        some = columns[start : start + count]
        table = Table(Column("", width=_NAMES_WIDTH), *(Column(column[0], overflow="fold") for column in some))
        for place, name in enumerate(names[1:], start=1):
            table.add_row(name, *(column[place] for column in some))
        yield table


def _read_all(paths: Sequence[Path]) -> list[Run]:
    """The runs that have something to show, if there is one."""
    runs: list[Run] = []
    problems: list[NotYetError] = []
    for path in paths:
        try:
            runs += read(path)
        except NotYetError as error:
            problems.append(error)
    if not runs:
        raise problems[0]
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return runs


def _accuracy(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, 0.75 for 75 %; got {text!r}") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], 0.75 for 75 %; got {text}")
    return value
