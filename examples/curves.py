"""Accuracy against megabytes sent, from the metrics that ``imagenet_resnet50.py`` writes.

Draw the runs of several jobs into one picture::

    python examples/curves.py runs/*/metrics.jsonl --output accuracy-vs-megabytes.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # nodes of a cluster have no display
import matplotlib.pyplot as plt

MARKERS = "osD^vP"


def draw(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a picture with one curve for each ``run``, its last accuracy written beside it."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record["megabytes_sent"] > 0:  # the axis is logarithmic
            point = (record["megabytes_sent"], 100 * record["accuracy"])
            curves.setdefault(record["run"], []).append(point)
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
        for number, (run, points) in enumerate(curves.items()):
            megabytes, accuracy = zip(*points, strict=True)
            axes.plot(megabytes, accuracy, marker=MARKERS[number % len(MARKERS)], markersize=4, label=run)
            axes.annotate(f"{accuracy[-1]:.1f} %", (megabytes[-1], accuracy[-1]), (5, 3), textcoords="offset points")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda megabytes, _: f"{megabytes:,g}")
        axes.set_ylim(0, 105)
        axes.set_xlabel("Megabytes sent per rank")
        axes.set_ylabel("Validation accuracy (%)")
        axes.grid(which="major", alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw accuracy against megabytes sent, one curve for each run.")
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.jsonl of imagenet_resnet50.py")
    parser.add_argument("--output", type=Path, default=Path("accuracy-vs-megabytes.png"), help="(%(default)s)")
    args = parser.parse_args()
    draw((json.loads(line) for path in args.metrics for line in path.read_text().splitlines()), args.output)


if __name__ == "__main__":
    main()
