"""Adaptive k: the rule in numbers, the budget whatever happens, and agreement between ranks."""

from __future__ import annotations

import copy
import math
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Vectors, assert_replicas_identical, gradient
from world import World

from hvd_compress import Compression
from hvd_compress.operators import TopK
from hvd_compress.schedules import Accordion, AdaptiveTopK, divide, next_k


def test_rule_by_hand() -> None:
    """100 elements left over 10 exchanges: 10 each, times (G/Ḡ)^(1/3)."""

    def k(energy: float, exponent: float = 1 / 3, **changed: int) -> int:
        settings = {"left": 100, "exchanges_left": 10, "k_min": 2, "k_max": 1000, **changed}
        return next_k(relative_energy=energy, exponent=exponent, **settings)

    assert k(1.0) == 10
    assert k(8.0) == 20
    assert k(0.125) == 5
    assert k(4.0, exponent=0.5) == 20
    assert k(5.0, exponent=0.0) == 10
    assert k(1e-9) == 2
    assert k(1e9) == 100 - 9 * 2  # each of the nine others still gets its 2
    assert k(1e9, k_max=30) == 30
    assert k(0.0) == 2


@given(
    st.integers(1, 60),
    st.floats(0.001, 1.0),
    st.floats(0, 1),
    st.floats(0, 1),
    st.lists(st.floats(0, 1e30) | st.just(math.nan) | st.just(math.inf), min_size=60, max_size=120),
    st.dictionaries(st.text(max_size=3), st.integers(0, 5000), min_size=1, max_size=6),
)
def test_budget_holds_whatever_the_gradients_do(
    exchanges: int, ratio: float, smallest: float, exponent: float, energies: list[float], sizes: dict[str, int]
) -> None:
    plan = AdaptiveTopK(ratio, exchanges, smallest=smallest, exponent=exponent)
    schedule = plan.start(sizes)
    filled = {name: size for name, size in sizes.items() if size}
    k_min = max(round(smallest * max(round(ratio * sum(sizes.values())), len(filled))), len(filled))
    spent = []
    for energy in energies:
        asked = {name: schedule.operator(name) for name in filled}
        ks = [operator.count(filled[name]) for name, operator in asked.items() if isinstance(operator, TopK)]
        assert sum(ks) == schedule.k >= k_min
        spent.append(sum(ks))
        schedule.advance(energy)
    for start in range(0, len(spent), exchanges):
        assert sum(spent[start : start + exchanges]) <= schedule.budget
    assert schedule.budget <= exchanges * max(round(ratio * sum(sizes.values())), len(filled))


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 1000), min_size=1, max_size=8), st.data())
def test_division_is_exact_proportional_and_possible(sizes: dict[str, int], data: st.DataObject) -> None:
    k = data.draw(st.integers(len(sizes), sum(sizes.values())))
    shares = divide(k, sizes)
    assert sum(shares.values()) == k
    total = sum(sizes.values()) - len(sizes)
    for name, share in shares.items():
        assert 1 <= share <= sizes[name]
        ideal = 1 + (k - len(sizes)) * (sizes[name] - 1) / total if total else 1
        assert abs(share - ideal) <= 1


def test_moving_average_by_hand() -> None:
    """Energies 8, 1 with decay 1/2: means 8 and 4.5; k = 10 · (1/4.5)^(1/3) = 6.06 at the third exchange."""
    schedule = AdaptiveTopK(0.1, 100, smallest=0.0, decay=0.5).start({"w": 100})
    assert schedule.k == 10
    schedule.advance(8.0)
    assert schedule.k == 10
    schedule.advance(1.0)
    assert schedule.k == round(980 / 98 * (1 / 4.5) ** (1 / 3)) == 6
    schedule.advance(math.nan)  # an overflow tells nothing
    assert schedule.k == round((1000 - 26) / 97 * (1 / 4.5) ** (1 / 3))


def test_accordion_by_hand() -> None:
    """Norms of intervals 10, 9, 4, 4: the change to 4 is 5/9 ≥ 1/2, the others are not critical."""
    schedule = Accordion(high=0.5, low=0.1, interval=2).start({"w": 100})
    seen = []
    for energy in (60.0, 40.0, 80.0, 1.0, 10.0, 6.0, 16.0, 0.0, 1.0):
        seen.append(schedule.operator("w"))
        schedule.advance(energy)
    high, low = TopK(ratio=0.5), TopK(ratio=0.1)
    assert seen == [high, high, high, high, low, low, high, high, low]


SHAPES = {"a": (400,), "b": (70, 110), "c": (30, 5, 4)}


def adapts(plan: str) -> list[tuple[int, ...]]:
    """Trains with norms that differ between ranks and steps; returns what this rank's schedule asked for."""

    def make() -> tuple[Vectors, Any, Any]:
        model = Vectors(SHAPES)
        settings: dict[str, Any] = {"named_parameters": model.named_parameters(), "dense_below": 0}
        compression = (
            Compression.adaptive_topk(ratio=0.02, exchanges=8, **settings)
            if plan == "adaptive"
            else Compression.accordion(high=0.05, low=0.01, interval=3, **settings)
        )
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return (
            model,
            compression,
            hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), compression=compression),
        )

    def train(model: Vectors, compression: Any, optimizer: Any, first: int, last: int) -> list[tuple[int, ...]]:
        asked = []
        for step in range(first, last):
            schedule = compression._reducer._schedule
            counts = [schedule.operator(n).count(math.prod(s)) for n, s in SHAPES.items()]
            asked.append(tuple(counts))
            optimizer.zero_grad()
            scale = (1 + 9 * (step % 4 == 0)) * (1 + hvd.rank())
            model({n: scale * gradient(s, hvd.rank(), step) for n, s in SHAPES.items()}).backward()
            optimizer.step()
            assert_replicas_identical(list(model.parameters()))
        return asked

    model, compression, optimizer = make()
    asked = train(model, compression, optimizer, 0, 7)
    saved = copy.deepcopy((compression.state_dict(), model.state_dict()))
    asked += train(model, compression, optimizer, 7, 16)

    resumed, compression, optimizer = make()
    resumed.load_state_dict(saved[1])
    compression.load_state_dict(saved[0])
    assert train(resumed, compression, optimizer, 7, 16) == asked[7:]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    return asked


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("plan", ["adaptive", "accordion"])
def test_ranks_agree_resume_and_adapt(world: World, plan: str) -> None:
    asked = world.run(adapts, plan)
    assert all(other == asked[0] for other in asked)
    totals = [sum(counts) for counts in asked[0]]
    assert len(set(totals)) > 1
    if plan == "adaptive":
        budget = 8 * round(0.02 * 8700)
        assert sum(totals[:8]) <= budget
        assert sum(totals[8:]) <= budget


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AdaptiveTopK(0.0, 10), "ratio"),
        (lambda: AdaptiveTopK(0.1, 0), "exchanges"),
        (lambda: AdaptiveTopK(0.1, 10, smallest=2.0), "smallest"),
        (lambda: AdaptiveTopK(0.1, 10, exponent=-1.0), "exponent"),
        (lambda: AdaptiveTopK(0.1, 10, decay=1.0), "decay"),
        (lambda: Accordion(high=0.1, low=0.2), "low ≤ high"),
        (lambda: Accordion(high=0.1, low=0.1, interval=0), "interval"),
        (lambda: Accordion(high=0.1, low=0.1, threshold=0.0), "threshold"),
    ],
)
def test_bad_arguments(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
