"""The model of hvd_compress/costs.py against measurements, and what it says about clusters that were not measured.

    python benchmarks/scale_model.py

Reads benchmarks/results/lab.json (from benchmarks/scale.py), prints how far the model is off, and draws
docs/images/scale.png.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table

from hvd_compress import costs
from hvd_compress.costs import Cluster, Cost, Link, Work

ROOT = Path(__file__).resolve().parent.parent
ONE_CALL = 2**31 - 1  # bytes that an allgather may collect
NAMES = {
    "dense": "dense (fp16)",
    "allgather": "allgather",
    "hierarchical": "hierarchical",
    "reduce_scatter": "reduce-scatter",
}
COLOURS = ["#bbbbbb", "#4477aa", "#228833", "#ee6677"]
RANKS = [2**i for i in range(1, 13)]
GBIT = np.geomspace(1, 400, 40)
LOCAL = 8  # ranks of a node, where there are so many

# One core of the measuring machine, ResNet-50 at 1 %: memory and selection, packing, opening, an empty packet.
SECONDS: dict[str, Any] = {"select": 0.6e-9, "pack": 1.6e-3, "open": 2.2e-3, "packet": 7e-5}
RESNET = Work(elements=25_557_032, dense=4 * 25_557_032, message=1_282_445)


def check(results: list[dict[str, Any]]) -> None:
    """Print model and measurement side by side."""
    volumes = Table(title="MB that a node sends, as the kernel counts, and the model")
    for heading in ("nodes × ranks", "exchange", "measured", "model", "error"):
        volumes.add_column(heading, justify="left" if heading == "exchange" else "right")
    for result in results:
        for name, function in costs.EXCHANGES.items():
            predicted = function(_cluster(result, Link(0, 1)), _work(result)).between
            measured = result["bytes per node"][name]
            layout = f"{result['nodes']} × {result['ranks'] // result['nodes']}"
            error = f"{100 * (predicted / measured - 1):+.1f} %"
            volumes.add_row(layout, name, f"{measured / 1e6:.3f}", f"{predicted / 1e6:.3f}", error)
    console = Console(force_terminal=False, width=100)
    console.print(volumes)
    free = {_key(result): result for result in results if result["rate"] == "none" and result["seconds"]}
    times = Table(title="seconds for one exchange: those without a limit, and the model of the link in addition")
    for heading in ("nodes × ranks", "card", "exchange", "measured", "model", "error"):
        times.add_column(heading, justify="left" if heading == "exchange" else "right")
    for result in results:
        if result["rate"] == "none" or _key(result) not in free or not result["seconds"]:
            continue
        link = Link(1e-4, _bytes_per_second(result["rate"]))
        for name, function in (*costs.EXCHANGES.items(), ("Horovod, none", costs.dense)):
            base = free[_key(result)]["seconds"][name]
            instead = replace(_cluster(result, link), within=Link(0, float("inf")))
            predicted = base + function(instead, _work(result)).seconds
            measured = result["seconds"][name]
            layout = f"{result['nodes']} × {result['ranks'] // result['nodes']}"
            error = f"{100 * (predicted / measured - 1):+.0f} %"
            times.add_row(layout, result["rate"], name, f"{measured:.3f}", f"{predicted:.3f}", error)
    console.print(times)


def _key(result: dict[str, Any]) -> tuple[int, int, int]:
    return result["nodes"], result["ranks"], result["elements"]


def _cluster(result: dict[str, Any], link: Link) -> Cluster:
    return Cluster(result["nodes"], result["ranks"] // result["nodes"], link, Link(0, float("inf")))


def _work(result: dict[str, Any]) -> Work:
    message = result["bytes handed over per rank"]["allgather"]
    return Work(result["elements"], 4 * result["elements"], message, result["union"])


def _bytes_per_second(rate: str) -> float:
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor / 8
    raise ValueError(f"a rate in gbit or mbit is needed, got {rate!r}")


def exchanges(cluster: Cluster, work: Work) -> dict[str, float]:
    """Seconds by exchange, of those that are possible."""
    found: dict[str, Cost] = {"dense": costs.dense(cluster, work, itemsize=2)}
    collected = {
        "allgather": cluster.ranks * work.message,
        "hierarchical": cluster.nodes * work.message / cluster.ranks_per_node,
        "reduce_scatter": work.message * work.union,
    }
    for name, function in costs.EXCHANGES.items():
        if collected[name] <= ONE_CALL:
            found[name] = function(cluster, work)
    return {name: cost.seconds for name, cost in found.items()}


def draw(path: Path) -> None:
    """Which exchange is the fastest, by ranks and rate."""
    factor = 7e9 / RESNET.elements
    large = replace(RESNET, elements=int(7e9), dense=4 * 7e9, message=RESNET.message * factor)
    scaled: dict[str, Any] = {
        name: value * (factor if name in ("pack", "open") else 1) for name, value in SECONDS.items()
    }
    panels = [
        ("ResNet-50, links alone", RESNET, Link(1e-6, 2e11)),
        ("7 B parameters, links alone", large, Link(1e-6, 2e11)),
        ("ResNet-50, with one core per rank", replace(RESNET, **SECONDS), Link(1e-5, 4e9)),
        ("7 B parameters, with one core per rank", replace(large, **scaled), Link(1e-5, 4e9)),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True, constrained_layout=True)
    for axis, (title, work, within) in zip(axes.flat, panels, strict=True):
        winners = np.zeros((len(GBIT), len(RANKS)))
        faster = np.ones_like(winners)
        for i, gbit in enumerate(GBIT):
            for j, ranks in enumerate(RANKS):
                local = min(LOCAL, ranks // 2)
                cluster = Cluster(ranks // local, local, Link(2e-5, gbit / 8 * 1e9), within)
                seconds = exchanges(cluster, replace(work, union=min(ranks, costs.room(ranks, cluster.nodes))))
                best = min(seconds, key=seconds.__getitem__)
                winners[i, j] = list(NAMES).index(best)
                faster[i, j] = seconds["dense"] / seconds[best]
        axis.pcolormesh(RANKS, GBIT, winners, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=3.5, shading="nearest")
        lines = axis.contour(RANKS, GBIT, faster, levels=[1.1, 2, 5, 10, 20, 50], colors="black", linewidths=0.7)
        axis.clabel(lines, fmt="%g×", fontsize=8)
        axis.set(title=title, xscale="log", yscale="log", xticks=RANKS, xticklabels=RANKS)
        axis.tick_params(axis="x", rotation=60)
        axis.minorticks_off()
        axis.set(yticks=[1, 10, 100, 400], yticklabels=["1", "10", "100", "400"])
    for axis in axes[1]:
        axis.set_xlabel(f"ranks ({LOCAL} on a node from 16 on)")
    for axis in axes[:, 0]:
        axis.set_ylabel("Gbit/s of a node's card")
    patches = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, NAMES.values(), strict=True)]
    figure.legend(
        handles=patches, loc="outside upper center", ncols=4, title="fastest exchange; lines: times faster than dense"
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compare and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "lab.json")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "scale.png")
    args = parser.parse_args()
    check(json.loads(args.results.read_text()))
    draw(args.output)


if __name__ == "__main__":
    main()
