"""Messages that travel while the backward pass goes on."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import horovod.torch as hvd
import pytest
import torch
from models import Vectors, assert_replicas_identical, gradient
from world import World

from hvd_compress import Compression, PeerError, QsparseLocalSGD, RankMismatchError, wire
from hvd_compress.ledger import Ledger
from hvd_compress.membership import check_horovod_takes, link
from hvd_compress.memory import Residual
from hvd_compress.operators import TopK
from hvd_compress.pieces import in_buckets
from hvd_compress.reducer import Reducer
from hvd_compress.wire import Message

SHAPES = {f"w{i}": (10 + 3 * i, 4) for i in range(7)}
TINY = 1e-9  # megabytes: a bucket for each tensor


def reducer(cap: float, operator: type[TopK] = TopK) -> Reducer:
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    made = Reducer(
        shapes,
        operator=operator(k=5),
        memory=Residual(),
        dense_below=0,
        buckets=list(in_buckets(shapes, cap)),
        seed=0,
        ledger=Ledger(),
    )
    made.open(*link(hvd.global_process_set, None), "", 60)
    return made


def tensor(name: str, step: int) -> torch.Tensor:
    return gradient(SHAPES[name], hvd.rank(), step, list(SHAPES).index(name))


def test_neighbours_share_a_bucket_until_it_is_full() -> None:
    shapes = {name: torch.Size([250_000 * size]) for name, size in (("a", 1), ("b", 3), ("c", 2), ("d", 1))}
    assert list(in_buckets(shapes, 3.0)) == [["d", "c"], ["b"], ["a"], []]  # megabytes: 1 + 2, 3, 1
    assert list(in_buckets(shapes, 3.5)) == [["d", "c", "b"], ["a"], []]
    assert list(in_buckets(shapes, 7.0)) == list(in_buckets(shapes, 100.0)) == [["d", "c", "b", "a"]]
    assert list(in_buckets(shapes, TINY)) == [["d"], ["c"], ["b"], ["a"], []]
    assert list(in_buckets({}, 1.0)) == [[]]


def test_the_last_bucket_is_small() -> None:
    """It travels when the backward pass is over."""
    sizes = {"a": 100_000, "b": 100_000, "c": 100_000, "d": 10_000_000}  # 0.4 MB each, and 40
    shapes = {name: torch.Size([size]) for name, size in sizes.items()}
    assert list(in_buckets(shapes, 25.0)) == [["d"], ["c"], ["b", "a"]]
    assert list(in_buckets({"empty": torch.Size([0]), **shapes}, 25.0)) == [["d"], ["c"], ["b", "a", "empty"]]


# The same bits, however tensors are put together and in whatever order they come


def trains(path: str, caps: list[float], **settings: Any) -> None:
    finals = []
    for cap in caps:
        model = Vectors(SHAPES)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        compression = Compression.by_name(
            dense_below=0, bucket_cap_mb=cap, named_parameters=model.named_parameters(), **settings
        )
        optimizer: Any
        if path == "gradient":
            optimizer = hvd.DistributedOptimizer(
                inner, named_parameters=model.named_parameters(), compression=compression
            )
        else:
            optimizer = QsparseLocalSGD(
                inner, named_parameters=model.named_parameters(), compression=compression, sync_every=2
            )
        order = random.Random(hvd.rank())
        for step in range(8):
            # In another order on each rank; some are unused, on some ranks only.
            names = order.sample(list(SHAPES), order.randint(4, len(SHAPES)))
            optimizer.zero_grad()
            model({name: tensor(name, step) for name in names}).backward()
            optimizer.step()
            if path == "gradient" or step % 2:
                assert_replicas_identical(list(model.parameters()))
        finals.append([p.detach().clone() for p in model.parameters()])
    for final in finals[1:]:
        assert all(torch.equal(a, b) for a, b in zip(finals[0], final, strict=True))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("path", ["gradient", "local"])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "topk", "k": 5},
        {"name": "qtopk", "k": 9, "bits": 3},
        {"name": "adaptive_topk", "ratio": 0.1, "exchanges": 8},
    ],
    ids=lambda s: s["name"],
)
def test_buckets_change_no_bit(world: World, path: str, settings: dict) -> None:
    world.run(trains_in_all_sizes, path, settings)


def trains_in_all_sizes(path: str, settings: dict) -> None:
    trains(path, [100.0, 0.0004, TINY], **settings)


# They leave early


def gradients_wait_for_their_bucket(name: str, options: dict[str, Any]) -> None:
    """What is done to a gradient when the last of its bucket has come is no change by the program."""
    parameters = torch.nn.ParameterDict({f"w{i}": torch.zeros(16, 16) for i in range(8)})
    compressor = getattr(Compression, name)(
        named_parameters=parameters.named_parameters(), bucket_cap_mb=0.003, dense_below=0, seed=1, **options
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters.values(), lr=0.1), parameters.named_parameters(), compression=compressor
    )
    for step in range(4):
        optimizer.zero_grad()
        slopes = [gradient((16, 16), hvd.rank(), step, i) for i in range(8)]
        sum((p * slope).sum() for p, slope in zip(parameters.values(), slopes, strict=True)).backward()
        optimizer.step()
    assert_replicas_identical(list(parameters.values()))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("topk", {"k": 5}),
        ("topk", {"k": 256}),
        ("topk", {"k": 5, "memory": "none"}),
        ("threshold", {"threshold": 0.5}),
        ("cat", {}),
        ("sign", {}),
        ("qtopk", {"k": 5, "bits": 4}),
    ],
)
def test_gradients_wait_for_their_bucket(world: World, name: str, options: dict[str, Any]) -> None:
    world.run(gradients_wait_for_their_bucket, name, options)


def leaves_before_it_is_asked() -> None:
    exchange = reducer(TINY)
    names = list(reversed(SHAPES))
    for step in range(3):
        for count, name in enumerate(names, start=1):
            exchange.add(name, tensor(name, step))
            assert len(exchange._departed) == count  # of one more, which is empty
        deadline = time.monotonic() + 60
        while not all(bucket.arrival.done() for bucket in exchange._departed):  # nobody has called reduce()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        hvd.barrier()
        assert not exchange.reduce().overflow
    # The first bucket waits for its tensor, and the others for the first.
    for name in names[1:]:
        exchange.add(name, tensor(name, 3))
    assert not exchange._departed
    exchange.add(names[0], tensor(names[0], 3))
    assert len(exchange._departed) == len(names)
    exchange.reduce()


@pytest.mark.ranks(2)
def test_a_full_bucket_departs_while_others_are_filled(world: World) -> None:
    world.run(leaves_before_it_is_asked)


def tensors_come_and_stay_away() -> None:
    """What does not come is not waited for any more, and may come again."""
    exchange, reference = reducer(TINY), reducer(100.0)
    rounds = [list(SHAPES), ["w1", "w4"], ["w4", "w1"], ["w0", "w4", "w6"], [], ["w1", "w5"], list(SHAPES)]
    early = []
    for step, names in enumerate(rounds):
        for name in names:
            exchange.add(name, tensor(name, step))
            reference.add(name, tensor(name, step))
        early.append(len(exchange._departed))
        ours, theirs = exchange.reduce(), reference.reduce()
        assert ours.sums.keys() == theirs.sums.keys() == {*names}
        assert all(torch.equal(ours.sums[name], theirs.sums[name]) for name in names)
    # After the second round, only w4 (in the third bucket) and w1 (in the last but two) are waited for.
    assert early == [7, 0, 7, 5, 0, 7, 7]
    for name in SHAPES:
        a, b = exchange.residual(name), reference.residual(name)
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.ranks(2)
def test_tensors_that_come_only_sometimes(world: World) -> None:
    world.run(tensors_come_and_stay_away)


# What fails


def second_tensor_comes_too_early() -> None:
    exchange = reducer(TINY)
    names = list(reversed(SHAPES))
    for name in names:
        exchange.add(name, tensor(name, 0))
    before = exchange.reduce()
    assert not before.overflow
    memory = {name: m.clone() for name, m in exchange.state_dict()["memory"].items()}
    for name in names:
        exchange.add(name, tensor(name, 1))
    if hvd.rank() == 1:
        exchange.add(names[0], tensor(names[0], 2))
        with pytest.raises(RuntimeError, match="a second tensor 'w6' came before the sum of the first"):
            exchange.reduce()
    else:
        with pytest.raises(PeerError, match="rank 1 failed: RuntimeError: a second tensor 'w6'"):
            exchange.reduce()
    assert all(torch.equal(m, exchange.state_dict()["memory"][name]) for name, m in memory.items())
    for name in names:  # and it goes on
        exchange.add(name, tensor(name, 1))
    assert not exchange.reduce().overflow


def overflow_in_an_early_bucket() -> None:
    exchange = reducer(TINY)
    names = list(reversed(SHAPES))
    for name in names:
        exchange.add(name, tensor(name, 0))
    exchange.reduce()
    memory = {name: m.clone() for name, m in exchange.state_dict()["memory"].items()}
    for name in names:
        bad = hvd.rank() == 1 and name == names[1]
        exchange.add(name, tensor(name, 1) * (float("nan") if bad else 1))
    reduced = exchange.reduce()
    assert reduced.overflow == [(1, "w5")]
    assert bool(reduced.sums["w5"].isnan().any())
    assert all(torch.equal(m, exchange.state_dict()["memory"][name]) for name, m in memory.items())


def one_rank_adds_less() -> None:
    from hvd_compress import RankMismatchError

    exchange = reducer(TINY)
    for name in reversed(SHAPES):
        if (hvd.rank(), name) != (1, "w6"):
            exchange.add(name, tensor(name, 0))
    with pytest.raises(RankMismatchError, match="do not send the same tensors: w6"):
        exchange.reduce()


class FailsOnce(TopK):
    """On one rank, in one exchange, for one tensor."""

    def split(self, x: torch.Tensor, other: torch.Tensor, out: torch.Tensor, **draws: Any) -> Message:
        if hvd.rank() == 1 and bool((x == 100).any()):
            out.fill_(torch.nan)  # half done
            raise ArithmeticError("cannot take a hundred")
        return super().split(x, other, out)


class Longer(TopK):
    """Says more than it was asked, once there is a memory."""

    def split(self, x: torch.Tensor, other: torch.Tensor, out: torch.Tensor, **draws: Any) -> Message:
        return Message.dense(torch.zeros(len(x) + 1))


def message_of_another_size() -> None:
    exchange = reducer(100.0, Longer)
    for name in reversed(SHAPES):
        exchange.add(name, tensor(name, 0))
    exchange.reduce()
    for name in reversed(SHAPES):
        exchange.add(name, tensor(name, 1))
    with pytest.raises(ValueError, match="made a message of 41 elements from 40"):
        exchange.reduce()


def one_of_several_cannot_be_compressed(cap: float) -> None:
    """Tensors of a bucket are compressed together: no memory of any of them may change."""
    exchange = reducer(cap, FailsOnce)
    for name in reversed(SHAPES):
        exchange.add(name, tensor(name, 0))
    exchange.reduce()
    memory = {name: m.clone() for name, m in exchange.state_dict()["memory"].items()}
    for name in reversed(SHAPES):
        exchange.add(name, tensor(name, 1).index_fill(0, torch.tensor([0]), 100.0 if name == "w3" else 0.0))
    with pytest.raises(RuntimeError, match="between backward"):
        exchange.state_dict()
    with pytest.raises((ArithmeticError, PeerError), match="cannot take a hundred"):
        exchange.reduce()
    assert all(torch.equal(m, exchange.state_dict()["memory"][name]) for name, m in memory.items())
    for name in reversed(SHAPES):  # and it goes on, with the second of two where the first has not departed
        if cap == 100:
            exchange.add(name, torch.full(SHAPES[name], torch.nan))
        exchange.add(name, tensor(name, 1))
    assert not exchange.reduce().overflow


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("cap", [TINY, 2e-3, 100.0])
def test_a_tensor_that_cannot_be_compressed(world: World, cap: float) -> None:
    world.run(one_of_several_cannot_be_compressed, cap)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(
    "variant",
    [second_tensor_comes_too_early, overflow_in_an_early_bucket, one_rank_adds_less, message_of_another_size],
)
def test_a_failure_reaches_all_buckets(world: World, variant: Any) -> None:
    world.run(variant)


def twins_exchange_at_once(times: int) -> None:
    """As the compressors of two critics that share a loss: alike in shapes and settings, not in what they send."""
    twins = [reducer(TINY), reducer(TINY)]
    for step in range(times):
        for name in reversed(SHAPES):
            for factor, one in enumerate(twins, start=1):
                one.add(name, factor * tensor(name, step))
        sums, doubled = (one.reduce().sums for one in twins)
        assert all(torch.equal(2 * sums[name], doubled[name]) for name in SHAPES)


@pytest.mark.ranks(2, 3)
def test_two_models_that_are_alike(world: World) -> None:
    world.run(twins_exchange_at_once, 20)


def all_give_up(times: int) -> None:
    """Again and again, after other numbers of tensors on each rank; then it is as if nothing had been."""
    exchange, reference = reducer(TINY), reducer(TINY)
    names = list(reversed(SHAPES))

    def sums(one: Reducer, step: int) -> dict[str, torch.Tensor]:
        for name in names:
            one.add(name, tensor(name, step))
        return one.reduce().sums

    sums(exchange, 0)
    sums(reference, 0)
    state = exchange.state_dict()
    order = random.Random(hvd.rank())
    for step in range(1, times + 1):
        for name in names[: order.randint(1, len(names))]:
            exchange.add(name, tensor(name, 100 + step))
        exchange.load_state_dict(state)
        ours, theirs = sums(exchange, step), sums(reference, step)
        assert all(torch.equal(ours[name], theirs[name]) for name in names)
        state = exchange.state_dict()


def one_gives_up() -> None:
    exchange = reducer(TINY)
    state = exchange.state_dict()
    for step in range(5):
        for name in reversed(SHAPES):
            exchange.add(name, tensor(name, step))
        if hvd.rank() == 1:
            exchange.load_state_dict(state)
        else:
            with pytest.raises(PeerError, match="rank 1 failed: RuntimeError: the exchange was given up"):
                exchange.reduce()
    for name in reversed(SHAPES):
        exchange.add(name, tensor(name, 5))
    assert_replicas_identical(list(exchange.reduce().sums.values()))


def one_is_interrupted() -> None:
    """As a bucket is about to depart, whose messages nobody has then; it gives up, or goes on and all know."""
    for goes_on in (False, True):
        exchange = reducer(TINY)
        names = list(reversed(SHAPES))
        for step in range(2):
            for name in names:
                exchange.add(name, tensor(name, step))
            exchange.reduce()
        state = exchange.state_dict()
        for name in names[:2]:
            exchange.add(name, tensor(name, 2))
        if hvd.rank() == 1:
            interrupted = mock.patch.object(wire, "device_of", side_effect=KeyboardInterrupt)
            with interrupted, pytest.raises(KeyboardInterrupt):
                exchange.add(names[2], tensor(names[2], 2))
        else:
            exchange.add(names[2], tensor(names[2], 2))
        for name in names[3:] if goes_on else ():
            exchange.add(name, tensor(name, 2))
        if goes_on:
            with pytest.raises(RankMismatchError, match=f"do not send the same tensors: {names[2]}"):
                exchange.reduce()
        else:
            exchange.load_state_dict(state)
        memory = exchange.state_dict()["memory"]
        assert all(torch.equal(memory[name], before) for name, before in state["memory"].items())
        for name in names:
            exchange.add(name, tensor(name, 2))
        assert_replicas_identical(list(exchange.reduce().sums.values()))


@pytest.mark.ranks(2)
def test_an_interrupt_before_a_bucket_departs(world: World) -> None:
    world.run(one_is_interrupted)


@pytest.mark.ranks(2, 3)
def test_an_exchange_that_is_given_up(world: World) -> None:
    world.run(all_give_up, 30)
    world.run(one_gives_up)


@contextmanager
def never_waiting(device: str) -> Iterator[None]:
    """A context in which it is an error to wait for the GPU."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def reduces_on(device: str) -> None:
    """What a reducer makes on the CPU, on ``device``."""
    plain, other = reducer(1.0), reducer(1.0)
    for step in range(3):
        for place, name in enumerate(reversed(SHAPES)):
            plain.add(name, tensor(name, step))
            there = tensor(name, step).to(device)
            # With the last one a bucket departs, and its thread waits for the copy to the host.
            with never_waiting(device if place + 1 < len(SHAPES) else "cpu"):
                other.add(name, there)
        expected, found = plain.reduce().sums, other.reduce().sums
        for name in SHAPES:
            assert found[name].device.type == device
            assert torch.equal(found[name].cpu(), expected[name])
            ours, theirs = plain.residual(name), other.residual(name)
            assert ours is not None
            assert theirs is not None
            assert torch.equal(theirs.cpu(), ours)


def compresses_on(device: str) -> None:
    """Gradients handed over as Horovod does, but for the tickets' sum, which a Horovod without NCCL cannot make."""
    averages: list[dict[str, torch.Tensor]] = []
    for where in ("cpu", device):
        model = torch.nn.ParameterDict(
            {n: torch.nn.Parameter(torch.zeros(s, device=where)) for n, s in SHAPES.items()}
        )
        compression: Any = Compression.topk(k=5, dense_below=0, named_parameters=model.named_parameters())
        for step in range(3):
            contexts = {}
            for place, (name, p) in enumerate(model.named_parameters()):
                p.grad = tensor(name, step).to(where)
                quiet = where if step and place + 1 < len(SHAPES) else "cpu"  # the first time, ranks meet
                # Horovod, whatever it was built for, is asked for nothing here.
                with mock.patch.object(hvd, "cuda_built", return_value=True), never_waiting(quiet):
                    ticket, contexts[name] = compression.compress(p.grad)
                assert ticket.device.type == where
            summed = torch.tensor([1.0, 1 / hvd.size()], device=where)
            averages.append({name: compression.decompress(summed, c).cpu() for name, c in contexts.items()})
    for expected, found in zip(averages[:3], averages[3:], strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_another_device_makes_the_same(world: World) -> None:
    world.run(reduces_on, "cpu")
    world.run(compresses_on, "cpu")


@pytest.mark.gpu
def test_gpu_reduces_to_the_same_and_never_waits(world: World) -> None:
    world.run(reduces_on, "cuda")
    world.run(compresses_on, "cuda")


def test_a_horovod_for_cpus_alone_is_told_from_one_for_gpus() -> None:
    check_horovod_takes(torch.device("cpu"))
    with mock.patch.object(hvd, "cuda_built", return_value=True):
        check_horovod_takes(torch.device("cuda", 1))
    with (
        mock.patch.object(hvd, "cuda_built", return_value=False),
        pytest.raises(RuntimeError, match=r"cuda:1.*--nccl"),
    ):
        check_horovod_takes(torch.device("cuda", 1))


@pytest.mark.parametrize("cap", [0, -1.0, float("nan")])
def test_bad_sizes(cap: float) -> None:
    with pytest.raises(ValueError, match="bucket_cap_mb"):
        Compression.topk(k=1, bucket_cap_mb=cap)
