"""Pictures of what step_cost.py and slow_link.py have measured.

python benchmarks/figures.py --step-cost step.json --slow-link link.json --output docs/images
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def step_cost(seconds: dict[str, float], output: Path) -> None:
    """A bar for each method's exchange."""
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(seconds) + 1), layout="constrained")
    names = list(reversed(seconds))
    bars = axes.barh(names, [1e3 * seconds[n] for n in names], color=["C1" if "ours" in n else "C0" for n in names])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel("milliseconds for one exchange of all gradients")
    axes.margins(x=0.1)
    figure.savefig(output / "step-cost.png", dpi=120)


def slow_link(measured: dict[str, dict[str, float]], output: Path) -> None:
    """Groups of bars, one for each rate of the link."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    methods = list(next(iter(measured.values())))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        places = [group + (i - (len(methods) - 1) / 2) * width for group in range(len(measured))]
        axes.bar(places, [seconds[method] for seconds in measured.values()], width, label=method)
    axes.set_xticks(range(len(measured)), [rate.replace("bit", "bit/s") for rate in measured])
    axes.set_yscale("log")
    axes.set_ylabel("seconds per training step")
    axes.legend(fontsize="small")
    figure.savefig(output / "slow-link.png", dpi=120)


def main() -> None:
    """Draw what is there."""
    parser = argparse.ArgumentParser(description="Pictures of benchmarks.")
    parser.add_argument("--step-cost", type=Path, help="what step_cost.py --json has written")
    parser.add_argument("--slow-link", type=Path, help="what slow_link.py --json has written")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the pictures (default: this one)")
    args = parser.parse_args()
    if args.step_cost:
        step_cost(json.loads(args.step_cost.read_text()), args.output)
    if args.slow_link:
        slow_link(json.loads(args.slow_link.read_text()), args.output)


if __name__ == "__main__":
    main()
