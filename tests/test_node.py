"""Dense sums inside a node, by MPI and by Horovod, and the exchange that is built on them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from models import Vectors, assert_replicas_identical, gradient
from test_exchange import Fragile
from test_scale import (
    EVEN,
    ODD,
    ONE,
    SHAPES,
    UNEVEN,
    NodesByDefinition,
    Unsent,
    gradients,
    memories,
    on_path,
    step_of,
)
from torch import Tensor
from world import World, launch

from hvd_compress import Compression, PeerError, RankMismatchError
from hvd_compress.exchanges import reducer
from hvd_compress.hierarchical import HierarchicalReducer
from hvd_compress.ledger import Ledger
from hvd_compress.membership import members
from hvd_compress.node import HorovodNode, MpiNode, Node, _read, _write

TINY = 1e-9  # megabytes: a bucket for each tensor
SOME = 0.02  # two buckets: "long" and what comes after it, and the others


@contextmanager
def process_sets(nodes: Sequence[int]) -> Iterator[hvd.ProcessSet]:
    """This rank's node; all of them are removed in the end, so that other tests do not meet them."""
    labels = list(dict.fromkeys(nodes))
    together = [[r for r, n in enumerate(nodes) if n == label] for label in labels]
    if len(labels) == 1:
        yield hvd.global_process_set
        return
    sets = [hvd.add_process_set(ranks) for ranks in together]
    yield sets[labels.index(nodes[hvd.rank()])]
    hvd.barrier()
    for one in sets:
        hvd.remove_process_set(one)


def node_by(library: str, staged: int) -> Node:
    from mpi4py import MPI

    if library == "mpi":
        return MpiNode(MPI.COMM_WORLD.Dup(), staged)
    return HorovodNode(hvd.global_process_set, "test", staged)


def sums_in_a_node(library: str, owners: int, dtype: torch.dtype) -> None:
    node = node_by(library, staged=10)  # so that vectors are cut in the middle
    lengths = [[3, 0, 14], [], [25], [1, 1, 1]][:owners]

    def contribution(rank: int) -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(rank)
        vectors = [[torch.randn(n, generator=generator).to(dtype) for n in ns] for ns in lengths]
        # By Horovod sums are in any order: exact, then.
        return vectors if library == "mpi" else [[(v * 100).round() for v in part] for part in vectors]

    mine = contribution(node.rank)
    expected = contribution(0)
    for rank in range(1, node.size):
        for part, others in zip(expected, contribution(rank), strict=True):
            for total, vector in zip(part, others, strict=True):
                total += vector  # in rank order, to the bit
    own = mine[node.rank] if node.rank < owners else []
    sums = own if node.size == 1 else [torch.full_like(v, float("nan")) for v in own]
    node.sum_at_owners(mine, sums)
    assert all(torch.equal(a, b) for a, b in zip(sums, expected[node.rank] if own else [], strict=True))
    untouched = contribution(node.rank)
    assert all(
        torch.equal(a, b) for part, same in zip(mine, untouched, strict=True) for a, b in zip(part, same, strict=True)
    )
    if library == "mpi":
        elements = sum(sum(n) for owner, n in enumerate(lengths) if owner != node.rank)
        assert node.sent == torch.empty(0, dtype=dtype).element_size() * elements
    if own:
        mine[node.rank] = sums
    node.share(mine)
    for part, sums in zip(mine, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, sums, strict=True))


@pytest.mark.ranks(1, 4)
@pytest.mark.parametrize("library", ["mpi", "horovod"])
def test_dense_sums_in_a_node(world: World, library: str) -> None:
    for owners in {1, world.ranks}:
        for dtype in (torch.float32, torch.float64):
            world.run(sums_in_a_node, library, owners, dtype)


def test_vectors_of_more_elements_than_an_int32_counts() -> None:
    """As a model of billions of parameters has them; one number stands for all of a long one's elements."""
    long = 2**31 + 5
    vectors = [torch.tensor([7.0]).expand(long), torch.arange(100.0), torch.tensor([8.0]).expand(long)]
    into = torch.zeros(104)
    _read(vectors, long - 2, long + 102, into)
    assert into.tolist() == [7.0, 7.0, *range(100), 8.0, 8.0]
    _write([vectors[0], into], long + 1, long + 4, torch.tensor([1.0, 2.0, 3.0]))
    assert into[:5].tolist() == [7.0, 1.0, 2.0, 3.0, 2.0]


# Horovod sums inside the node


def follows_the_definition(path: str, nodes: Sequence[int], cap: float, by_horovod: bool) -> None:
    with process_sets(nodes) as node:
        model = Vectors(SHAPES)
        options: dict[str, Any] = {"nodes": nodes, "bucket_cap_mb": cap, "process_set": hvd.global_process_set}
        if by_horovod:
            options["node_process_set"] = node
        optimizer, owner = on_path(path, model, k=40, dense_below=0, exchange="hierarchical", **options)
        reference = NodesByDefinition(nodes, 40, 0)
        expected = {name: torch.zeros(s) for name, s in SHAPES.items()}
        for step in range(3):
            step_of(model, optimizer, step)
            average = reference.average([gradients(r, step) for r in range(hvd.size())])
            for name, p in model.named_parameters():
                expected[name] -= average[name]
                assert torch.equal(p.detach(), expected[name]), (name, step)
        labels = list(dict.fromkeys(nodes))
        remembered = reference.memories[labels.index(nodes[hvd.rank()])]
        for name, memory in memories(owner.state_dict()).items():
            assert any(n == name and torch.equal(memory, m) for (n, _), m in remembered.items())


@pytest.mark.ranks(4)
@pytest.mark.parametrize("nodes", [EVEN, ODD, UNEVEN, ONE])
def test_horovod_sums_inside_the_node(world: World, nodes: list[int]) -> None:
    world.run(follows_the_definition, "gradient", nodes, SOME, True)
    world.run(follows_the_definition, "local", nodes, 25.0, True)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("cap", [SOME, TINY])
def test_the_size_of_buckets_changes_no_bit(world: World, cap: float) -> None:
    world.run(follows_the_definition, "gradient", EVEN, cap, False)
    world.run(follows_the_definition, "local", UNEVEN, cap, False)


def stays_identical(nodes: Sequence[int], dtype: torch.dtype, seed: int) -> None:
    """Any numbers, which Horovod may add in any order; parameters unused on some ranks, another order on each."""
    with process_sets(nodes) as node:
        model = Vectors(SHAPES, dtype)
        compression = Compression.qtopk(
            ratio=0.02,
            bits=4,
            dense_below=0,
            exchange="hierarchical",
            nodes=nodes,
            bucket_cap_mb=SOME,
            process_set=hvd.global_process_set,
            node_process_set=node,
            named_parameters=model.named_parameters(),
        )
        optimizer: Any = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0),
            named_parameters=model.named_parameters(),
            compression=compression,
        )
        order = random.Random(seed + hvd.rank())
        for step in range(5):
            optimizer.zero_grad()
            names = order.sample(list(SHAPES), order.randint(3, len(SHAPES)))
            model({n: gradient(SHAPES[n], hvd.rank(), step, 0, dtype) for n in names}).backward()
            optimizer.step()
        as_bits = [p.detach().float() for p in model.parameters()]
        assert_replicas_identical(as_bits)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_replicas_are_identical(world: World, dtype: torch.dtype) -> None:
    world.run(stays_identical, UNEVEN, dtype, 0)


def wrong_process_set(how: str) -> str:
    with process_sets(EVEN) as node:
        given = {
            "another node's": hvd.global_process_set if hvd.rank() == 3 else node,
            "on some ranks": None if hvd.rank() == 3 else node,
            "not registered": hvd.ProcessSet(node.ranks or []),
        }[how]
        compression = Compression.topk(
            k=3,
            exchange="hierarchical",
            nodes=EVEN,
            process_set=hvd.global_process_set,
            node_process_set=given,
        )
        model = Vectors({"w": (30,)})
        one = reducer(compression.settings, dict(model.named_parameters()), Ledger())
        with pytest.raises(RankMismatchError) as caught:
            one.open(*members(hvd.global_process_set, None), "test", 30)
        return str(caught.value)


@pytest.mark.ranks(4)
def test_a_process_set_that_is_not_the_nodes(world: World) -> None:
    texts = world.run(wrong_process_set, "another node's")
    assert len(set(texts)) == 1
    assert "of rank(s) [3] is not of the ranks that share their node; those of the first node are [0, 1]" in texts[0]
    assert "rank(s) [0, 1, 2, 3]" in world.run(wrong_process_set, "not registered")[0]
    texts = world.run(wrong_process_set, "on some ranks")
    assert all("summed by Horovod" in text and "summed by MPI" in text for text in texts)


def test_a_process_set_is_horovods() -> None:
    with pytest.raises(TypeError, match=r"node_process_set must be hvd\.ProcessSet.*, got 0"):
        Compression.topk(k=3, exchange="hierarchical", node_process_set=0)


def auto_measures_horovod() -> None:
    with process_sets(EVEN) as node:
        settings: dict[str, Any] = {"nodes": EVEN, "node_process_set": node, "process_set": hvd.global_process_set}
        model = Vectors(SHAPES)
        optimizer, owner = on_path("gradient", model, k=40, exchange="auto", **settings)
        step_of(model, optimizer, 0)
        step_of(model, optimizer, 1)
        assert_replicas_identical(list(model.parameters()))
        assert owner.ledger.total.node > 1 << 20  # megabytes were summed to see how fast that is


@pytest.mark.ranks(4)
def test_auto_measures_what_will_be_used(world: World) -> None:
    world.run(auto_measures_horovod)


# What comes, and what fails


def made(nodes: Sequence[int], cap: float, operator: Any = None, node: Any = None) -> HierarchicalReducer:
    options: dict[str, Any] = {"exchange": "hierarchical", "nodes": nodes, "dense_below": 0, "bucket_cap_mb": cap}
    options |= {"node_process_set": node, "process_set": hvd.global_process_set}
    compression = Compression.topk(k=40, **options) if operator is None else Compression.of(operator, **options)
    one = reducer(compression.settings, dict(Vectors(SHAPES).named_parameters()), Ledger())
    assert isinstance(one, HierarchicalReducer)
    one.open(*members(compression.settings.process_set, None), "test", 60)
    return one


def tensors_come_and_stay_away(nodes: Sequence[int], by_horovod: bool) -> None:
    """Tensors that only some exchanges have, in any order and at any time; none at all in one of them."""
    with process_sets(nodes) as node:
        one = made(nodes, TINY, node=node if by_horovod else None)
        reference = NodesByDefinition(nodes, 40, 0)
        rounds = [list(SHAPES), ["wide", "scalar"], ["scalar", "wide"], ["small", "long"], [], ["long"], list(SHAPES)]
        for step, names in enumerate(rounds):
            mine = gradients(hvd.rank(), step)
            for name in random.Random(hvd.rank()).sample(names, len(names)):
                one.add(name, mine[name].clone())
                time.sleep(0.002 * ((hvd.rank() + step) % 3))
            sums = one.reduce(divisor=hvd.size()).sums
            assert sums.keys() == {*names}
            everyone = [{n: t for n, t in gradients(r, step).items() if n in names} for r in range(hvd.size())]
            expected = reference.average(everyone)
            assert all(torch.equal(sums[name], expected[name].reshape(-1)) for name in names)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("nodes", [EVEN, UNEVEN])
def test_tensors_that_come_only_sometimes(world: World, nodes: list[int]) -> None:
    world.run(tensors_come_and_stay_away, nodes, False)
    world.run(tensors_come_and_stay_away, nodes, True)


def fails(one: HierarchicalReducer, how: str, who: int) -> str:
    """What becomes of an exchange in which one rank does something else than the others."""
    mine = gradients(hvd.rank(), 1)
    odd = hvd.rank() == who
    for name in reversed(SHAPES):
        if how == "operator" and odd and name == "long":
            mine[name] += 1e9
        if how == "integers" and odd and name == "long":
            one.add(name, torch.ones(SHAPES[name], dtype=torch.int64))
        elif how == "dtype" and odd and name == "long":
            one.add(name, mine[name].double())
        elif not (how == "absent" and odd and name == "long"):
            one.add(name, mine[name].clone())
    with pytest.raises(
        (PeerError, RankMismatchError, ArithmeticError, TypeError, RuntimeError, ValueError)
    ) as caught:
        one.reduce(step=7 if how == "step" and odd else None)
    return str(caught.value)


def a_failure_reaches_all(nodes: Sequence[int], by_horovod: bool, how: str, text: str, operator: Any = None) -> None:
    with process_sets(nodes) as node:
        one = made(nodes, TINY, operator, node if by_horovod else None)

        def goes_well(step: int) -> None:
            for name, tensor in gradients(hvd.rank(), step).items():
                one.add(name, tensor)
            assert_replicas_identical(list(one.reduce().sums.values()))

        goes_well(0)
        for who in (0, 3):
            before = {n: m.clone() for n, m in memories(one.state_dict()).items()}
            message = fails(one, how, who)
            assert text in message or f"rank {who} failed" in message, message
            after = memories(one.state_dict())
            assert before.keys() == after.keys()
            assert all(torch.equal(m, after[n]) for n, m in before.items())
            goes_well(2 + who)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("how", "text", "operator"),
    [
        ("operator", "too heavy", Fragile()),  # on the node's sum, so on the owner
        ("operator", "ascending", Unsent()),  # in packing, once the memory has compensated
        ("absent", "do not send the same tensors: long", None),
        ("integers", "only floating point", None),
        ("step", "exchanges at step", None),
    ],
    ids=["operator", "packing", "absent", "integers", "step"],
)
def test_a_failure_reaches_all_ranks(world: World, how: str, text: str, operator: Any) -> None:
    world.run(a_failure_reaches_all, EVEN, False, how, text, operator)
    world.run(a_failure_reaches_all, UNEVEN, True, how, text, operator)


@pytest.mark.ranks(4)
def test_a_gradient_of_another_dtype(world: World) -> None:
    """MPI would write it past the end of the buffer that it is received in."""
    for by_horovod in (False, True):
        world.run(a_failure_reaches_all, EVEN, by_horovod, "dtype", "do not send the same tensors: long")


def no_room_on_one_rank(what: str) -> None:
    """For the sum over the node, or for what it is made with."""
    one = made(EVEN, TINY)

    def add(step: int) -> None:
        for name, tensor in gradients(hvd.rank(), step).items():
            one.add(name, tensor)

    def fails(*_: Any) -> Any:
        raise MemoryError("no room")

    add(0)
    one.reduce()
    before = {n: m.clone() for n, m in memories(one.state_dict()).items()}
    holder, name = {"sum": (one, "_room"), "buffers": (one._node, "_outgoing")}[what]
    works = getattr(holder, name)
    if hvd.rank() == 1:
        setattr(holder, name, fails)
    add(1)
    with pytest.raises((PeerError, MemoryError), match="no room"):
        one.reduce()
    setattr(holder, name, works)
    assert all(torch.equal(m, before[n]) for n, m in memories(one.state_dict()).items())
    add(1)
    assert_replicas_identical(list(one.reduce().sums.values()))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("what", ["sum", "buffers"])
def test_no_room_for_the_sum_on_one_rank(world: World, what: str) -> None:
    world.run(no_room_on_one_rank, what)


def test_a_sum_that_fails_on_one_rank() -> None:
    """The other one of the node is in MPI and cannot be told."""
    script = """
import torch, horovod.torch as hvd
from hvd_compress import Compression, QsparseLocalSGD
from hvd_compress.node import MpiNode
hvd.init()
model = torch.nn.Linear(50, 50)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
compression = Compression.topk(ratio=0.1, exchange="hierarchical", dense_below=0)
optimizer = QsparseLocalSGD(
    torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(), compression=compression)
def step():
    model(torch.randn(4, 50)).square().sum().backward()
    optimizer.step()
def fails(*_):
    raise MemoryError("no room")
step()
if hvd.rank() == 1: MpiNode._sum = fails
try:
    step()
finally:
    print("the end")
"""
    ended = launch(2, script)
    assert ended.returncode != 0
    assert "rank 1 ends the job: the others of its node wait for it, and it fails" in ended.stdout
    assert "MemoryError: no room" in ended.stdout
    assert "the end" not in ended.stdout


def copies_nothing_it_need_not(nodes: Sequence[int]) -> int:
    """The sum is made where the memory keeps it, and where an owner has all of a tensor, the old memory takes it."""
    one = made(nodes, 25.0)
    copied = 0
    before: dict[str, int] = {}
    for step in range(3):
        for name, tensor in gradients(hvd.rank(), step).items():
            one.add(name, tensor)
        sums = one.reduce().sums
        if step:
            for piece in one._owned:
                is_whole = len(piece) == len(sums[piece.name])
                assert is_whole == (sums[piece.name].data_ptr() == before[piece.name])
                copied += not is_whole
        before = {piece.name: one._memory._residuals[piece.name].data_ptr() for piece in one._owned}  # type: ignore[attr-defined]
    return copied


@pytest.mark.ranks(4)
def test_a_tensor_is_copied_only_if_it_is_cut(world: World) -> None:
    assert world.run(copies_nothing_it_need_not, EVEN) == [2, 2, 2, 2]  # the one that is cut, in two exchanges
    assert world.run(copies_nothing_it_need_not, [0, 1, 2, 3]) == [0, 0, 0, 0]
