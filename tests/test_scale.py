"""Exchanges that know which ranks share a node, or that share the work of summing."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from models import Vectors, assert_replicas_identical, gradient, through_a_file
from test_exchange import Counting, Fragile
from torch import Tensor
from world import World, launch

from hvd_compress import (
    DQGAN,
    AsyncQsparseLocalSGD,
    Compression,
    PeerError,
    QsparseLocalSGD,
    RankMismatchError,
    costs,
    node_process_set,
    resize,
    scattered,
)
from hvd_compress.auto import AutoReducer
from hvd_compress.exchanges import reducer
from hvd_compress.ledger import Ledger
from hvd_compress.membership import Change, members
from hvd_compress.memory import Residual
from hvd_compress.operators import QSGD, Operator, RandK, Rotated, Sign, TopK, compose
from hvd_compress.pieces import Piece, cut, even_ends
from hvd_compress.scattered import equal_parts, select_again
from hvd_compress.wire import Message

SHAPES = {"small": (9,), "wide": (30, 40), "none": (0,), "long": (5003,), "scalar": ()}
EVEN, ODD, UNEVEN, ONE = [0, 0, 1, 1], [0, 1, 0, 1], [7, 7, 7, 3], [0, 0, 0, 0]


def gradients(rank: int, step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Whole numbers, whose sums and halves are exact."""
    return {
        name: (8 * gradient(shape, rank, step, which)).round().to(dtype)
        for which, (name, shape) in enumerate(SHAPES.items())
    }


def step_of(model: Vectors, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    model(gradients(hvd.rank(), step, next(model.parameters()).dtype)).backward()
    optimizer.step()


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


def wrap(model: torch.nn.Module, compression: Any) -> Any:
    return hvd.DistributedOptimizer(sgd(model), named_parameters=model.named_parameters(), compression=compression)


def on_path(path: str, model: Vectors, **options: Any) -> tuple[Any, Any]:
    """An optimizer, and what has the ledger and, in the end, the memory."""
    if path == "gradient":
        compression = Compression.topk(**options, named_parameters=model.named_parameters())
        return wrap(model, compression), compression
    optimizer = QsparseLocalSGD(
        sgd(model), named_parameters=model.named_parameters(), compression=Compression.topk(**options)
    )
    return optimizer, optimizer


def memories(state: Any) -> dict[str, Tensor]:
    """All that a reducer's state holds as memory."""
    state = state.get("qsparse_local_sgd", {}).get("average", state)
    state = state.get("inner", state)
    return {} if state is None else state["memory"]


# Shards


def test_shards_cover_all_elements_once_and_evenly() -> None:
    sizes = {"a": 7, "empty": 0, "b": 1, "c": 12}
    for shards in range(1, 25):
        parts = cut(sizes, even_ends(20, shards))
        lengths = [sum(p.stop - p.start for p in part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        for name, size in sizes.items():
            pieces = [p for part in parts for p in part if p.name == name]
            assert [p.start for p in pieces] == [0, *(p.stop for p in pieces)][: len(pieces)]
            assert not pieces or pieces[-1].stop == size
            assert all(p.start < p.stop for p in pieces)


def test_more_elements_than_an_int32_counts() -> None:
    """A 7 B-parameter model's worth, none of which is allocated."""
    large = 3_500_000_001
    first, second, third = cut({"a": large, "b": 10, "c": large}, even_ends(2 * large + 10, 3))
    third_of_all = (2 * large + 10) // 3
    assert first == [Piece("a", 0, third_of_all)]
    assert second == [Piece("a", third_of_all, large), Piece("b", 0, 10), Piece("c", 0, second[2].stop)]
    assert third == [Piece("c", second[2].stop, large)]


# The algorithm


class NodesByDefinition:
    """Top-k with error feedback where the worker is the node, computed on one rank from the definition."""

    def __init__(self, nodes: Sequence[int], k: int, dense_below: int) -> None:
        labels = list(dict.fromkeys(nodes))
        self.members = [[r for r, n in enumerate(nodes) if n == label] for label in labels]
        self.shards = min(map(len, self.members))
        self.k, self.dense_below = k, dense_below
        self.memories: list[dict[tuple[str, int], Tensor]] = [{} for _ in labels]

    def average(self, by_rank: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        ranks, workers = len(by_rank), len(self.members)
        result = {name: torch.zeros(t.numel()) for name, t in by_rank[0].items()}
        sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
        total, offset = sum(sizes.values()), 0
        bounds = [total * i // self.shards for i in range(self.shards + 1)]
        for name, size in sizes.items():
            for low, high in itertools.pairwise(bounds):
                start, stop = max(low - offset, 0), min(high - offset, size)
                if start >= stop or name not in by_rank[0]:
                    continue
                for node, together in enumerate(self.members):
                    x = sum(by_rank[r][name].reshape(-1)[start:stop] for r in together) * (workers / ranks)
                    result[name][start:stop] += self._sent(node, (name, start), torch.as_tensor(x)) / workers
            offset += size
        return {name: t.view(by_rank[0][name].shape) for name, t in result.items()}

    def _sent(self, node: int, key: tuple[str, int], x: Tensor) -> Tensor:
        if len(x) < self.dense_below:
            return x
        p = self.memories[node].get(key, torch.zeros_like(x)) + x
        kept = torch.sort(p.abs(), descending=True, stable=True).indices[: self.k]
        message = torch.zeros_like(p)
        message[kept] = p[kept]
        self.memories[node][key] = p - message
        return message


def follows_the_definition(path: str, nodes: Sequence[int]) -> None:
    model = Vectors(SHAPES)
    optimizer, owner = on_path(path, model, k=40, dense_below=0, exchange="hierarchical", nodes=nodes)
    reference, expected = NodesByDefinition(nodes, 40, 0), {name: torch.zeros(s) for name, s in SHAPES.items()}
    for step in range(4):
        step_of(model, optimizer, step)
        average = reference.average([gradients(r, step) for r in range(hvd.size())])
        for name, p in model.named_parameters():
            expected[name] -= average[name]
            assert torch.equal(p.detach(), expected[name]), (name, step)
    assert_replicas_identical(list(model.parameters()))
    labels = list(dict.fromkeys(nodes))
    node = reference.memories[labels.index(nodes[hvd.rank()])]
    for name, memory in memories(owner.state_dict()).items():
        assert any(n == name and torch.equal(memory, m) for (n, _), m in node.items())
    assert owner.ledger.exchanges == 4


@pytest.mark.ranks(4)
@pytest.mark.parametrize("nodes", [EVEN, ODD, UNEVEN, ONE])
@pytest.mark.parametrize("path", ["gradient", "local"])
def test_the_worker_is_the_node(world: World, path: str, nodes: list[int]) -> None:
    world.run(follows_the_definition, path, nodes)


@pytest.mark.ranks(8)
@pytest.mark.parametrize("nodes", [[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2, 2]])
def test_eight_ranks(world: World, nodes: list[int]) -> None:
    world.run(follows_the_definition, "gradient", nodes)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def is_the_flat_exchange(path: str, dtype: torch.dtype) -> None:
    """With one rank on each node: same parameters, memories and bytes, whatever the numbers are."""
    runs = []
    for options in ({}, {"exchange": "hierarchical", "nodes": list(range(hvd.size()))}):
        model = Vectors(SHAPES, dtype)
        optimizer, owner = on_path(path, model, ratio=0.05, dense_below=10, **options)
        for step in range(3):
            optimizer.zero_grad()
            model({n: gradient(s, hvd.rank(), step, i, dtype) for i, (n, s) in enumerate(SHAPES.items())}).backward()
            optimizer.step()
        total = owner.ledger.total
        runs.append((model.state_dict(), memories(owner.state_dict()), total.horovod, owner.ledger.exchanges))
        assert total.node == 0
    assert all(_same_bits(t, runs[1][0][n]) for n, t in runs[0][0].items())
    assert runs[0][1].keys() == runs[1][1].keys() != set()
    assert all(torch.equal(m, runs[1][1][n]) for n, m in runs[0][1].items())
    assert runs[0][2:] == runs[1][2:]


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_one_rank_on_each_node_is_the_flat_exchange(world: World, dtype: torch.dtype) -> None:
    if world.ranks > 1:
        world.run(is_the_flat_exchange, "gradient", dtype)
    world.run(is_the_flat_exchange, "local", dtype)


def mpi_finds_the_node() -> None:
    """All ranks of this machine share memory."""
    model = Vectors(SHAPES)
    optimizer, owner = on_path("local", model, k=40, dense_below=0, exchange="hierarchical")
    step_of(model, optimizer, 0)
    reference = NodesByDefinition([0] * hvd.size(), 40, 0)
    average = reference.average([gradients(r, 0) for r in range(hvd.size())])
    assert all(torch.equal(-average[n], p.detach()) for n, p in model.named_parameters())
    assert owner.ledger.total.node > 0


@pytest.mark.ranks(4)
def test_mpi_knows_who_shares_a_node(world: World) -> None:
    world.run(mpi_finds_the_node)


def stays_identical(dtype: torch.dtype, exchange: str, nodes: Sequence[int] | None) -> None:
    """Any numbers, parameters unused on some ranks, another order on each."""
    model = Vectors(SHAPES, dtype)
    compression = Compression.qtopk(
        ratio=0.02,
        bits=4,
        dense_below=0,
        exchange=exchange,
        nodes=nodes,
        named_parameters=model.named_parameters(),
    )
    optimizer = wrap(model, compression)
    for step in range(4):
        optimizer.zero_grad()
        mine = {
            name: gradient(shape, hvd.rank(), step, which, dtype)
            for which, (name, shape) in enumerate(SHAPES.items())
            if (which + step + hvd.rank()) % 3
        }
        model(dict(sorted(mine.items(), reverse=hvd.rank() % 2 == 1))).backward()
        optimizer.step()
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_replicas_are_identical(world: World, dtype: torch.dtype) -> None:
    world.run(stays_identical, dtype, "hierarchical", UNEVEN)
    world.run(stays_identical, dtype, "reduce_scatter", None)


# Messages that are passed on within nodes


@contextmanager
def parts_within(nodes: Sequence[int]) -> Iterator[list[int]]:
    """Bytes that this rank hands to others of its node in reduce-scatter's first half, each time that it does."""
    from hvd_compress.exchange import Scatter

    near: list[int] = []
    plain = Scatter.alltoall

    def watched(self: Any, buffers: list[Any]) -> list[Any]:
        here = hvd.rank()
        near.append(sum(b.nbytes for rank, b in enumerate(buffers) if rank != here and nodes[rank] == nodes[here]))
        return plain(self, buffers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scatter, "alltoall", watched)
        yield near


def goes_another_way(path: str, exchange: str, nodes: Sequence[int]) -> tuple[int, int]:
    """To the same bits, and at the same number of them between nodes. Returns the bytes within nodes."""
    runs = []
    for options in ({}, {"nodes": nodes}):
        model = Vectors(SHAPES)
        optimizer, owner = on_path(path, model, k=40, dense_below=10, exchange=exchange, reselect=1.0, **options)
        with parts_within(nodes) as near:
            for step in range(4):
                step_of(model, optimizer, step)
        runs.append((model.state_dict(), memories(owner.state_dict()), owner.ledger.total))
    (model_state, memory, total), (state, waiting, passed_on) = runs
    assert all(torch.equal(t, state[name]) for name, t in model_state.items())
    assert all(torch.equal(t, waiting[name]) for name, t in memory.items())
    stays = sum(near) if len({*nodes}) > 1 else 0
    assert total.mpi == passed_on.mpi + stays + 16  # MPI was asked who shares a node, in two numbers
    return total.node, passed_on.node


@pytest.mark.ranks(4)
@pytest.mark.parametrize("exchange", ["allgather", "reduce_scatter"])
def test_nodes_change_the_way_and_nothing_else(world: World, exchange: str) -> None:
    for path in ("gradient", "local"):
        for nodes, passed_on in ((ODD, 4), (UNEVEN, 4), (ONE, 0), ([0, 1, 2, 3], 0)):
            within = world.run(goes_another_way, path, exchange, nodes)
            assert [before for before, _ in within] == [0] * 4
            assert sum(after > 0 for _, after in within) == passed_on


# Reduce-scatter


def ranks_share_the_summing(dtype: torch.dtype, reselect: float | None) -> None:
    """Nothing is lost: what was applied and what all memories hold are what all ranks had; each step, exactly."""
    model = Vectors(SHAPES, dtype)
    compression = Compression.topk(
        k=40,
        dense_below=0,
        exchange="reduce_scatter",
        reselect=reselect,
        named_parameters=model.named_parameters(),
    )
    optimizer = wrap(model, compression)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in range(5):
        step_of(model, optimizer, step)
        for rank in range(hvd.size()):
            for name, g in gradients(rank, step, dtype).items():
                given[name] += g
        waiting = memories(compression.state_dict())
        for name, p in model.named_parameters():
            remembered = waiting.get(name, torch.zeros(p.numel(), dtype=p.dtype)).double()
            total = hvd.allreduce(remembered, op=hvd.Sum, name=f"memory {name}").view(p.shape)
            assert torch.equal(total - hvd.size() * p.detach().double(), given[name]), (name, step)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(1, 4)
def test_nothing_is_lost_where_the_sum_is_selected_again(world: World) -> None:
    if world.ranks > 1:
        world.run(ranks_share_the_summing, torch.float32, None)
        world.run(ranks_share_the_summing, torch.float64, 0.5)


@pytest.mark.ranks(8)
def test_nothing_is_lost_on_eight_ranks(world: World) -> None:
    world.run(ranks_share_the_summing, torch.float32, 1.0)


def is_the_flat_sum(path: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Without a second selection it is the flat exchange, to the bit."""
    runs = []
    for more in ({}, {"exchange": "reduce_scatter", "reselect": math.inf}):
        model = Vectors(SHAPES, dtype)
        optimizer, owner = on_path(path, model, **options, **more)
        for step in range(3):
            optimizer.zero_grad()
            model({n: gradient(s, hvd.rank(), step, i, dtype) for i, (n, s) in enumerate(SHAPES.items())}).backward()
            optimizer.step()
        runs.append((model.state_dict(), memories(owner.state_dict())))
    for mine, theirs in zip(*runs, strict=True):
        assert mine.keys() == theirs.keys() != set()
        assert all(torch.equal(t, theirs[n]) for n, t in mine.items())


@pytest.mark.ranks(1, 4)
@pytest.mark.parametrize("path", ["gradient", "local"])
def test_the_whole_union_is_the_flat_sum(world: World, path: str) -> None:
    if world.ranks > 1 or path == "local":
        world.run(is_the_flat_sum, path, torch.float32, {"ratio": 0.05, "dense_below": 10})
        world.run(is_the_flat_sum, path, torch.float64, {"k": 3, "dense_below": 0})
        world.run(is_the_flat_sum, path, torch.float16, {"ratio": 0.9, "dense_below": 0})


AWAITED = """
import builtins, contextlib, sys
from pkgutil import resolve_name
from unittest import mock
import horovod.torch as hvd, torch
from hvd_compress import Compression, QsparseLocalSGD
kind, at, where, error = sys.argv[1:]
hvd.init()
model = torch.nn.Linear(50, 50)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
compression = Compression.topk(k=5, exchange=kind)
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = QsparseLocalSGD(sgd, named_parameters=model.named_parameters(), compression=compression)
for step in range(5):
    model(torch.ones(50)).sum().backward()
    holder, name = where.rsplit(".", 1)
    fails = mock.patch.object(resolve_name(holder), name, side_effect=getattr(builtins, error))
    with fails if hvd.rank() == 1 and step == int(at) else contextlib.nullcontext():
        try:
            optimizer.step()
        except BaseException as caught:
            print("goes on after", repr(caught), flush=True)
"""


@pytest.mark.parametrize(
    ("exchange", "step", "where", "error"),
    [
        ("reduce_scatter", 2, "hvd_compress.exchange:Scatter.sum", "KeyboardInterrupt"),
        ("reduce_scatter", 2, "hvd_compress.exchange:Scatter.alltoall", "MemoryError"),
        ("reduce_scatter", 2, "hvd_compress.exchange:Scatter.allgatherv", "KeyboardInterrupt"),
        ("auto", 0, "hvd_compress.auto.AutoReducer._try", "KeyboardInterrupt"),
        ("auto", 0, "hvd_compress.exchange.union", "MemoryError"),
    ],
)
def test_a_rank_that_cannot_tell_the_others_ends_the_job(exchange: str, step: int, where: str, error: str) -> None:
    """Where they are in a collective operation of the exchange, which it would leave for the next one's."""
    ended = launch(2, ["-c", AWAITED, exchange, str(step), where, error])
    assert ended.returncode != 0
    assert "rank 1 ends the job: the others " in ended.stdout
    assert " it, and it fails" in ended.stdout
    assert f"\n{error}" in ended.stdout
    assert "goes on" not in ended.stdout


def selected_by_hand(ranks_values: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    one = opened(
        Compression.topk(k=2, dense_below=0, exchange="reduce_scatter", reselect=1.0),
        Vectors({"w": (len(ranks_values[0]),)}),
    )
    one.add("w", torch.tensor(ranks_values[hvd.rank()]))
    total = one.reduce().sums["w"].tolist()
    return total, memories(one.state_dict())["w"].tolist()


@pytest.mark.ranks(2)
def test_a_second_selection_by_hand(world: World) -> None:
    """Rank 0 selects 9 and -8, rank 1 8 and 7. Regions end at (2 + 6) // 2 = 4."""
    values = [[9.0, 0.0, -8.0, 1.0, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 8.0, 0.0, 3.0, 0.0, 7.0, 0.0]]
    (total, first), (same, second) = world.run(selected_by_hand, values)
    # Of three values in the first region ceil(3 / 2) return, after 8 has cancelled -8; the second has one.
    assert total == same == [9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 0.0]
    assert first == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0]
    assert second == [0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]


def as_many_as_there_is_room_for(nodes: Sequence[int], most: float) -> None:
    """The default is that much of the sum, by tensor and owner, and what all ranks selected is more."""
    sums = []
    for reselect in (None, most):
        one = opened(
            Compression.topk(k=30, dense_below=0, exchange="reduce_scatter", nodes=nodes, reselect=reselect),
            Vectors({"w": (4000,)}),
        )
        one.add("w", gradient((4000,), hvd.rank(), 0))
        sums.append(one.reduce().sums["w"])
    assert torch.equal(*sums)
    assert abs(int(torch.count_nonzero(sums[0])) - most * 30) <= hvd.size()  # each owner rounds up
    assert int(torch.count_nonzero(sums[0])) < 30 * hvd.size() - hvd.size()


@pytest.mark.ranks(4)
def test_the_sum_has_as_many_elements_as_there_is_room_for(world: World) -> None:
    world.run(as_many_as_there_is_room_for, [0, 1, 2, 3], 1.0)
    world.run(as_many_as_there_is_room_for, ONE, 1.0)
    world.run(as_many_as_there_is_room_for, EVEN, 3.0)
    world.run(as_many_as_there_is_room_for, UNEVEN, 3.0)
    world.run(as_many_as_there_is_room_for, [0, 1, 1, 2], 4 / 3 * (1.25 * 3 / 2 - 1))


def test_selecting_again() -> None:
    total = torch.tensor([0.0, 5.0, -7.0, 0.0, 1.0] + [0.0] * 95)
    message, rest = select_again(total, 1.5)
    assert message.indices is not None
    assert rest is not None
    assert message.indices.tolist() == [1, 2]
    assert torch.equal(message.decode() + rest, total)
    assert select_again(total, math.inf)[1] is None
    empty, rest = select_again(torch.zeros(100), 0.0)
    assert (len(empty.values), rest) == (0, None)
    nan = torch.tensor([0.0, float("nan"), 2.0] + [0.0] * 97)
    assert torch.isnan(select_again(nan, 1)[0].decode()[1])


@pytest.mark.parametrize("absent", [0, 1, 2, 3, 4, 50])
def test_a_dense_union_is_sent_dense_where_that_is_shorter(absent: int) -> None:
    total = torch.arange(1.0, 101.0)
    total[:absent] = 0
    message, rest = select_again(total, math.inf)
    dense = Message.dense(total)
    indices = torch.nonzero(total).reshape(-1)
    sparse = Message.sparse((100,), indices, total[indices])
    assert rest is None
    assert torch.equal(message.decode(), total)
    assert (message.indices is None) == (absent <= 3)
    # The coder leaves zeros out of sparse messages, and makes full ones dense.
    assert len(message.to_bytes()) <= min(len(sparse.to_bytes()), len(dense.to_bytes())) + 3


def test_regions_have_equally_many_survivors() -> None:
    sparse = Message.sparse((1000,), torch.tensor([1, 2, 3, 500]), torch.ones(4))
    dense = Message.dense(torch.ones(4))
    empty = Message.sparse((10**10,), torch.tensor([], dtype=torch.int64), torch.tensor([]))
    late = Message.sparse((10**10,), torch.tensor([7, 10**10 - 1]), torch.ones(2))
    ends = equal_parts([sparse, dense, empty, late], 5)
    assert ends == [3, 1000, 1002, 1004 + 10**10 + 7, 1004 + 2 * 10**10]
    assert equal_parts([sparse], 1) == [1000]
    assert equal_parts([Message.sparse((9,), torch.tensor([4]), torch.ones(1))], 3) == [4, 4, 9]


def test_messages_that_can_be_divided() -> None:
    x = gradient((100,), 0, 0)
    for operator in (
        TopK(k=20),
        RandK(k=20),
        compose(TopK(k=20), QSGD(bits=4, norm="max", bucket=0)),
        compose(TopK(k=20), Sign()),
        TopK(k=100),
    ):
        message = operator.encode(x)
        parts = [message.part(start, stop).decode() for start, stop in ((0, 30), (30, 30), (30, 100))]
        assert torch.equal(torch.cat(parts), message.decode())
    for undividable in (QSGD(bits=4, bucket=10), Rotated(bits=4)):
        with pytest.raises(TypeError, match="cannot be divided"):
            undividable.encode(x).part(0, 100)


# What goes wrong


def overflow_on_one_rank(path: str, options: dict[str, Any], who: int) -> None:
    model = Vectors(SHAPES)
    optimizer, owner = on_path(path, model, k=30, dense_below=0, **options)
    step_of(model, optimizer, 0)
    before = {n: m.clone() for n, m in memories(owner.state_dict()).items()}
    optimizer.zero_grad()
    mine = gradients(hvd.rank(), 1)
    if hvd.rank() == who:
        mine["long"][4000] = float("inf")
    model(mine).backward()
    if path == "gradient":
        optimizer.step()
        assert not torch.isfinite(model.get_parameter("long")).all()
    else:
        with pytest.raises(FloatingPointError, match="long on rank"):
            optimizer.step()
        assert all(torch.isfinite(p).all() for p in model.parameters())
    after = memories(owner.state_dict())
    assert before.keys() == after.keys()
    assert all(torch.equal(m, after[n]) for n, m in before.items())


@pytest.mark.ranks(4)
@pytest.mark.parametrize("path", ["gradient", "local"])
def test_an_overflow_spoils_no_memory(world: World, path: str) -> None:
    for who in (1, 2):
        world.run(overflow_on_one_rank, path, {"exchange": "hierarchical", "nodes": EVEN}, who)
        world.run(overflow_on_one_rank, path, {"exchange": "hierarchical", "nodes": UNEVEN}, who)
        world.run(overflow_on_one_rank, path, {"exchange": "reduce_scatter"}, who)


class Unsent(Operator):
    """Makes messages that cannot be packed when the tensor is heavy."""

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        indices = torch.arange(min(2, len(x)))
        message = Message.sparse(tuple(x.shape), indices, x[:2])
        return Message(message.shape, indices.flip(0) if float(x.sum()) > 1e6 else indices, message.values)


def opened(compression: Any, model: Vectors) -> Any:
    """The reducer of a compressor, once the ranks have met."""
    one = reducer(compression.settings, dict(model.named_parameters()), Ledger())
    one.open(*members(None, None), "test", 30)
    return one


def fails_on_one_rank(operator: Operator, options: dict[str, Any], text: str, who: int) -> None:
    one = opened(Compression.of(operator, dense_below=0, **options), Vectors({"w": (30,), "v": (20,)}))

    def reduce(scale: float) -> dict[str, Tensor]:
        one.add("w", scale * torch.arange(1.0, 31.0))
        one.add("v", torch.ones(20))
        return one.reduce().sums

    reduce(1.0)
    before = {n: m.clone() for n, m in memories(one.state_dict()).items()}
    with pytest.raises((PeerError, ArithmeticError, ValueError), match=text):
        reduce(1e9 if hvd.rank() == who else 1.0)
    assert all(torch.equal(before[n], m) for n, m in memories(one.state_dict()).items())
    assert_replicas_identical(list(reduce(1.0).values()))  # and it goes on


@pytest.mark.ranks(4)
@pytest.mark.parametrize("nodes", [EVEN, ODD, UNEVEN])
def test_an_operator_that_fails_on_one_rank(world: World, nodes: list[int]) -> None:
    """On a node's sum, so on the owner of the shard; before and after the memory has compensated."""
    options = {"exchange": "hierarchical", "nodes": nodes}
    world.run(fails_on_one_rank, Fragile(), options, "too heavy", 2)
    world.run(fails_on_one_rank, Unsent(), options, "ascending", 1)


@pytest.mark.ranks(4)
def test_an_operator_that_fails_on_one_of_the_ranks_that_sum(world: World) -> None:
    world.run(fails_on_one_rank, Fragile(), {"exchange": "reduce_scatter"}, "too heavy", 2)
    world.run(messages_cannot_be_divided)
    world.run(no_room_to_divide)


def no_room_to_divide() -> None:
    """Before the first collective of the exchange."""
    one = opened(Compression.topk(k=3, dense_below=0, exchange="reduce_scatter"), Vectors({"w": (30,)}))
    one.add("w", torch.arange(1.0, 31.0))
    fails = patch.object(scattered, "equal_parts", side_effect=MemoryError("no room"))
    with fails if hvd.rank() == 2 else nullcontext(), pytest.raises((MemoryError, PeerError), match="no room"):
        one.reduce()
    one.add("w", torch.arange(1.0, 31.0))
    assert_replicas_identical(list(one.reduce().sums.values()))


def messages_cannot_be_divided() -> None:
    one = opened(Compression.qsgd(bits=4, exchange="reduce_scatter", dense_below=0), Vectors({"w": (3000,)}))
    one.add("w", torch.ones(3000))
    with pytest.raises(TypeError, match="cannot be divided among ranks"):
        one.reduce()


def differ(what: str, options: dict[str, Any]) -> None:
    model = Vectors({"w": (30,), "v": (20,), "u": (10,)})
    parameters = dict(model.named_parameters())
    one = opened(Compression.topk(k=3, dense_below=0, **options), model)
    last = hvd.rank() == hvd.size() - 1
    for name in ("w", "v", *(["u"] if what == "tensors" and last else [])):
        one.add(name, torch.ones(parameters[name].numel()))
    if what == "type" and last:
        one.add("u", torch.ones(10, dtype=torch.int64))
    expected = {
        "tensors": "do not send the same tensors: u",
        "step": "exchanges at step|rank . failed",
        "type": "only floating point",
    }[what]
    with pytest.raises((RankMismatchError, PeerError, TypeError), match=expected):
        one.reduce(step=7 if what == "step" and last else 5)
    for name in ("w", "v"):
        one.add(name, torch.ones(parameters[name].numel()))
    sums = one.reduce(step=8).sums
    assert_replicas_identical(list(sums.values()))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("what", ["tensors", "step", "type"])
def test_ranks_that_differ(world: World, what: str) -> None:
    for nodes in (EVEN, UNEVEN):
        world.run(differ, what, {"exchange": "hierarchical", "nodes": nodes})
    for exchange in ("allgather", "reduce_scatter"):
        world.run(differ, what, {"exchange": exchange, "nodes": UNEVEN})


def disagree_about_nodes(exchange: str) -> str:
    model = Vectors({"w": (30,)})
    nodes = [0, 0, 1, hvd.rank() // 3]
    optimizer, _ = on_path("local", model, k=3, dense_below=0, exchange=exchange, nodes=nodes)
    model({"w": torch.ones(30)}).backward()
    with pytest.raises(RankMismatchError) as caught:
        optimizer.step()
    return str(caught.value)


@pytest.mark.ranks(4)
def test_ranks_that_disagree_about_nodes(world: World) -> None:
    for exchange in ("allgather", "hierarchical", "reduce_scatter"):
        texts = world.run(disagree_about_nodes, exchange)
        assert len(set(texts)) == 1
        assert "nodes=(0, 0, 1, 0)" in texts[0]
        assert "nodes=(0, 0, 1, 1)" in texts[0]


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="exchange must be one of 'allgather'"):
        Compression.topk(k=3, exchange="alltoall")
    with pytest.raises(TypeError, match="an integer for each rank"):
        Compression.topk(k=3, exchange="hierarchical", nodes=["a", "b"])
    with pytest.raises(ValueError, match="reselect must be positive"):
        Compression.topk(k=3, exchange="reduce_scatter", reselect=0)
    for wrong in ("1", True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="reselect must be a number"):
            Compression.topk(k=3, exchange="reduce_scatter", reselect=wrong)
    model = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="each one sends to servers"):
        AsyncQsparseLocalSGD(
            sgd(model),
            named_parameters=model.named_parameters(),
            compression=Compression.topk(k=3, exchange="auto"),
        )
    with pytest.raises(TypeError, match="keeps memories by node"):
        QsparseLocalSGD(
            sgd(model),
            named_parameters=model.named_parameters(),
            compression=Compression.topk(k=3, exchange="hierarchical"),
            look_ahead=0.3,
        )


def draws_with_the_largest_seed() -> None:
    """Each shard has a seed of its own, which is one of 64 bits too."""
    model = Vectors(SHAPES)
    compression = Compression.randk(ratio=0.1, dense_below=0, exchange="hierarchical", nodes=EVEN, seed=2**63 - 1)
    optimizer = QsparseLocalSGD(sgd(model), named_parameters=model.named_parameters(), compression=compression)
    step_of(model, optimizer, 0)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(4)
def test_any_seed_will_do(world: World) -> None:
    world.run(draws_with_the_largest_seed)


def too_few_nodes() -> None:
    model = Vectors({"w": (30,)})
    optimizer, _ = on_path("local", model, k=3, exchange="hierarchical", nodes=[0])
    model({"w": torch.ones(30)}).backward()
    with pytest.raises(ValueError, match="where 1 ranks are"):
        optimizer.step()


@pytest.mark.ranks(4)
def test_nodes_that_do_not_speak_of_all_ranks(world: World) -> None:
    world.run(too_few_nodes)


# State


def resumes(path: str, options: dict[str, Any], forgets: bool = False) -> None:
    def run(optimizer: Any, model: Vectors, steps: range) -> None:
        for step in steps:
            step_of(model, optimizer, step)

    straight = Vectors(SHAPES)
    optimizer, owner = on_path(path, straight, k=30, dense_below=0, **options)
    run(optimizer, straight, range(3))
    saved = through_a_file((straight.state_dict(), owner.state_dict()))
    if forgets:
        owner.reset_memory()
    run(optimizer, straight, range(3, 6))

    resumed = Vectors(SHAPES)
    optimizer, again = on_path(path, resumed, k=30, dense_below=0, **options)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    if forgets:
        again.reset_memory()
    if path == "gradient":  # not a thing has changed by being loaded and saved
        assert again.state_dict()["round"] == 3
    run(optimizer, resumed, range(3, 6))
    assert all(torch.equal(t, resumed.state_dict()[n]) for n, t in straight.state_dict().items())
    ours, theirs = memories(again.state_dict()), memories(owner.state_dict())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(m, theirs[n]) for n, m in ours.items())
    assert again.ledger.exchanges == 6
    assert again.ledger.total.dense == owner.ledger.total.dense
    owner.reset_memory()
    assert not memories(owner.state_dict())


@pytest.mark.ranks(4)
@pytest.mark.parametrize("path", ["gradient", "local"])
def test_resume_bit_for_bit(world: World, path: str) -> None:
    world.run(resumes, path, {"exchange": "hierarchical", "nodes": UNEVEN})
    world.run(resumes, path, {"exchange": "reduce_scatter"})


@pytest.mark.ranks(4)
@pytest.mark.parametrize("options", [{"exchange": "hierarchical", "nodes": UNEVEN}, {"exchange": "reduce_scatter"}])
def test_memory_may_be_wiped_after_a_resume(world: World, options: dict[str, Any]) -> None:
    world.run(resumes, "gradient", options, True)
    world.run(resumes, "local", options, True)


def another_layout() -> str:
    model = Vectors(SHAPES)
    optimizer, owner = on_path("gradient", model, k=30, exchange="hierarchical", nodes=EVEN)
    step_of(model, optimizer, 0)
    state = owner.state_dict()
    with pytest.raises(ValueError, match="expected a compressor's state of format 2"):
        on_path("gradient", model, k=30)[1].load_state_dict(state)
    with pytest.raises(ValueError, match="another exchange"):
        owner.load_state_dict(on_path("gradient", model, k=30)[1].state_dict())
    optimizer, owner = on_path("gradient", model, k=30, exchange="hierarchical", nodes=ONE)
    owner.load_state_dict(state)
    optimizer.zero_grad()
    loss = model(gradients(hvd.rank(), 1))
    with pytest.raises(RankMismatchError) as caught:
        loss.backward()
    return str(caught.value)


@pytest.mark.ranks(4)
def test_a_state_of_other_nodes(world: World) -> None:
    texts = world.run(another_layout)
    assert len(set(texts)) == 1
    assert "saved with other numbers of ranks on the nodes; here are 1 node(s) of 4 rank(s)" in texts[0]


def another_memory() -> None:
    """Refused on all ranks, before the first exchange and after it; and without a compressor it would be lost."""
    model = Vectors(SHAPES)
    optimizer, owner = on_path("local", model, k=30, exchange="hierarchical", nodes=EVEN)
    step_of(model, optimizer, 0)
    state = owner.state_dict()
    plain = QsparseLocalSGD(sgd(model), named_parameters=model.named_parameters(), compression=Compression.none)
    with pytest.raises(ValueError, match="saved with a compressor and its memory"):
        plain.load_state_dict(state)
    optimizer, owner = on_path("local", model, k=30, exchange="hierarchical", nodes=EVEN, memory="ef21")
    for _ in range(2):
        with pytest.raises(ValueError, match="not saved with a memory like EF21"):
            owner.load_state_dict(state)
        step_of(model, optimizer, 0)


@pytest.mark.ranks(4)
def test_a_state_of_another_memory(world: World) -> None:
    world.run(another_memory)


def another_schedule() -> str:
    """On nodes of two and one: the second rank has no shard, and so nothing that could tell it."""
    model = Vectors(SHAPES)
    optimizer, owner = on_path("gradient", model, k=30, exchange="hierarchical", nodes=(0, 0, 1))
    step_of(model, optimizer, 0)
    state = owner.state_dict()
    plan = Compression.accordion(
        high=0.5, low=0.1, exchange="hierarchical", nodes=(0, 0, 1), named_parameters=model.named_parameters()
    )
    plan.load_state_dict(state)
    other = wrap(model, plan)
    with pytest.raises(RankMismatchError) as caught:
        step_of(model, other, 1)
    return str(caught.value)


@pytest.mark.ranks(3)
def test_a_state_of_another_schedule_is_refused_on_all_ranks(world: World) -> None:
    (text,) = {*world.run(another_schedule)}
    assert "does not fit: the state was not saved with a schedule like Accordion" in text


def an_early_state(exchange: str) -> None:
    model = Vectors(SHAPES)
    optimizer, owner = on_path("gradient", model, k=30, exchange=exchange, nodes=list(range(hvd.size())))
    early = owner.state_dict()
    step_of(model, optimizer, 0)
    if exchange == "hierarchical":  # its memory is there, and nothing to replace it by
        with pytest.raises(ValueError, match="before the first exchange"):
            owner.load_state_dict(early)
        assert memories(owner.state_dict())
    else:
        owner.load_state_dict(early)
        assert not memories(owner.state_dict())


@pytest.mark.parametrize("exchange", ["hierarchical", "reduce_scatter"])
def test_a_state_from_before_the_first_exchange(world: World, exchange: str) -> None:
    world.run(an_early_state, exchange)


def too_long_on_one_rank() -> None:
    from hvd_compress.exchange import scatter

    model = Vectors(SHAPES)
    optimizer, owner = on_path("local", model, k=30, exchange="reduce_scatter")
    step_of(model, optimizer, 0)
    limit, error = (10, OverflowError) if hvd.rank() == 1 else (2**31 - 1, PeerError)
    with patch.object(scatter, "LIMIT", limit), pytest.raises(error, match="MPI carries 10"):
        step_of(model, optimizer, 1)
    step_of(model, optimizer, 2)
    owner.synchronize()
    assert_replicas_identical(list(model.parameters()))


def test_a_message_that_is_too_long_is_an_error_on_all_ranks(world: World) -> None:
    world.run(too_long_on_one_rank)


def another_number_of_ranks(exchange: str, path: str) -> tuple[Any, dict[str, Tensor]]:
    model = Vectors(SHAPES)
    optimizer, owner = on_path(path, model, k=30, dense_below=0, exchange=exchange)
    step_of(model, optimizer, 0)
    return owner.state_dict(), memories(chosen_state(owner.state_dict()))


def chosen_state(state: Any) -> Any:
    """What ``exchange="auto"`` has chosen has a state of its own."""
    state = state.get("qsparse_local_sgd", {}).get("average", state)
    return state.get("chosen", state)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("path", ["gradient", "local"])
def test_half_the_ranks_go_on(world: World, path: str) -> None:
    """The memories' mean stays where a rank has its own, and a state that is divided among a node's is refused."""
    states, before = zip(*world.run(another_number_of_ranks, "reduce_scatter", path), strict=True)
    # The same under exchange="auto", if it has chosen this.
    chosen = [{"format": "auto 1", "choice": "reduce_scatter", "op": "Average", "chosen": s} for s in states]
    automatic = [{**c, "ledger": chosen_state(s)["ledger"]} for c, s in zip(chosen, states, strict=True)]
    for saved in [states, *([automatic] if path == "gradient" else [])]:
        after = [resize(change, [saved[old] for old in change.predecessors]) for change in HALVED]
        assert [chosen_state(state)["rank"] for state in after] == [0, 1]
        for name in before[0]:
            total = torch.stack([memories(chosen_state(state))[name] for state in after]).sum(0)
            assert torch.allclose(total / 2, torch.stack([m[name] for m in before]).mean(0))
        counts = [[chosen_state(s)["ledger"]["shared"]["mpi"] for s in which] for which in (saved, after)]
        assert sum(counts[0]) == sum(counts[1])
    states, _ = zip(*world.run(another_number_of_ranks, "hierarchical", path), strict=True)
    with pytest.raises(ValueError, match="keeps memories by node"):
        resize(HALVED[0], [states[0], states[1]])


HALVED = [Change.of(rank, 2, 4) for rank in range(2)]


@pytest.mark.parametrize("exchange", ["hierarchical", "reduce_scatter", "auto"])
def test_without_mpi_an_exchange_says_what_it_needs(exchange: str) -> None:
    settings = Compression.topk(k=3, exchange=exchange).settings
    one = reducer(settings, dict(Vectors({"w": (30,)}).named_parameters()), Ledger())
    with pytest.raises(RuntimeError, match=f"exchange='{exchange}' needs MPI"):
        one.open(hvd.ProcessSet([0]), [0], "test", 30)


# The ledger


def ledger_tells_the_truth(options: dict[str, Any]) -> tuple[int, int]:
    from mpi4py import MPI

    counting = Counting(MPI.COMM_WORLD)
    model = Vectors(SHAPES)
    optimizer, owner = on_path("local", model, k=30, dense_below=0, communicator=counting, **options)
    for step in range(3):
        step_of(model, optimizer, step)
    total = owner.ledger.total
    assert total.mpi + total.node == sum(counting.counts.values())
    return total.mpi, total.node


@pytest.mark.ranks(4)
def test_the_ledger_is_what_mpi_was_given(world: World) -> None:
    elements = 9 + 1200 + 5003 + 1
    counts = world.run(ledger_tells_the_truth, {"exchange": "hierarchical", "nodes": EVEN})
    assert all(3 * 4 * elements <= node < 3 * (4 * elements + 1000) for _, node in counts)
    assert all(node == 0 for _, node in world.run(ledger_tells_the_truth, {"exchange": "reduce_scatter"}))
    # A rank speaks of one shard: 40 elements of the cut tensor, 40 of another, 10 small ones, and the first meeting.
    assert all(mpi < 3 * (90 * 5.5 + 100) + 200 for mpi, _ in counts)


def parts_for_neighbours() -> tuple[int, int]:
    """Bytes that one rank sends to the other one of its node, and what the ledger says of them."""
    with parts_within(EVEN) as near:
        _, node = ledger_tells_the_truth({"exchange": "reduce_scatter", "nodes": EVEN})
    return sum(near), node


@pytest.mark.ranks(4)
def test_parts_for_a_rank_of_the_same_node_do_not_leave_it(world: World) -> None:
    assert all(0 < near <= node for near, node in world.run(parts_for_neighbours))


# Choosing


def chooses(options: dict[str, Any]) -> tuple[str, list[str], int]:
    from mpi4py import MPI

    counting = Counting(MPI.COMM_WORLD)
    model = Vectors(SHAPES)
    compression = Compression.topk(k=40, dense_below=0, exchange="auto", communicator=counting, **options)
    optimizer = QsparseLocalSGD(sgd(model), named_parameters=model.named_parameters(), compression=compression)
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hvd_compress")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        step_of(model, optimizer, 0)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    total = optimizer.ledger.total
    assert total.mpi + total.node == sum(counting.counts.values())
    state = through_a_file(optimizer.state_dict())
    choice = state["qsparse_local_sgd"]["average"]["choice"]

    again = Vectors(SHAPES)
    again.load_state_dict(model.state_dict())
    compression = Compression.topk(k=40, dense_below=0, exchange="auto", **options)
    resumed = QsparseLocalSGD(sgd(again), named_parameters=again.named_parameters(), compression=compression)
    resumed.load_state_dict(state)
    step_of(model, optimizer, 1)
    step_of(again, resumed, 1)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    assert_replicas_identical(list(model.parameters()))
    return choice, texts, len(memories(state["qsparse_local_sgd"]["average"]["chosen"]))


@pytest.mark.ranks(1, 4)
def test_auto_chooses_the_same_on_all_ranks_says_why_and_keeps_to_it(world: World) -> None:
    for nodes in ([0] * world.ranks, [0, 0, 1, 1][: world.ranks]):
        choices, texts, _ = zip(*world.run(chooses, {"nodes": nodes}), strict=True)
        assert len(set(choices)) == 1
        assert [len(t) for t in texts] == [1] + [0] * (world.ranks - 1)
        assert f"exchange {choices[0]}: expected are allgather" in texts[0][0]
        assert f"Measured on {len(set(nodes))} node(s)" in texts[0][0]


class DrawsThere(Operator):
    """Sends ones, if its draws are where its tensor is."""

    def encode(self, x: Tensor, *, generator: Any = None) -> Message:
        assert generator.device == x.device
        return Message.dense(torch.ones(x.shape))


class PretendedGenerator:
    """torch has none on the device that its tensors pretend to be on."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = torch.device(device)

    def manual_seed(self, seed: int) -> PretendedGenerator:
        return self


def test_auto_tries_with_draws_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"w": torch.Size([30])}
    options: Any = {"operator": DrawsThere(), "memory": Residual(), "dense_below": 0, "seed": 0, "ledger": Ledger()}
    make: Any = None  # nothing is chosen here
    monkeypatch.setattr(torch, "Generator", PretendedGenerator)
    messages, _ = AutoReducer(make, shapes, **options)._try({"w": torch.empty(30, device="meta")})
    assert messages.keys() == {"w"}


def auto_fails_on_one_rank() -> None:
    one = opened(Compression.of(Fragile(), dense_below=0, exchange="auto"), Vectors({"w": (30,)}))
    one.add("w", torch.full((30,), 1e9 if hvd.rank() == 1 else 1.0))
    with pytest.raises((PeerError, ArithmeticError), match="too heavy"):
        one.reduce()
    one.add("w", torch.ones(30))
    assert_replicas_identical(list(one.reduce().sums.values()))


def loads_when_it_is_too_late() -> None:
    """The ranks have met, and what was chosen has not: refused, and nothing is changed."""
    saved = opened(Compression.topk(k=2, dense_below=0, exchange="auto"), Vectors({"w": (30,)}))
    saved.add("w", torch.arange(30.0))
    saved.reduce()
    fresh = opened(Compression.topk(k=2, dense_below=0, exchange="auto"), Vectors({"w": (30,)}))
    with pytest.raises(ValueError, match="load the state before the first exchange"):
        fresh.load_state_dict(saved.state_dict())
    assert fresh.state_dict()["choice"] is None
    assert fresh._memory.state_dict() == {}


@pytest.mark.ranks(1)
def test_a_state_that_auto_cannot_take_changes_nothing(world: World) -> None:
    world.run(loads_when_it_is_too_late)


@pytest.mark.ranks(4)
def test_an_operator_that_fails_while_auto_chooses(world: World) -> None:
    world.run(auto_fails_on_one_rank)


def measures_selection_of_all_ranks() -> None:
    from mpi4py import MPI

    from hvd_compress.exchange import union

    mask = np.zeros(64, np.bool_)
    mask[[0, 1 + hvd.rank(), 8 * hvd.rank()]] = True
    together, added_up, _ = union(MPI.COMM_WORLD, mask)
    places = {0} | {1 + r for r in range(4)} | {8 * r for r in range(4)}
    assert (together, added_up) == (len(places), 2 + 3 * 3)


@pytest.mark.ranks(4)
def test_the_union_of_selections(world: World) -> None:
    world.run(measures_selection_of_all_ranks)


def cluster(nodes: int, ranks: int, gbit: float = 10.0) -> costs.Cluster:
    return costs.Cluster(nodes, ranks, costs.Link(2e-5, gbit / 8 * 1e9), costs.Link(1e-6, 1e10))


def test_a_rank_sends_about_as_much_however_many_there_are() -> None:
    """Messages to other nodes, in halves of a reduce-scatter whose ranks have selected different elements."""

    def sent(nodes: int, local: int) -> float:
        ranks = nodes * local
        room = costs.room(ranks, nodes)
        assert room >= 1
        work = costs.Work(elements=1000, dense=4000.0, message=1.0, union=min(room, ranks))
        return costs.reduce_scatter(cluster(nodes, local), work).between / local

    for nodes in range(2, 40):
        for local in range(1, 20):
            least = (nodes - 1) / nodes * (1 + 1 / local)
            assert sent(nodes, local) == pytest.approx(max(1.25, least))
    for layouts in ([(2, 1), (2, 2), (2, 4)], [(2, 1), (4, 1), (4, 2)], [(2, 1), (4, 1), (8, 1)]):
        volumes = [sent(*layout) for layout in layouts]
        mean = sum(volumes) / 3
        assert all(0.8 * mean < volume < 1.2 * mean for volume in volumes)
    assert [costs.room(ranks, 1) for ranks in (1, 2, 4)] == [1.0, 1.5, 1.0] == [costs.room(r, r) for r in (1, 2, 4)]


def test_costs_are_what_the_algorithms_send() -> None:
    work = costs.Work(elements=25_000_000, dense=1e8, message=1.3e6)
    assert costs.allgather(cluster(4, 1), work).between == 3 * 1.3e6
    # Of a node's two ranks, each sends half of a shard's messages.
    assert costs.hierarchical(cluster(4, 2), work).between == costs.allgather(cluster(4, 1), work).between
    assert costs.hierarchical(cluster(4, 2), work).within == 1e8
    for nodes in (2, 4, 64):
        assert costs.hierarchical(cluster(nodes, 1), work) == costs.allgather(cluster(nodes, 1), work)
        two = costs.reduce_scatter(cluster(nodes, 1), work).between
        assert two == pytest.approx(2 * 1.3e6 * (nodes - 1) / nodes)
    assert costs.dense(cluster(4, 1), work).between == pytest.approx(2 * 1e8 * 3 / 4)
    assert [f(cluster(1, 4), work).between for f in costs.EXCHANGES.values()] == [0, 0, 0]
    # Each of a node's four messages enters the other node once, and is passed on with what came from there.
    passed_on = costs.allgather(cluster(2, 4), work)
    assert (passed_on.between, passed_on.within) == (4 * 1.3e6, 3 * 2 * 1.3e6)
    for nodes, ranks in itertools.product(range(2, 9), range(1, 9)):
        flat, divided = (f(cluster(nodes, ranks), work) for f in (costs.allgather, costs.hierarchical))
        assert flat.between == pytest.approx(ranks * divided.between)
        # Of what a rank sends, the part that owners on other nodes get; the sum's parts enter each other node once.
        expected = ranks * 1.3e6 * (nodes - 1) / nodes + (nodes - 1) / nodes * 1.3e6
        assert costs.reduce_scatter(cluster(nodes, ranks), work).between == pytest.approx(expected)


def test_more_is_never_faster() -> None:
    work = costs.Work(25_000_000, 1e8, 1.3e6, union=2.0, select=1e-9, pack=1e-3, open=1e-3, packet=1e-4)
    for function in (*costs.EXCHANGES.values(), costs.dense):
        seconds = [function(cluster(4, 2, gbit), work).seconds for gbit in (1, 10, 100)]
        assert seconds == sorted(seconds, reverse=True)
        assert function(cluster(64, 8), work).seconds > function(cluster(4, 8), work).seconds


# Together with Horovod


def two_levels(nodes: list[int]) -> None:
    """Gradients are averaged inside a node in each step, and parameters across nodes in every second one."""
    model = Vectors(SHAPES)
    node = node_process_set(nodes)
    inner = hvd.DistributedOptimizer(sgd(model), named_parameters=model.named_parameters(), process_set=node)
    compression = Compression.topk(
        k=40, dense_below=0, exchange="hierarchical", nodes=nodes, process_set=hvd.global_process_set
    )
    optimizer = QsparseLocalSGD(
        inner, named_parameters=model.named_parameters(), compression=compression, sync_every=2
    )
    reference, expected = NodesByDefinition(nodes, 40, 0), {name: torch.zeros(s) for name, s in SHAPES.items()}
    together = [r for r in range(hvd.size()) if nodes[r] == nodes[hvd.rank()]]
    for step in range(4):
        step_of(model, optimizer, step)
        if step % 2:
            both = [[gradients(r, s) for s in (step - 1, step)] for r in range(hvd.size())]
            average = reference.average([{n: a[n] + b[n] for n in SHAPES} for a, b in both])
            expected = {name: total - average[name] for name, total in expected.items()}
            for name, p in model.named_parameters():
                assert torch.equal(p.detach(), expected[name]), (name, step)
        else:
            mine = [gradients(r, step) for r in together]
            for name, p in model.named_parameters():
                mean = sum(m[name] for m in mine) / len(together)
                assert torch.equal(p.detach(), expected[name] - mean)
    assert optimizer.ledger.exchanges == 2


def two_levels_under_a_scaler(nodes: list[int]) -> None:
    """Gradients are averaged inside a node before they are unscaled."""
    model = Vectors(SHAPES)
    node = node_process_set(nodes)
    together = [r for r in range(hvd.size()) if nodes[r] == nodes[hvd.rank()]]

    def wrapped(of: Vectors) -> tuple[Any, QsparseLocalSGD]:
        named = list(of.named_parameters())
        inner = hvd.DistributedOptimizer(sgd(of), named_parameters=named, process_set=node)
        compression = Compression.topk(
            k=40, dense_below=0, exchange="hierarchical", nodes=nodes, process_set=hvd.global_process_set
        )
        return inner, QsparseLocalSGD(inner, named_parameters=named, compression=compression, sync_every=3)

    inner, optimizer = wrapped(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(model(gradients(hvd.rank(), step))).backward()
        inner.synchronize()
        with inner.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        for name, p in model.named_parameters():
            total = sum((gradients(r, s)[name] for r in together for s in range(step + 1)), torch.zeros_like(p))
            assert torch.equal(p.detach(), -total / len(together))
    optimizer.zero_grad()
    scaler.scale(model(gradients(hvd.rank(), 2))).backward()
    with pytest.raises(RuntimeError, match=r"call synchronize\(\) of the hvd\.DistributedOptimizer"):
        scaler.step(optimizer)
    inner.synchronize()


@pytest.mark.ranks(4)
def test_two_levels_of_local_sgd(world: World) -> None:
    world.run(two_levels, EVEN)
    world.close()  # whose process sets other tests would meet


@pytest.mark.ranks(4)
def test_two_levels_under_a_grad_scaler(world: World) -> None:
    world.run(two_levels_under_a_scaler, EVEN)
    world.close()


def refuses_to_average_twice() -> None:
    model = Vectors(SHAPES)

    def averaged(**options: Any) -> Any:
        return hvd.DistributedOptimizer(sgd(model), named_parameters=model.named_parameters(), **options)

    def wrapped(kind: Any, inner: Any, process_set: Any = None, **options: Any) -> Any:
        compression = Compression.topk(k=3, **options)
        return kind(
            inner, named_parameters=model.named_parameters(), compression=compression, process_set=process_set
        )

    for kind in (QsparseLocalSGD, AsyncQsparseLocalSGD, DQGAN):
        with pytest.raises(
            ValueError, match=r"over all ranks.*plain optimizer.*process_set=hvd_compress\.node_process_set\(\)"
        ):
            wrapped(kind, averaged())
        with pytest.raises(TypeError, match=f"{kind.__name__} exchanges by itself"):
            hvd.DistributedOptimizer(wrapped(kind, sgd(model)), named_parameters=model.named_parameters())
        with pytest.raises(TypeError, match="already takes local steps"):
            wrapped(kind, wrapped(QsparseLocalSGD, sgd(model)))
    with pytest.raises(ValueError, match="over all ranks"):
        wrapped(QsparseLocalSGD, averaged(), exchange="hierarchical", nodes=[0, 1])
    wrapped(QsparseLocalSGD, averaged(), exchange="hierarchical")  # two levels, on a cluster of one node
    sets = [hvd.add_process_set([rank]) for rank in range(hvd.size())]
    with pytest.raises(ValueError, match="over all ranks"):
        wrapped(QsparseLocalSGD, averaged(), process_set=sets[hvd.rank()])
    wrapped(QsparseLocalSGD, averaged(process_set=sets[hvd.rank()]), process_set=hvd.global_process_set)
    hvd.barrier()
    for one in sets:
        hvd.remove_process_set(one)


@pytest.mark.ranks(2)
def test_gradients_are_not_averaged_twice(world: World) -> None:
    world.run(refuses_to_average_twice)


def in_a_process_set() -> None:
    few = hvd.add_process_set([0, 2, 3])
    if hvd.rank() != 1:
        model = Vectors(SHAPES)
        compression = Compression.topk(
            k=30, dense_below=0, exchange="hierarchical", nodes=[0, 9, 0, 1], process_set=few
        )
        optimizer = QsparseLocalSGD(
            sgd(model), named_parameters=model.named_parameters(), compression=compression, process_set=few
        )
        step_of(model, optimizer, 0)
        reference = NodesByDefinition([0, 0, 1], 30, 0)
        average = reference.average([gradients(r, 0) for r in (0, 2, 3)])
        assert all(torch.allclose(-average[n], p.detach()) for n, p in model.named_parameters())
    hvd.barrier()
    hvd.remove_process_set(few)


@pytest.mark.ranks(4)
def test_a_process_set(world: World) -> None:
    world.run(in_a_process_set)
