"""Truncated quantizers against QSGD and TernGrad, at 2, 3 and 4 bits for each element.

    python examples/papers/truncated.py --data /usr/share/datasets/fashion-mnist

Plain Horovod training of a small ResNet on 4 ranks with ``hvd.DistributedOptimizer`` and without error feedback, as
in arXiv 2402.01160 and 2402.01798. One run for each seed is uncompressed: there each quantizer's error on that run's
own gradients is measured too. A run that was killed goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import horovod.torch as hvd
import matplotlib as mpl
import torch
import torch.nn.functional as F
from experiment import Case, Run, decay, environment, initial_model, main, markdown, spread, train
from images import Images
from networks import MODELS
from torch import Tensor

from hvd_compress import Compression
from hvd_compress.operators import QSGD, TBQSGD, TNQSGD, TQSGD, Operator, TernGrad

mpl.use("Agg")
import matplotlib.pyplot as plt

RANKS = {"resnet": 4}
BITS = (2, 3, 4)
LAST = 5  # looks at the test images that a result is the mean of
MEASUREMENTS = 4  # of the noise, in a run

SETTINGS: dict[str, Any] = {"steps": 160, "batch_size": 16, "lr": 0.05, "momentum": 0.9, "evaluate_every": 8}

OPERATORS: dict[str, Callable[[int], Operator]] = {
    "QSGD, l2 norm": lambda bits: QSGD(bits=bits, norm="l2"),
    "QSGD, max norm": lambda bits: QSGD(bits=bits),
    "QSGD, max norm of 512": lambda bits: QSGD(bits=bits, bucket=512),
    "TernGrad": lambda bits: TernGrad(),
    "TQSGD, Laplace": lambda bits: TQSGD(bits=bits),
    "TNQSGD, Laplace": lambda bits: TNQSGD(bits=bits),
    "TBQSGD, Laplace": lambda bits: TBQSGD(bits=bits),
    "TQSGD, power law": lambda bits: TQSGD(bits=bits, model="power"),
    "TNQSGD, power law": lambda bits: TNQSGD(bits=bits, model="power"),
    "TBQSGD, power law": lambda bits: TBQSGD(bits=bits, model="power"),
}
TRAINED = ("QSGD, l2 norm", "QSGD, max norm of 512", "TernGrad", *(f"{t}QSGD, Laplace" for t in ("T", "TN", "TB")))
"""The error on gradients is measured for all."""


def operators() -> Iterator[tuple[str, int]]:
    """Names and bits; TernGrad has two bits only, and bi-scaled levels need more than two."""
    for name in OPERATORS:
        for bits in BITS:
            if bits == 2 or name != "TernGrad":
                yield name, bits


def cases(part: str, data: str, ranks: int, seeds: Sequence[int], short: bool) -> list[Case]:
    """Seed by seed, so that a part of the results is a part of each."""
    settings = SETTINGS | {"data": data, "ranks": ranks} | ({"steps": 48} if short else {})
    names = [("none", 32), *((name, bits) for name, bits in operators() if name in TRAINED)]
    return [
        {"part": part, "operator": name, "bits": bits, "seed": seed} | settings
        for seed in seeds
        for name, bits in (names[::4] if short else names)
    ]


def train_case(case: Case, images: Images) -> Run:
    """One training, on all ranks."""
    torch.manual_seed(case["seed"])
    model = initial_model(MODELS[case["part"]](images.side))
    sgd = torch.optim.SGD(model.parameters(), lr=case["lr"], momentum=case["momentum"])
    if case["operator"] != "none":
        compression = Compression.of(
            OPERATORS[case["operator"]](case["bits"]),
            named_parameters=model.named_parameters(),
            memory="none",
            dense_below=0,
            seed=case["seed"],
        )
        optimizer = hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters(), compression=compression)
        ledger = compression.ledger
        curve = train(model, optimizer, images, case, lambda: ledger.total.sent, decay(optimizer, case))
        return Run(case, curve, {"environment": environment()})

    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters())
    slower = decay(optimizer, case)
    steps = 0
    errors: dict[str, list[float]] = {f"{name}, {bits}": [] for name, bits in operators()}

    def after_step(step: int) -> None:
        nonlocal steps
        steps = step
        slower(step)
        if step % (case["steps"] // MEASUREMENTS) == 0:
            own = own_gradients(model, images, case["batch_size"], step)
            for name, bits in operators():
                errors[f"{name}, {bits}"].append(relative_error(OPERATORS[name](bits), own, step))

    handed_over = sum(p.nbytes for p in model.parameters())  # to Horovod, in each step
    curve = train(model, optimizer, images, case, lambda: steps * handed_over, after_step)
    return Run(case, curve, {"environment": environment(), "errors": {k: mean(v) for k, v in errors.items() if v}})


def own_gradients(model: torch.nn.Module, images: Images, batch_size: int, seed: int) -> list[Tensor]:
    """This rank's, of one batch; Horovod, which waits at ``.grad``, does not see them."""
    batch = torch.randint(len(images.train_labels), (batch_size,), generator=torch.Generator().manual_seed(seed))
    loss = F.cross_entropy(model(images.train_images[batch]), images.train_labels[batch])
    return list(torch.autograd.grad(loss, list(model.parameters())))


def relative_error(operator: Operator, gradients: list[Tensor], seed: int) -> float:
    """``Σ‖C(g) − g‖² / Σ‖g‖²``, tensor by tensor."""
    generator = torch.Generator().manual_seed(seed)
    lost = sum(float((operator(g, generator=generator) - g).square().sum()) for g in gradients)
    return lost / sum(float(g.square().sum()) for g in gradients)


def report(runs: list[Run]) -> dict[str, str]:
    """For each operator and number of bits, the test error, and the error on gradients."""
    uncompressed = [run for run in runs if run.case["operator"] == "none"]
    accuracy, noise = [], []
    if uncompressed:
        accuracy.append(["none (32 bits)", *[spread(map(test_error, uncompressed), ".2f")] * len(BITS)])
    for name in OPERATORS:
        of_name = [run for run in runs if run.case["operator"] == name]
        cells = []
        for bits in BITS:
            some = [run for run in of_name if run.case["bits"] == bits]
            cells.append(spread(map(test_error, some), ".2f") if some else "")
        if any(cells):
            accuracy.append([name, *cells])
        errors = []
        for bits in BITS:
            key = f"{name}, {bits}"
            values = [run.notes["errors"][key] for run in uncompressed if key in run.notes["errors"]]
            errors.append(spread(values, ".2g") if values else "")
        if any(errors):
            noise.append([name, *errors])
    sent = []
    for bits in BITS:
        rates = [run.curve[-1].sent / run.case["steps"] / 1e3 for run in runs if run.case["bits"] == bits]
        sent.append(f"{min(rates):.1f} to {max(rates):.1f}" if rates else "")
    accuracy.append(["kB sent in each step", *sent])
    heading = [f"{bits} bits" for bits in BITS]
    return {
        "error": markdown(["test error (%)", *heading], accuracy),
        "noise": markdown(["‖C(g) − g‖² / ‖g‖²", *heading], noise),
    }


def test_error(run: Run) -> float:
    """In per cent, the mean of the last looks."""
    return 100 * mean(point.error for point in run.curve[-LAST:])


def draw(runs: list[Run], path: Path) -> None:
    """Test error by bits, a mark for each seed, and a line through their means."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        for number, name in enumerate(TRAINED):
            points = {
                bits: [test_error(run) for run in runs if (run.case["operator"], run.case["bits"]) == (name, bits)]
                for bits in BITS
            }
            points = {bits: errors for bits, errors in points.items() if errors}
            shift = (number - len(TRAINED) / 2) * 0.03
            places = [bits + shift for bits, errors in points.items() for _ in errors]
            axes.plot(
                places, [e for errors in points.values() for e in errors], "o", markersize=3, color=f"C{number}"
            )
            means = [mean(errors) for errors in points.values()]
            axes.plot([bits + shift for bits in points], means, "-", color=f"C{number}", label=name, linewidth=1.2)
        uncompressed = [test_error(run) for run in runs if run.case["operator"] == "none"]
        if uncompressed:
            axes.axhline(mean(uncompressed), color="black", linewidth=0.8, label="uncompressed")
        axes.set_xticks(BITS, [f"{bits} bits" for bits in BITS])
        axes.set_ylabel("Test error (%)")
        axes.grid(axis="y", alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    main(__doc__ or "", ranks=RANKS, cases=cases, train_case=train_case, report=report, draw=draw)
