"""Adaptive Top-K against fixed Top-K with the same number of elements in all.

    python examples/papers/adaptive.py --data /usr/share/datasets/fashion-mnist

Plain Horovod training on 4 ranks with ``hvd.DistributedOptimizer``: each exchange sends as many elements as the
others do (Top-K), as many as the gradients' norm asks for (after arXiv 2210.13532), or all that exceed one threshold
(after arXiv 2108.00951), within one budget; with and without error feedback. A run that was killed goes on with the
same command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import horovod.torch as hvd
import matplotlib as mpl
import torch
from experiment import Case, Run, decay, environment, initial_model, main, markdown, spread, train
from images import Images
from networks import MODELS

from hvd_compress import Compression, GradientCompressor
from hvd_compress.operators import Operator, TopK
from hvd_compress.schedules import AdaptiveTopK, HardThreshold, Plan

mpl.use("Agg")
import matplotlib.pyplot as plt

RANKS = {"softmax": 4, "resnet": 4}
RATIOS = {"softmax": (0.001, 0.01), "resnet": (0.01,)}
LAST = 5  # looks at the test images that a result is the mean of

SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {"steps": 240, "batch_size": 16, "lr": 0.05, "momentum": 0.0},
    "resnet": {"steps": 160, "batch_size": 16, "lr": 0.05, "momentum": 0.9},
}


def adaptive(memory: str, ratio: float, exchanges: int) -> Plan:
    """The exponent that fits the memory: see :class:`hvd_compress.schedules.AdaptiveTopK`."""
    return AdaptiveTopK(ratio, exchanges, exponent=1 / 3 if memory == "residual" else 1 / 2)


RULES: dict[str, Callable[[str, float, int], Operator | Plan]] = {
    "Top-K": lambda memory, ratio, steps: TopK(ratio=ratio),
    "Adaptive Top-K, one budget": adaptive,
    "Adaptive Top-K, ten budgets": lambda memory, ratio, steps: adaptive(memory, ratio, steps // 10),
    "hard threshold, one budget": lambda memory, ratio, steps: HardThreshold(ratio, steps),
    "hard threshold, ten budgets": lambda memory, ratio, steps: HardThreshold(ratio, steps // 10),
}


def cases(part: str, data: str, ranks: int, seeds: Sequence[int], short: bool) -> list[Case]:
    """Seed by seed, so that a part of the results is a part of each."""
    settings = SETTINGS[part] | {"evaluate_every": 8, "data": data, "ranks": ranks}
    if short:
        settings |= {"steps": 20}
    return [
        {"part": part, "rule": rule, "memory": memory, "ratio": ratio, "seed": seed} | settings
        for seed in seeds
        for ratio in (RATIOS[part][-1:] if short else RATIOS[part])
        for memory in ("residual", "none")
        for rule in RULES
    ]


def train_case(case: Case, images: Images) -> Run:
    """One training, on all ranks."""
    torch.manual_seed(case["seed"])
    model = initial_model(MODELS[case["part"]](images.side))
    compression: GradientCompressor = Compression.of(
        RULES[case["rule"]](case["memory"], case["ratio"], case["steps"]),
        named_parameters=model.named_parameters(),
        memory=case["memory"],
        dense_below=0,
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=case["lr"], momentum=case["momentum"]),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    ledger = compression.ledger
    curve = train(model, optimizer, images, case, lambda: ledger.total.sent, decay(optimizer, case))
    return Run(case, curve, {"environment": environment()})


def report(runs: list[Run]) -> dict[str, str]:
    """For each part, the error of each rule, and by how much it differs from Top-K's with the same seed."""
    tables = {}
    for part in RANKS:
        rows = []
        for memory in ("residual", "none"):
            for rule in RULES:
                row = [f"{rule}, {'with' if memory == 'residual' else 'no'} error feedback"]
                for ratio in RATIOS[part]:
                    errors = by_seed(runs, part, rule, memory, ratio)
                    fixed = by_seed(runs, part, "Top-K", memory, ratio)
                    differences = [error - fixed[seed] for seed, error in errors.items() if seed in fixed]
                    row.append(spread(errors.values(), ".2f") if errors else "")
                    row.append("" if rule == "Top-K" or not differences else spread(differences, "+.2f"))
                    sent = [run.curve[-1].sent / 1e3 for run in select(runs, part, rule, memory, ratio)]
                    row.append(f"{mean(sent):,.0f}" if sent else "")
                if any(row[1:]):
                    rows.append(row)
        if rows:
            heading = [f"{part}: error (%)"]
            for ratio in RATIOS[part]:
                heading += [f"{ratio:.1%} sent", "against Top-K", "kB"]
            tables[part] = markdown(heading, rows)
    return tables


def select(runs: list[Run], part: str, rule: str, memory: str, ratio: float) -> list[Run]:
    """Of all seeds."""
    wanted = {"part": part, "rule": rule, "memory": memory, "ratio": ratio}
    return [run for run in runs if wanted.items() <= run.case.items()]


def by_seed(runs: list[Run], part: str, rule: str, memory: str, ratio: float) -> Mapping[int, float]:
    """Test error in per cent, the mean of the last looks."""
    return {
        run.case["seed"]: 100 * mean(point.error for point in run.curve[-LAST:])
        for run in select(runs, part, rule, memory, ratio)
    }


def draw(runs: list[Run], path: Path) -> None:
    """By how much each rule's error differs from Top-K's, a dot for each seed."""
    settings = [(part, memory, ratio) for part in RANKS for memory in ("residual", "none") for ratio in RATIOS[part]]
    settings = [key for key in settings if by_seed(runs, key[0], "Top-K", *key[1:])]
    rules = [rule for rule in RULES if rule != "Top-K"]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(8.0, 0.9 + 0.75 * len(settings)), layout="constrained")
        for number, rule in enumerate(rules):
            for row, (part, memory, ratio) in enumerate(settings):
                fixed = by_seed(runs, part, "Top-K", memory, ratio)
                errors = by_seed(runs, part, rule, memory, ratio)
                differences = [error - fixed[seed] for seed, error in errors.items() if seed in fixed]
                height = -row - (number - (len(rules) - 1) / 2) * 0.16
                label = rule if row == 0 else None
                axes.plot(
                    differences, [height] * len(differences), "o", markersize=3.5, color=f"C{number}", label=label
                )
                if differences:
                    axes.plot(mean(differences), height, "|", markersize=10, color=f"C{number}")
        axes.axvline(0, color="black", linewidth=0.8)
        names = [f"{p}, {r:.1%}, {'with' if m == 'residual' else 'no'} memory" for p, m, r in settings]
        axes.set_yticks([-row for row in range(len(settings))], names)
        axes.set_xlabel("Test error less that of fixed Top-K with the same seed (percentage points; left is better)")
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xticks([-5, -2, -1, 0, 1, 2, 5], ["−5", "−2", "−1", "0", "+1", "+2", "+5"])
        axes.grid(axis="x", alpha=0.3)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    main(__doc__ or "", ranks=RANKS, cases=cases, train_case=train_case, report=report, draw=draw)
