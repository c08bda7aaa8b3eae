"""``AsyncQsparseLocalSGD``: Algorithm 2 of the paper, its identities, the servers, and what goes wrong."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Vectors, assert_replicas_identical, gradient, half_set, interrupted_soon, through_a_file
from test_wire import mutated
from torch import Tensor
from world import World, launch

from hvd_compress import (
    AsyncQsparseLocalSGD,
    Compression,
    NonFiniteError,
    PeerError,
    QsparseLocalSGD,
    RankMismatchError,
    WireError,
    random_gaps,
    sync_at,
    wire,
)
from hvd_compress.ledger import Ledger
from hvd_compress.master import AsTheyCome, ByClock, Master, Shard, Topic, deal, receive
from hvd_compress.memory import Residual
from hvd_compress.operators import Operator, TopK
from hvd_compress.remote import RemoteModel
from hvd_compress.wire import Message, encode

ROOT = Path(__file__).parent.parent

SHAPES = {"a": (40,), "b": (7, 11), "c": (3, 5, 4), "d": ()}
KEY = "async_qsparse_local_sgd"


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    return {name: gradient(shape, rank, step, which) for which, (name, shape) in enumerate(SHAPES.items())}


def wrap(
    model: torch.nn.Module, sync_every: Any = 2, lr: float = 0.5, momentum: float = 0.0, **options: Any
) -> AsyncQsparseLocalSGD:
    own = {n: options.pop(n) for n in ("mode", "total_steps", "max_staleness", "timeout", "servers") if n in options}
    own.setdefault("servers", 2)
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


def service_of(optimizer: AsyncQsparseLocalSGD) -> Any:
    return optimizer._model._service


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


# Reductions and identities


COMPRESSIONS: dict[str, Callable[[], Any]] = {
    "topk": lambda: Compression.topk(k=5, dense_below=0),
    "small tensors whole": lambda: Compression.topk(k=5, dense_below=50),
    "qtopk": lambda: Compression.qtopk(k=9, bits=3, dense_below=0),
    "randk": lambda: Compression.randk(ratio=0.2, dense_below=0, seed=4),
    "shared randk": lambda: Compression.randk(ratio=0.2, shared=True, dense_below=0),
    "rotated": lambda: Compression.rotated(bits=2, dense_below=0),
}


def equals_the_synchronous_algorithm(compression: str, dtype: torch.dtype) -> None:
    """Equal schedules: Algorithm 2 is Algorithm 1, here bit for bit."""
    models = [Vectors(SHAPES, dtype=dtype) for _ in range(2)]
    inner = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in models]
    chosen = COMPRESSIONS[compression]
    optimizer = AsyncQsparseLocalSGD(
        inner[0],
        named_parameters=models[0].named_parameters(),
        compression=chosen(),
        sync_every=3,
        mode="logical",
        total_steps=12,
    )
    reference = QsparseLocalSGD(
        inner[1], named_parameters=models[1].named_parameters(), compression=chosen(), sync_every=3
    )
    for step in range(12):
        for model, opt in zip(models, (optimizer, reference), strict=True):
            opt.zero_grad()
            slopes = {name: g.to(dtype) for name, g in gradients(hvd.rank(), step).items()}
            model(slopes).backward()
            opt.step()
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    optimizer.finish()
    for name, memory in memories(optimizer).items():
        residual = reference._average.residual(name)
        assert residual is not None
        assert torch.equal(memory, residual)
    assert optimizer.ledger.exchanges == reference.ledger.exchanges == 4


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_equal_schedules_are_algorithm_1(world: World, compression: str) -> None:
    world.run(equals_the_synchronous_algorithm, compression, torch.float32)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_equal_schedules_in_other_dtypes(world: World, dtype: torch.dtype) -> None:
    world.run(equals_the_synchronous_algorithm, "topk", dtype)


def telescopes(mode: str) -> tuple[int, int]:
    """x_T − (1/R) Σ m_T = x_0 − (1/R) Σ_r Σ_t η ∇f, exactly: all numbers are dyadic and R is a power of two."""
    model = Vectors({"w": (64,)})
    options: dict[str, Any] = {"mode": mode, "total_steps": 23} if mode == "logical" else {}
    optimizer = wrap(model, random_gaps(5, seed=3), lr=0.25, k=3, **options)
    walked = torch.zeros(64)
    for step in range(23):
        generator = torch.Generator().manual_seed(1000 * step + hvd.rank())
        slope = torch.randint(-32, 32, (64,), generator=generator) / 8
        optimizer.zero_grad()
        model({"w": slope}).backward()
        time.sleep(0.003 * hvd.rank())
        optimizer.step()
        walked += 0.25 * slope
    optimizer.finish()
    assert_replicas_identical(list(model.parameters()))
    memory = memories(optimizer)["w"]
    assert memory.any()
    mean = hvd.allreduce(torch.stack([walked, memory]), name="mean", op=hvd.Sum) / hvd.size()
    assert torch.equal(model.get_parameter("w").detach() - mean[1], -mean[0])
    return optimizer.ledger.exchanges, sum(random_gaps(5, seed=3)(step) or step == 23 for step in range(1, 24))


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("mode", ["logical", "free-running"])
def test_telescoping_identity_at_the_end(world: World, mode: str) -> None:
    assert all(exchanges == expected for exchanges, expected in world.run(telescopes, mode))


# Schedules


@given(st.integers(1, 9), st.integers(0, 99), st.integers(0, 5))
def test_random_gaps_are_at_most_h_and_a_function_of_the_step(largest: int, seed: int, rank: int) -> None:
    forwards, backwards = random_gaps(largest, seed, rank), random_gaps(largest, seed, rank)
    steps = [step for step in range(1, 200) if forwards(step)]
    assert [step for step in reversed(range(1, 200)) if backwards(step)] == steps[::-1]
    gaps = [b - a for a, b in itertools.pairwise([0, *steps])]
    assert all(1 <= gap <= largest for gap in gaps)
    assert 200 - steps[-1] <= largest


def test_random_gaps_are_uniform_and_differ_between_ranks() -> None:
    """χ² with 7 degrees of freedom exceeds 24.3 once in a thousand; the seed is fixed."""
    schedules = [list(filter(random_gaps(8, 1, rank), range(1, 9000))) for rank in (0, 1)]
    assert schedules[0] != schedules[1]
    gaps = [b - a for a, b in itertools.pairwise([0, *schedules[0]])]
    expected = len(gaps) / 8
    assert sum((gaps.count(h) - expected) ** 2 / expected for h in range(1, 9)) < 24.3


def counts_exchanges(sync_every: Any, steps: int, options: dict[str, Any]) -> int:
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every, **options)
    train(model, optimizer, 0, steps)
    optimizer.finish()
    optimizer.finish()  # nothing happens
    assert_replicas_identical(list(model.parameters()))
    return optimizer.ledger.exchanges


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("sync_every", "steps", "options", "expected"),
    [
        (4, 10, {}, 3),
        (4, 8, {}, 2),
        (4, 10, {"total_steps": 10}, 3),
        (4, 10, {"total_steps": 10, "mode": "logical"}, 3),
        (sync_at, 10, {}, 3),
        (4, 0, {}, 0),
    ],
)
def test_the_last_step_is_exchanged(
    world: World, sync_every: Any, steps: int, options: dict[str, Any], expected: int
) -> None:
    assert world.run(counts_exchanges, 4 if sync_every is sync_at else sync_every, steps, options) == [expected] * 2


# The master model and its copies


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 6))
def test_tensors_are_dealt_evenly(sizes: list[int], servers: int) -> None:
    shares = deal(sizes, servers)
    assert len(shares) == servers
    assert sorted(id for share in shares for id in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(sizes[id] for id in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


def packet(id: int, message: Message, step: int = 1) -> wire.Packet:
    return wire.decode(wire.encode([message], ids=[id], round=step).data)


def sparse(numel: int, elements: dict[int, float], dtype: torch.dtype = torch.float32) -> Message:
    return Message.sparse((numel,), torch.tensor([*elements]), torch.tensor([*elements.values()], dtype=dtype))


def bits(x: Tensor) -> list[int]:
    return x.reshape(-1).view(torch.uint8).tolist()


@settings(max_examples=60)
@given(st.data(), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_copies_are_the_master_bit_for_bit(data: st.DataObject, dtype: torch.dtype) -> None:
    """Any updates in any order, values that come back to zero among them; a copy is right as soon as it is told."""
    shapes, size = {0: (30,), 2: (3, 4), 5: ()}, 3
    start = {id: torch.zeros(shape, dtype=dtype) for id, shape in shapes.items()}
    start[0][::2] = -0.0
    shard = Shard(start, size)
    copies = [{id: x.clone() for id, x in start.items()} for _ in range(size)]
    for _ in range(data.draw(st.integers(1, 8))):
        id = data.draw(st.sampled_from(list(shapes)))
        numel = math.prod(shapes[id])
        value = st.sampled_from([-3.0, -1.5, 0.0, 1.5, 3.0])
        if data.draw(st.booleans()):
            message = Message.dense(torch.tensor(data.draw(st.lists(value, min_size=numel, max_size=numel))))
        else:
            message = sparse(numel, data.draw(st.dictionaries(st.integers(0, numel - 1), value, min_size=1)))
        shard.apply([packet(id, message)] * data.draw(st.integers(1, 2)))
        rank = data.draw(st.integers(0, size - 1))
        for told, change in zip((p := wire.decode(shard.changes(rank, 1)[0].data)).ids, p.messages, strict=True):
            receive(change, copies[rank][told])
        assert all(bits(copies[rank][id]) == bits(x) for id, x in shard.state_dict()["values"].items())


def test_answers_have_what_changed_and_are_never_larger_than_dense() -> None:
    numel = 100_000
    shard = Shard({0: torch.zeros(numel), 1: torch.zeros(numel)}, 2)
    sizes = {}
    for count in (10, 1000, 50_000, 95_000, 99_990, numel):
        chosen = torch.randperm(numel, generator=torch.Generator().manual_seed(count))[:count]
        shard.apply([packet(0, Message.sparse((numel,), chosen, torch.ones(count)))])
        encoded, ids = shard.changes(0, 1)
        assert ids == [0]
        sizes[count] = len(encoded.data)
    assert len(shard.changes(0, 1)[0].data) == wire.HEADER_BYTES
    assert sizes[10] < 110
    assert sizes[1000] < 6000
    assert sizes[50_000] < 0.6 * sizes[numel]
    assert all(size <= sizes[numel] for size in sizes.values())
    assert sizes[numel] < 4 * numel + 60
    assert sizes[1000] + 60 < len(shard.changes(1, 1)[0].data)  # the other rank was not told before


def test_a_shard_weighs_by_the_number_of_ranks_and_adds_in_order() -> None:
    shard = Shard({0: torch.tensor([10.0, 10.0, 10.0])}, 4)
    shard.apply([packet(0, sparse(3, {0: 2.0})), packet(0, sparse(3, {0: 2.0, 2: 4.0}))])
    assert shard.state_dict()["values"][0].tolist() == [9.0, 10.0, 9.0]
    # In rank order: (2^24 + 1) + 1 is 2^24 in float32, and 2^24 + 1 − 2^24 is not 1.
    shard = Shard({0: torch.zeros(2)}, 1)
    shard.apply([packet(0, sparse(2, {0: x})) for x in (2.0**24, 1.0, -(2.0**24))])
    assert shard.state_dict()["values"][0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e38])
def test_a_shard_refuses_what_would_spoil_it(bad: float) -> None:
    shard = Shard({0: torch.tensor([0.0, -3e38]), 1: torch.zeros(2)}, 1)
    before = shard.state_dict()
    with pytest.raises(NonFiniteError):
        shard.apply([packet(1, sparse(2, {0: 1.0})), packet(0, sparse(2, {1: bad}))])
    assert torch.equal(shard.state_dict()["values"][1], before["values"][1])
    assert torch.equal(shard.state_dict()["values"][0], before["values"][0])
    assert len(shard.changes(0, 1)[0].data) == wire.HEADER_BYTES


# Turns


def master_of(turns: Any, numel: int = 4, timeout: float = 60.0) -> Master:
    return Master(Shard({0: torch.zeros(numel)}, len(turns.last)), turns, ["w"], timeout)


def update(step: int, elements: dict[int, float]) -> Any:
    return wire.encode([sparse(4, elements)], ids=[0], round=step).data


EMPTY = wire.encode([]).data


def test_a_server_takes_anything() -> None:
    """Mutated updates with a right checksum are refused, all ranks are told, and the model stays finite."""
    rng = random.Random(0)
    outcomes = {"applied": 0, "refused": 0}
    for _ in range(600):
        master = master_of(AsTheyCome(2, None), numel=600)
        before = master.shard.state_dict()["values"][0]
        message = Message.sparse((600,), torch.arange(0, 600, 7), torch.randn(86))
        packet = bytearray(wire.encode([message], ids=[0], round=1).data.tobytes())
        request = np.frombuffer(mutated(packet, rng), np.uint8).copy()
        answers = [wire.decode(answer) for rank, answer in master.receive(1, Topic.UPDATE, request) if rank == 1]
        after = master.shard.state_dict()["values"][0]
        assert bool(after.isfinite().all())
        if answers and answers[0].failure is not None:
            outcomes["refused"] += 1
            assert torch.equal(before, after)
            told = dict(master.receive(0, Topic.UPDATE, update(1, {})))
            assert wire.decode(told[0]).failure == answers[0].failure
        else:
            outcomes["applied"] += 1
    assert outcomes["refused"] > 300
    assert outcomes["applied"] > 5


@given(st.data())
def test_by_the_clock_the_order_of_arrival_does_not_matter(data: st.DataObject) -> None:
    """Each rank's next request may come at any time after its last answer; what it is told is always the same."""
    schedules = [[2, 4, 6], [1, 4], [3, 4, 5, 6]]
    x, expected = torch.zeros(4), {}
    for step in range(1, 7):
        senders = [r for r in range(3) if step in schedules[r]]
        total = torch.zeros(4)
        for r in senders:
            total[r] += step
            total[3] += 0.1 * (r + 1)
        x = x - total / 3
        expected.update({(r, step): x.clone() for r in senders})
    master = master_of(ByClock(schedules))
    copies, position, ready = [torch.zeros(4) for _ in range(3)], [0, 0, 0], {0, 1, 2}
    while ready:
        rank = data.draw(st.sampled_from(sorted(ready)))
        ready.discard(rank)
        step = schedules[rank][position[rank]]
        for told, answer in master.receive(rank, Topic.UPDATE, update(step, {rank: step, 3: 0.1 * (rank + 1)})):
            for message in wire.decode(answer).messages:
                receive(message, copies[told])
            assert torch.equal(copies[told], expected[told, schedules[told][position[told]]])
            position[told] += 1
            if position[told] < len(schedules[told]):
                ready.add(told)
    assert position == [3, 2, 4]
    answers = [master.receive(rank, Topic.FINISH, EMPTY) for rank in range(3)]
    assert [rank for rank, _ in answers[2]] == [0, 1, 2]
    assert master.is_done


def test_as_they_come_nobody_waits() -> None:
    master = master_of(AsTheyCome(3, None))
    for step in range(1, 9):
        ((rank, answer),) = master.receive(1, Topic.UPDATE, update(step, {0: 3.0}))
        assert rank == 1
        assert wire.decode(answer).messages[0].values.floats.tolist() == [-step]


def test_staleness_is_bounded() -> None:
    """Bound 4, three ranks: each is answered once the others, or those that have not finished, are near enough."""
    master = master_of(AsTheyCome(3, 4))

    def told(rank: int, step: int, topic: Topic = Topic.UPDATE) -> list[int]:
        return [r for r, _ in master.receive(rank, topic, update(step, {0: 1.0}) if step else EMPTY)]

    assert told(0, 4) == [0]
    assert told(0, 8) == []  # the others are at 0
    assert told(1, 3) == [1]
    assert told(2, 2) == [2]
    assert told(2, 4) == [2]  # rank 1 is still at 3
    assert told(1, 5) == [0, 1]  # in the order in which they came
    assert told(0, 12) == []
    assert told(2, 0, Topic.FINISH) == []
    assert told(1, 8) == [0, 1]  # rank 2 has finished
    assert told(0, 0, Topic.FINISH) == []
    assert told(1, 20) == [1]
    assert told(1, 0, Topic.FINISH) == [0, 1, 2]


def test_a_server_names_ranks_that_are_silent_while_others_wait() -> None:
    master = master_of(ByClock([[1, 2], [1, 2], [2]]), timeout=10)
    start = time.monotonic()
    assert master.look(start + 100) == []  # nobody waits
    assert master.receive(0, Topic.UPDATE, update(1, {0: 1.0})) == []
    assert master.look(start + 9) == []
    ((rank, answer),) = master.look(start + 100)
    assert rank == 0
    assert "rank(s) 1, 2 sent nothing for 10 s" in str(wire.decode(answer).failure)
    # From now on this is everyone's answer, until all have taken note.
    ((rank, answer),) = master.receive(2, Topic.UPDATE, update(2, {0: 1.0}))
    assert rank == 2
    assert wire.decode(answer).failure
    for r in range(3):
        assert not master.is_done
        assert master.receive(r, Topic.FAILURE, wire.encode_failure("told")) == []
    assert master.is_done


@pytest.mark.parametrize(
    ("requests", "text"),
    [
        ([(0, Topic.PAUSE, EMPTY), (1, Topic.FINISH, EMPTY)], "ranks [0] save their state, the others finish"),
        ([(0, Topic.UPDATE, update(2, {0: 1.0})), (1, Topic.PAUSE, EMPTY)], "ranks [0] wait for updates of"),
        ([(0, Topic.UPDATE, update(3, {0: 1.0}))], "rank 0 sends an update at step 3, by its"),
        ([(0, Topic.UPDATE, wire.encode([sparse(9, {0: 1.0})], ids=[7], round=2).data)], "does not belong here"),
        ([(0, Topic.UPDATE, update(2, {0: 1.0})[:-1])], "from rank 0: message"),
        ([(0, Topic.FAILURE, wire.encode_failure("rank 0 failed: it rains"))], "rank 0 failed: it rains"),
    ],
)  # fmt: skip
def test_a_server_tells_what_goes_wrong(requests: list[tuple[int, Topic, Any]], text: str) -> None:
    master = master_of(ByClock([[2], [1, 2]]))
    master.turns.last[1] = 1
    answers = [a for rank, topic, request in requests for a in master.receive(rank, topic, request)]
    answers += master.receive(1, Topic.UPDATE, update(2, {0: 1.0})) if not answers else []
    assert answers
    assert all(text in str(wire.decode(answer).failure) for _, answer in answers)


# On real ranks


def goes_on_while_the_other_computes(max_staleness: int | None, before: int) -> None:
    """Rank 1's first step ends only once rank 0 has exchanged 20 times: if rank 0 waited, neither would end."""
    from mpi4py import MPI

    model = Vectors(SHAPES)
    optimizer = wrap(model, 1, max_staleness=max_staleness)
    train(model, optimizer, 0, before * (1 + hvd.rank()))
    optimizer.finish()
    if hvd.rank() == 1:
        with_first_step = iter([True])

        def closure() -> float:
            if next(with_first_step, False):
                MPI.COMM_WORLD.recv(source=0, tag=77)
            optimizer.zero_grad()
            loss = model(gradients(1, 0))
            loss.backward()
            return float(loss)

        for _ in range(3):
            optimizer.step(closure)
    else:
        train(model, optimizer, 0, 20)
        MPI.COMM_WORLD.send("go on", dest=1, tag=77)
    optimizer.finish()
    assert_replicas_identical(list(model.parameters()))
    assert optimizer.ledger.exchanges == (20 + before if hvd.rank() == 0 else 3 + 2 * before)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("max_staleness", "before"), [(None, 0), (20, 0), (20, 5)])
def test_no_rank_waits_for_anothers_computation(world: World, max_staleness: int | None, before: int) -> None:
    """Nor for what it has done before the last finish()."""
    world.run(goes_on_while_the_other_computes, max_staleness, before)


def finishes_at_its_own_time() -> None:
    """Different numbers of steps and speeds, twice: after finish() the next step begins anew."""
    model = Vectors(SHAPES)
    optimizer = wrap(model, random_gaps(4), servers=None)
    for epoch in range(2):
        steps = 6 + 5 * hvd.rank()
        train(model, optimizer, 20 * epoch, 20 * epoch + steps, pause=0.01 * hvd.rank())
        optimizer.finish()
        assert_replicas_identical(list(model.parameters()))
    start = copy.deepcopy(list(model.parameters()))
    with optimizer:
        train(model, optimizer, 40, 43)
    assert_replicas_identical(list(model.parameters()))
    assert not torch.equal(start[0], next(model.parameters()))


@pytest.mark.ranks(3)
def test_ranks_finish_at_different_times(world: World) -> None:
    world.run(finishes_at_its_own_time)


def counts_every_byte(ratio: float) -> tuple[int, int]:
    model = Vectors({"a": (3000,), "b": (2000,), "c": (10,)})
    compression = Compression.topk(ratio=ratio)
    optimizer = wrap(model, 1, compression=compression)
    for step in range(6):
        optimizer.zero_grad()
        slopes = {n: gradient(p.shape, hvd.rank(), step) for n, p in model.named_parameters()}
        model(slopes).backward()
        optimizer.step()
        service = service_of(optimizer)
    optimizer.finish()
    met = optimizer.ledger.total.mpi - service.sent - service.answered
    assert met == (32 if hvd.rank() else 2)  # a digest to the first rank, which sends a verdict on two back
    assert optimizer.ledger.tensors["a"].dense == 6 * 12_000
    total = optimizer.ledger.total.mpi
    optimizer.ledger.reset()
    assert optimizer.ledger.total.mpi == 0
    return total, service.answered


@pytest.mark.ranks(2)
def test_every_byte_is_in_the_ledger_and_answers_are_sparse(world: World) -> None:
    small, large = world.run(counts_every_byte, 0.01), world.run(counts_every_byte, 1.0)
    dense = 6 * 20_040  # of the way there alone; a way back has as much
    assert all(total < 0.1 * dense and answered < 0.05 * dense for total, answered in small)
    assert 3.8 * dense < sum(total for total, _ in large) < 4.2 * dense


def resumes_bit_for_bit(at: int) -> None:
    def begin(model: Vectors) -> AsyncQsparseLocalSGD:
        return wrap(model, random_gaps(4, seed=2), momentum=0.9, mode="logical", total_steps=17)

    straight = Vectors(SHAPES)
    whole = begin(straight)
    train(straight, whole, 0, 17)
    whole.finish()

    model = Vectors(SHAPES)
    optimizer = begin(model)
    train(model, optimizer, 0, at)
    saved = through_a_file((optimizer.state_dict(), model.state_dict()))
    train(model, optimizer, at, 17)  # the run from which it was taken goes on
    optimizer.finish()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), model.parameters(), strict=True))

    model = Vectors(SHAPES)
    optimizer = begin(model)
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    train(model, optimizer, at, 17)
    optimizer.finish()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(m, memories(whole)[name]) for name, m in memories(optimizer).items())
    assert optimizer.ledger.exchanges == whole.ledger.exchanges


@pytest.mark.ranks(3)
@pytest.mark.parametrize("at", [0, 1, 8, 17])
def test_resume_by_the_clock(world: World, at: int) -> None:
    world.run(resumes_bit_for_bit, at)


def resumes_while_running_free() -> None:
    """Ranks at different steps; then the identity still holds across the restart."""
    walked = torch.zeros(16)

    def go(model: Vectors, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(1000 * step + hvd.rank())
            slope = torch.randint(-32, 32, (16,), generator=generator) / 8
            optimizer.zero_grad()
            model({"w": slope}).backward()
            optimizer.step()
            walked.add_(slope, alpha=0.25)

    model = Vectors({"w": (16,)})
    optimizer = wrap(model, 3, lr=0.25, k=2, max_staleness=6)
    middle = 7 + 2 * hvd.rank()
    go(model, optimizer, 0, middle)
    saved = through_a_file((optimizer.state_dict(), model.state_dict()))
    optimizer.finish()
    model = Vectors({"w": (16,)})
    optimizer = wrap(model, 3, lr=0.25, k=2, max_staleness=6)
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    with pytest.raises(ValueError, match="mode="):
        wrap(model, 3, mode="logical", total_steps=30).load_state_dict(saved[0])
    with pytest.raises(ValueError, match="another model"):
        wrap(Vectors({"v": (16,)}), 3).load_state_dict(saved[0])
    with pytest.raises(ValueError, match="not a state of Async"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    go(model, optimizer, middle, 20)
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.load_state_dict(saved[0])
    optimizer.finish()
    assert_replicas_identical(list(model.parameters()))
    mean = hvd.allreduce(torch.stack([walked, memories(optimizer)["w"]]), name="mean", op=hvd.Sum) / hvd.size()
    assert torch.equal(model.get_parameter("w").detach() - mean[1], -mean[0])


@pytest.mark.ranks(2)
def test_resume_while_running_free(world: World) -> None:
    world.run(resumes_while_running_free)


# What goes wrong


def overflows_on_one_rank(mode: str) -> None:
    model = Vectors(SHAPES)
    options: dict[str, Any] = {"mode": mode, "total_steps": 8} if mode == "logical" else {}
    optimizer = wrap(model, 2, **options)
    train(model, optimizer, 0, 2)
    memory = copy.deepcopy(memories(optimizer))
    bad = gradients(hvd.rank(), 2)
    if hvd.rank() == 1:
        bad["b"][0, 0] = math.inf
    optimizer.zero_grad()
    model(bad).backward()
    optimizer.step()
    optimizer.zero_grad()
    model(gradients(hvd.rank(), 3)).backward()
    if hvd.rank() == 1:
        with pytest.raises(NonFiniteError, match=r"this rank \(rank 1\): b\. "):
            optimizer.step()
        assert all(torch.equal(m, memory[n]) for n, m in memories(optimizer).items())
        assert all(torch.equal(p, optimizer._anchors[n]) for n, p in model.named_parameters())
    else:
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    train(model, optimizer, 4, 8)
    optimizer.finish()
    assert_replicas_identical(list(model.parameters()))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("mode", ["logical", "free-running"])
def test_an_overflow_spoils_nothing_and_stops_only_its_rank(world: World, mode: str) -> None:
    world.run(overflows_on_one_rank, mode)


class Fails(Operator):
    """On rank 1, at its third exchange; there are two tensors in each."""

    calls = 0

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        self.calls += 1
        if self.calls > 4 and hvd.rank() == 1:
            raise ArithmeticError("a bad day")
        return Message.dense(x.clone())


def scaler_after_an_overflow() -> None:
    """The step after one that raised takes off this step's scale, not the last one's too."""
    model = Vectors(SHAPES)
    optimizer = wrap(model, sync_every=2, ratio=1.0, k=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with optimizer:
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(model(gradients(hvd.rank(), step))).backward()
            if step == 1 and hvd.rank() == 1:
                with torch.no_grad():
                    model.get_parameter("b")[0, 0] = math.inf
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(NonFiniteError) if step == 1 and hvd.rank() == 1 else contextlib.nullcontext():
                scaler.step(optimizer)
            scaler.update()
            if step % 2 == 0:  # no exchange
                for name, slope in gradients(hvd.rank(), step).items():
                    assert torch.equal(model.get_parameter(name), before[name] - 0.5 * slope)


@pytest.mark.ranks(2)
def test_grad_scaler_after_an_overflow(world: World) -> None:
    world.run(scaler_after_an_overflow)


def an_operator_fails(mode: str) -> None:
    model = Vectors({"a": (40,), "b": (7,)})
    options: dict[str, Any] = {"mode": mode, "total_steps": 500} if mode == "logical" else {}
    optimizer = wrap(model, 1, compression=Compression.of(Fails(), dense_below=0), **options)
    error, text = (ArithmeticError, "a bad day") if hvd.rank() == 1 else (PeerError, "rank 1 failed: Arithm.*bad day")

    def steps() -> None:
        with optimizer:
            for step in range(500):
                optimizer.zero_grad()
                model({n: gradient(p.shape, hvd.rank(), step) for n, p in model.named_parameters()}).backward()
                optimizer.step()
                time.sleep(0.01)

    with pytest.raises(error, match=text):
        steps()
    with pytest.raises(PeerError, match="a bad day"):  # it stays so
        optimizer.finish() if mode != "logical" else optimizer.state_dict()
    thread = service_of(optimizer)._thread
    assert (thread is None) == (hvd.rank() == 2)
    if thread is not None:  # the servers end once all know
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.mark.ranks(3)
@pytest.mark.parametrize("mode", ["logical", "free-running"])
def test_an_operator_that_fails_is_known_to_all(world: World, mode: str) -> None:
    world.run(an_operator_fails, mode)


def interrupted_while_it_compresses() -> None:
    """What this rank has done is in its parameters still, and it goes on."""
    model = Vectors(SHAPES)
    with wrap(model, 4) as optimizer:
        train(model, optimizer, 0, 7)
        before = [p.clone() for p in model.parameters()], memories(optimizer)
        if hvd.rank() == 1:
            optimizer.zero_grad()
            model({name: torch.zeros(shape) for name, shape in SHAPES.items()}).backward()
            interrupted = mock.patch.object(TopK, "split", side_effect=KeyboardInterrupt)
            with interrupted as split, pytest.raises(KeyboardInterrupt):
                optimizer.step()
            assert split.call_count == 1
            assert all(map(torch.equal, model.parameters(), before[0]))
            assert any(
                bool((p != anchor).any()) for p, anchor in zip(before[0], optimizer._anchors.values(), strict=True)
            )
            after = memories(optimizer)
            assert all(torch.equal(after[name], memory) for name, memory in before[1].items())
        train(model, optimizer, 8, 13)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
def test_an_interrupt_while_a_rank_compresses_loses_nothing(world: World) -> None:
    world.run(interrupted_while_it_compresses)


def interrupted_in_an_exchange(who: int, interrupted: str) -> None:
    """On one rank; what it has sent is not sent again, and both go on in the order of the schedule."""
    model = Vectors(SHAPES)
    with wrap(model, 2, ratio=1.0, k=None, mode="logical", total_steps=6) as optimizer:
        train(model, optimizer, 0, 3)
        if hvd.rank() != who:
            time.sleep(1.0)
            train(model, optimizer, 3, 4)
        elif interrupted == "as it waits":  # by a real Ctrl-C
            with interrupted_soon():
                train(model, optimizer, 3, 4)
        else:
            with half_set(optimizer), pytest.raises(KeyboardInterrupt):
                train(model, optimizer, 3, 4)
        train(model, optimizer, 4, 6)
    assert_replicas_identical(list(model.parameters()))
    steps = sum(gradients(r, s)["a"] for r in range(hvd.size()) for s in range(6))
    torch.testing.assert_close(model.get_parameter("a").detach(), -0.5 * steps / hvd.size())


@pytest.mark.ranks(2)
def test_an_interrupt_while_others_are_awaited(world: World) -> None:
    world.run(interrupted_in_an_exchange, 0, "as it waits")


def interrupted_between_two_tensors() -> None:
    """In an operator: nothing of what was added stays, and the state can be saved."""
    model = Vectors(SHAPES)
    with wrap(model, 4) as optimizer:
        train(model, optimizer, 0, 7)
        works, calls = TopK.split, itertools.count()

        def interrupts(*arguments: Any, **draws: Any) -> Any:
            if next(calls):
                raise KeyboardInterrupt
            return works(*arguments, **draws)

        if hvd.rank() == 1:
            with mock.patch.object(TopK, "split", interrupts), pytest.raises(KeyboardInterrupt):
                train(model, optimizer, 7, 8)
        else:
            train(model, optimizer, 7, 8)
        optimizer.state_dict()
        train(model, optimizer, 8, 13)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
def test_an_interrupt_between_two_tensors(world: World) -> None:
    world.run(interrupted_between_two_tensors)


@pytest.mark.ranks(2)
def test_an_interrupt_as_parameters_are_set_loses_nothing(world: World) -> None:
    world.run(interrupted_in_an_exchange, 1, "as parameters are set")


def resumes_with_other_servers() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, servers=1)
    train(model, optimizer, 0, 3)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="saved with servers=1, this is 2"):
        wrap(model, servers=2).load_state_dict(state)
    optimizer.finish()


@pytest.mark.ranks(2)
def test_a_state_of_other_servers(world: World) -> None:
    world.run(resumes_with_other_servers)


class NoRoom(Tensor):
    """Cannot be subtracted from."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function in (Tensor.sub, Tensor.__sub__):
            raise MemoryError("no room")
        return super().__torch_function__(function, types, arguments, options or {})


def no_room_for_a_difference() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, 1, mode="logical", total_steps=9, timeout=9.0)
    train(model, optimizer, 0, 2)
    if hvd.rank() == 1:
        optimizer._anchors["b"] = optimizer._anchors["b"].as_subclass(NoRoom)
    error = MemoryError if hvd.rank() == 1 else PeerError
    with pytest.raises(error, match="no room" if hvd.rank() == 1 else "rank 1 failed: MemoryError: no room"):
        train(model, optimizer, 2, 9)


@pytest.mark.ranks(2)
def test_no_room_for_a_difference_on_one_rank(world: World) -> None:
    """Known to all at once, outside of a ``with`` statement too."""
    world.run(no_room_for_a_difference)


def a_rank_is_late() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, 1, mode="logical", total_steps=9, timeout=3.0)
    train(model, optimizer, 0, 2)
    if hvd.rank() == 0:
        with pytest.raises(PeerError, match=r"rank\(s\) 1 sent nothing for 3 s while others wait"):
            train(model, optimizer, 2, 3)
    hvd.barrier()  # rank 1 is here already
    if hvd.rank() == 1:
        with pytest.raises(PeerError, match=r"rank\(s\) 1 sent nothing"):
            train(model, optimizer, 2, 3)


@pytest.mark.ranks(2)
def test_a_rank_that_does_not_come_is_named(world: World) -> None:
    world.run(a_rank_is_late)


def ranks_that_differ() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, 1, mode="logical", total_steps=5 + hvd.rank())
    with pytest.raises(RankMismatchError, match=r"total_steps=5.*total_steps=6"):
        train(model, optimizer, 0, 1)
    torch.manual_seed(hvd.rank())
    linear = torch.nn.Linear(30, 40)
    linear(torch.ones(2, 30)).sum().backward()
    with pytest.raises(RankMismatchError, match="checksum"):
        wrap(linear).step()


@pytest.mark.ranks(2)
def test_ranks_that_differ(world: World) -> None:
    world.run(ranks_that_differ)


def steps_beyond_the_end() -> None:
    model = Vectors(SHAPES)
    optimizer = wrap(model, 2, mode="logical", total_steps=4)
    train(model, optimizer, 0, 4)
    with pytest.raises(RuntimeError, match=r"total_steps=4 were taken: call finish"):
        train(model, optimizer, 4, 5)
    optimizer.finish()
    optimizer = wrap(model, 2, mode="logical", total_steps=4)
    train(model, optimizer, 0, 3)
    with pytest.raises((RuntimeError, PeerError), match=r"finish\(\) after 3 of total_steps=4"):
        optimizer.finish()


@pytest.mark.ranks(1)
def test_steps_are_counted(world: World) -> None:
    world.run(steps_beyond_the_end)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"sync_every": 0}, ValueError, "sync_every"),
        ({"mode": "eager"}, ValueError, "mode must be"),
        ({"mode": "logical"}, ValueError, "total_steps"),
        ({"total_steps": 0}, ValueError, "total_steps"),
        ({"mode": "logical", "total_steps": 5, "max_staleness": 3}, ValueError, "max_staleness"),
        ({"max_staleness": -1}, ValueError, "max_staleness"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"servers": 0}, ValueError, "servers"),
        ({"compression": Compression.none}, TypeError, r"Compression.topk\(ratio=1.0\)"),
        ({"compression": Compression.ef21(k=5)}, TypeError, "messages of all ranks"),
        ({"optimizer": None}, TypeError, "optimizer must be"),
        ({"timeout": None}, TypeError, "timeout must be a number"),
        ({"max_staleness": "3"}, TypeError, "max_staleness must be a number"),
        ({"process_set": 3}, TypeError, r"process_set must be hvd\.ProcessSet"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], text: str) -> None:
    model = Vectors(SHAPES)
    usual: dict[str, Any] = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "named_parameters": model.named_parameters(),
        "compression": Compression.topk(k=5),
    }
    with pytest.raises(error, match=text):
        AsyncQsparseLocalSGD(**{**usual, **arguments})


SCRIPT = """
import horovod.torch as hvd, torch
from hvd_compress import AsyncQsparseLocalSGD, Compression
hvd.init()
model = torch.nn.Linear(40, 40)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = AsyncQsparseLocalSGD(
    torch.optim.SGD(model.parameters(), lr=0.1),
    named_parameters=model.named_parameters(),
    compression=Compression.topk(k=9),
    mode="{mode}",
    total_steps=10,
)
for step in range(10):
    if step == 5:
        {wrong}
    model(torch.ones(2, 40)).square().sum().backward()
    optimizer.step()
optimizer.finish()
print("the end")
"""


@pytest.mark.parametrize(
    ("mode", "wrong", "text"),
    [
        ("logical", "if hvd.rank() == 1: raise ArithmeticError('a bad day')", "ArithmeticError: a bad day"),
        ("free-running", "if hvd.rank() == 1: exit()", "without AsyncQsparseLocalSGD.finish"),
        ("free-running", "exit()", "without AsyncQsparseLocalSGD.finish"),
        ("logical", "state = optimizer.state_dict(); hvd.rank() == 1 and exit(75)", "who finish or save their state"),
    ],
)
def test_ranks_that_end_in_the_middle_end_the_job(mode: str, wrong: str, text: str) -> None:
    ended = launch(2, SCRIPT.format(mode=mode, wrong=wrong))
    assert ended.returncode != 0
    assert text in ended.stdout
    assert "the end" not in ended.stdout


@pytest.mark.parametrize("mode", ["logical", "free-running"])
@pytest.mark.parametrize("within", ["", "with optimizer: "])
def test_ranks_that_have_saved_their_states_may_end(mode: str, within: str) -> None:
    """With the status that asks for another start, as after an interruption."""
    ended = launch(2, SCRIPT.format(mode=mode, wrong=f"{within}state = optimizer.state_dict(); exit(75)"))
    assert ended.returncode == 75, ended.stdout
    assert "Error" not in ended.stdout


def runs_the_benchmark() -> None:
    spec = importlib.util.spec_from_file_location("straggler", ROOT / "benchmarks" / "straggler.py")
    assert spec
    assert spec.loader
    straggler = sys.modules["straggler"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(straggler)
    setting = straggler.Setting(
        steps=16, sync_every=4, seconds=0.02, slowdown=4.0, elements=8000, ratio=0.01, max_staleness=None
    )
    speeds = straggler.compare(setting)
    assert len(straggler.table(speeds, 4.0).splitlines()) == 2 + len(speeds) == 7
    other, slow = speeds["synchronous, one slow"]
    assert other == pytest.approx(slow, rel=0.2)
    other, slow = speeds["asynchronous, one slow"]
    assert other > 1.3 * slow


@pytest.mark.ranks(2)
def test_the_straggler_benchmark_runs(world: World) -> None:
    """The figures are the machine's; what must be so is that synchronous ranks have one speed and others not."""
    world.run(runs_the_benchmark)


@pytest.mark.parametrize(
    ("ids", "numels"),
    [([0], [1]), ([0], [5]), ([1], [6]), ([7], [6]), ([0, 1], [4, 6])],
    ids=["one element", "one more", "another server's", "unknown", "a second one"],
)
def test_an_answer_about_something_else_changes_nothing(ids: list[int], numels: list[int]) -> None:
    """What a server may say of is what it serves."""
    answer = encode([Message.dense(torch.ones(n)) for n in numels], ids=ids).data
    right = encode([Message.dense(torch.ones(6))], ids=[1]).data
    shapes = {"a": torch.Size([4]), "b": torch.Size([2, 3])}
    sending: dict[str, Any] = {"operator": TopK(k=1), "memory": Residual(), "dense_below": 0, "seed": 0}
    remote = RemoteModel(shapes, ledger=Ledger(), **sending)
    remote._shares = {0: [1], 1: [0]}
    remote._service = mock.Mock(ask=lambda *_: {0: right, 1: answer})
    anchors = {"a": torch.zeros(4), "b": torch.zeros(2, 3)}
    with pytest.raises(WireError, match="from rank 1"):
        remote._ask(Topic.UPDATE, {}, anchors)
    assert not any(anchor.any() for anchor in anchors.values())
