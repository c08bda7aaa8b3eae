"""Qsparse-local-SGD: what has to be sent until a model is good enough.

    python examples/papers/qsparse.py --data /usr/share/datasets/fashion-mnist

Softmax regression on 15 ranks and a small ResNet on 4, each with several operators, with 1, 2, 4 and 8 local steps,
synchronous and asynchronous (arXiv 1906.02367, Algorithms 1 and 2; in the asynchronous runs each rank draws the time
to its next exchange from 1 to H). A run that was killed goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from experiment import Case, Point, Run, decay, environment, initial_model, main, markdown, spread, train
from images import Images
from networks import MODELS

from hvd_compress import AsyncQsparseLocalSGD, Compression, QsparseLocalSGD, random_gaps

mpl.use("Agg")
import matplotlib.pyplot as plt

RANKS = {"softmax": 15, "resnet": 4}
PERIODS = (1, 2, 4, 8)

SETTINGS: dict[str, dict[str, Any]] = {
    # k and the number of ranks of the softmax regression are the paper's.
    "softmax": {"steps": 160, "batch_size": 8, "lr": 0.05, "momentum": 0.0, "weight_decay": 1e-4, "k": 40},
    "resnet": {"steps": 160, "batch_size": 16, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "ratio": 0.01},
}
TARGETS = {
    ("softmax", "fashion-mnist"): (0.25, 0.20),
    ("resnet", "fashion-mnist"): (0.30, 0.22),
    ("softmax", "digits"): (0.20, 0.10),
    ("resnet", "digits"): (0.20, 0.10),
}
"""Part of the test images that may be taken for something else: what most runs reach, and what only some do."""

OPERATORS: dict[str, Callable[..., Any]] = {
    "SGD": lambda **amount: Compression.none,
    "EF-QSGD": lambda **amount: Compression.qsgd(bits=4, memory="residual", dense_below=0),
    "EF-SignSGD": lambda **amount: Compression.sign(dense_below=0),
    "TopK": lambda **amount: Compression.topk(**amount, dense_below=0),
    "QTopK": lambda **amount: Compression.qtopk(**amount, bits=4, dense_below=0),
    "SignTopK": lambda **amount: Compression.signtopk(**amount, dense_below=0),
}
SPARSE = ("TopK", "QTopK", "SignTopK")


def cases(part: str, data: str, ranks: int, seeds: Sequence[int], short: bool) -> list[Case]:
    """Seed by seed, so that a part of the results is a part of each."""
    settings = SETTINGS[part] | {"evaluate_every": 8, "data": data, "ranks": ranks}
    periods: tuple[int, ...] = PERIODS
    if short:
        settings, periods = settings | {"steps": 16}, (1, 4)
    kinds = [("sync", operator, period) for operator in OPERATORS for period in periods]
    # With one step between exchanges the asynchronous algorithm is the synchronous one.
    kinds += [("async", operator, period) for operator in SPARSE for period in periods if period > 1]
    return [
        {"part": part, "operator": operator, "mode": mode, "H": period, "seed": seed} | settings
        for seed in seeds
        for mode, operator, period in kinds
    ]


def train_case(case: Case, images: Images) -> Run:
    """One training, on all ranks."""
    torch.manual_seed(case["seed"])
    model = initial_model(MODELS[case["part"]](images.side))
    sgd = torch.optim.SGD(
        model.parameters(), lr=case["lr"], momentum=case["momentum"], weight_decay=case["weight_decay"]
    )
    amount = {name: case[name] for name in ("k", "ratio") if name in case}
    compression = OPERATORS[case["operator"]](**amount)
    slower = decay(sgd, case)
    if case["mode"] == "sync":
        optimizer = QsparseLocalSGD(
            sgd, named_parameters=model.named_parameters(), compression=compression, sync_every=case["H"]
        )
        curve = train(model, optimizer, images, case, lambda: optimizer.ledger.total.sent, slower)
    else:
        asynchronous = AsyncQsparseLocalSGD(
            sgd,
            named_parameters=model.named_parameters(),
            compression=compression,
            sync_every=random_gaps(case["H"], case["seed"]),
            mode="logical",  # the order of updates is that of the steps, so that the run can be repeated
            total_steps=case["steps"],
            servers=1,
        )

        def after_step(step: int) -> None:
            slower(step)
            if step == case["steps"]:
                asynchronous.finish()

        curve = train(model, asynchronous, images, case, lambda: asynchronous.ledger.total.sent, after_step)
    return Run(case, curve, {"environment": environment()})


def reached(run: Run, target: float) -> Point | None:
    """The first time that the error was so small."""
    return next((point for point in run.curve if point.error <= target), None)


def targets_of(runs: Sequence[Run]) -> tuple[float, ...]:
    """Those for a part's images."""
    case = runs[0].case
    return TARGETS.get((case["part"], case["data"]), (0.3, 0.2))


def report(runs: list[Run]) -> dict[str, str]:
    """For each part, mode and target: kilobytes until it is reached, and how many times less than plain SGD's."""
    tables = {}
    for part in RANKS:
        of_part = [run for run in runs if run.case["part"] == part]
        if not of_part:
            continue
        for target in targets_of(of_part):
            plain = _upward(_of(of_part, "SGD", "sync", 1), target)
            for mode in ("sync", "async"):
                periods = sorted({run.case["H"] for run in of_part if run.case["mode"] == mode})
                rows = [
                    [operator, *(_cell(_of(of_part, operator, mode, period), target, plain) for period in periods)]
                    for operator in OPERATORS
                ]
                heading = [f"kB until {target:.0%} error", *(f"H = {h}" for h in periods)]
                tables[f"{part} {mode} {target:.0%}"] = markdown(heading, [row for row in rows if any(row[1:])])
        rows = []
        for operator in OPERATORS:
            for mode in ("sync", "async"):
                errors = [
                    spread([100 * run.curve[-1].error for run in some], ".1f") if some else ""
                    for some in (_of(of_part, operator, mode, period) for period in PERIODS)
                ]
                if any(errors):
                    rows.append([f"{operator}, {mode}", *errors])
        tables[f"{part} error"] = markdown(["error at the end (%)", *(f"H = {h}" for h in PERIODS)], rows)
    return tables


def draw(runs: list[Run], path: Path) -> None:
    """Mean error over the seeds against bytes, of the synchronous runs with H = 1 and with the largest."""
    parts = [part for part in RANKS if any(run.case["part"] == part for run in runs)]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            1, len(parts), figsize=(4.6 * len(parts), 3.8), layout="constrained", squeeze=False
        )
        for axis, part in zip(axes[0], parts, strict=True):
            of_part = [run for run in runs if run.case["part"] == part and run.case["mode"] == "sync"]
            for number, operator in enumerate(OPERATORS):
                for period, style in ((1, ":"), (max(run.case["H"] for run in of_part), "-")):
                    some = _of(of_part, operator, "sync", period)
                    if some:
                        curves = [run.curve for run in some]
                        kilobytes = [
                            sum(p.upward for p in points) / len(points) / 1e3 for points in zip(*curves, strict=True)
                        ]
                        errors = [
                            100 * sum(p.error for p in points) / len(points) for points in zip(*curves, strict=True)
                        ]
                        label = f"{operator}, H = {period}"
                        axis.plot(kilobytes, errors, style, color=f"C{number}", label=label, linewidth=1.4)
            for target in targets_of(of_part):
                axis.axhline(100 * target, color="grey", linewidth=0.8)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(lambda kilobytes, _: f"{kilobytes:,g}")
            axis.set_title(f"{part}, {of_part[0].case['ranks']} ranks, {of_part[0].case['data']}")
            axis.set_xlabel("Kilobytes sent by each rank")
            axis.set_ylabel("Test error (%)")
            axis.grid(which="major", alpha=0.3)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _of(runs: Sequence[Run], operator: str, mode: str, period: int) -> list[Run]:
    wanted = {"operator": operator, "mode": mode, "H": period}
    return [run for run in runs if wanted.items() <= run.case.items()]


def _upward(runs: Sequence[Run], target: float) -> float | None:
    """Mean kilobytes until the target; None if one run never came there."""
    points = [reached(run, target) for run in runs]
    found = [point.upward for point in points if point is not None]
    return sum(found) / len(found) / 1e3 if found and len(found) == len(points) else None


def _cell(runs: Sequence[Run], target: float, plain: float | None) -> str:
    if not runs:
        return ""
    points = [reached(run, target) for run in runs]
    found = [point.upward / 1e3 for point in points if point is not None]
    if len(found) < len(points):
        return f"{len(found)} of {len(points)} there" if found else "–"
    text = spread(found, ",.1f" if max(found) < 100 else ",.0f")
    return text if plain is None else f"{text} ({plain / (sum(found) / len(found)):,.0f}×)"


if __name__ == "__main__":
    main(__doc__ or "", ranks=RANKS, cases=cases, train_case=train_case, report=report, draw=draw)
