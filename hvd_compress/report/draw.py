"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runs import KINDS, Run, Summary, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP"
X = {"megabytes": "Megabytes sent per rank", "minutes": "Minutes", "epoch": "Epoch"}
Y = {"accuracy": "Validation accuracy (%)", "loss": "Validation loss"}
_FEW = 5  # runs whose names and last numbers find room among the curves
SHADES = {"input": "#b8b8b8", "compute": "#4c78a8", "compress": "#f58518", "exchange": "#e45756"}


def draw(runs: Sequence[Run] | Mapping[str, Run], x: str, y: str, path: Path) -> None:
    """Write a picture with one curve for each run.

    Args:
        runs: with their labels, or without.
        x: one of :data:`X`. Megabytes are on a logarithmic axis, so runs that sent nothing are not there.
        y: one of :data:`Y`.
        path: of the PNG.
    """
    labelled = runs if isinstance(runs, Mapping) else label(runs)
    are_many = len(labelled) > _FEW

    def curves(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for number, (name, run) in enumerate(labelled.items()):
            scale = 100 if y == "accuracy" else 1
            points = zip(run.column(x), run.column(y), strict=True)
            shown = [(a, scale * b) for a, b in points if a == a and b == b and (a > 0 or x != "megabytes")]
            xs, ys = zip(*shown, strict=True) if shown else ((), ())
            marker = MARKERS[number % len(MARKERS)]
            (line,) = axes.plot(xs, ys, marker=marker, markersize=4, label=name, color=f"C{number % 10}")
            if y == "accuracy" and shown and not are_many:
                text = f"{ys[-1]:.1f} %"
                axes.annotate(text, shown[-1], (5, 3), textcoords="offset points", color=line.get_color())
        if x == "megabytes":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda megabytes, _: f"{megabytes:,g}")
        elif x == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if y == "accuracy":
            axes.set_ylim(0, 105)
        axes.set_xlabel(X[x])
        axes.set_ylabel(Y[y])
        axes.margins(x=0.1)
        axes.grid(which="major", alpha=0.3)
        if are_many:
            axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        else:
            axes.legend(frameon=False)

    _picture(path, curves)


def draw_bits(summaries: Sequence[Summary], target: float, path: Path) -> None:
    """Bars: bits that each rank sent until the target; runs that did not reach it, or sent nothing, have none."""

    def bars(axes: Axes) -> None:
        values = [s.target_bits or 0.0 for s in summaries]
        places = range(len(summaries))
        axes.barh(places, [value / 8e6 for value in values], color=[f"C{n % 10}" for n in places])
        axes.set_yticks(places, [s.label for s in summaries])
        axes.invert_yaxis()
        if any(values):
            axes.set_xscale("log")
            axes.set_xlim(min(v for v in values if v) / 8e6 / 3, max(values) / 8e6 * 3)
            axes.xaxis.set_major_formatter(lambda megabytes, _: f"{megabytes:,g}")
        axes.set_xlabel(f"Megabytes sent per rank until {target:.1%} accuracy")

    _picture(path, bars, height=1.2 + 0.4 * len(summaries))


def draw_shares(summaries: Sequence[Summary], path: Path) -> None:
    """Bars: what the time of training was spent on."""

    def bars(axes: Axes) -> None:
        places = range(len(summaries))
        left = [0.0] * len(summaries)
        for kind in KINDS:
            widths = [100 * s.shares.get(kind, 0.0) for s in summaries]
            axes.barh(places, widths, left=left, label=kind, color=SHADES[kind])
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(places, [s.label for s in summaries])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("Part of the training time (%), first rank")
        legend = {"ncols": len(KINDS), "handlelength": 1, "columnspacing": 1, "handletextpad": 0.4}
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), **legend)

    _picture(path, bars, height=1.5 + 0.4 * len(summaries))


def _picture(path: Path, content: Any, height: float = 3.6) -> None:
    # Here, since it takes a second, which every other command would have to wait too.
    import matplotlib as mpl

    mpl.use("Agg")  # nodes of a cluster have no display
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(5.5, height), layout="constrained")
        content(axes)
        figure.savefig(path, dpi=200)
        plt.close(figure)
