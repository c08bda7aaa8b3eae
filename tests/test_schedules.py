"""Adaptive k: the rule in numbers, the budget whatever happens, and agreement between ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import horovod.torch as hvd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Vectors, assert_replicas_identical, gradient
from world import World

from hvd_compress import Compression, wire
from hvd_compress.operators import Operator, Threshold, TopK
from hvd_compress.schedules import Accordion, AdaptiveTopK, HardThreshold, WarmUp, divide, next_k


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


def test_a_threshold_survives_any_step_that_its_settings_allow() -> None:
    schedule = HardThreshold(0.0001, 100, largest=1e6, rate=1.0).start({"w": 10_000_000})
    for _ in range(3):
        schedule.advance(1.0, 10_000_000)
        assert schedule.price is not None
        assert 0 < schedule.price < math.inf
        schedule.operator("w")


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
        schedule.advance(energy, kept=0)
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
    schedule.advance(8.0, kept=10)
    assert schedule.k == 10
    schedule.advance(1.0, kept=10)
    assert schedule.k == round(980 / 98 * (1 / 4.5) ** (1 / 3)) == 6
    schedule.advance(math.nan, kept=6)  # an overflow tells nothing
    assert schedule.k == round((1000 - 26) / 97 * (1 / 4.5) ** (1 / 3))


def test_accordion_by_hand() -> None:
    """Norms of intervals 10, 9, 4, 4: the change to 4 is 5/9 ≥ 1/2, the others are not critical."""
    schedule = Accordion(high=0.5, low=0.1, interval=2).start({"w": 100})
    seen = []
    for energy in (60.0, 40.0, 80.0, 1.0, 10.0, 6.0, 16.0, 0.0, 1.0):
        seen.append(schedule.operator("w"))
        schedule.advance(energy, kept=0)
    high, low = TopK(ratio=0.5), TopK(ratio=0.1)
    assert seen == [high, high, high, high, low, low, high, high, low]


@pytest.mark.parametrize(
    ("energies", "ratios"),
    [([4.0, math.inf, 4.0, math.nan, 4.0], [0.5, 0.5, 0.1, 0.1, 0.1]), ([0.0, 0.0, 0.0], [0.5, 0.1, 0.1])],
)
def test_accordion_takes_neither_overflows_nor_zeros_for_a_change(energies: list[float], ratios: list[float]) -> None:
    schedule = Accordion(high=0.5, low=0.1, interval=1).start({"w": 100})
    seen = []
    for energy in energies:
        schedule.advance(energy, kept=0)
        seen.append(schedule.operator("w"))
    assert seen == [TopK(ratio=ratio) for ratio in ratios]


@given(
    st.integers(1, 40),
    st.floats(0.001, 1.0),
    st.floats(0, 1),
    st.floats(1, 50),
    st.floats(0.01, 1),
    st.lists(st.tuples(st.floats(0, 1e30) | st.just(math.nan), st.floats(0, 1)), min_size=40, max_size=90),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 5000), min_size=1).filter(lambda d: any(d.values())),
)
def test_no_threshold_breaks_the_budget(
    exchanges: int,
    ratio: float,
    smallest: float,
    largest: float,
    rate: float,
    seen: list[tuple[float, float]],
    sizes: dict[str, int],
) -> None:
    """Whatever passes, from the least to the most that the operators let through, and whatever the energies are."""
    schedule = HardThreshold(ratio, exchanges, smallest=smallest, largest=largest, rate=rate).start(sizes)
    filled = {name: size for name, size in sizes.items() if size}
    average = max(round(ratio * sum(sizes.values())), len(filled))
    k_min = max(round(smallest * average), len(filled))

    def limits(name: str) -> tuple[int, int]:
        operator = schedule.operator(name)
        if isinstance(operator, TopK):
            return operator.count(filled[name]), operator.count(filled[name])
        assert isinstance(operator, Threshold)
        assert operator.at_most is not None
        return operator.at_least, operator.at_most

    sent = []
    for energy, part in seen:
        bounds = [limits(name) for name in filled]
        assert all(1 <= low <= high <= size for (low, high), size in zip(bounds, filled.values(), strict=True))
        assert sum(low for low, _ in bounds) >= k_min
        sent.append(sum(low + round(part * (high - low)) for low, high in bounds))
        schedule.advance(energy, sent[-1])
    for start in range(0, len(sent), exchanges):
        assert sum(sent[start : start + exchanges]) <= schedule.budget == average * exchanges


def test_price_by_hand() -> None:
    """λ starts at G/2d · ln²(d/k̄), and is multiplied by exp(0.5 (k/k̄ − 1)) with the k̄ that was left."""
    schedule = HardThreshold(0.1, 100, smallest=0.0, rate=0.5).start({"w": 100})
    assert schedule.operator("w") == TopK(k=10)
    schedule.advance(math.nan, kept=10)  # an overflow tells nothing, but was sent
    assert schedule.operator("w") == TopK(k=10)
    schedule.advance(50.0, kept=10)
    price = 50 / 200 * math.log(10) ** 2
    assert schedule.operator("w") == Threshold(math.sqrt(price), at_least=1, at_most=40)
    schedule.advance(50.0, kept=30)
    price *= math.exp(0.5 * (30 / 10 - 1))
    left = (1000 - 50) / 97
    assert schedule.operator("w") == Threshold(math.sqrt(price), at_least=1, at_most=round(4 * left))
    schedule.advance(50.0, kept=1)
    price *= math.exp(0.5 * (1 / left - 1))
    assert schedule.price == pytest.approx(price, rel=1e-15)
    schedule.advance(0.0, kept=0)  # nor do zeros
    assert schedule.price == pytest.approx(price, rel=1e-15)


def test_first_price_is_right_for_laplace() -> None:
    """Rule: 200,000 draws (fixed seed), of which the first λ lets 1 % pass, within five standard deviations."""
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(200_000).exponential_(generator=generator)
    schedule = HardThreshold(0.01, 100).start({"w": len(x)})
    schedule.advance(float(x.square().sum()), kept=2000)
    assert abs(len(schedule.operator("w").encode(x).values) - 2000) <= 5 * math.sqrt(2000)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_threshold_finds_its_budget_with_error_feedback(scale: float) -> None:
    """Heavy-tailed tensors of unlike sizes and scales, whose norm falls. Rule (fixed seed): after a first budget,
    each later one is spent to 90 % at least, and k varies with what passes."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"a": 20_000, "b": 3_000, "c": 500}
    schedule = HardThreshold(0.02, 50).start(sizes)
    memories = {name: torch.zeros(size) for name, size in sizes.items()}
    sent = []
    for t in range(200):
        energy, kept = 0.0, 0
        for i, name in enumerate(sizes):
            x = torch.randn(sizes[name], generator=generator)
            p = memories[name] + x * x.abs() * scale * (1 + i) * 0.99**t
            message = schedule.operator(name).encode(p)
            memories[name] = p - message.decode()
            energy += float(p.double().square().sum())
            kept += len(message.values)
        sent.append(kept)
        schedule.advance(energy, kept)
    for start in range(0, 200, 50):
        assert (0.9 if start else 0) * schedule.budget <= sum(sent[start : start + 50]) <= schedule.budget
    assert max(sent[50:]) > 1.5 * min(sent[50:])


@pytest.mark.parametrize("make", [AdaptiveTopK, HardThreshold])
@pytest.mark.parametrize(("ratio", "exchanges"), [(0.05, 50), (0.05, 60), (0.01, 100)])
def test_a_budget_that_has_no_room_for_what_was_spent_begins_anew(make: Any, ratio: float, exchanges: int) -> None:
    """On twice the ranks, say, an epoch has half the exchanges."""
    saved = make(0.05, 100).start({"w": 1500})
    for _ in range(60):
        saved.advance(1.0, kept=75)
    resumed = make(ratio, exchanges).start({"w": 1500})
    resumed.load_state_dict(saved.state_dict())
    average = round(ratio * 1500)
    for _ in range(2 * exchanges):
        operator = resumed.operator("w")
        most = operator.k if isinstance(operator, TopK) else operator.at_most
        assert most is not None
        assert most >= average
        resumed.advance(1.0, kept=average)


def test_a_limit_may_be_as_large_as_a_number_can_be() -> None:
    schedule = HardThreshold(0.5, 10, largest=1e308).start({"w": 1000})
    schedule.advance(1.0, 500)
    assert schedule.operator("w").at_most == 1000  # type: ignore[attr-defined]


def test_a_state_of_another_schedule_changes_nothing() -> None:
    def make(operator: Any) -> Any:
        return Compression.of(operator, named_parameters=Vectors({"w": (50,)}).named_parameters(), dense_below=0)

    memory = {"memory": {"w": torch.ones(50)}}
    for other in (TopK(k=5), WarmUp(0.01, 10), Accordion(high=0.1, low=0.01)):
        compression = make(AdaptiveTopK(0.1, 10))
        before = compression.state_dict()
        with pytest.raises(ValueError, match="AdaptiveTopK"):
            compression.load_state_dict({**make(other).state_dict(), **memory})
        assert compression.state_dict() == before
        make(TopK(k=5)).load_state_dict({**before, **memory})  # one operator throughout goes on from any


SHAPES = {"a": (400,), "b": (70, 110), "c": (30, 5, 4)}


PLANS: dict[str, dict[str, Any]] = {
    "adaptive_topk": {"ratio": 0.02, "exchanges": 8},
    "accordion": {"high": 0.05, "low": 0.01, "interval": 3},
    "hard_threshold": {"ratio": 0.02, "exchanges": 8},
}


def adapts(plan: str) -> tuple[list[tuple[Operator, ...]], list[int]]:
    """Trains with norms that differ between ranks and steps.

    Returns what this rank's schedule asked for, and how many elements were then in its packet, exchange by exchange.
    """
    sent = []

    def encode(messages: Sequence[wire.Message], **settings: Any) -> wire.Encoded:
        encoded = wire.packet.encode(messages, **settings)
        sent.append(sum(len(m.values) for m in wire.decode(encoded.data).messages))
        return encoded

    def make() -> tuple[Vectors, Any, Any]:
        model = Vectors(SHAPES)
        settings: dict[str, Any] = {"named_parameters": model.named_parameters(), "dense_below": 0}
        compression = Compression.by_name(plan, **PLANS[plan], **settings)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return (
            model,
            compression,
            hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), compression=compression),
        )

    def train(model: Vectors, compression: Any, optimizer: Any, first: int, last: int) -> list[tuple[Operator, ...]]:
        asked = []
        for step in range(first, last):
            schedule = compression._reducer._schedule
            asked.append(tuple(schedule.operator(name) for name in SHAPES))
            optimizer.zero_grad()
            scale = (1 + 9 * (step % 4 == 0)) * (1 + hvd.rank())
            model({n: scale * gradient(s, hvd.rank(), step) for n, s in SHAPES.items()}).backward()
            optimizer.step()
            assert_replicas_identical(list(model.parameters()))
        return asked

    with mock.patch.object(wire, "encode", encode):
        model, compression, optimizer = make()
        asked = train(model, compression, optimizer, 0, 7)
        saved = copy.deepcopy((compression.state_dict(), model.state_dict()))
        asked += train(model, compression, optimizer, 7, 16)

        resumed, compression, optimizer = make()
        resumed.load_state_dict(saved[1])
        compression.load_state_dict(saved[0])
        assert train(resumed, compression, optimizer, 7, 16) == asked[7:]
    assert sent[16:] == sent[7:16]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    return asked, sent[:16]


def stays_low(high: float) -> list[float]:
    """The ratios of Accordion while gradients are drawn from one distribution."""
    model = Vectors({"w": (10_000,)})
    settings: dict[str, Any] = {"named_parameters": model.named_parameters(), "dense_below": 0}
    compression = Compression.accordion(high=high, low=0.01, interval=10, **settings)
    optimizer: Any = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    ratios = []
    for step in range(100):
        optimizer.zero_grad()
        model({"w": gradient((10_000,), hvd.rank(), step)}).backward()
        optimizer.step()
        ratios.append(compression._reducer._schedule.operator("w").ratio)  # type: ignore[union-attr]
    return ratios


@pytest.mark.parametrize("high", [0.25, 1.0])
def test_accordion_does_not_take_its_memory_for_a_change_of_gradients(world: World, high: float) -> None:
    """The memory grows at the low ratio and is sent at the high one, however little gradients change."""
    assert all(set(ratios[20:]) == {0.01} for ratios in world.run(stays_low, high))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("plan", PLANS)
def test_ranks_agree_resume_and_adapt(world: World, plan: str) -> None:
    ranks = world.run(adapts, plan)
    operators = ranks[0][0]
    assert all(asked == operators for asked, _ in ranks)
    assert len(set(operators)) > 1
    if plan == "accordion":
        return
    budget = 8 * round(0.02 * 8700)
    assert all(sum(sent[start : start + 8]) <= budget for _, sent in ranks for start in (0, 8))
    # Only under a threshold does it differ between ranks how much passes.
    assert (len({tuple(sent) for _, sent in ranks}) > 1) == (plan == "hard_threshold")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AdaptiveTopK(0.0, 10), "ratio"),
        (lambda: AdaptiveTopK(0.1, 0), "exchanges"),
        (lambda: AdaptiveTopK(0.1, 10, smallest=2.0), "smallest"),
        (lambda: AdaptiveTopK(0.1, 10, exponent=-1.0), "exponent"),
        (lambda: AdaptiveTopK(0.1, 10, decay=1.0), "decay"),
        (lambda: HardThreshold(0.0, 10), "ratio"),
        (lambda: HardThreshold(0.1, 10, largest=0.5), "largest"),
        (lambda: HardThreshold(0.1, 10, largest=math.inf), "largest"),
        (lambda: HardThreshold(0.1, 10, rate=0.0), "rate"),
        (lambda: Accordion(high=0.1, low=0.2), "low ≤ high"),
        (lambda: Accordion(high=0.1, low=0.1, interval=0), "interval"),
        (lambda: Accordion(high=0.1, low=0.1, threshold=0.0), "threshold"),
    ],
)
def test_bad_arguments(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_warm_up_by_the_paper() -> None:
    """0.1 % after four epochs at 25, 6.25, 1.5625 and 0.390625 %; and it goes on where it was."""
    plan = WarmUp(ratio=0.001, exchanges=40)
    schedule = plan.start({"w": 1_000_000})
    seen = []
    for exchange in range(50):
        seen.append(schedule.operator("w").ratio)
        schedule.advance(1.0, 1)
        if exchange == 23:
            state = schedule.state_dict()
            schedule = plan.start({"w": 1_000_000})
            schedule.load_state_dict(state)
    assert seen == [0.25] * 10 + [0.0625] * 10 + [0.015625] * 10 + [0.00390625] * 10 + [0.001] * 10
    assert WarmUp(ratio=0.5, exchanges=9).ratio_at(0) == 0.5
    assert WarmUp(ratio=0.01, exchanges=0).ratio_at(0) == 0.01
    for wrong in ({"ratio": 0.0}, {"exchanges": -1}, {"first": 2.0}, {"factor": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            WarmUp(**{"ratio": 0.1, "exchanges": 5, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"at_least": 1.5}, {"at_least": True}, {"at_most": 2.5}, {"at_least": None}])
def test_limits_of_a_threshold_are_numbers_of_elements(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be a number of elements"):
        Threshold(1.0, **wrong)
