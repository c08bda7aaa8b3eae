"""``QsparseLocalSGD``: Algorithm 1 of the paper, its identities, and what it reduces to."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import signal
import threading
import time
from fractions import Fraction
from typing import Any
from unittest import mock

import horovod.torch as hvd
import pytest
import torch
from models import (
    ByDefinition,
    Vectors,
    assert_replicas_identical,
    gradient,
    half_set,
    interrupted_soon,
    through_a_file,
)
from torch import Tensor
from world import World

from hvd_compress import (
    AsyncQsparseLocalSGD,
    Compression,
    NonFiniteError,
    PeerError,
    QsparseLocalSGD,
    RankMismatchError,
    post_local,
    sync_at,
    wire,
)
from hvd_compress.averages import averager
from hvd_compress.interrupts import interrupted_at_its_end
from hvd_compress.memory import Residual
from hvd_compress.operators import QSGD, TopK, compose

SHAPES = {"a": (40,), "b": (7, 11), "c": (3, 5, 4)}


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    return {name: gradient(shape, rank, step, which) for which, (name, shape) in enumerate(SHAPES.items())}


def wrap(model: torch.nn.Module, lr: float = 0.5, sync_every: Any = 1, momentum: float = 0.0, **options: Any) -> Any:
    compression = Compression.topk(**{"k": 5, "dense_below": 0, **options})
    inner = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return QsparseLocalSGD(
        inner, named_parameters=model.named_parameters(), compression=compression, sync_every=sync_every
    )


def train(model: Vectors, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        model(gradients(hvd.rank(), step)).backward()
        optimizer.step()


# Algorithm 1


def traces_by_hand(sync_every: int) -> None:
    """Two ranks, top-1 of two elements, η = 1/2, in exact fractions, line by line of Algorithm 1.

    The numbers are dyadic, so float32 computes them exactly and the comparison is for equality.
    """
    size, steps, eta = hvd.size(), 8, Fraction(1, 2)
    slopes = [[[3, 2], [1, 1], [0, -2], [5, 4], [1, 0], [0, 0], [-1, 3], [2, 2]],
              [[-1, 4], [2, -2], [1, 1], [0, 3], [-4, 1], [2, 0], [1, -1], [0, 6]]][:size]  # fmt: skip
    x = [Fraction(0), Fraction(0)]
    local = [list(x) for _ in range(size)]
    memory = [[Fraction(0), Fraction(0)] for _ in range(size)]

    model = Vectors({"w": (2,)})
    optimizer = wrap(model, sync_every=sync_every, k=1)
    for t in range(steps):
        optimizer.zero_grad()
        model({"w": torch.tensor(slopes[hvd.rank()][t], dtype=torch.float32)}).backward()
        optimizer.step()

        for r in range(size):
            local[r] = [v - eta * g for v, g in zip(local[r], slopes[r][t], strict=True)]  # line 4
        if (t + 1) % sync_every == 0:
            sent = []
            for r in range(size):
                p = [m + a - b for m, a, b in zip(memory[r], x, local[r], strict=True)]  # line 8
                kept = 0 if abs(p[0]) >= abs(p[1]) else 1  # line 9: top-1, the lower index among equals
                sent.append([p[i] if i == kept else Fraction(0) for i in range(2)])
                memory[r] = [a - b for a, b in zip(p, sent[r], strict=True)]  # line 10
            x = [v - sum(s[i] for s in sent) / size for i, v in enumerate(x)]  # line 13
            local = [list(x) for _ in range(size)]  # line 11
        assert [Fraction(v) for v in model.get_parameter("w").tolist()] == local[hvd.rank()]
        own = optimizer.state_dict()["qsparse_local_sgd"]["average"]["memory"].get("w", torch.zeros(2))
        assert [Fraction(v) for v in own.tolist()] == memory[hvd.rank()]


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("sync_every", [1, 2, 3])
def test_algorithm_1_in_exact_fractions(world: World, sync_every: int) -> None:
    world.run(traces_by_hand, sync_every)


def matches_the_definition(sync_every: int, momentum: float) -> None:
    size = hvd.size()
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=sync_every, momentum=momentum)
    definition = ByDefinition(size, k=5)
    x = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    local = [Vectors(SHAPES) for _ in range(size)]
    inner = [torch.optim.SGD(m.parameters(), lr=0.5, momentum=momentum) for m in local]
    for step in range(10):
        train(model, optimizer, step, step + 1)
        for r in range(size):
            inner[r].zero_grad()
            local[r](gradients(r, step)).backward()
            inner[r].step()
        if (step + 1) % sync_every == 0:
            for name in SHAPES:
                moved = [x[name] - local[r].get_parameter(name).detach() for r in range(size)]
                x[name] = x[name] - definition.total(name, moved) / size
                for m in local:
                    m.get_parameter(name).data.copy_(x[name])
        for name in SHAPES:
            assert torch.equal(model.get_parameter(name), local[hvd.rank()].get_parameter(name))


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize(("sync_every", "momentum"), [(1, 0.0), (4, 0.9)])
def test_against_all_ranks_computed_on_one(world: World, sync_every: int, momentum: float) -> None:
    world.run(matches_the_definition, sync_every, momentum)


def telescopes(sync_every: int) -> None:
    """x_T − (1/R) Σ m_T = x_0 − (1/R) Σ_r Σ_t η ∇f, exactly: all numbers are dyadic and R is a power of two."""
    model = Vectors({"w": (64,)})
    optimizer = wrap(model, lr=0.25, sync_every=sync_every, k=3)
    walked = torch.zeros(64)
    for step in range(23):
        generator = torch.Generator().manual_seed(1000 * step + hvd.rank())
        slope = torch.randint(-32, 32, (64,), generator=generator) / 8
        optimizer.zero_grad()
        model({"w": slope}).backward()
        optimizer.step()
        walked += 0.25 * slope
    optimizer.synchronize()
    memory = optimizer.state_dict()["qsparse_local_sgd"]["average"]["memory"]["w"]
    assert memory.any()
    mean = hvd.allreduce(torch.stack([walked, memory]), name="mean", op=hvd.Sum) / hvd.size()
    assert torch.equal(model.get_parameter("w").detach() - mean[1], -mean[0])


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("sync_every", [1, 5, 100])
def test_telescoping_identity(world: World, sync_every: int) -> None:
    world.run(telescopes, sync_every)


# Reductions to known algorithms


def identity_is_synchronous_sgd(compression: str) -> None:
    """H = 1 without compression and without momentum: one step of SGD with the mean gradient."""
    model = Vectors(SHAPES)
    chosen = Compression.none if compression == "none" else Compression.topk(ratio=1.0, dense_below=0)
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = QsparseLocalSGD(inner, named_parameters=model.named_parameters(), compression=chosen)
    reference = Vectors(SHAPES)
    plain = torch.optim.SGD(reference.parameters(), lr=0.5)
    for step in range(10):
        train(model, optimizer, step, step + 1)
        plain.zero_grad()
        for name in SHAPES:
            total = sum(gradients(r, step)[name] for r in range(hvd.size()))
            reference.get_parameter(name).grad = total / hvd.size()
        plain.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("compression", ["none", "topk"])
def test_identity_and_h_1_is_synchronous_sgd(world: World, compression: str) -> None:
    world.run(identity_is_synchronous_sgd, compression)


def identity_is_local_sgd(compression: str) -> None:
    """H > 1 without compression: parameters are averaged every H steps, momentum buffers are not."""
    model = Vectors(SHAPES)
    chosen = Compression.none if compression == "none" else Compression.topk(ratio=1.0, dense_below=0)
    inner = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    optimizer = QsparseLocalSGD(inner, named_parameters=model.named_parameters(), compression=chosen, sync_every=4)
    reference = Vectors(SHAPES)
    plain = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    for step in range(12):
        train(model, optimizer, step, step + 1)
        plain.zero_grad()
        reference(gradients(hvd.rank(), step)).backward()
        plain.step()
        if (step + 1) % 4 == 0:
            for name, p in reference.named_parameters():
                p.data = hvd.allreduce(p.data, name=f"reference.{name}", op=hvd.Average)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("compression", ["none", "topk"])
def test_identity_and_h_above_1_is_local_sgd(world: World, compression: str) -> None:
    world.run(identity_is_local_sgd, compression)


def one_rank_is_sequential(make: Any) -> None:
    """R = 1 without compression; dyadic numbers, so that x − (x − y) is exactly y."""
    models = [Vectors({"w": (16,)}) for _ in range(2)]
    inner = make(models[0].parameters())
    optimizer = QsparseLocalSGD(
        inner,
        named_parameters=models[0].named_parameters(),
        compression=Compression.topk(ratio=1.0, dense_below=0),
        sync_every=3,
    )
    plain = make(models[1].parameters())
    for step in range(10):
        slope = torch.randint(-8, 8, (16,), generator=torch.Generator().manual_seed(step)) / 8
        for model, opt in zip(models, (optimizer, plain), strict=True):
            opt.zero_grad()
            model({"w": slope}).backward()
            opt.step()
    assert torch.equal(models[0].get_parameter("w"), models[1].get_parameter("w"))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.25, momentum=0.5)


@pytest.mark.ranks(1)
def test_one_rank_is_sequential_sgd(world: World) -> None:
    world.run(one_rank_is_sequential, sgd)


# The outer step


def subtracts(dtype: torch.dtype, **options: Any) -> None:
    """The paper's outer step, which touches only what was sent, against SGD over dense averages, to the bit."""
    look_ahead = options.pop("look_ahead", 0.0)
    models = [Vectors({**SHAPES, "d": (2,), "unused": (30,)}, dtype) for _ in range(2)]
    optimizers = []
    for model, outer in zip(models, (None, lambda x: torch.optim.SGD(x, lr=1.0)), strict=True):
        c = model.get_parameter("c")
        c.data = torch.zeros(5, 4, 3, dtype=dtype).permute(2, 0, 1)  # of other strides than its copies
        groups: list[dict[str, Any]] = [
            {"params": [c], "lr": 0.25},
            {"params": [p for p in model.parameters() if p is not c]},
        ]
        optimizers.append(
            QsparseLocalSGD(
                torch.optim.SGD(groups, lr=0.5, momentum=0.9),
                named_parameters=model.named_parameters(),
                compression=Compression.of(dense_below=3, **options),
                sync_every=2,
                outer=outer,
                look_ahead=look_ahead,
            )
        )
    for step in range(9):
        slopes = {name: g.to(dtype) for name, g in gradients(hvd.rank(), step).items()}
        slopes["d"] = torch.full((2,), step / 8, dtype=dtype)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(slopes).backward()
            optimizer.step()
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a, b)
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.synchronize()
        with optimizer.evaluation():
            assert_replicas_identical(list(model.parameters()))
    assert models[0].get_parameter("a").any()
    states = [optimizer.state_dict()["qsparse_local_sgd"] for optimizer in optimizers]
    assert_same(states[0]["anchors"], states[1]["anchors"])
    ours, theirs = (state["average"].get("inner", state["average"])["memory"] for state in states)
    assert_same(ours, theirs)
    for one, other in itertools.permutations(optimizers):
        with pytest.raises(ValueError, match="outer optimizer"):
            one.load_state_dict(other.state_dict())


def subtracts_in_all_ways() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        subtracts(dtype, operator=TopK(k=5))
    for operator in (TopK(k=1000), QSGD(bits=4), compose(TopK(k=9), QSGD(bits=4, norm="max"))):
        subtracts(torch.float32, operator=operator, memory="residual")
    subtracts(torch.float32, operator=TopK(k=5), look_ahead=0.3)
    subtracts(torch.float32, operator=TopK(k=5), memory="none")
    subtracts(torch.float32, operator=TopK(k=5), exchange="reduce_scatter")
    subtracts(torch.bfloat16, operator=TopK(k=5), exchange="hierarchical", nodes=list(range(hvd.size())))


@pytest.mark.ranks(1, 2, 3)
def test_the_outer_step_of_the_paper_is_sgd_over_dense_averages(world: World) -> None:
    world.run(subtracts_in_all_ways)


# Exchanges


def leaves_while_it_computes() -> None:
    """Buckets are on their way before the last difference is computed."""
    model = Vectors(SHAPES)
    optimizer = wrap(model, bucket_cap_mb=1e-6)
    train(model, optimizer, 0, 1)  # meets the other ranks
    moved, departed = optimizer._moved, {}

    def watched(name: str) -> Tensor:
        departed[name] = len(optimizer._average._reducer._departed)
        return moved(name)

    optimizer._moved = watched
    train(model, optimizer, 1, 2)
    assert departed == {"c": 0, "b": 1, "a": 2}


@pytest.mark.ranks(2)
def test_buckets_leave_while_the_rest_is_computed(world: World) -> None:
    world.run(leaves_while_it_computes)


def fails_on_the_way(who: int) -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, bucket_cap_mb=1e-6)
    train(model, optimizer, 0, 2)
    before = copy.deepcopy((optimizer.state_dict()["qsparse_local_sgd"]["average"]["memory"], model.state_dict()))
    moved, step = optimizer._moved, optimizer.sync_every
    optimizer.sync_every = 2
    train(model, optimizer, 2, 3)
    local = copy.deepcopy(model.state_dict())

    def fails(name: str) -> Tensor:
        if name == "b" and hvd.rank() == who:
            raise MemoryError("no room")
        return moved(name)

    optimizer._moved = fails
    with pytest.raises(MemoryError if hvd.rank() == who else PeerError, match="no room"):
        optimizer.synchronize()
    assert_same(optimizer.state_dict()["qsparse_local_sgd"]["average"]["memory"], before[0])
    assert_same(dict(model.state_dict()), dict(local))
    with optimizer.evaluation():
        assert_same(dict(model.state_dict()), dict(before[1]))
    optimizer._moved, optimizer.sync_every = moved, step
    optimizer.synchronize()
    assert_replicas_identical(list(model.parameters()))
    assert not torch.equal(model.get_parameter("a"), before[1]["a"])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("who", [0, 1])
def test_no_room_for_a_difference_on_one_rank(world: World, who: int) -> None:
    world.run(fails_on_the_way, who)


def fails_after_the_exchange(where: str, options: dict[str, Any]) -> None:
    """On one rank, which has changed half of what the others have, or nothing, and would differ unnoticed."""
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=lambda step: True, **options)
    train(model, optimizer, 0, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 2, 3)
    expected = copy.deepcopy(model.state_dict())
    optimizer.load_state_dict(saved[1])

    reducer = optimizer._average._reducer
    places = {"decode": (wire, "decode"), "commit": (reducer._memory, "commit"), "subtract": (wire, "subtract")}
    holder, name = places[where]
    works, calls = getattr(holder, name), []

    def fails(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("no room")
        return works(*arguments, **options)

    if hvd.rank() == 1:
        setattr(holder, name, fails)
        with pytest.raises(MemoryError, match="no room"):
            train(model, optimizer, 2, 3)
        setattr(holder, name, works)
        with pytest.raises(RuntimeError, match=r"on this rank alone \(MemoryError: no room\).*load a checkpoint"):
            optimizer.state_dict()
    else:
        train(model, optimizer, 2, 3)
    for step in (3, 4):
        with pytest.raises(RuntimeError if hvd.rank() == 1 else PeerError, match="MemoryError: no room"):
            train(model, optimizer, step, step + 1)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 2, 3)
    assert_same(dict(model.state_dict()), dict(expected))
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("decode", {"bucket_cap_mb": 1e-6}),
        ("decode", {"exchange": "reduce_scatter"}),
        ("commit", {}),
        ("subtract", {"bucket_cap_mb": 1e-6}),
        ("commit", {"exchange": "reduce_scatter"}),
        ("commit", {"exchange": "hierarchical", "nodes": [0, 1]}),
    ],
)
def test_no_room_after_the_exchange_on_one_rank(world: World, where: str, options: dict[str, Any]) -> None:
    world.run(fails_after_the_exchange, where, options)


def interrupted_in_an_operator(where: str, options: dict[str, Any]) -> None:
    """By Ctrl-C on the last rank, which then saves its state, or comes after all; who asks hears that it is away."""
    model = Vectors(SHAPES)
    optimizer = wrap(model, **options)
    train(model, optimizer, 0, 2)

    def memory() -> Any:
        state = optimizer.state_dict()["qsparse_local_sgd"]["average"]
        return copy.deepcopy(state.get("inner", state)["memory"])

    before = memory()
    if hvd.rank() == hvd.size() - 1:
        place = optimizer if where == "_moved" else TopK
        works, calls = getattr(place, where), itertools.count()

        def interrupts(*arguments: Any) -> Any:
            if next(calls):
                raise KeyboardInterrupt
            return works(*arguments)

        side_effect = interrupts if where == "_moved" else KeyboardInterrupt
        with mock.patch.object(place, where, side_effect=side_effect), pytest.raises(KeyboardInterrupt):
            train(model, optimizer, 2, 3)
        assert optimizer._average._reducer._watch._watcher.since is None
        assert_same(memory(), before)
        optimizer.synchronize()
    else:
        train(model, optimizer, 2, 3)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(1, 2)
def test_an_interrupt_in_an_operator_changes_no_memory(world: World) -> None:
    alone = list(range(world.ranks))
    kinds: list[dict[str, Any]] = [{}, {"exchange": "reduce_scatter"}, {"exchange": "hierarchical", "nodes": alone}]
    for exchange in kinds:
        for dense_below in (0, 50):  # some are then sent whole
            world.run(interrupted_in_an_operator, "split_all", {**exchange, "dense_below": dense_below})
            world.run(interrupted_in_an_operator, "_moved", {**exchange, "dense_below": dense_below})


def fails_behind_the_exchange(where: str, path: str) -> None:
    """On one rank, in what QsparseLocalSGD makes of the average: it has moved less, or would send it again."""
    model = Vectors(SHAPES)
    settings: dict[str, dict[str, Any]] = {
        "outer": {"outer": lambda x: torch.optim.SGD(x, lr=0.5, momentum=0.5)},
        "sub_": {},
        "lead": {"look_ahead": 0.5},
    }
    compression = hvd.Compression.none if path == "none" else Compression.topk(k=5, dense_below=0)
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.5),
        named_parameters=model.named_parameters(),
        compression=compression,
        **settings[where],
    )
    train(model, optimizer, 0, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 2, 3)
    expected = copy.deepcopy(model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(saved[1]))
    places: dict[str, Any] = {
        "outer": (optimizer.outer, "step"),
        "sub_": (Tensor, "sub_"),
        "lead": (optimizer, "_lead"),
    }
    if hvd.rank() == 1:
        with (
            mock.patch.object(*places[where], side_effect=MemoryError("no room")),
            pytest.raises(MemoryError, match="no room"),
        ):
            train(model, optimizer, 2, 3)
        with pytest.raises(RuntimeError, match=r"on this rank alone \(MemoryError: no room\).*load a checkpoint"):
            optimizer.state_dict()
    else:
        train(model, optimizer, 2, 3)
    for step in (3, 4):
        text = "MemoryError: no room" if path != "none" or hvd.rank() == 1 else "rank 1 failed"
        with pytest.raises(RuntimeError if hvd.rank() == 1 else PeerError, match=text):
            train(model, optimizer, step, step + 1)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(copy.deepcopy(saved[1]))
    train(model, optimizer, 2, 3)
    assert_same(dict(model.state_dict()), dict(expected))
    with optimizer.evaluation():
        assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("where", "path"), [("outer", "topk"), ("outer", "none"), ("sub_", "none"), ("lead", "topk")]
)
def test_no_room_behind_the_exchange_on_one_rank(world: World, where: str, path: str) -> None:
    world.run(fails_behind_the_exchange, where, path)


def interrupted_as_parameters_are_set(where: str) -> None:
    """On one rank, half of them; it goes on where it was."""
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=2)
    train(model, optimizer, 0, 3)
    reference = copy.deepcopy(model.state_dict())

    def evaluates() -> None:
        with optimizer.evaluation():
            raise AssertionError("not to be reached")

    if hvd.rank() == 1:
        with half_set(optimizer), pytest.raises(KeyboardInterrupt):
            evaluates() if where == "evaluation" else optimizer.synchronize()
    elif where == "synchronize":
        optimizer.synchronize()
    if where == "evaluation":
        assert_same(dict(model.state_dict()), dict(reference))
        optimizer.synchronize()
    assert optimizer.state_dict()["qsparse_local_sgd"]["local_steps"] == 0
    train(model, optimizer, 3, 5)
    optimizer.synchronize()
    assert_replicas_identical(list(model.parameters()))
    total = sum((gradients(r, s)["a"] for r in range(2) for s in range(5)), torch.zeros(40)) / 4  # lr 0.5, mean
    waiting = hvd.allreduce(optimizer._average.residual("a"), name="waiting")
    torch.testing.assert_close(model.get_parameter("a").detach(), waiting - total)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", ["synchronize", "evaluation"])
def test_an_interrupt_as_parameters_are_set_loses_nothing(world: World, where: str) -> None:
    world.run(interrupted_as_parameters_are_set, where)


def interrupted_as_it_waits(path: str) -> None:
    """By a real Ctrl-C, while the other rank has not come: it comes after the exchange."""
    model = Vectors(SHAPES)
    compression = hvd.Compression.none if path == "none" else Compression.topk(k=5, dense_below=0)
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.5),
        named_parameters=model.named_parameters(),
        compression=compression,
        sync_every=2,
    )
    train(model, optimizer, 0, 3)
    if hvd.rank() == 0:
        with interrupted_soon():
            train(model, optimizer, 3, 4)
    else:
        time.sleep(1.0)
        train(model, optimizer, 3, 4)
    assert_replicas_identical(list(model.parameters()))
    assert optimizer.state_dict()["qsparse_local_sgd"]["local_steps"] == 0
    train(model, optimizer, 4, 6)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("path", ["topk", "none"])
def test_an_interrupt_while_others_are_awaited_comes_after_the_exchange(world: World, path: str) -> None:
    world.run(interrupted_as_it_waits, path)


def sends_itself(*signals: signal.Signals, then: Exception | None = None) -> list[str]:
    """What a block that gets these has come to, in its context."""
    came = []
    try:
        with interrupted_at_its_end(), interrupted_at_its_end():
            for number in signals:
                os.kill(os.getpid(), number)
            if then is not None:
                raise then
            came.append("its end")
    except KeyboardInterrupt:
        came.append("interrupt")
    return came


def test_an_interrupt_comes_at_the_end_and_a_second_one_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        assert sends_itself() == ["its end"]
        assert sends_itself(signal.SIGINT) == ["its end", "interrupt"]
        assert sends_itself(signal.SIGINT, signal.SIGINT) == ["interrupt"]
        assert sends_itself(signal.SIGINT, then=ValueError("less urgent")) == ["interrupt"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        own: list[int] = []
        signal.signal(signal.SIGINT, lambda number, _: own.append(number))
        assert sends_itself(signal.SIGINT) == ["its end"]
        assert own == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
    elsewhere: list[list[str]] = []
    thread = threading.Thread(target=lambda: elsewhere.append(sends_itself()))
    thread.start()
    thread.join()
    assert elsewhere == [["its end"]]


def steps_within_an_evaluation() -> None:
    """Where the parameters are x_sync: the local steps would be lost, and others' counted twice."""
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=2)
    train(model, optimizer, 0, 3)
    before = copy.deepcopy(dict(model.state_dict()))
    with optimizer.evaluation():
        for call in (optimizer.synchronize, optimizer.step):
            with pytest.raises(RuntimeError, match=r"within evaluation\(\).* outside of it"):
                call()
    assert_same(dict(model.state_dict()), before)
    optimizer.synchronize()
    with optimizer.evaluation():
        optimizer.synchronize()  # there is nothing to be lost
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(1, 2)
def test_steps_within_an_evaluation_are_refused(world: World) -> None:
    world.run(steps_within_an_evaluation)


def synchronizes_in_inference_mode(path: str) -> None:
    """As evaluating functions are decorated: what is allocated there is changed in later steps."""
    runs = []
    for mode in (contextlib.nullcontext, torch.inference_mode):
        model = Vectors(SHAPES)
        optimizer = QsparseLocalSGD(
            torch.optim.SGD(model.parameters(), lr=0.5),
            named_parameters=model.named_parameters(),
            compression=hvd.Compression.none if path == "none" else Compression.topk(k=5, dense_below=0),
            sync_every=4,
            outer=(lambda x: torch.optim.SGD(x, lr=0.7, momentum=0.9)) if path == "outer" else None,
        )
        for first in (0, 2, 5):
            train(model, optimizer, first, first + 3)
            with mode():
                optimizer.synchronize()
        runs.append(dict(model.state_dict()))
    assert_same(*runs)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("path", ["topk", "outer", "none"])
def test_synchronize_in_inference_mode(world: World, path: str) -> None:
    world.run(synchronizes_in_inference_mode, path)


def averages_are_counted() -> None:
    """One rank has seen an average more than the other, at the same step."""
    model = Vectors(SHAPES)
    optimizer: Any = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.5), named_parameters=model.named_parameters()
    )
    train(model, optimizer, 0, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer._average._rounds += hvd.rank()
    with pytest.raises(RankMismatchError, match=r"2 to 3 averages.*Load a checkpoint on all ranks"):
        train(model, optimizer, 2, 3)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 2, 3)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
def test_ranks_that_have_seen_different_averages_know(world: World) -> None:
    world.run(averages_are_counted)


def fails_before_horovod_is_asked() -> None:
    """On one rank, whose program goes on; all know, and the steps of both go into the next average."""
    model = Vectors(SHAPES)
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.5), named_parameters=model.named_parameters(), sync_every=2
    )
    train(model, optimizer, 0, 3)
    if hvd.rank() == 1:
        with (
            mock.patch.object(optimizer, "_moved", side_effect=MemoryError("no room")),
            pytest.raises(MemoryError, match="no room"),
        ):
            train(model, optimizer, 3, 4)
    else:
        with pytest.raises(PeerError, match="rank 1 failed before the average"):
            train(model, optimizer, 3, 4)
    train(model, optimizer, 4, 5)
    assert_replicas_identical(list(model.parameters()))
    total = sum((gradients(r, s)["a"] for r in range(2) for s in range(5)), torch.zeros(40)) / 4
    torch.testing.assert_close(model.get_parameter("a").detach(), -total)


@pytest.mark.ranks(2)
def test_a_failure_before_horovods_average_is_known_to_all(world: World) -> None:
    world.run(fails_before_horovod_is_asked)


def forgets_and_is_interrupted() -> None:
    """The memory that was wiped since the learning rate has dropped is there again."""
    model = Vectors(SHAPES)
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.5),
        named_parameters=model.named_parameters(),
        compression=Compression.topk(k=5, dense_below=0),
        forget_at_drop=0.5,
    )
    train(model, optimizer, 0, 2)
    before = optimizer.state_dict()["qsparse_local_sgd"]["average"]["memory"]
    optimizer.param_groups[0]["lr"] = 0.05
    with (
        mock.patch.object(TopK, "split_all", side_effect=KeyboardInterrupt),
        mock.patch.object(TopK, "encode", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        train(model, optimizer, 2, 3)
    assert_same(optimizer.state_dict()["qsparse_local_sgd"]["average"]["memory"], before)
    optimizer.synchronize()
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
def test_an_interrupt_brings_back_what_was_to_be_forgotten(world: World) -> None:
    world.run(forgets_and_is_interrupted)


def spoilt_when_it_is_to_forget(options: dict[str, Any]) -> None:
    """What was to be forgotten does not come back, as if nothing had been; and the others need not wait."""
    model = Vectors(SHAPES)
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.5),
        named_parameters=model.named_parameters(),
        compression=Compression.topk(k=5, dense_below=0, **options),
        forget_at_drop=0.5,
    )
    train(model, optimizer, 0, 2)
    optimizer.param_groups[0]["lr"] = 0.05
    if hvd.rank() == 1:
        with (
            mock.patch.object(Residual, "commit", side_effect=MemoryError("no room")),
            pytest.raises(MemoryError, match="no room"),
        ):
            train(model, optimizer, 2, 3)
        with pytest.raises(RuntimeError, match="on this rank alone"):
            optimizer.state_dict()
    else:
        train(model, optimizer, 2, 3)
    optimizer.param_groups[0]["lr"] = 0.005
    with pytest.raises(RuntimeError if hvd.rank() == 1 else PeerError, match="MemoryError: no room"):
        train(model, optimizer, 3, 4)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "options", [{}, {"exchange": "reduce_scatter"}, {"exchange": "hierarchical", "nodes": [0, 1]}]
)
def test_a_spoilt_rank_that_is_to_forget(world: World, options: dict[str, Any]) -> None:
    world.run(spoilt_when_it_is_to_forget, options)


def saves_within_an_evaluation() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=2)
    train(model, optimizer, 0, 3)
    with optimizer.evaluation(), pytest.raises(RuntimeError, match="1 local steps are not in the model"):
        optimizer.state_dict()
    assert optimizer.state_dict()["qsparse_local_sgd"]["local_steps"] == 1
    optimizer.synchronize()
    with optimizer.evaluation():
        assert optimizer.state_dict()["qsparse_local_sgd"]["local_steps"] == 0


def test_a_state_within_an_evaluation_in_mid_round(world: World) -> None:
    world.run(saves_within_an_evaluation)


def tries_again() -> None:
    """The exchange after step 4 fails on one rank: the one after step 5 takes all five steps along."""
    model = Vectors({"w": (64,)})
    optimizer = wrap(model, lr=1.0, sync_every=4, ratio=1.0, k=None)
    slope = torch.arange(64.0)
    moved = optimizer._moved

    def fails(name: str) -> Tensor:
        raise MemoryError("no room")

    for step in range(12):
        optimizer._moved = fails if step == 3 and hvd.rank() == 1 else moved
        optimizer.zero_grad()
        model({"w": slope}).backward()
        if step == 3:
            with pytest.raises(MemoryError if hvd.rank() == 1 else PeerError, match="no room"):
                optimizer.step()
        else:
            optimizer.step()
        synchronised = (0, 0, 0, 0, 5, 5, 5, 5, 9, 9, 9, 9)[step]
        with optimizer.evaluation():
            assert torch.equal(model.get_parameter("w"), -synchronised * slope)


@pytest.mark.ranks(2)
def test_the_step_after_a_failed_exchange_exchanges_again(world: World) -> None:
    world.run(tries_again)


def a_shorter_period_in_mid_round() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=8)
    train(model, optimizer, 0, 6)
    optimizer.sync_every = 4
    train(model, optimizer, 6, 12)
    assert optimizer.ledger.exchanges == 2  # after steps 7 and 11


@pytest.mark.ranks(1)
def test_a_shorter_period_in_mid_round(world: World) -> None:
    world.run(a_shorter_period_in_mid_round)


def counts_exchanges(steps: int, sync_every: int) -> tuple[int, int]:
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=sync_every)
    train(model, optimizer, 0, steps)
    automatic = optimizer.ledger.exchanges
    optimizer.synchronize()
    optimizer.synchronize()  # nothing has moved since, so nothing is sent
    assert_replicas_identical(list(model.parameters()))
    return automatic, optimizer.ledger.exchanges


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("steps", "sync_every"), [(12, 4), (13, 4), (3, 4), (7, 1), (0, 4)])
def test_number_of_exchanges(world: World, steps: int, sync_every: int) -> None:
    expected = (steps // sync_every, math.ceil(steps / sync_every))
    assert world.run(counts_exchanges, steps, sync_every) == [expected] * 2


def exchanges_at(sync_every: Any, steps: int, resume_at: int) -> list[int]:
    """The steps after which an exchange took place, across a restart."""
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=sync_every)
    seen = []
    for step in range(steps):
        if step == resume_at:
            saved = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
            optimizer = wrap(model, sync_every=sync_every)
            model.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[0])
        before = optimizer.ledger.exchanges
        train(model, optimizer, step, step + 1)
        if optimizer.ledger.exchanges > before:
            seen.append(step + 1)
    return seen


def scheduled(resume_at: int) -> None:
    assert exchanges_at(post_local(first=3, then=4), 16, resume_at) == [1, 2, 3, 7, 11, 15]
    assert exchanges_at(sync_at([2, 3, 9]), 16, resume_at) == [2, 3, 9]
    growing = [1, 3, 6, 10, 15]
    assert exchanges_at(lambda step: step in growing, 16, resume_at) == growing


@pytest.mark.ranks(2)
@pytest.mark.parametrize("resume_at", [0, 5, 8])
def test_schedules_of_exchanges(world: World, resume_at: int) -> None:
    world.run(scheduled, resume_at)


def out_of_step(compression: str) -> None:
    """Ranks that exchange after different numbers of steps would average what does not belong together."""
    model = Vectors(SHAPES)
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.5),
        named_parameters=model.named_parameters(),
        compression=Compression.none if compression == "none" else Compression.topk(k=5),
        sync_every=3 + hvd.rank(),
    )
    train(model, optimizer, 0, 2 + hvd.rank())
    with pytest.raises(RankMismatchError, match="step"):
        train(model, optimizer, 2 + hvd.rank(), 3 + hvd.rank())


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("compression", ["none", "topk"])
def test_ranks_with_other_schedules(world: World, compression: str) -> None:
    world.run(out_of_step, compression)


def far_into_a_run() -> None:
    """Where a float64 does not count the squares of steps."""
    average = averager(Compression.none, None, dict(Vectors(SHAPES).named_parameters()))

    def moved(name: str) -> Tensor:
        return torch.zeros(SHAPES[name])

    average(moved, 100_000_001)
    with pytest.raises(RankMismatchError, match="different steps; this rank at step 10000000"):
        average(moved, 100_000_000 + hvd.rank())


@pytest.mark.ranks(2, 3)
def test_steps_are_compared_far_into_a_run(world: World) -> None:
    world.run(far_into_a_run)


def extra_exchange() -> None:
    """A call of synchronize() between two sync indices leaves the later ones where they are."""
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=sync_at([2, 6]))
    train(model, optimizer, 0, 4)
    optimizer.synchronize()
    train(model, optimizer, 4, 6)
    assert optimizer.ledger.exchanges == 3
    optimizer.synchronize()
    assert optimizer.ledger.exchanges == 3


@pytest.mark.ranks(2)
def test_an_extra_exchange(world: World) -> None:
    world.run(extra_exchange)


def test_sync_indices_count_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        sync_at([0, 2])
    for wrong in (4, [1.5], ["4"], [True]):
        with pytest.raises(TypeError, match="list of step numbers"):
            sync_at(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [-1, 2.5, "4"])
def test_post_local_counts_steps(first: Any) -> None:
    with pytest.raises(ValueError, match="first must be a number of steps"):
        post_local(first, 4)


def any_optimizer_and_schedule(sync_every: int) -> None:
    """Adam, a scheduler, parameter groups and a real model; replicas equal after each exchange."""
    torch.manual_seed(hvd.rank())
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 4)
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters(), "lr": 0.01},
        {"params": [*model[1].parameters(), *model[3].parameters()]},
    ]
    optimizer = QsparseLocalSGD(
        torch.optim.Adam(groups, lr=0.02),
        named_parameters=model.named_parameters(),
        compression=Compression.topk(ratio=0.05, dense_below=100),
        sync_every=sync_every,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    target = torch.randn(16, 4, generator=torch.Generator().manual_seed(9))
    losses = []
    for step in range(60):
        x = torch.randn(32, 16)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), (x @ target).argmax(1))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % sync_every == 0:
            assert_replicas_identical(list(model.parameters()))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert optimizer.param_groups[0]["lr"] == optimizer.optimizer.param_groups[0]["lr"] < 1e-3
    assert optimizer.ledger.total.ratio > 5 * sync_every / 2


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("sync_every", [1, 5])
def test_any_optimizer_trains(world: World, sync_every: int) -> None:
    world.run(any_optimizer_and_schedule, sync_every)


def scaled_gradients(unscale_first: bool) -> None:
    """An overflow on one rank: its step is left out, and no rank waits for an exchange that never comes."""
    size = hvd.size()
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    reference = Vectors(SHAPES)
    plain = wrap(reference, sync_every=2)
    for step in range(8):
        overflow = step == 4 and hvd.rank() == size - 1
        for m, o in ((model, optimizer), (reference, plain)):
            o.zero_grad()
            loss = m(gradients(hvd.rank(), step))
            if o is plain:
                (loss * 0 if overflow else loss).backward()
                o.step()
                continue
            scaler.scale(loss * math.inf if overflow else loss).backward()
            if unscale_first:
                scaler.unscale_(o)
            scaler.step(o)
            scaler.update()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert optimizer.ledger.exchanges == 4
    assert scaler.get_scale() == (256 * 2 * 0.5 * 2 if hvd.rank() == size - 1 else 256 * 4)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_with_an_overflow_on_one_rank(world: World, unscale_first: bool) -> None:
    world.run(scaled_gradients, unscale_first)


def scaler_after_an_error() -> None:
    """The step after one that raised takes off this step's scale, not the last one's too."""
    models = [Vectors(SHAPES) for _ in range(2)]
    optimizers = [wrap(model, sync_every=2, ratio=1.0, k=None) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(gradients(hvd.rank(), step))
            (scaler.scale(loss) if model is models[0] else loss).backward()
            if step == 3 and hvd.rank() == 1:
                with torch.no_grad():
                    model.get_parameter("b")[0, 0] = math.inf
            expected = pytest.raises(NonFiniteError) if step == 3 else contextlib.nullcontext()
            with expected:
                scaler.step(optimizer) if model is models[0] else optimizer.step()
        scaler.update()
        assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.ranks(2)
def test_grad_scaler_after_an_error(world: World) -> None:
    world.run(scaler_after_an_error)


def within_process_set() -> None:
    pair = hvd.add_process_set([0, 2])
    try:
        for compression in (Compression.topk(k=5, dense_below=0, process_set=pair), Compression.none):
            if hvd.rank() in (0, 2):
                model = Vectors(SHAPES)
                optimizer = QsparseLocalSGD(
                    torch.optim.SGD(model.parameters(), lr=0.5),
                    named_parameters=model.named_parameters(),
                    compression=compression,
                    process_set=pair,
                )
                train(model, optimizer, 0, 3)
                flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
                both = hvd.allgather(flat[None], name="pair", process_set=pair)
                assert torch.equal(both[0], both[1])
            hvd.barrier()
    finally:
        hvd.remove_process_set(pair)


@pytest.mark.ranks(3)
def test_process_set(world: World) -> None:
    world.run(within_process_set)


# State


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def resumes_bit_for_bit(at: int) -> None:
    straight = Vectors(SHAPES)
    whole = wrap(straight, sync_every=4, momentum=0.9)
    train(straight, whole, 0, 18)

    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=4, momentum=0.9)
    train(model, optimizer, 0, at)
    saved = through_a_file((optimizer.state_dict(), model.state_dict()))
    kept, before = optimizer.state_dict()["qsparse_local_sgd"], copy.deepcopy(saved[0]["qsparse_local_sgd"])
    train(model, optimizer, at, at + 3)
    assert_same(kept, before)  # a state does not change with the run that it was taken from

    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=4, momentum=0.9)
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    train(model, optimizer, at, 18)
    whole.synchronize()
    optimizer.synchronize()
    for a, b in zip(straight.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("at", [0, 8, 10])
def test_resume_between_and_at_exchanges(world: World, at: int) -> None:
    world.run(resumes_bit_for_bit, at)


def refuses_states_that_do_not_fit() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=4)
    train(model, optimizer, 0, 4)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="plain optimizer"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    with pytest.raises(ValueError, match="sync_every=4"):
        wrap(Vectors(SHAPES), sync_every=2).load_state_dict(state)
    with pytest.raises(ValueError, match="another model"):
        wrap(Vectors({"a": (40,)}), sync_every=4).load_state_dict(state)
    plain = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.5), named_parameters=model.named_parameters(), sync_every=4
    )
    with pytest.raises(ValueError, match="same compression"):
        plain.load_state_dict(state)


@pytest.mark.ranks(2)
def test_states_that_do_not_fit(world: World) -> None:
    world.run(refuses_states_that_do_not_fit)


def a_load_that_is_refused(by: str) -> None:
    """It leaves everything as it was, whoever refuses it: the inner optimizer, the outer one, or the exchange."""

    def build(refuses: bool) -> tuple[Vectors, QsparseLocalSGD]:
        model = Vectors(SHAPES)
        divided = refuses and by == "inner"
        groups = [{"params": [p]} for p in model.parameters()] if divided else model.parameters()

        def outer(x: list[Tensor]) -> torch.optim.Optimizer:
            divided = refuses and by == "outer"
            return torch.optim.SGD([{"params": [a]} for a in x] if divided else x, lr=0.7, momentum=0.9)

        return model, QsparseLocalSGD(
            torch.optim.SGD(groups, lr=0.5, momentum=0.9),
            named_parameters=model.named_parameters(),
            compression=Compression.topk(
                k=5, dense_below=0, memory="none" if refuses and by == "exchange" else "residual"
            ),
            outer=outer,
        )

    model, optimizer = build(False)
    train(model, optimizer, 0, 3)
    state = copy.deepcopy(optimizer.state_dict())
    model, optimizer = build(True)
    train(model, optimizer, 10, 12)
    before = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    with pytest.raises(ValueError, match="no memory" if by == "exchange" else "group"):
        optimizer.load_state_dict(state)
    assert_same(optimizer.state_dict(), before[0])
    assert_same(dict(model.state_dict()), dict(before[1]))


@pytest.mark.ranks(1)
@pytest.mark.parametrize("by", ["inner", "outer", "exchange"])
def test_a_load_that_is_refused_changes_nothing(world: World, by: str) -> None:
    world.run(a_load_that_is_refused, by)


# What goes wrong


def divergence() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=2)
    train(model, optimizer, 0, 2)
    synchronised = copy.deepcopy(model.state_dict())
    memory = copy.deepcopy(optimizer.state_dict()["qsparse_local_sgd"]["average"]["memory"])
    bad = gradients(hvd.rank(), 2)
    if hvd.rank() == 1:
        bad["b"][0, 0] = math.inf
    optimizer.zero_grad()
    model(bad).backward()
    optimizer.step()
    optimizer.zero_grad()
    model(gradients(hvd.rank(), 3)).backward()
    with pytest.raises(NonFiniteError, match="b on rank 1"):
        optimizer.step()
    assert all(torch.equal(p, synchronised[n]) for n, p in model.named_parameters())
    after = optimizer.state_dict()["qsparse_local_sgd"]["average"]["memory"]
    assert all(torch.equal(m, memory[n]) for n, m in after.items())
    train(model, optimizer, 4, 6)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
def test_a_rank_that_diverges_stops_all_and_spoils_nothing(world: World) -> None:
    world.run(divergence)


def divergence_at_a_drop(exchange: str) -> None:
    """What was to be forgotten at the drop is forgotten at the first exchange after it that succeeds."""
    model = Vectors(SHAPES)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = QsparseLocalSGD(
        sgd,
        named_parameters=model.named_parameters(),
        compression=Compression.topk(k=5, dense_below=0, exchange=exchange, nodes=list(range(hvd.size()))),
        forget_at_drop=0.5,
    )

    def memory() -> dict[str, Tensor]:
        state = optimizer.state_dict()["qsparse_local_sgd"]["average"]
        return copy.deepcopy(state.get("inner", state)["memory"])

    train(model, optimizer, 0, 3)
    before, exchanges = memory(), optimizer.ledger.exchanges
    assert any(bool(m.any()) for m in before.values())
    sgd.param_groups[0]["lr"] = 0.25
    bad = gradients(hvd.rank(), 3)
    if hvd.rank() == 1:
        bad["b"][0, 0] = math.inf
    optimizer.zero_grad()
    model(bad).backward()
    with pytest.raises(NonFiniteError):
        optimizer.step()
    assert_same(memory(), before)
    assert optimizer.ledger.exchanges == exchanges + 1
    anchors = copy.deepcopy(model.state_dict())
    train(model, optimizer, 4, 5)
    assert_replicas_identical(list(model.parameters()))
    sent = {name: 0.25 * g for name, g in gradients(hvd.rank(), 4).items()}
    for name, p in model.named_parameters():
        whole = hvd.allreduce(sent[name] - memory()[name].view_as(p), name=f"{exchange}.{name}")
        assert torch.allclose(anchors[name] - p, whole, atol=1e-6)


def divergence_at_a_drop_of_one_rank() -> None:
    """Learning rates of their own, as ReduceLROnPlateau makes them of each rank's loss."""
    model = Vectors(SHAPES)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = QsparseLocalSGD(
        sgd,
        named_parameters=model.named_parameters(),
        compression=Compression.topk(k=5, dense_below=0),
        forget_at_drop=0.5,
    )
    train(model, optimizer, 0, 3)
    sgd.param_groups[0]["lr"] = 0.5 if hvd.rank() else 0.1
    model({name: torch.full_like(g, math.inf) for name, g in gradients(hvd.rank(), 3).items()}).backward()
    with pytest.raises(NonFiniteError):
        optimizer.step()
    train(model, optimizer, 4, 6)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
def test_ranks_go_on_when_one_was_to_forget(world: World) -> None:
    world.run(divergence_at_a_drop_of_one_rank)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("exchange", ["allgather", "hierarchical"])
def test_a_rank_that_diverges_at_a_drop_spoils_nothing_either(world: World, exchange: str) -> None:
    world.run(divergence_at_a_drop, exchange)


def divergence_through_horovod(compression: Any) -> None:
    model = Vectors(SHAPES)
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = QsparseLocalSGD(inner, named_parameters=model.named_parameters(), compression=compression)
    train(model, optimizer, 0, 2)
    synchronised = copy.deepcopy(model.state_dict())
    bad = gradients(hvd.rank(), 2)
    if hvd.rank() == 1:
        bad["b"][0, 0] = math.inf
    optimizer.zero_grad()
    model(bad).backward()
    with pytest.raises(NonFiniteError, match="inf or NaN: b"):
        optimizer.step()
    assert all(torch.equal(p, synchronised[n]) for n, p in model.named_parameters())
    train(model, optimizer, 3, 5)
    assert_replicas_identical(list(model.parameters()))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["none", "fp16"])
def test_a_rank_that_diverges_spoils_nothing_through_horovod_either(world: World, name: str) -> None:
    world.run(divergence_through_horovod, getattr(hvd.Compression, name))


def steps_of_half_an_ulp(dtype: torch.dtype, kind: str) -> None:
    """Each rank moves elements of its own by one ulp, so that the mean is half of one."""
    ulp = torch.finfo(dtype).eps / 2  # below 1
    w = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    compression = Compression.topk(k=8, dense_below=0)
    settings: dict[str, Any] = {"named_parameters": [("w", w)], "compression": compression}
    sgd = torch.optim.SGD([w], lr=1.0)
    if kind == "outer":
        settings["outer"] = lambda x: torch.optim.SGD(x, lr=1.0)
    optimizer: Any = (
        AsyncQsparseLocalSGD(sgd, **settings, sync_every=1, mode="logical", total_steps=64)
        if kind == "asynchronous"
        else QsparseLocalSGD(sgd, **settings, sync_every=1)
    )
    for step in range(64):
        gradient = torch.zeros(64)
        gradient[8 * ((step + hvd.rank()) % 8) :][:8] = ulp
        w.grad = gradient.to(dtype)
        optimizer.step()
    if kind == "asynchronous":
        optimizer.finish()
    assert torch.equal(optimizer._anchors["w"], torch.full((64,), 1 - 8 * ulp))
    assert w.dtype == dtype
    assert torch.equal(w.detach(), optimizer._anchors["w"].to(dtype))


@pytest.mark.parametrize("kind", ["synchronous", "outer", "asynchronous"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_16_bits_cannot_hold_adds_up(world: World, dtype: torch.dtype, kind: str) -> None:
    """Rounded away from a model that the ranks share, it would be gone: no memory knows of it."""
    world.run(steps_of_half_an_ulp, dtype, kind)


def bfloat16_through_horovod() -> None:
    model = torch.nn.Linear(30, 40).to(torch.bfloat16)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.5), named_parameters=model.named_parameters(), sync_every=1
    )
    model.weight.grad = torch.full_like(model.weight, float(2 * hvd.rank()))
    optimizer.step()
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, torch.full_like(model.weight, -0.5))


@pytest.mark.ranks(2)
def test_bfloat16_parameters_through_horovod(world: World) -> None:
    world.run(bfloat16_through_horovod)


def starts(compression: str, seed: int, look_ahead: float = 0.0) -> None:
    torch.manual_seed(seed)
    model = torch.nn.Linear(30, 40)
    made = Compression.topk(k=5) if compression == "topk" else getattr(Compression, compression)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    named = model.named_parameters()
    optimizer = QsparseLocalSGD(sgd, named_parameters=named, compression=made, look_ahead=look_ahead)
    model(torch.ones(2, 30)).sum().backward()
    optimizer.step()


def differs_at_the_start(compression: str) -> None:
    with pytest.raises(RankMismatchError, match=r"rank 0 and rank 1 .*checksum.*broadcast_parameters"):
        starts(compression, seed=hvd.rank())
    with pytest.raises(RankMismatchError, match=r"rank 0 and rank 1 .*look_ahead=0\.0.*look_ahead=0\.5"):
        starts(compression, seed=0, look_ahead=0.5 * (hvd.rank() == 1))
    starts(compression, seed=0)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("compression", ["topk", "none", "fp16"])
def test_ranks_that_start_apart(world: World, compression: str) -> None:
    world.run(differs_at_the_start, compression)


def another_rounding() -> None:
    with pytest.raises(RankMismatchError, match=r"Compression\.none.*Compression\.fp16"):
        starts("fp16" if hvd.rank() else "none", seed=0)


@pytest.mark.ranks(2)
def test_ranks_that_round_otherwise(world: World) -> None:
    world.run(another_rounding)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"sync_every": 0}, ValueError, "sync_every"),
        ({"sync_every": 2.5}, ValueError, "sync_every"),
        ({"compression": "topk"}, TypeError, "compression must be"),
        ({"compression": Compression.topk}, TypeError, "compression must be"),
        ({"named_parameters": [("a", torch.nn.Parameter(torch.zeros(2)))]}, ValueError, "not in named_parameters"),
        ({"optimizer": None}, TypeError, "optimizer must be"),
        ({"sync_every": [4, 8]}, ValueError, r"sync_at\(\[4, 8\]\)"),
        ({"look_ahead": "0.3"}, TypeError, "look_ahead must be a number"),
        ({"forget_at_drop": "0.5"}, TypeError, "forget_at_drop must be a number"),
        ({"process_set": 3}, TypeError, r"process_set must be hvd\.ProcessSet"),
        ({"outer": 3}, TypeError, "outer must be a function"),
        ({"outer": lambda x: None}, TypeError, r"outer must .* optimizer of the parameters that it is called with"),
        ({"outer": lambda x: torch.optim.SGD(x[:2], lr=1.0)}, ValueError, "all the parameters"),
        ({"outer": lambda x: torch.optim.SGD([y.clone() for y in x], lr=1.0)}, ValueError, "all the parameters"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], text: str) -> None:
    model = Vectors(SHAPES)
    usual: dict[str, Any] = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "named_parameters": model.named_parameters(),
    }
    with pytest.raises(error, match=text):
        QsparseLocalSGD(**{**usual, **arguments})


def test_a_parameter_of_two_names_has_the_first() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(remove_duplicate=False),
        compression=Compression.topk(k=3),
        sync_every=2,
    )
    optimizer.step()
    assert list(optimizer.ledger.tensors) == ["0.weight", "0.bias", "1.bias"]


def test_a_changed_model_needs_a_new_optimizer() -> None:
    model = Vectors(SHAPES)
    with pytest.raises(NotImplementedError, match="new QsparseLocalSGD"):
        wrap(model).add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})


def changes_the_wrapped_optimizer() -> None:
    """What the others would never hear of is not even stepped."""
    model, more = Vectors(SHAPES), torch.nn.Parameter(torch.zeros(2))
    optimizer = wrap(model)
    train(model, optimizer, 0, 1)
    optimizer.optimizer.add_param_group({"params": [more]})
    before = copy.deepcopy(model.state_dict())
    more.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"1 parameter\(s\).*new QsparseLocalSGD after changing the model"):
        train(model, optimizer, 1, 2)
    assert not more.any()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.ranks(2)
def test_parameters_that_only_the_wrapped_optimizer_knows(world: World) -> None:
    world.run(changes_the_wrapped_optimizer)


def test_hooks_are_the_wrapped_optimizers() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=2)
    steps, states = [], []
    optimizer.register_step_post_hook(lambda inner, *_: steps.append(inner))
    optimizer.register_state_dict_post_hook(lambda inner, _: states.append(inner))
    optimizer.step()
    optimizer.state_dict()
    assert steps == states == [optimizer.optimizer]


def test_no_copies() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=2)
    with pytest.raises(TypeError, match=r"save its state_dict\(\) instead"):
        copy.deepcopy(optimizer)
    optimizer.step()
