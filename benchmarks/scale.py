"""Exchanges in a lab of several nodes on this machine: bytes that the kernel counts, and seconds.

    sudo python benchmarks/scale.py --output benchmarks/results/lab.json

For each rate and layout (nodes × ranks on each) it starts a lab (benchmarks/lab.py) and measures one exchange of
ResNet-50's gradients in it. benchmarks/scale_model.py compares the figures with the model of hvd_compress/costs.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from lab import Lab, end_on_sigterm, missing
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
LAYOUTS = ["4x2", "2x4", "2x1", "2x2", "4x1", "8x1"]


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["1gbit"], help="of a node's card, in tc's units, or none")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help="nodes × ranks (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed, 0 for none (default: %(default)s)")
    parser.add_argument("--elements", type=int, help="of ResNet-50, from the first tensor on (default: all)")
    parser.add_argument("--output", type=Path, help="where to add the figures")
    args = parser.parse_args()
    if reason := missing():
        sys.exit(f"no lab, nothing was measured: {reason}")
    end_on_sigterm()
    os.environ["OMP_NUM_THREADS"] = "1"
    for rate, layout in itertools.product(args.rates, args.layouts):
        nodes, ranks = map(int, layout.split("x"))
        program = [sys.executable, str(HERE / "exchange_step.py"), "--rounds", str(args.rounds)]
        program += ["--elements", str(args.elements)] if args.elements else []
        load = os.getloadavg()[0]
        with Lab(nodes, None if rate == "none" else rate) as lab:
            measured = json.loads(lab.run(ranks, program, timeout=600).strip().splitlines()[-1])
        result = {"rate": rate, "load": [load, os.getloadavg()[0]], **measured}
        report(layout, result)
        if args.output:
            args.output.parent.mkdir(exist_ok=True)
            results = json.loads(args.output.read_text()) if args.output.exists() else []
            args.output.write_text(json.dumps([*results, result], indent=1) + "\n")


def report(layout: str, result: dict[str, Any]) -> None:
    """A table for one layout."""
    before, after = result["load"]
    title = f"{layout.replace('x', ' nodes × ')} rank(s), card: {result['rate']}, {result['elements']:,} elements"
    rows = Table(title=f"{title}; load average {before:.0f} before, {after:.0f} after")
    rows.add_column("exchange")
    for heading in ("MB a node sends", "per rank", "of allgather's", "s per exchange"):
        rows.add_column(heading, justify="right")
    sent = result["bytes per node"]
    for name, volume in sent.items():
        per_rank = volume * result["nodes"] / result["ranks"]
        seconds = result["seconds"].get(name)
        times = (
            f"1/{sent['allgather'] / volume:.1f}"
            if volume < sent["allgather"]
            else f"{volume / sent['allgather']:.1f}×"
        )
        timed = "" if seconds is None else f"{seconds:.3f}"
        rows.add_row(name, f"{volume / 1e6:.3f}", f"{per_rank / 1e6:.3f}", times, timed)
    Console(force_terminal=False, width=110).print(rows)


if __name__ == "__main__":
    main()
