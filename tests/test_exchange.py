"""Ranks that meet, agree, exchange and fail together."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from models import Vectors, assert_replicas_identical, gradient
from test_wire import mutated
from torch import Tensor
from world import RankFailedError, World, launch

from hvd_compress import Compression, PeerError, QsparseLocalSGD, RankMismatchError, WireError
from hvd_compress.ledger import Ledger
from hvd_compress.memory import Residual
from hvd_compress.operators import QSGD, Operator, TopK, compose
from hvd_compress.pieces import in_buckets
from hvd_compress.reducer import Reducer
from hvd_compress.wire import Message

SHAPES = {"small": (9,), "wide": (30, 40), "long": (5000,)}


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    return {name: gradient(shape, rank, step, which) for which, (name, shape) in enumerate(SHAPES.items())}


def wrap(model: torch.nn.Module, compression: Any) -> Any:
    return hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
    )


# Buffers


def unequal_buffers(nodes: list[int] | None) -> None:
    from mpi4py import MPI

    from hvd_compress.exchange import Exchange

    exchange = Exchange(MPI.COMM_WORLD.Dup(), nodes)
    sent = exchange.sent
    last, spread, expected = [-1, -1], [0, 0], [0, 0]  # by place
    for round in range(40):
        place = round % 2
        lengths = [(7 * r * r + round) % 11 * 1000 * (round % 3) for r in range(exchange.size)]
        buffers = [np.full(n, 17 * r + round, np.uint8) for r, n in enumerate(lengths)]
        received = exchange.allgatherv(buffers[exchange.rank], place)
        assert all(np.array_equal(a, b) for a, b in zip(received, buffers, strict=True))
        own = lengths[exchange.rank]
        sent += 8 + max(own, expected[place])
        if last[place] >= 0:
            spread[place] = max(abs(own - last[place]), spread[place] * 7 // 8)
        is_steady = spread[place] <= own // 64
        last[place] = own
        expected[place] = own + 2 * spread[place] if is_steady else max(0, own - 2 * spread[place])
    assert exchange.sent == sent


def one_collective_when_lengths_stay() -> None:
    from mpi4py import MPI

    from hvd_compress.exchange import Exchange

    counting = Counting(MPI.COMM_WORLD.Dup())
    exchange = Exchange(counting)  # type: ignore[arg-type]
    before = exchange.sent
    for round in range(6):
        data = np.full(10_000 + 3 * round, round, np.uint8)  # a little longer each time
        for rank, received in enumerate(exchange.allgatherv(data)):
            assert np.array_equal(received, data), rank
        # The first time nothing is known of lengths, the second time nothing of how they change.
        assert counting.calls["Iallgatherv"] == [2, 4, 5, 6, 7, 8][round]
    # Two changes, less one.
    assert exchange.sent - before == 6 * 8 + sum(10_000 + 3 * round for round in range(6)) + 4 * 3
    data = np.zeros(20_000, np.uint8) if exchange.rank == 0 else data
    lengths = [len(received) for received in exchange.allgatherv(data)]
    assert lengths == [20_000] + [10_015] * (exchange.size - 1)
    assert counting.calls["Iallgatherv"] == 10  # what one rank has in excess takes another
    for _ in range(80):
        sent = exchange.sent
        exchange.allgatherv(data)
    assert exchange.sent == sent + 8 + len(data)  # what stays the same needs no more than its length


def hardly_a_byte_in_vain() -> None:
    from mpi4py import MPI

    from hvd_compress.exchange import Exchange

    exchange = Exchange(MPI.COMM_WORLD.Dup())
    rng = np.random.default_rng(exchange.rank)
    needed = 0
    for _ in range(200):
        data = np.full(int(rng.integers(5_000, 20_000)), exchange.rank, np.uint8)
        for rank, received in enumerate(exchange.allgatherv(data)):
            assert (received == rank).all(), rank
        needed += 8 + len(data)
    assert exchange.sent <= 1.01 * needed


@pytest.mark.ranks(2)
def test_lengths_that_change_much_cost_no_bytes(world: World) -> None:
    world.run(hardly_a_byte_in_vain)


@pytest.mark.ranks(1, 3)
def test_lengths_take_no_round_trip_of_their_own(world: World) -> None:
    world.run(one_collective_when_lengths_stay)


@pytest.mark.ranks(1, 2, 3, 4)
def test_buffers_of_unequal_and_zero_length(world: World) -> None:
    world.run(unequal_buffers, None)


@pytest.mark.ranks(5)
def test_the_same_on_nodes_with_two_and_three_ranks(world: World) -> None:
    world.run(unequal_buffers, [0, 1, 0, 1, 0])


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "nodes",
    [[0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 2], [2, 1, 1, 0], [3, 1, 2, 0], [0] * 4],
)
def test_the_same_on_nodes_with_several_ranks(world: World, nodes: list[int]) -> None:
    world.run(unequal_buffers, nodes)


# The ledger tells the truth


_SENDING = {"Isend", "Send", "Allgather", "Allgatherv", "Iallgatherv", "Allreduce", "Alltoall", "Alltoallv", "Bcast"}
_SILENT = ("Get_", "Irecv", "Recv", "Ibarrier", "Barrier", "Free", "Improbe")


class Counting:
    """An mpi4py communicator that adds up the send buffers it is given, and those that come from it."""

    def __init__(self, communicator: Any, counts: dict[str, int] | None = None) -> None:
        self._communicator = communicator
        self.counts = {} if counts is None else counts  # bytes by name
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        original = getattr(self._communicator, name)
        if not callable(original):
            return original

        def call(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            if name in ("Create_group", "Dup", "Split", "Split_type"):
                return Counting(result, self.counts)
            if name in _SENDING:
                buffer, *where = arguments[0] if isinstance(arguments[0], list) else [arguments[0]]
                array = np.asarray(buffer)
                sent = sum(where[0][0]) * array.itemsize if where and isinstance(where[0], tuple) else array.nbytes
                self.counts[name] = self.counts.get(name, 0) + sent
                self.calls[name] = self.calls.get(name, 0) + 1
            elif name[0].isupper() and not name.startswith(_SILENT):
                raise AssertionError(f"{name} is not counted")
            return result

        return call


def ledger_equals_mpi(path: str) -> tuple[int, int]:
    from mpi4py import MPI

    counting = Counting(MPI.COMM_WORLD)
    model = Vectors(SHAPES)
    if path == "gradient":
        compression = Compression.topk(
            k=50, named_parameters=model.named_parameters(), dense_below=10, communicator=counting
        )
        optimizer, ledger = wrap(model, compression), compression.ledger
    else:
        compression = Compression.topk(k=50, dense_below=10, communicator=counting)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = QsparseLocalSGD(
            inner, named_parameters=model.named_parameters(), compression=compression, sync_every=2
        )
        ledger = optimizer.ledger
    for step in range(6):
        optimizer.zero_grad()
        model(gradients(hvd.rank(), step)).backward()
        optimizer.step()
    assert ledger.total.mpi == sum(counting.counts.values()) > 0
    # Tickets of two floats, the small tensor through Horovod; or all through MPI.
    assert ledger.total.horovod == (6 * (2 * 8 + 9 * 4) if path == "gradient" else 0)
    assert ledger.total.dense == 6 * 4 * (9 + 1200 + 5000)
    return ledger.total.mpi, ledger.exchanges


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(("path", "exchanges"), [("gradient", 6), ("local", 3)])
def test_ledger_is_what_mpi_was_given(world: World, path: str, exchanges: int) -> None:
    for sent, count in world.run(ledger_equals_mpi, path):
        assert count == exchanges
        # 50 of 1,200 and 50 of 5,000 elements, 4 bytes a value and under 1.5 an index; small adds 36 bytes at most.
        assert sent < exchanges * (100 * 5.5 + 36 + 60) + 100


# Ranks that differ


def disagree(kind: str) -> str:
    last = hvd.rank() == hvd.size() - 1
    shapes: dict[str, tuple[int, ...]] = {"a": (30,), "b": (40,)}
    if kind == "shape" and last:
        shapes["b"] = (41,)
    if kind == "extra" and last:
        shapes["c"] = (5,)
    model = Vectors(shapes, torch.float64 if kind == "dtype" and last else torch.float32)
    settings = {"k": 4 if kind == "setting" and last else 3, "dense_below": 10 if kind == "dense" and last else 0}
    compression = Compression.topk(**settings, named_parameters=model.named_parameters())
    optimizer = wrap(model, compression)
    loss = model({name: torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(RankMismatchError) as caught:
        loss.backward()
    del optimizer
    return str(caught.value)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("shape", ["tensor b of shape (40,)", "tensor b of shape (41,)"]),
        ("extra", ["(nothing)", "tensor c of shape (5,)"]),
        ("dtype", ["gradient path in torch.float32", "gradient path in torch.float64"]),
        ("setting", ["k=3", "k=4"]),
        ("dense", ["dense_below=0", "dense_below=10"]),
    ],
)
def test_models_and_settings_that_differ(world: World, kind: str, texts: list[str]) -> None:
    messages = world.run(disagree, kind)
    assert len(set(messages)) == 1
    assert f"rank 0 and rank {world.ranks - 1} do not agree" in messages[0]
    assert all(text in messages[0] for text in texts)


def unequal_threads(name: str) -> str:
    """A sum of many elements depends on the number of threads, and each rank sums what all have sent."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1 + hvd.rank())
    try:
        model = Vectors({"w": (30,)})
        settings = {"named_parameters": model.named_parameters(), "dense_below": 0}
        optimizer = wrap(model, getattr(Compression, name)(**settings, **({"k": 3} if name == "topk" else {})))
        loss = model({"w": torch.ones(30)})
        try:
            loss.backward()
        except RankMismatchError as error:
            return str(error)
        optimizer.synchronize()
        return ""
    finally:
        torch.set_num_threads(kept)


@pytest.mark.ranks(2)
def test_ranks_with_another_number_of_threads(world: World) -> None:
    """Where each computes the sum for itself, they must not; elsewhere they may."""
    assert all("1 thread(s) in torch (OMP_NUM_THREADS)" in text for text in world.run(unequal_threads, "cd_adam"))
    assert world.run(unequal_threads, "topk") == ["", ""]


def meet_in_another_order() -> str:
    models = [Vectors({name: (30,)}) for name in ("generator", "discriminator")]
    optimizers = [
        wrap(model, Compression.topk(k=3, dense_below=0, named_parameters=model.named_parameters()))
        for model in models
    ]
    ((name, first),) = models[hvd.rank()].named_parameters()
    with pytest.raises(RankMismatchError) as caught:
        models[hvd.rank()]({name: torch.ones_like(first)}).backward()
    del optimizers
    return str(caught.value)


def test_a_state_that_is_saved_again_tells_whose_it_is() -> None:
    compression = Compression.topk(k=3, named_parameters=Vectors({"w": (30,)}).named_parameters())
    state = {**compression.state_dict(), "rank": 3, "size": 8}
    compression.load_state_dict(state)
    assert compression.state_dict() == state


@pytest.mark.ranks(2)
def test_compressors_that_meet_in_another_order(world: World) -> None:
    first, second = world.run(meet_in_another_order)
    assert first == second
    assert "tensor generator" in first
    assert "tensor discriminator" in first


def expect_others(ranks: dict[int, list[int]]) -> str:
    from mpi4py import MPI

    from hvd_compress.exchange import rendezvous

    if hvd.rank() not in ranks:
        return ""
    with pytest.raises(RankMismatchError) as caught:
        rendezvous(MPI.COMM_WORLD, ranks[hvd.rank()], "the same", 3.0)
    return str(caught.value)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("theirs", [[0, 1], [0, 1, 2, 3], [0, 1, 3]])
def test_ranks_that_expect_others(world: World, theirs: list[int]) -> None:
    """Process sets of another number of ranks, and of as many."""
    texts = world.run(expect_others, {0: [0, 1, 2], 1: theirs, 2: [0, 1, 2]})
    assert texts[0] == texts[1] == texts[2]
    assert "rank 0 and rank 1 do not agree. Rank 0 has: ranks 0 to 2. Rank 1 has: ranks 0" in texts[0]


def absent(who: int) -> str:
    model = Vectors({"w": (30,)})
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = Compression.topk(k=3, dense_below=0, timeout=1.0)
    optimizer = QsparseLocalSGD(inner, named_parameters=model.named_parameters(), compression=compression)
    if hvd.rank() == who:
        return ""
    model({"w": torch.ones(30)}).backward()
    with pytest.raises(RankMismatchError) as caught:
        optimizer.step()
    return str(caught.value)


def drain() -> None:
    """Take in what the ranks without a root had sent, so that the next test finds no old messages."""
    from mpi4py import MPI

    status = MPI.Status()
    hvd.barrier()
    while MPI.COMM_WORLD.Iprobe(status=status):
        MPI.COMM_WORLD.Recv(np.empty(status.Get_count(), np.uint8), status.Get_source(), status.Get_tag())
    hvd.barrier()


@pytest.mark.ranks(3)
@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_never_comes_is_named(world: World, who: int) -> None:
    texts = world.run(absent, who)
    assert len({*texts} - {""}) == 1
    assert all(f"rank(s) {who} did not begin" in text for rank, text in enumerate(texts) if rank != who)
    world.run(drain)


def out_of_step() -> None:
    """A rank that took another checkpoint, or skipped a step, is found before anything is averaged."""
    model = Vectors({"w": (30,)})
    compression = Compression.topk(k=3, dense_below=0, named_parameters=model.named_parameters())
    optimizer = wrap(model, compression)
    for _ in range(2):
        optimizer.zero_grad()
        model({"w": torch.ones(30)}).backward()
        optimizer.step()
    state = compression.state_dict()
    if hvd.rank() == 1:
        state["round"] = 1
    compression.load_state_dict(state)
    optimizer.zero_grad()
    model({"w": torch.ones(30)}).backward()
    with pytest.raises(RankMismatchError, match=r"rank . exchanges at step"):
        optimizer.step()


@pytest.mark.ranks(2)
def test_ranks_at_different_exchanges(world: World) -> None:
    world.run(out_of_step)


def anothers_state() -> str:
    """Every rank loads rank 0's file, as a script does that saves on rank 0 only."""

    def make() -> tuple[Vectors, Any, Any]:
        model = Vectors({"w": (30,)})
        compression = Compression.topk(k=3, dense_below=0, named_parameters=model.named_parameters())
        return model, compression, wrap(model, compression)

    model, compression, optimizer = make()
    model({"w": torch.ones(30)}).backward()
    optimizer.step()
    state = hvd.broadcast_object(compression.state_dict(), root_rank=0)
    model, compression, optimizer = make()
    compression.load_state_dict(state)
    loss = model({"w": torch.ones(30)})
    with pytest.raises(RankMismatchError) as caught:
        loss.backward()
    del optimizer
    return str(caught.value)


@pytest.mark.ranks(2, 3)
def test_a_state_of_another_rank(world: World) -> None:
    texts = world.run(anothers_state)
    assert len(set(texts)) == 1
    assert f"the state saved by rank 0 of {world.ranks}, being rank 1 of {world.ranks}" in texts[0]


# A rank that fails


class Fragile(Operator):
    """Top-2, unless something is wrong with the tensor."""

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        if float(x.sum()) > 1e6:
            raise ArithmeticError("this one is too heavy")
        return TopK(k=2).encode(x, generator=generator)


def one_operator_fails(path: str) -> None:
    model = Vectors({"w": (30,), "v": (20,)})
    parameters = model.named_parameters()
    if path == "gradient":
        compression = Compression.of(Fragile(), named_parameters=parameters, dense_below=0)
        optimizer = wrap(model, compression)
        state = compression.state_dict
    else:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = QsparseLocalSGD(
            inner, named_parameters=parameters, compression=Compression.of(Fragile(), dense_below=0)
        )

        def state() -> dict[str, Any]:
            return optimizer.state_dict()["qsparse_local_sgd"]["average"]

    def step(scale: float) -> None:
        optimizer.zero_grad()
        model({"w": scale * torch.arange(30.0), "v": torch.ones(20)}).backward()
        optimizer.step()

    step(1.0)
    before = {n: m.clone() for n, m in state()["memory"].items()}
    heavy = -1e9 if path == "local" else 1e9
    if hvd.rank() == 1:
        with pytest.raises(ArithmeticError, match="too heavy"):
            step(-heavy if path == "local" else heavy)
    else:
        with pytest.raises(PeerError, match=r"rank 1 failed: ArithmeticError: this one is too heavy"):
            step(1.0)
    assert all(torch.equal(before[n], m) for n, m in state()["memory"].items())
    if path == "gradient":
        hvd.barrier()  # Horovod may still be at the tickets of this step
        optimizer.load_state_dict(optimizer.state_dict())  # its way to forget a step that was begun
        step(1.0)
        assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("path", ["gradient", "local"])
def test_an_operator_that_fails_on_one_rank_raises_on_all(world: World, path: str) -> None:
    world.run(one_operator_fails, path)


class Damaging(Counting):
    """Flips a bit of what the last rank has sent."""

    def __getattr__(self, name: str) -> Any:
        original = getattr(self._communicator, name)
        if name == "Create_group":
            return lambda group: Damaging(original(group))
        if name != "Iallgatherv":
            return original

        def gather(buffer: Any, into: Any) -> Any:
            request = original(buffer, into)
            request.Wait()
            if len(into[0]) > 8 * self._communicator.Get_size():  # not the lengths
                gathered, lengths, starts, _ = into
                gathered[starts[-1] + lengths[-1] - 1] ^= 1
            return request

        return gather


def damaged() -> None:
    from mpi4py import MPI

    model = Vectors({"w": (30,)})
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = Compression.topk(k=3, dense_below=0, communicator=Damaging(MPI.COMM_WORLD))
    optimizer = QsparseLocalSGD(inner, named_parameters=model.named_parameters(), compression=compression)
    model({"w": torch.ones(30)}).backward()
    with pytest.raises(WireError, match=rf"from rank {hvd.size() - 1}: .*checksum"):
        optimizer.step()


@pytest.mark.ranks(2)
def test_a_damaged_message(world: World) -> None:
    world.run(damaged)


def damaged_on_one_rank(exchange: str) -> None:
    """What one rank has received is not what was sent: the others go on, at the same step, without it."""
    model = Vectors({"w": (60, 60)})
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=Compression.topk(k=30, exchange=exchange, nodes=range(hvd.size())),
    )

    def step(which: int) -> None:
        optimizer.zero_grad()
        model({"w": gradient((60, 60), hvd.rank(), which)}).backward()
        optimizer.step()

    step(0)
    reducer: Any = optimizer._average._reducer  # type: ignore[union-attr]
    link = getattr(reducer, "_inner", reducer)._exchange
    gather = link.allgatherv

    def damaging(buffer: Any, place: int = 0) -> Any:
        received = gather(buffer, place)
        if hvd.rank() == 1:
            received[0] = received[0].copy()
            received[0][-1] ^= 1
        return received

    link.allgatherv = damaging
    if hvd.rank() == 1:
        with pytest.raises(WireError, match="checksum"):
            step(1)
    else:
        step(1)
    link.allgatherv = gather
    for which in (2, 3):
        with pytest.raises((RankMismatchError, PeerError), match=r"has seen \d exchanges, this rank"):
            step(which)


@pytest.mark.parametrize("exchange", ["allgather", "reduce_scatter", "hierarchical"])
def test_a_message_that_is_damaged_on_its_way_to_one_rank(world: World, exchange: str) -> None:
    world.run(damaged_on_one_rank, exchange)


class Mutating:
    """An exchange whose second rank sends something else than it should."""

    def __init__(self, exchange: Any) -> None:
        self._exchange = exchange
        self.random = random.Random(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exchange, name)

    def allgatherv(self, buffer: Any, place: int) -> Any:
        if hvd.rank() == 1 and self.random.random() < 0.5:
            changed = bytearray(buffer.tobytes())
            buffer = np.frombuffer(mutated(changed, self.random), np.uint8).copy()
        return self._exchange.allgatherv(buffer, place)


def a_peer_sends_anything(rounds: int) -> list[str]:
    """What became of each exchange on this rank, and of the memory."""
    from mpi4py import MPI

    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    reducer = Reducer(
        shapes,
        operator=compose(TopK(k=40), QSGD(bits=4, norm="max")),
        memory=Residual(),
        dense_below=10,
        buckets=list(in_buckets(shapes, 0.01)),  # two
        seed=0,
        ledger=Ledger(),
    )
    reducer.open(MPI.COMM_WORLD, range(hvd.size()), "fuzz", timeout=300)
    reducer._exchange = Mutating(reducer._exchange)  # type: ignore[assignment]
    outcomes = []
    for step in range(rounds):
        before = reducer.state_dict()["memory"]
        for name, tensor in gradients(hvd.rank(), step).items():
            reducer.add(name, tensor)
        try:
            reduced = reducer.reduce()
        except (WireError, RankMismatchError, PeerError) as error:
            outcomes.append(type(error).__name__)
            after = reducer.state_dict()["memory"]
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
        else:
            assert_replicas_identical(list(reduced.sums.values()))
            outcomes.append("overflow" if reduced.overflow else "sums")
    return outcomes


@pytest.mark.ranks(3)
def test_a_peer_that_sends_anything(world: World) -> None:
    """Mutated packets with a right checksum, through real exchanges: all ranks come to the same end."""
    first, *others = world.run(a_peer_sends_anything, 400)
    assert all(other == first for other in others)
    assert first.count("WireError") > 200
    assert first.count("sums") > 50


# Whole jobs


PREAMBLE = """
import sys, torch, horovod.torch as hvd
from hvd_compress import Compression, QsparseLocalSGD
hvd.init()
model = torch.nn.Linear(50, 50)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
compression = Compression.topk(ratio=0.1, named_parameters=model.named_parameters())
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(), compression=compression)
def step():
    optimizer.zero_grad()
    model(torch.randn(4, 50)).square().sum().backward()
    optimizer.step()
"""


@pytest.mark.parametrize(
    ("cores", "of", "ranks", "few"),
    [(1, 8, 2, True), (2, 8, 4, False), (2, 2, 2, True), (2, 2, 1, False), (8, 8, 4, False), (8, 8, 5, True)],
)
def test_a_rank_wants_two_cores(cores: int, of: int, ranks: int, few: bool) -> None:
    from hvd_compress.exchange.communicator import are_few

    assert are_few(cores, of, ranks) is few


def test_ranks_that_spin_on_few_cores_are_told_once() -> None:
    asks = """
import logging, os
import hvd_compress.exchange as exchange
from mpi4py import MPI

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.basicConfig(handlers=[handler])
many = os.cpu_count()
exchange.warn_of_few_cores(0, many)
before = len(said)
del os.environ["OMPI_MCA_mpi_yield_when_idle"]
for _ in range(2):
    exchange.warn_of_few_cores(0, many + 1)
    exchange.warn_of_few_cores(1, many + 1)
print(MPI.get_vendor()[0], before, len(said), *said)
"""
    printed = launch(1, asks).stdout
    if "Open MPI" not in printed:
        pytest.skip("MPI waits in another way")
    assert "Open MPI 0 1 " in printed
    assert "--mca mpi_yield_when_idle 1" in printed


def test_a_rank_that_raises_ends_the_job_with_its_traceback() -> None:
    ended = launch(
        3, PREAMBLE + "step()\nif hvd.rank() == 2: raise KeyError('only here')\nfor _ in range(50): step()"
    )
    assert ended.returncode != 0
    assert "KeyError: 'only here'" in ended.stdout
    assert "rank 2 failed with KeyError; ending the job" in ended.stdout


LOCAL = """
import torch, horovod.torch as hvd
from hvd_compress import Compression, Interruption, QsparseLocalSGD
hvd.init()
model = torch.nn.Linear(50, 50)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = QsparseLocalSGD(
    torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
    compression=Compression.topk(ratio=0.1, timeout=2.0), sync_every=2)
def step():
    optimizer.zero_grad()
    model(torch.randn(4, 50)).square().sum().backward()
    optimizer.step()
interruption = Interruption()
step(); step()
def evaluate():
    import time
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("wrong", "others", "texts"),
    [
        ("evaluate()", "step(); step()", ["rank(s) 1 did not come to exchange 2", "in evaluate"]),
        (
            "raise SystemExit",
            "interruption.agreed()",
            ["rank 1 ends the job: its program has ended, and Interruption.agreed() no. 1 of rank(s)"],
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "step(); step()", ["signal 9"]),
    ],
    ids=["hangs", "exits", "is killed"],
)
def test_a_rank_that_does_not_come_ends_the_job(wrong: str, others: str, texts: list[str]) -> None:
    ended = launch(3, LOCAL + f"if hvd.rank() == 1: {wrong}\n{others}\nprint('the end')")
    assert ended.returncode != 0
    assert "the end" not in ended.stdout
    assert all(text in ended.stdout for text in texts), ended.stdout


def test_a_rank_that_failed_in_an_exchange_and_ended_is_not_waited_for() -> None:
    """Before it took part: the others know nothing of that, and it has done as many exchanges as they have begun."""
    no_room = """
def no_room(*_): raise MemoryError('no room')
if hvd.rank() == 1:
    optimizer._average._reducer._exchange.allgatherv = no_room
    try: step(); step()
    except MemoryError: raise SystemExit
step(); step()
print('the end')
"""
    ended = launch(3, LOCAL + no_room)
    assert ended.returncode != 0
    assert "rank(s) 1 did not come to exchange 2" in ended.stdout, ended.stdout
    assert "the end" not in ended.stdout


def test_ranks_that_wait_at_different_exchanges_end_the_job() -> None:
    """One has left an exchange that the other waits in; both are in an exchange, and wait for ever."""
    different = """
from mpi4py import MPI
from hvd_compress.exchange import Watch
watch = Watch(MPI.COMM_WORLD, 1.0)
watch.begin()
if hvd.rank() == 1: watch.end(); watch.begin()
import time
def waits(): time.sleep(60)
waits()
print('the end')
"""
    ended = launch(2, LOCAL + different, timeout=50)
    assert ended.returncode != 0
    assert "rank 0 ends the job: it waits in exchange 1 since" in ended.stdout, ended.stdout
    assert "and rank 1 at exchange 2\nRank 1 is here:" in ended.stdout
    assert "in waits" in ended.stdout
    assert "the end" not in ended.stdout


def test_a_rank_that_ends_before_the_first_exchange() -> None:
    """Horovod ends MPI on all ranks, under those who wait for it."""
    ends = """
if hvd.rank() == 0:
    from mpi4py import MPI
    for other in (1, 2): MPI.COMM_WORLD.Probe(other)  # has come
    raise SystemExit
step()
"""
    ended = launch(3, PREAMBLE + ends)
    assert ended.returncode != 0
    assert "PeerError: the program of another rank has ended" in ended.stdout, ended.stdout
    assert "MPI_ERRORS_ARE_FATAL" not in ended.stdout


@pytest.mark.parametrize(
    ("wrong", "texts"),
    [
        ("raise KeyError('only here')", ["KeyError: 'only here'", "rank 1 failed with KeyError; ending the job"]),
        (
            "raise SystemExit",
            [
                "rank 1 ends the job: its program has ended, and rank(s) 0, 2 wait",
                "hvd.allreduce(torch.ones(1))",
                "checkpoints.save(1, {})",
            ],
        ),
    ],
    ids=["raises", "exits"],
)
def test_a_rank_that_others_wait_for_elsewhere_ends_the_job(tmp_path: Path, wrong: str, texts: list[str]) -> None:
    """In Horovod's own calls and in those of checkpoints, before any exchange."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import torch, horovod.torch as hvd
from hvd_compress import Checkpoints, Interruption
hvd.init()
checkpoints, interruption = Checkpoints({str(tmp_path)!r}), Interruption()
interruption.agreed()
if hvd.rank() == 0: hvd.allreduce(torch.ones(1))
if hvd.rank() == 1: {wrong}
checkpoints.save(1, {{}})
print('the end')
""")
    ended = launch(3, [str(script)])
    assert ended.returncode != 0
    assert "the end" not in ended.stdout
    assert all(text in ended.stdout for text in texts), ended.stdout


def test_a_step_that_all_give_up_ends_no_job() -> None:
    """One of them drops the compressor, the other keeps it for longer than it takes to call that rank gone."""
    given_up = """
import os, time
model(torch.randn(4, 50)).sum().backward()
if hvd.rank() == 1:
    compression._reducer._watch = None
time.sleep(7)
print('the end', flush=True)
time.sleep(2)
os._exit(0)
"""
    ended = launch(2, PREAMBLE + given_up)
    assert ended.stdout.count("the end") == 2, ended.stdout


def test_mpi_does_not_end_under_a_rank_that_looks_out() -> None:
    """Horovod's thread ends it on all ranks once rank 1's program has ended, while rank 0 is about to call it."""
    slowly = """
from hvd_compress.exchange import watch
stack = watch._stack
def slowly():
    import time
    time.sleep(0.2)
    return stack()
if hvd.rank() == 0: watch._stack = slowly
print('the end')
"""
    ended = launch(2, LOCAL + slowly)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("the end") == 2


def test_a_collected_compressor_waits_for_no_thread() -> None:
    """A garbage collection may come while the program has what the thread that uses MPI just now waits for."""
    collected = """
import gc, threading
from hvd_compress.exchange.communicator import mpi
begun, over = threading.Event(), threading.Event()
def look():
    with mpi():
        begun.set()
        over.wait()
step()
threading.Thread(target=look).start()
begun.wait()
del model, optimizer, compression, step
gc.collect()
over.set()
print('the end')
"""
    ended = launch(2, PREAMBLE + collected, timeout=60)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("the end") == 2


def test_ranks_that_all_raise_each_say_why() -> None:
    ended = launch(2, PREAMBLE + "step()\nraise KeyError(f'rank {hvd.rank()}')")
    assert ended.returncode != 0
    assert "KeyError: 'rank 0'" in ended.stdout
    assert "KeyError: 'rank 1'" in ended.stdout
    assert "ending the job" not in ended.stdout


def test_mpi4py_may_be_imported_first() -> None:
    ended = launch(2, "from mpi4py import MPI" + PREAMBLE + "step(); step(); print('fine')")
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("fine") == 2


def test_without_mpirun_both_paths_work_on_one_rank() -> None:
    script = PREAMBLE + (
        "step(); assert compression.ledger.total.sent == 0\n"
        "model = torch.nn.Linear(50, 50)\n"
        "optimizer = QsparseLocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), "
        "named_parameters=model.named_parameters(), compression=Compression.topk(ratio=0.1), sync_every=2)\n"
        "for _ in range(4): step()\n"
        "assert optimizer.ledger.exchanges == 2; print('fine')\n"
    )
    ended = launch(1, script)
    assert "fine" in ended.stdout, ended.stdout


def test_importing_does_not_start_mpi() -> None:
    """On login nodes many MPI libraries abort the process that starts them."""
    ended = launch(1, "import hvd_compress, sys; assert 'mpi4py.MPI' not in sys.modules; print('fine')")
    assert "fine" in ended.stdout, ended.stdout


# The fixture itself


def comes_back() -> None:
    hvd.barrier()


def hangs_on_one_rank() -> None:
    if hvd.rank() == 0:
        hvd.barrier()


def raises_on_one_rank() -> None:
    if hvd.rank() == 1:
        raise ValueError("told you")
    hvd.barrier()


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("world.GRACE_SECONDS", 2)  # its end is what these tests wait for


@pytest.mark.ranks(2)
@pytest.mark.usefixtures("short_grace")
def test_failures_and_hangs_are_reported_by_rank(world: World) -> None:
    world.run(comes_back)
    with pytest.raises(RankFailedError, match=r"(?s)rank 0\nno answer.*in barrier"):
        world.run(hangs_on_one_rank, timeout=3)


@pytest.mark.ranks(2)
@pytest.mark.usefixtures("short_grace")
def test_the_text_of_a_failing_rank_is_kept(world: World) -> None:
    with pytest.raises(RankFailedError, match=r"(?s)--- rank 1\n.*told you"):
        world.run(raises_on_one_rank, timeout=60)


def test_looking_where_the_program_is_while_threads_come_from_elsewhere() -> None:
    """Threads that Python does not know register themselves without its lock, and the program runs on."""
    script = (
        "import ctypes, threading, time\n"
        "from hvd_compress.exchange import watch\n"
        "start = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)\n"
        "create, join = ctypes.CDLL(None).pthread_create, ctypes.CDLL(None).pthread_join\n"
        "create.argtypes = [ctypes.c_void_p, ctypes.c_void_p, start, ctypes.c_void_p]\n"
        "join.argtypes = [ctypes.c_ulong, ctypes.c_void_p]\n"
        "nothing, end = start(lambda _: None), time.monotonic() + 5\n"
        "def come():\n"
        "    thread = ctypes.c_ulong()\n"
        "    while time.monotonic() < end:\n"
        "        create(ctypes.byref(thread), None, nothing, None), join(thread, None)\n"
        "def look():\n"
        "    while time.monotonic() < end:\n"
        "        stacks.add(watch._stack().splitlines()[-1].strip()), watch._frame()\n"
        "def run_on(depth):\n"
        "    yield from range(3) if depth == 0 else run_on(depth - 1)\n"
        "stacks = set()\n"
        "threads = [threading.Thread(target=f) for f in [come] * 16 + [look]]\n"
        "for thread in threads: thread.start()\n"
        "while time.monotonic() < end: list(run_on(20))\n"
        "for thread in threads: thread.join()\n"
        "print(any(line.endswith('in run_on') for line in stacks))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr


def test_looking_where_the_program_is_meets_a_garbage_collection() -> None:
    """Python holds a lock while it lists the frames: a callback that lists them too must not come meanwhile."""
    script = (
        "import gc, weakref\n"
        "from hvd_compress.exchange import watch\n"
        "class Cycle: pass\n"
        "kept = []\n"
        "gc.set_threshold(1)\n"
        "for _ in range(300):\n"
        "    cycle = Cycle(); cycle.me = cycle\n"
        "    kept.append(weakref.ref(cycle, lambda _: watch._frame()))\n"
        "    del cycle\n"
        "    watch._frame()\n"
        "print('ended')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "ended\n", ended.stderr
