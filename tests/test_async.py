"""``AsyncQsparseLocalSGD``: Algorithm 2 of the paper, its identities, servers, and what goes wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from models import Vectors, gradient
from torch import Tensor
from world import World

from hvd_compress import (
    AsyncQsparseLocalSGD,
    Compression,
    sync_at,
)

ROOT = Path(__file__).parent.parent
SHAPES = {"a": (40,), "b": (7, 11), "c": (3, 5, 4), "d": ()}
KEY = "async_qsparse_local_sgd"


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    return {name: gradient(shape, rank, step, which) for which, (name, shape) in enumerate(SHAPES.items())}


def wrap(
    model: torch.nn.Module, sync_every: Any = 2, lr: float = 0.5, momentum: float = 0.0, **options: Any
) -> AsyncQsparseLocalSGD:
    own = {n: options.pop(n) for n in ("mode", "total_steps", "max_staleness", "timeout") if n in options}
    compression = options.pop("compression", None) or Compression.topk(**{"k": 5, "dense_below": 0, **options})
    return AsyncQsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum),
        named_parameters=model.named_parameters(),
        compression=compression,
        sync_every=sync_every,
        **own,
    )


def train(model: Vectors, optimizer: Any, first: int, last: int, pause: float = 0.0) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        model(gradients(hvd.rank(), step)).backward()
        optimizer.step()
        time.sleep(pause)


def memories(optimizer: AsyncQsparseLocalSGD) -> dict[str, Tensor]:
    return optimizer._model._memory.state_dict()


# Algorithm 2

SLOPES = [[[3, 2], [1, 1], [0, -2], [5, 4], [1, 0], [0, 0], [-1, 3], [2, 2]],
          [[-1, 4], [2, -2], [1, 1], [0, 3], [-4, 1], [2, 0], [1, -1], [0, 6]],
          [[2, 0], [-3, 1], [4, 4], [1, -1], [0, 2], [3, 3], [-2, 0], [1, 5]]]  # fmt: skip


def traces_by_hand(schedules: Sequence[Sequence[int]]) -> None:
    """Top-1 of two elements, η = 1/2, in exact fractions, line by line of Algorithm 2; lower ranks are slower.

    With three ranks the slopes are multiples of 3^8, so that all thirds, and all numbers, are exact in float64.
    """
    size, steps, eta = hvd.size(), 8, Fraction(1, 2)
    unit = 3**8 if size == 3 else 1
    x = [Fraction(0), Fraction(0)]
    local = [list(x) for _ in range(size)]
    copies = [list(x) for _ in range(size)]
    memory = [[Fraction(0), Fraction(0)] for _ in range(size)]

    model = Vectors({"w": (2,)}, dtype=torch.float64)
    optimizer = wrap(model, sync_at(schedules[hvd.rank()]), k=1, mode="logical", total_steps=steps)
    for t in range(steps):
        optimizer.zero_grad()
        model({"w": unit * torch.tensor(SLOPES[hvd.rank()][t], dtype=torch.float64)}).backward()
        time.sleep(0.01 * (size - hvd.rank()))
        optimizer.step()

        senders = [r for r in range(size) if t + 1 in schedules[r] or t + 1 == steps]
        sent = []
        for r in range(size):
            local[r] = [v - eta * unit * g for v, g in zip(local[r], SLOPES[r][t], strict=True)]
        for r in senders:
            p = [m + a - b for m, a, b in zip(memory[r], copies[r], local[r], strict=True)]
            kept = 0 if abs(p[0]) >= abs(p[1]) else 1
            sent.append([p[i] if i == kept else Fraction(0) for i in range(2)])
            memory[r] = [a - b for a, b in zip(p, sent[-1], strict=True)]
        x = [v - sum((s[i] for s in sent), Fraction(0)) / size for i, v in enumerate(x)]
        for r in senders:
            local[r], copies[r] = list(x), list(x)
        assert [Fraction(v) for v in model.get_parameter("w").tolist()] == local[hvd.rank()], t
        own = memories(optimizer).get("w", torch.zeros(2))
        assert [Fraction(v) for v in own.tolist()] == memory[hvd.rank()], t
    optimizer.finish()
    assert [Fraction(v) for v in model.get_parameter("w").tolist()] == x


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize(
    "schedules",
    [([2, 4, 6], [3, 6], [1, 2, 5]), ([1, 2, 3, 4, 5, 6, 7], [], [4]), ([3], [5], [7]), ([2, 4, 6],) * 3],
)
def test_algorithm_2_in_exact_fractions(world: World, schedules: Sequence[Sequence[int]]) -> None:
    world.run(traces_by_hand, schedules)
