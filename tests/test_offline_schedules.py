"""Budgets divided with hindsight: optimal among all whole numbers, by brute force and by exchange arguments.

Energies of the exact tests are whole numbers, of which floats lose nothing that matters; objectives are compared as
fractions.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_compress.operators import TopK
from hvd_compress.schedules import (
    AdaptiveTopK,
    Bell,
    ErrorModel,
    HardThreshold,
    Linear,
    Power,
    best_allocation,
    global_threshold,
)

MODELS: list[tuple[ErrorModel, Any]] = [
    (Linear(), lambda g, k, d: g * (1 - Fraction(k, d))),
    (Bell(), lambda g, k, d: g * (1 - Fraction(k, d)) ** 2),
    (Power(1 / 2), lambda g, k, d: Fraction(g, k)),
    (Power(1 / 3), lambda g, k, d: Fraction(g, k**2)),
]
each_model = pytest.mark.parametrize(("model", "exact"), MODELS, ids=lambda m: repr(m) if m in dict(MODELS) else "")


def allocations(n: int, budget: int, low: int, high: int) -> list[tuple[int, ...]]:
    return [ks for ks in itertools.product(range(low, high + 1), repeat=n) if sum(ks) <= budget]


@each_model
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 3), st.integers(0, 26))
def test_no_allocation_of_whole_numbers_is_better(
    model: ErrorModel, exact: Any, energies: list[int], d: int, k_min: int, budget: int
) -> None:
    k_min = min(max(k_min, 1), d)
    budget = max(budget, len(energies) * k_min)
    ks = best_allocation(model, energies, budget=budget, d=d, k_min=k_min)
    assert sum(ks) == min(budget, len(energies) * d)
    assert all(k_min <= k <= d for k in ks)

    def total(candidate: Sequence[int]) -> Fraction:
        return sum((exact(g, k, d) for g, k in zip(energies, candidate, strict=True)), Fraction(0))

    assert total(ks) == min(map(total, allocations(len(energies), budget, k_min, d)))


@each_model
@pytest.mark.parametrize(("n", "d", "share"), [(50, 1000, 0.1), (300, 40, 0.5), (1000, 100_000, 0.01)])
def test_no_element_gains_by_moving(model: ErrorModel, exact: Any, n: int, d: int, share: float) -> None:
    """Convex and separable: if no single move gains, nothing does. Energies over eight decades, and some zeros."""
    draw = random.Random(n)
    energies = [0 if draw.random() < 0.1 else round(10 ** draw.uniform(0, 8)) for _ in range(n)]
    budget = round(share * n * d)
    ks = best_allocation(model, energies, budget=budget, d=d, k_min=3)
    assert sum(ks) == budget
    gains = [exact(g, k, d) - exact(g, k + 1, d) for g, k in zip(energies, ks, strict=True) if k < d]
    losses = [exact(g, k - 1, d) - exact(g, k, d) for g, k in zip(energies, ks, strict=True) if k > 3]
    assert max(gains) <= min(losses) * (1 + Fraction(1, 10**12))


def test_by_hand() -> None:
    # d(1 − ν/G): ν = (3·100 − 150) / (100 (1 + 1/2 + 1/4)) = 6/7, so that 100/7, 400/7 and 550/7.
    assert best_allocation(Bell(), [1.0, 2.0, 4.0], budget=150, d=100) == [14, 57, 79]
    # In proportion to the cube root, to the root, and all or nothing.
    assert best_allocation(Power(1 / 3), [1.0, 8.0, 27.0], budget=60, d=100) == [10, 20, 30]
    assert best_allocation(Power(1 / 2), [1.0, 4.0, 9.0], budget=60, d=100) == [10, 20, 30]
    assert best_allocation(Linear(), [1.0, 3.0, 2.0], budget=60, d=40, k_min=5) == [5, 40, 15]
    # Water-filling: the largest would get 98 of 100 but may have 60; the rest is divided as 1 : 1.
    assert best_allocation(Power(1 / 2), [1.0, 10_000.0, 1.0], budget=100, d=60) == [20, 60, 20]
    # The remainder goes to the earliest of equals.
    assert best_allocation(Bell(), [5.0, 5.0, 5.0], budget=8, d=10) == [3, 3, 2]
    assert best_allocation(Bell(), [], budget=8, d=10) == []
    assert best_allocation(Bell(), [0.0, 0.0], budget=8, d=10, k_min=0) == [4, 4]
    assert best_allocation(Bell(), [0.0, 1.0], budget=14, d=10, k_min=2) == [4, 10]


@each_model
def test_extreme_energies(model: ErrorModel, exact: Any) -> None:
    """Neither the smallest nor the largest floats lead to errors, or to a search that does not end."""
    energies = [5e-324, 1e308, 1e-100, 1.0, 0.0, 1.7e308]
    ks = best_allocation(model, energies, budget=5000, d=2000)
    assert sum(ks) == 5000
    assert ks[5] >= ks[1] >= ks[3] >= ks[2]


@given(
    st.lists(st.lists(st.integers(-4, 4), min_size=0, max_size=4), min_size=1, max_size=4),
    st.integers(0, 2),
    st.integers(0, 16),
)
def test_one_threshold_is_the_best_for_what_is_left(values: list[list[int]], k_min: int, budget: int) -> None:
    budget = max(budget, k_min * len(values))
    price, ks = global_threshold([torch.tensor(v, dtype=torch.float32) for v in values], budget=budget, k_min=k_min)
    squares = [sorted((x * x for x in v), reverse=True) for v in values]

    def left(candidate: Sequence[int]) -> int:
        return sum(sum(s[k:]) for s, k in zip(squares, candidate, strict=True))

    possible = [range(min(k_min, len(s)), len(s) + 1) for s in squares]
    assert sum(ks) == min(budget, sum(map(len, squares)))
    assert all(k in allowed for k, allowed in zip(ks, possible, strict=True))
    assert left(ks) == min(left(c) for c in itertools.product(*possible) if sum(c) <= budget)
    # λ tells them apart, but for ties and for those that are below it and among the k_min.
    for s, k in zip(squares, ks, strict=True):
        assert all(x >= price for x in s[min(k_min, len(s)) : k])
        assert all(x <= price for x in s[k:])


def test_threshold_by_hand() -> None:
    tensors = [torch.tensor([1.0, -5.0, 2.0]), torch.tensor([0.5, 0.25]), torch.tensor([3.0, -4.0, 0.0])]
    assert global_threshold([], budget=0) == (math.inf, [])
    assert global_threshold(tensors, budget=4) == (4.0, [2, 0, 2])
    assert global_threshold(tensors, budget=4, k_min=1) == (9.0, [1, 1, 2])
    assert global_threshold(tensors, budget=3, k_min=1) == (math.inf, [1, 1, 1])
    assert global_threshold(tensors, budget=99) == (0.0, [3, 2, 3])


@pytest.mark.parametrize(
    ("energy", "online_cost", "best_cost"),
    [
        (lambda t: 8 if t % 10 < 5 else 1, 1.03, 0.75),
        (lambda t: 1000 ** (1 - t / 200), 1.29, 0.41),
        (lambda t: 100 if t < 100 else 1, 1.03, 0.44),
    ],
    ids=["up and down", "falling", "a step"],
)
def test_the_online_rule_against_hindsight(energy: Any, online_cost: float, best_cost: float) -> None:
    """The figures of docs/operators.md: relative to equal shares. Nothing is random here."""
    d, exchanges, model = 10_000, 200, Power(1 / 3)
    energies = [float(energy(t)) for t in range(exchanges)]
    schedule = AdaptiveTopK(0.01, exchanges).start({"w": d})
    online = []
    for g in energies:
        online.append(schedule.k)
        schedule.advance(g, schedule.k)

    def total(ks: Sequence[int]) -> float:
        return sum(model.error(g, k, d) for g, k in zip(energies, ks, strict=True))

    best = best_allocation(model, energies, budget=schedule.budget, d=d, k_min=10)
    assert sum(online) <= sum(best) == schedule.budget
    equal = total([d // 100] * exchanges)
    assert total(online) / equal == pytest.approx(online_cost, abs=0.005)
    assert total(best) / equal == pytest.approx(best_cost, abs=0.005)


@pytest.mark.parametrize(
    ("energy", "online_worth", "best_worth"),
    [
        (lambda t: 1, 1.00, 1.00),
        (lambda t: 8 if t % 10 < 5 else 1, 1.28, 1.36),
        (lambda t: 1000 ** (1 - t / 200), 0.91, 2.06),
        (lambda t: 100 if t < 100 else 1, 1.00, 1.49),
    ],
    ids=["equal", "up and down", "falling", "a step"],
)
def test_the_online_threshold_against_hindsight(energy: Any, online_worth: float, best_worth: float) -> None:
    """The figures of docs/operators.md: energy that is sent, relative to equal shares. The seed is fixed."""
    generator = torch.Generator().manual_seed(0)
    d, exchanges = 10_000, 200
    xs = [torch.empty(d).exponential_(generator=generator) * math.sqrt(energy(t)) for t in range(exchanges)]
    schedule = HardThreshold(0.01, exchanges).start({"w": d})
    online = []
    for x in xs:
        online.append(len(schedule.operator("w").encode(x).values))
        schedule.advance(float(x.square().sum()), online[-1])

    def sent(ks: Sequence[int]) -> float:
        return sum(float(TopK(k=k)(x).square().sum()) for x, k in zip(xs, ks, strict=True))

    _, best = global_threshold(xs, budget=schedule.budget, k_min=10)
    assert sum(online) <= sum(best) == schedule.budget
    equal = sent([d // 100] * exchanges)
    assert sent(online) / equal == pytest.approx(online_worth, abs=0.01)
    assert sent(best) / equal == pytest.approx(best_worth, abs=0.01)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: best_allocation(Bell(), [1.0, math.nan], budget=9, d=5), "finite"),
        (lambda: best_allocation(Bell(), [-1.0], budget=9, d=5), "negative"),
        (lambda: best_allocation(Bell(), [1.0], budget=9, d=5, k_min=6), "at most d = 5"),
        (lambda: best_allocation(Power(), [1.0], budget=9, d=5, k_min=0), "1 for Power"),
        (lambda: best_allocation(Bell(), [1.0, 1.0], budget=9, d=5, k_min=5), "lower k_min"),
        (lambda: Power(1.0), "exponent"),
        (lambda: global_threshold([torch.tensor([math.inf])], budget=1), "finite"),
        (lambda: global_threshold([torch.ones(1)] * 3, budget=2, k_min=1), "raise the budget"),
        (lambda: global_threshold([], budget=2, k_min=-1), "at least 0"),
    ],
)
def test_bad_arguments(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
