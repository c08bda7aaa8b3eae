"""``hvd.DistributedOptimizer(compression=Compression.topk(…))`` with an unmodified Horovod."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from horovod.torch.compression import Compressor
from models import ByDefinition, Vectors, assert_replicas_identical, gradient, through_a_file
from torch import Tensor
from world import World

from hvd_compress import AsyncQsparseLocalSGD, Compression, PeerError, QsparseLocalSGD
from hvd_compress import gradient as gradient_path
from hvd_compress.compression import COMPRESSORS
from hvd_compress.memory import DGC, EF21, Residual, TwoSided
from hvd_compress.operators import OneBit, Operator, Sign, TopK
from hvd_compress.schedules import WarmUp
from hvd_compress.wire import Message

SHAPES = {"a": (40,), "b": (7, 11), "c": (3, 5, 4)}


def wrap(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> tuple[Any, Any]:
    """A compressor and a distributed optimizer; ``hvd_…`` options go to Horovod."""
    theirs = {key[4:]: options.pop(key) for key in list(options) if key.startswith("hvd_")}
    ours = {"k": 5, "dense_below": 0, **options}
    compression = Compression.topk(named_parameters=model.named_parameters(), **ours)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    return compression, hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compression, **theirs
    )


def gradients(rank: int, step: int, names: Any = SHAPES, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: gradient(SHAPES[name], rank, step, list(SHAPES).index(name), dtype) for name in names}


def train(model: Vectors, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        model(gradients(hvd.rank(), step)).backward()
        optimizer.step()


# Settings


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qsgd", {"norm": "l2", "memory": "residual"}),
        ("qsgd", {"bits": 2, "bucket": 0, "memory": "ef21"}),
        ("onebit", {"memory": "residual"}),
        ("minmax", {"bits": 1, "memory": "residual"}),
        ("terngrad", {"memory": "residual"}),
        ("onebit", {"memory": "dgc"}),
    ],
)
def test_errors_that_would_come_back_larger_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="would explode: use more bits"):
        Compression.by_name(name, **settings)
    Compression.by_name(name, **{**settings, "memory": "none"})


def test_errors_that_grow_with_the_tensor_are_refused_once_the_parameters_are_known() -> None:
    """QSGD with an l2 norm and 8 bits errs by 0.17 for 2^14 elements and by 2.2 for 2^18."""

    def qsgd(numel: int, **settings: Any) -> Any:
        named = [("w", torch.nn.Parameter(torch.zeros(numel)))]
        settings = {"bits": 8, "norm": "l2", "bucket": 0, "memory": "residual", **settings}
        return Compression.qsgd(named_parameters=named, **settings)

    with pytest.raises(ValueError, match=r"262144 elements.*would explode: use more bits"):
        qsgd(1 << 18)
    for harmless in ({"bucket": 512}, {"norm": "max"}, {"memory": "none"}, {"dense_below": (1 << 18) + 1}):
        qsgd(1 << 18, **harmless)
    qsgd(1 << 14)
    unbound = Compression.qsgd(bits=8, norm="l2", bucket=0, memory="residual")
    weight = torch.nn.Parameter(torch.zeros(1 << 18))
    kinds: list[Any] = [QsparseLocalSGD, AsyncQsparseLocalSGD]
    for kind in kinds:
        with pytest.raises(ValueError, match=r"262144 elements.*would explode: use more bits"):
            kind(torch.optim.SGD([weight], lr=0.1), named_parameters=[("w", weight)], compression=unbound)


def test_errors_of_the_way_back_come_back_too() -> None:
    with pytest.raises(ValueError, match=r"OneBit\(.*would explode: use more bits"):
        Compression.topk(ratio=0.5, memory=lambda: TwoSided(OneBit()))
    with pytest.raises(ValueError, match=r"OneBit\(.*would explode: use more bits"):
        Compression.of(OneBit(), memory=lambda: TwoSided(Sign()))
    Compression.cd_adam()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qsgd", {}),
        ("sign", {}),
        ("minmax", {}),
        ("rotated", {}),
        ("tnqsgd", {"bits": 1}),
        ("qtopk", {"ratio": 0.01}),
    ],
)
def test_error_feedback_with_what_contracts(name: str, settings: dict[str, Any]) -> None:
    Compression.by_name(name, **settings, memory="residual")


# What is sent is what the definition says


def matches_the_definition(divide: bool, **options: Any) -> None:
    model = Vectors(SHAPES)
    _, optimizer = wrap(model, **options)
    definition = ByDefinition(hvd.size(), k=5)
    for step in range(12):
        names = list(SHAPES)
        random.Random(100 * step + hvd.rank()).shuffle(names)  # the backward order differs between ranks
        optimizer.zero_grad()
        model(gradients(hvd.rank(), step, names)).backward()
        optimizer.synchronize()
        for name in SHAPES:
            total = definition.total(name, [gradients(r, step)[name] for r in range(hvd.size())])
            expected = total / hvd.size() if divide else total
            assert torch.equal(model.get_parameter(name).grad, expected)  # type: ignore[arg-type]
        with optimizer.skip_synchronize():
            optimizer.step()


@pytest.mark.ranks(2, 3, 4)
def test_average(world: World) -> None:
    world.run(matches_the_definition, True)


def sums() -> None:
    matches_the_definition(False, hvd_op=hvd.Sum)


def predivided() -> None:
    matches_the_definition(True, hvd_gradient_predivide_factor=3.7)


def grouped() -> None:
    matches_the_definition(True, hvd_groups=2)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("variant", [sums, predivided, grouped])
def test_variants(world: World, variant: Any) -> None:
    world.run(variant)


def accumulates() -> None:
    model = Vectors(SHAPES)
    _, optimizer = wrap(model, hvd_backward_passes_per_step=3)
    definition = ByDefinition(hvd.size(), k=5)
    for step in range(4):
        optimizer.zero_grad()
        for micro in range(3):
            model(gradients(hvd.rank(), 3 * step + micro)).backward()
        optimizer.synchronize()
        for name in SHAPES:
            per_rank = []
            for r in range(hvd.size()):
                parts = [gradients(r, 3 * step + micro)[name] for micro in range(3)]
                per_rank.append(parts[0] + parts[1] + parts[2])
            expected = definition.total(name, per_rank) / hvd.size()
            assert torch.equal(model.get_parameter(name).grad, expected)  # type: ignore[arg-type]
        with optimizer.skip_synchronize():
            optimizer.step()


@pytest.mark.ranks(2)
def test_backward_passes_per_step(world: World) -> None:
    world.run(accumulates)


# Real models, for many steps: replicas stay bit-identical


class Branches(torch.nn.Module):
    """Uses other branches on other ranks and in another order, has a frozen layer and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(20, 30)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(30, 30) for _ in range(4))
        self.frozen = torch.nn.Linear(30, 30).requires_grad_(False)
        self.never = torch.nn.Linear(30, 9)
        self.last = torch.nn.Linear(30, 20)
        self.last.weight = torch.nn.Parameter(self.first.weight.detach().t().contiguous())

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        x = self.first(x).relu()
        for branch in order:
            x = x + self.branches[branch](x).tanh()
        return self.last(self.frozen(x))


def replicas_stay_identical(steps: int, options: dict[str, Any]) -> float:
    torch.manual_seed(hvd.rank())
    model = Branches()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    if "hvd_groups" in options:
        model.never.requires_grad_(False)
    inner = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05, momentum=0.9)
    compression, optimizer = wrap(model, inner, **options)
    choose = random.Random(hvd.rank())
    losses = []
    for step in range(steps):
        # At least one branch is unused on each rank; Horovod's groups, though, must be complete on all ranks.
        order = choose.sample(range(4), 4 if "hvd_groups" in options else choose.randint(0, 3))
        x = torch.randn(8, 20)
        optimizer.zero_grad()
        loss = (model(x, order) - x).square().mean()
        loss.backward()
        if step % 2:
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        losses.append(loss.item())
        assert_replicas_identical(list(model.parameters()))
    assert sum(losses[-10:]) < sum(losses[:10])
    return compression.ledger.exchanges


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize(
    "options",
    [{"ratio": 0.05, "k": None}, {"k": 20, "dense_below": 100}, {"k": 20, "dense_below": 100, "hvd_groups": 3}],
    ids=["everything", "small-dense", "grouped"],
)
def test_replicas_identical_with_unused_reordered_and_frozen_parameters(world: World, options: dict) -> None:
    assert world.run(replicas_stay_identical, 50, options) == [50] * world.ranks


def dense_through_horovod_is_plain_horovod() -> None:
    """``dense_below`` above everything leaves nothing for us, so training is bit for bit Horovod's own."""
    models = [Vectors(SHAPES) for _ in range(2)]
    compression, ours = wrap(models[0], dense_below=1000)
    plain = hvd.DistributedOptimizer(
        torch.optim.SGD(models[1].parameters(), lr=1.0), named_parameters=models[1].named_parameters()
    )
    for step in range(5):
        for model, optimizer in zip(models, (ours, plain), strict=True):
            optimizer.zero_grad()
            model(gradients(hvd.rank(), step)).backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    total = compression.ledger.total
    assert (total.mpi - compression.ledger.shared.mpi, total.horovod, total.ratio > 0.9) == (0, total.dense, True)
    assert compression.ledger.exchanges == 0


@pytest.mark.ranks(2)
def test_dense_below_everything(world: World) -> None:
    world.run(dense_through_horovod_is_plain_horovod)


def ratio_one_is_the_mean() -> None:
    model = Vectors(SHAPES)
    _, optimizer = wrap(model, k=None, ratio=1.0)
    for step in range(3):
        optimizer.zero_grad()
        model(gradients(hvd.rank(), step)).backward()
        optimizer.synchronize()
        for name in SHAPES:
            total = torch.zeros(SHAPES[name])
            for r in range(hvd.size()):
                total += gradients(r, step)[name]
            assert torch.equal(model.get_parameter(name).grad, total / hvd.size())  # type: ignore[arg-type]
        with optimizer.skip_synchronize():
            optimizer.step()


@pytest.mark.ranks(3)
def test_identity_compression_is_the_mean(world: World) -> None:
    world.run(ratio_one_is_the_mean)


# Every compressor by its name, on both paths


def trains_with(name: str, settings: dict[str, Any]) -> dict[str, float]:
    ratios = {}
    for path in ("gradient", "local"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 8))
        inner = torch.optim.SGD(model.parameters(), lr=0.2)
        compression = Compression.by_name(
            name, named_parameters=model.named_parameters(), dense_below=200, **settings
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
        target = torch.randn(64, 8, generator=torch.Generator().manual_seed(7))
        torch.manual_seed(hvd.rank() + 1)
        losses = []
        for _ in range(60):
            x = torch.randn(32, 64)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), (x @ target).argmax(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert_replicas_identical(list(model.parameters()))
        assert sum(losses[-10:]) < 0.85 * sum(losses[:10]), (path, losses)
        ledger = compression.ledger if path == "gradient" else optimizer.ledger
        ratios[path] = ledger.total.ratio
    return ratios


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(
    ("name", "settings", "least"),
    [
        ("topk", {"ratio": 0.05}, 10),
        ("qtopk", {"ratio": 0.05, "bits": 4}, 30),
        ("qtopk", {"k": 400, "bits": 4, "norm": "l2", "scaled": True}, 30),
        ("signtopk", {"ratio": 0.05}, 35),
        ("randk", {"ratio": 0.1}, 8),
        ("randk", {"ratio": 0.1, "shared": True}, 8),
        ("qsgd", {"bits": 4}, 7),
        ("qsgd", {"bits": 4, "memory": "residual"}, 7),
        ("sign", {}, 20),
        ("terngrad", {}, 12),
        ("tnqsgd", {"bits": 3}, 9),
        ("adaptive_topk", {"ratio": 0.05, "exchanges": 30}, 10),
        ("accordion", {"high": 0.1, "low": 0.02, "interval": 5}, 7),
    ],
)
def test_every_compressor_trains_and_saves(world: World, name: str, settings: dict, least: float) -> None:
    for ratios in world.run(trains_with, name, settings):
        assert ratios["gradient"] > least
        assert ratios["local"] > 1.9 * least


# Dtypes, layouts, sparse gradients


def other_dtypes() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for dense_below in (0, 50):
            model = Vectors(SHAPES, dtype)
            _, optimizer = wrap(model, dense_below=dense_below)
            for step in range(3):
                optimizer.zero_grad()
                model(gradients(hvd.rank(), step, dtype=dtype)).backward()
                optimizer.step()
                assert_replicas_identical(list(model.parameters()))
            assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
            assert all(bool(p.any()) for p in model.parameters())


@pytest.mark.ranks(2)
def test_double_half_and_bfloat16(world: World) -> None:
    world.run(other_dtypes)


def keeps_what_half_precision_cannot_hold(options: dict[str, Any], op: Any) -> None:
    """One element of 40 a step: the others' memories grow to five times 65,504."""
    w = torch.nn.Parameter(torch.zeros(40, dtype=torch.float16))
    compression = Compression.topk(k=1, dense_below=0, named_parameters=[("w", w)], **options)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([w], lr=0.0), named_parameters=[("w", w)], compression=compression, op=op
    )
    received, largest = torch.zeros(40, dtype=torch.float64), 0.0
    for _ in range(18):
        optimizer.zero_grad()
        (w * 20_000).sum().backward()
        optimizer.step()
        assert w.grad is not None
        assert bool(torch.isfinite(w.grad).all())
        assert torch.equal(hvd.broadcast(w.grad, root_rank=0), w.grad)
        received += w.grad
        largest = max(largest, w.grad.max().item())
    assert largest == 65_504
    state = compression.state_dict()
    left = hvd.allreduce(state.get("inner", state)["memory"]["w"].double(), op=op)
    given = torch.full((40,), 18 * 20_000.0 * (hvd.size() if op is hvd.Sum else 1), dtype=torch.float64)
    assert torch.equal(received + left, given)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("op", ["Average", "Sum"])
@pytest.mark.parametrize(
    "options", [{}, {"exchange": "hierarchical", "nodes": (0, 1)}, {"exchange": "reduce_scatter"}], ids=str
)
def test_memory_keeps_what_half_precision_cannot_hold(world: World, options: dict[str, Any], op: str) -> None:
    """An inf would be lost for ever: the ranks have sent it, and their gradients were all finite."""
    world.run(keeps_what_half_precision_cannot_hold, options, getattr(hvd, op))


def a_real_overflow_stays_one(scale: float) -> None:
    """Of float16 gradients under a GradScaler, which has to hear of it; memories are as they were."""
    w = torch.nn.Parameter(torch.zeros(40, dtype=torch.float16))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    compression = Compression.topk(k=1, dense_below=0, named_parameters=[("w", w)], grad_scaler=scaler)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([w], lr=0.0), named_parameters=[("w", w)], compression=compression
    )
    for value in (2.0, 2.0):
        optimizer.zero_grad()
        (w * (value * scale)).sum().backward()
        optimizer.synchronize()
    before = compression.state_dict()["memory"]["w"]
    optimizer.zero_grad()
    (w * (math.inf if hvd.rank() == 1 else 2.0 * scale)).sum().backward()
    optimizer.synchronize()
    assert w.grad is not None
    assert not bool(torch.isfinite(w.grad).all())
    assert torch.equal(compression.state_dict()["memory"]["w"], before)


@pytest.mark.ranks(2)
def test_a_real_overflow_of_half_precision_stays_one(world: World) -> None:
    world.run(a_real_overflow_stays_one, 1024.0)


def channels_last() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(3, 8, 3)
    strided = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    results = []
    for model in (plain, strided):
        _, optimizer = wrap(model, dense_below=10)
        x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(hvd.rank()))
        if model is strided:
            x = x.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert_replicas_identical([p.contiguous() for p in model.parameters()])
        results.append([p.detach().contiguous() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.ranks(2)
def test_gradients_that_are_not_contiguous(world: World) -> None:
    world.run(channels_last)


def fused_optimizer(dense_below: int) -> None:
    """torch's fused kernels pair the elements of a parameter and its gradient by address, whatever their strides."""
    model, size = Vectors(SHAPES), hvd.size()
    model.get_parameter("b").data = torch.zeros(11, 7).t()
    model.get_parameter("c").data = torch.zeros(5, 4, 3).permute(2, 0, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    _, optimizer = wrap(model, sgd, k=None, ratio=1.0, dense_below=dense_below)
    expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(4):
        by_rank = [gradients(r, step) for r in range(size)]
        if step % 2:
            del by_rank[-1]["c"]  # not used there: Horovod then makes a gradient, a contiguous one
        optimizer.zero_grad()
        model(by_rank[hvd.rank()]).backward()
        optimizer.step()
        for name, weights in expected.items():
            weights -= sum(g[name] for g in by_rank if name in g) / size
            assert torch.allclose(model.get_parameter(name), weights, atol=1e-6)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dense_below", [0, 1000])
def test_fused_optimizers_of_parameters_that_are_not_contiguous(world: World, dense_below: int) -> None:
    world.run(fused_optimizer, dense_below)


def gradients_in_buffers_that_live_on(buffers: str, exchange: str) -> None:
    """Their owner writes to them after the step, which must not reach the memory."""
    model = Vectors(SHAPES)
    nodes = range(hvd.size()) if exchange == "hierarchical" else None
    _, optimizer = wrap(model, exchange=exchange, nodes=nodes)
    definition = ByDefinition(hvd.size(), k=5)
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    one = torch.zeros(sum(sizes))
    parts = one.split(sizes) if buffers == "one" else [torch.zeros(size) for size in sizes]
    for step in range(5):
        if buffers:
            for (name, shape), part in zip(SHAPES.items(), parts, strict=True):
                model.get_parameter(name).grad = part.zero_().view(shape)
        else:
            model.zero_grad(set_to_none=False)
        model(gradients(hvd.rank(), step)).backward()
        optimizer.synchronize()
        for name in SHAPES:
            total = definition.total(name, [gradients(r, step)[name] for r in range(hvd.size())])
            assert torch.equal(model.get_parameter(name).grad, total / hvd.size())  # type: ignore[arg-type]
        with optimizer.skip_synchronize():
            optimizer.step()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("exchange", ["allgather", "hierarchical"])
@pytest.mark.parametrize("buffers", ["", "one", "one each"])
def test_gradients_in_buffers_that_live_on(world: World, buffers: str, exchange: str) -> None:
    world.run(gradients_in_buffers_that_live_on, buffers, exchange)


class Tables(torch.nn.Module):
    """Their gradients, and that of what ``below`` makes, are one tensor to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.below = torch.nn.Parameter(torch.ones(40))
        self.rows = torch.nn.Parameter(torch.zeros(40))
        self.columns = torch.nn.Parameter(torch.zeros(40))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.below * x)[None] + (self.rows[None] + self.columns[None])).square().sum()


def gradients_of_one_storage(exchange: str, more: dict[str, Any] | None = None) -> None:
    model, alone = Tables(), Tables()
    nodes = range(2) if exchange == "hierarchical" else None
    _, optimizer = wrap(model, k=40, exchange=exchange, nodes=nodes, bucket_cap_mb=1e-9, **more or {})
    for step in range(3):
        optimizer.zero_grad()
        model(gradient((40,), hvd.rank(), step)).backward()
        optimizer.synchronize()
        alone.load_state_dict(model.state_dict())
        alone.zero_grad()
        (sum(alone(gradient((40,), r, step)) for r in range(2)) / 2).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        with optimizer.skip_synchronize():
            optimizer.step()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("exchange", ["allgather", "hierarchical", "reduce_scatter", "auto"])
def test_gradients_of_one_storage(world: World, exchange: str) -> None:
    world.run(gradients_of_one_storage, exchange)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("more", [{"hvd_backward_passes_per_step": 2}, {"hvd_groups": 1}, {"hvd_groups": 3}])
@pytest.mark.parametrize("exchange", ["allgather", "reduce_scatter"])
def test_gradients_of_one_storage_that_come_outside_their_hooks(
    world: World, exchange: str, more: dict[str, Any]
) -> None:
    """In synchronize(), after one pass of two, or in the hook of another parameter of their group."""
    world.run(gradients_of_one_storage, exchange, more)


def gradients_that_others_read(name: str, settings: dict[str, Any]) -> None:
    """They are left as they are, and everything else is the same to the bit."""
    finals = []
    for has_readers in (False, True):
        model = Vectors(SHAPES)
        read: list[tuple[Tensor, Tensor]] = []

        def may_have_readers(
            gradient: Tensor, is_in_its_hook: bool, has: bool = has_readers, read: list[Any] = read
        ) -> bool:
            assert is_in_its_hook
            read.append((gradient.detach(), gradient.clone()))  # of one storage, and not
            return has

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradient_path, "_may_have_readers", may_have_readers)
            compression = Compression.by_name(name, named_parameters=model.named_parameters(), **settings)
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=1.0),
                named_parameters=model.named_parameters(),
                compression=compression,
            )
            train(model, optimizer, 0, 4)
        assert len(read) >= 4
        if has_readers:
            assert all(torch.equal(gradient, before) for gradient, before in read)
        finals.append([*model.parameters()])  # which the memories of all steps but the last have gone into
    assert all(map(torch.equal, *finals))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk", {"k": 5}),
        ("topk", {"k": 70}),  # some whole
        ("topk", {"k": 5, "dense_below": 70, "exchange": "reduce_scatter"}),  # some small
        ("topk", {"k": 5, "memory": "none"}),
        ("topk", {"k": 5, "memory": "dgc"}),
        ("topk", {"k": 5, "memory": "ef21", "dense_below": 70}),
        ("topk", {"k": 5, "exchange": "hierarchical", "nodes": [0, 1]}),
        ("qtopk", {"k": 5, "bits": 4}),
        ("qsgd", {"bits": 4}),
        ("adaptive_topk", {"ratio": 0.1, "exchanges": 4}),
    ],
)
def test_gradients_that_others_read(world: World, name: str, settings: dict[str, Any]) -> None:
    world.run(gradients_that_others_read, name, {"dense_below": 0, **settings})


def test_whether_a_storage_has_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shared = torch.zeros(3), torch.zeros(3)
    others = [shared[:]]
    for is_in_its_hook in (True, False):  # where autograd has one reference more
        assert not gradient_path._may_have_readers(alone, is_in_its_hook)
        assert gradient_path._may_have_readers(shared, is_in_its_hook) != is_in_its_hook
    others.append(shared[:])
    assert gradient_path._may_have_readers(shared, True)
    monkeypatch.setattr(gradient_path, "_use_count", None)  # a torch that cannot tell
    assert gradient_path._may_have_readers(alone, True)


def frozen_later(forgets: bool) -> None:
    model = Vectors(SHAPES)
    compression, optimizer = wrap(model)
    train(model, optimizer, 0, 3)
    frozen = model.get_parameter("a").requires_grad_(False)
    before = frozen.detach().clone()
    if forgets:
        compression.reset_memory()
    train(model, optimizer, 3, 6)
    assert torch.equal(before, frozen) == forgets
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("forgets", [False, True])
def test_a_parameter_that_is_frozen_later(world: World, forgets: bool) -> None:
    world.run(frozen_later, forgets)


class WithEmbedding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 8, sparse=True)
        self.twin = torch.nn.Embedding(50, 8, sparse=True)  # of the same shape, to be told apart
        self.head = torch.nn.Linear(8, 40)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids) + 2 * self.twin(ids + 1))


def sparse_embeddings(as_dense: bool) -> None:
    torch.manual_seed(0)
    model = WithEmbedding()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    compression, optimizer = wrap(model, inner, dense_below=100, k=30, hvd_sparse_as_dense=as_dense)
    reference = copy.deepcopy(model)
    for step in range(5):
        ids = torch.tensor([hvd.rank() + step, 3, 7 + step])
        before = {n: compression.ledger.tensors[n].horovod for n in ("embedding.weight", "twin.weight")}
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        if step == 0:  # with the same parameters everywhere, embeddings must get exactly the mean gradient
            means = [torch.zeros(50, 8), torch.zeros(50, 8)]
            for r in range(hvd.size()):
                reference.zero_grad()
                reference(torch.tensor([r + step, 3, 7 + step])).square().sum().backward()
                for mean, e in zip(means, (reference.embedding, reference.twin), strict=True):
                    mean += e.weight.grad.to_dense() / hvd.size()  # type: ignore[union-attr]
        sparse = [e.weight.grad for e in (model.embedding, model.twin) if e.weight.grad is not None]
        sent = 0 if as_dense else sum(grad._indices().nbytes + grad._values().nbytes for grad in sparse)
        optimizer.synchronize()
        after = {n: compression.ledger.tensors[n].horovod for n in before}
        if as_dense:
            assert all(after[n] - before[n] == 8 for n in before)  # a ticket each; the gradient went compressed
        else:
            assert sum(after.values()) - sum(before.values()) == sent
            if step == 0:
                for mean, e in zip(means, (model.embedding, model.twin), strict=True):
                    assert torch.allclose(e.weight.grad.to_dense(), mean, atol=1e-5)  # type: ignore[union-attr]
        with optimizer.skip_synchronize():
            optimizer.step()
        assert_replicas_identical(list(model.parameters()))
    optimizer.zero_grad()
    (model(torch.tensor([1, 2])).sum() * torch.nan).backward()
    optimizer.step()
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("as_dense", [False, True])
def test_sparse_gradients_beside_dense_ones(world: World, as_dense: bool) -> None:
    world.run(sparse_embeddings, as_dense)


class TwoTables(torch.nn.Module):
    """Users and items, whose tables are of one size; a hinge loss, which is 0 where a margin is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.user = torch.nn.Embedding(40, 8, sparse=True)
        self.item = torch.nn.Embedding(40, 8, sparse=True)

    def forward(self, users: Tensor, items: Tensor, margin: float) -> Tensor:
        return torch.relu(margin - (self.user(users) * self.item(items)).sum(1)).sum()


def equal_sparse_gradients(passes: int) -> None:
    """Horovod hands over a dense copy of a gradient that is zero, as the other table's is on this rank only."""
    torch.manual_seed(0)
    models = [TwoTables(), TwoTables()]
    models[1].load_state_dict(models[0].state_dict())
    settings = {"hvd_sparse_as_dense": True, "hvd_backward_passes_per_step": passes}
    optimizers = [
        wrap(models[0], torch.optim.SGD(models[0].parameters(), lr=0.1), k=320, **settings)[1],
        hvd.DistributedOptimizer(
            torch.optim.SGD(models[1].parameters(), lr=0.1),
            named_parameters=[(f"plain.{name}", p) for name, p in models[1].named_parameters()],
            sparse_as_dense=True,
            backward_passes_per_step=passes,
        ),
    ]
    generator = torch.Generator().manual_seed(hvd.rank())
    for step in range(4):
        margin = -100.0 if step % 2 and hvd.rank() == 0 else 5.0
        pairs = [torch.randint(40, (2, 6), generator=generator) for _ in range(passes)]
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad(set_to_none=False)  # so that both gradients are there as the first one is handed over
            for users, items in pairs:
                model(users, items, margin).backward()
            optimizer.step()
    assert_replicas_identical(list(models[0].parameters()))
    for ours, plain in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(ours, plain, atol=1e-6)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("passes", [1, 2])
def test_equal_sparse_gradients_are_told_apart(world: World, passes: int) -> None:
    world.run(equal_sparse_gradients, passes)


def empty_and_scalar() -> None:
    model = Vectors({"none": (0,), "one": (), "many": (30,)})
    _, optimizer = wrap(model, k=3)
    for _ in range(3):
        optimizer.zero_grad()
        model({"none": torch.empty(0), "one": torch.tensor(2.0), "many": torch.zeros(30)}).backward()
        optimizer.step()
    assert model.get_parameter("one").item() == -6.0
    assert not model.get_parameter("many").any()


@pytest.mark.ranks(2)
def test_empty_scalar_and_all_zero_gradients(world: World) -> None:
    world.run(empty_and_scalar)


# inf and NaN


def overflow_elsewhere(where: str) -> None:
    """An overflow in what Horovod reduces itself makes a GradScaler skip the step, so no memory may change either."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"large": torch.nn.Linear(30, 30), "sparse": torch.nn.Embedding(20, 30, sparse=True)})
    compression, optimizer = wrap(model, dense_below=100)

    def backward(step: int, bad: bool) -> None:
        optimizer.zero_grad()
        ids = torch.tensor([step % 20, 3])
        generator = torch.Generator().manual_seed(100 * step + hvd.rank())
        scale = torch.randn(30, generator=generator)
        loss = ((model["large"](model["sparse"](ids)) - 1) * scale).square().mean()
        if bad and hvd.rank() == 0:  # of these gradients only
            spoilt = model["sparse"](torch.tensor([7])) if where == "sparse.weight" else model.get_parameter(where)
            loss = loss + spoilt.sum() * torch.inf
        loss.backward()
        optimizer.synchronize()

    for step in range(4):
        backward(step, bad=False)
    before = compression.state_dict()["memory"]
    assert before.keys() == {"large.weight"}
    backward(4, bad=True)
    gradient_there = model.get_parameter(where).grad
    assert gradient_there is not None
    values = gradient_there._values() if gradient_there.is_sparse else gradient_there
    assert not torch.isfinite(values).all()
    after = compression.state_dict()["memory"]
    assert torch.equal(before["large.weight"], after["large.weight"])
    backward(5, bad=False)
    assert not torch.equal(before["large.weight"], compression.state_dict()["memory"]["large.weight"])


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("where", ["large.bias", "sparse.weight"])
def test_an_overflow_in_what_is_not_compressed(world: World, where: str) -> None:
    world.run(overflow_elsewhere, where)


def overflow(bad: float, where: str) -> None:
    """One rank's overflow reaches the optimizer on all ranks, and leaves all memories as they were."""
    model = Vectors(SHAPES)
    compression, optimizer = wrap(model)
    train(model, optimizer, 0, 3)
    before = {n: m.clone() for n, m in compression.state_dict()["memory"].items()}
    assert any(m.any() for m in before.values())
    poisoned = gradients(hvd.rank(), 3)
    if hvd.rank() == hvd.size() - 1:
        poisoned[where].view(-1)[-1] = bad
    optimizer.zero_grad()
    model(poisoned).backward()
    optimizer.synchronize()
    gradient_there = model.get_parameter(where).grad
    assert gradient_there is not None
    assert not torch.isfinite(gradient_there).all()
    assert all(torch.equal(before[n], m) for n, m in compression.state_dict()["memory"].items())
    with optimizer.skip_synchronize():
        pass  # as a GradScaler does: the step is left out
    optimizer.zero_grad()
    model(gradients(hvd.rank(), 4)).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_overflow_on_one_rank(world: World, bad: float) -> None:
    world.run(overflow, bad, "b")


def under_a_grad_scaler(dtype: torch.dtype) -> None:
    """Scales are powers of two, so training with a scale that changes is, to the bit, training without one."""
    results = []
    for scaled in (False, True):
        model = Vectors(SHAPES, dtype)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3, enabled=scaled)
        compression, optimizer = wrap(model, grad_scaler=scaler)
        scales = []
        for step in range(10):
            optimizer.zero_grad()
            overflow = step == 5
            loss = model(gradients(hvd.rank(), step, dtype=dtype))
            if overflow and not scaled:
                continue  # what a scaler does with such a step
            scaler.scale(loss * math.inf if overflow and hvd.rank() == 0 else loss).backward()
            optimizer.synchronize()
            scales.append(scaler.get_scale())
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
        assert set(scales) == ({64.0, 128.0} if scaled else {1.0})
        results.append(([p.detach() for p in model.parameters()], compression.state_dict()["memory"]))
        assert_replicas_identical(list(model.parameters()))
    (plain, plain_memory), (scaled_parameters, memory) = results
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled_parameters, strict=True))
    assert all(torch.equal(m, memory[name]) for name, m in plain_memory.items())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_stays_right_when_a_grad_scaler_changes_its_scale(world: World, dtype: torch.dtype) -> None:
    world.run(under_a_grad_scaler, dtype)


# Process sets


def in_a_process_set() -> None:
    pair = hvd.add_process_set([0, 2])
    try:
        model = Vectors(SHAPES)
        if hvd.rank() in (0, 2):
            _, optimizer = wrap(model, hvd_process_set=pair)
            with pytest.raises(ValueError, match="process_set=…"):  # it cannot be known, so it must be said
                model(gradients(hvd.rank(), 0)).backward()
        hvd.barrier()
        model = Vectors(SHAPES)
        _, optimizer = wrap(model, hvd_process_set=pair, process_set=pair)
        definition = ByDefinition(hvd.size(), k=5)
        for step in range(4):
            optimizer.zero_grad()
            model(gradients(hvd.rank(), step)).backward()
            optimizer.synchronize()
            for name in SHAPES:
                grad = model.get_parameter(name).grad
                assert grad is not None
                if hvd.rank() == 1:
                    assert torch.equal(grad, gradients(1, step)[name])  # on its own
                    continue
                total = definition.sent(0, name, gradients(0, step)[name]) + definition.sent(
                    2, name, gradients(2, step)[name]
                )
                assert torch.equal(grad, total / 2)
            with optimizer.skip_synchronize():
                optimizer.step()
    finally:
        hvd.remove_process_set(pair)


@pytest.mark.ranks(3)
def test_process_set(world: World) -> None:
    world.run(in_a_process_set)


# State


def resumes_bit_for_bit(steps: int) -> None:
    straight = Vectors(SHAPES)
    whole, optimizer = wrap(straight)
    train(straight, optimizer, 0, 2 * steps)

    model = Vectors(SHAPES)
    compression, optimizer = wrap(model)
    train(model, optimizer, 0, steps)
    saved = through_a_file((compression.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, steps, steps + 2)  # what comes after the checkpoint is lost in the crash

    model = Vectors(SHAPES)
    compression, optimizer = wrap(model)
    compression.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    train(model, optimizer, steps, 2 * steps)
    for a, b in zip(straight.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(m, compression.state_dict()["memory"][n]) for n, m in whole.state_dict()["memory"].items())
    assert compression.ledger.exchanges == whole.ledger.exchanges == 2 * steps
    without_handshake = [c.ledger.total.sent - c.ledger.shared.mpi for c in (whole, compression)]
    assert without_handshake[0] == without_handshake[1]


@pytest.mark.ranks(2, 3)
def test_resume(world: World) -> None:
    world.run(resumes_bit_for_bit, 5)


def bad_states() -> None:
    model = Vectors(SHAPES)
    compression, optimizer = wrap(model)
    model(gradients(hvd.rank(), 0)).backward()
    with pytest.raises(RuntimeError, match=r"after step\(\)"):
        compression.state_dict()
    optimizer.step()
    state = compression.state_dict()
    other = Compression.topk(k=5, named_parameters=Vectors({"a": (41,)}).named_parameters())
    with pytest.raises(ValueError, match="41"):
        other.load_state_dict({**state, "memory": {"a": state["memory"]["a"]}})
    with pytest.raises(ValueError, match="'b'"):
        other.load_state_dict({**state, "memory": {"b": state["memory"]["b"]}})
    with pytest.raises(ValueError, match="format"):
        other.load_state_dict({"state": {}, "param_groups": []})
    with pytest.raises(ValueError, match="rank"):
        compression.load_state_dict({**state, "rank": hvd.rank() + 1})
    with pytest.raises(ValueError, match=f"of {hvd.size() + 1}"):
        compression.load_state_dict({**state, "size": hvd.size() + 1})


@pytest.mark.ranks(2)
def test_states_that_do_not_fit(world: World) -> None:
    world.run(bad_states)


def test_a_state_of_another_kind_of_memory_is_refused_and_heals_nothing() -> None:
    w = torch.nn.Parameter(torch.zeros(40, 50))

    def make(memory: Any) -> Any:
        return Compression.topk(k=3, memory=memory, named_parameters=[("w", w)])

    saved = make(DGC).state_dict() | {"memory": {"w": torch.ones(2, 2000)}}  # velocity and accumulated
    for other in (EF21, Residual, lambda: TwoSided(TopK(k=3))):
        compression = make(other)
        compression._reducer._spoilt = RuntimeError("this rank differs")
        with pytest.raises(ValueError, match="memory like"):
            compression.load_state_dict(saved)
        with pytest.raises(RuntimeError, match="this rank differs"):
            compression.state_dict()
    make(DGC).load_state_dict(saved)


class Whole(Operator):
    """Sends what it is given, in its own storage."""

    draws = False

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        return Message.dense(x)


def sends_all(memory: Any) -> None:
    model = torch.nn.Linear(40, 50, bias=False)
    compression = Compression.of(Whole(), memory=memory, named_parameters=model.named_parameters())
    for step in range(3):
        model.weight.grad = torch.full((50, 40), 1.0 + hvd.rank() + step)
        _, context = compression.compress(model.weight.grad)
        mean = 1 + step + (hvd.size() - 1) / 2
        assert torch.equal(
            compression.decompress(torch.tensor([1.0, 1 / hvd.size()]), context), torch.full((50, 40), mean)
        )


@pytest.mark.parametrize("memory", ["residual", "none"])
def test_an_operator_may_send_the_storage_that_it_was_given(world: World, memory: str) -> None:
    world.run(sends_all, memory)


def overflows_without_an_exchange() -> None:
    """Two parts of a model with an optimizer each; the first has no tensor that is compressed."""
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 2), "body": torch.nn.Linear(60, 60)})
    compression = Compression.topk(k=30, named_parameters=model.named_parameters())
    head, body = (
        hvd.DistributedOptimizer(
            torch.optim.SGD(model[part].parameters(), lr=0.1),
            named_parameters=[(f"{part}.{n}", p) for n, p in model[part].named_parameters()],
            compression=compression,
        )
        for part in ("head", "body")
    )

    def step(part: str, optimizer: Any, scale: float) -> None:
        optimizer.zero_grad()
        (scale * model[part](torch.ones(1, 4 if part == "head" else 60))).sum().backward()
        optimizer.synchronize()

    step("head", head, math.inf)
    for _ in range(3):
        step("head", head, 1.0)
    assert len(compression._dense_finite) == 2  # of one step
    step("body", body, 1.0)
    assert compression.state_dict()["memory"]["body.weight"].any()


def test_an_overflow_spoils_no_later_step(world: World) -> None:
    world.run(overflows_without_an_exchange)


def clipped_too_early(set_to_none: bool) -> None:
    """Between backward() and synchronize() gradients are the compressor's: what was not sent would be scaled away."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.ReLU(), torch.nn.Linear(40, 30))
    compression, optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.01), k=20)

    def backward(step: int) -> None:
        model.zero_grad(set_to_none=set_to_none)
        x = torch.randn(8, 30, generator=torch.Generator().manual_seed(100 * step + hvd.rank()))
        (model(x) - x).square().sum().backward()

    def step_rightly(step: int) -> None:
        backward(step)
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            optimizer.step()

    step_rightly(0)
    step_rightly(1)
    before = compression.state_dict()["memory"]
    backward(2)
    if hvd.rank() == 1:
        torch.nn.utils.clip_grad_norm_([model.get_parameter("2.weight")], 1.0)
    with pytest.raises(PeerError if hvd.rank() == 0 else RuntimeError, match=r"2\.weight were changed.*then clip"):
        optimizer.step()
    after = compression.state_dict()["memory"]
    assert all(torch.equal(after[name], memory) for name, memory in before.items())
    hvd.barrier()  # Horovod may still be at the tickets of this step
    optimizer.load_state_dict(optimizer.state_dict())  # so that it forgets the step
    step_rightly(2)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_changed_on_their_way(world: World, set_to_none: bool) -> None:
    world.run(clipped_too_early, set_to_none)


def replaced_or_unscaled(what: str, given: bool) -> None:
    """Neither of which raises torch's count of changes."""
    model = Vectors(SHAPES)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    compression, optimizer = wrap(model, grad_scaler=scaler if given else None)
    for step in range(3):
        before = compression.state_dict()["memory"]
        optimizer.zero_grad()
        scaler.scale(model(gradients(hvd.rank(), step))).backward()
        if step < 2:
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
        elif what == "unscaled":
            with pytest.raises(RuntimeError, match=r"scaler\.step\(optimizer\), within optimizer\.skip_synchronize"):
                scaler.step(optimizer)
        else:
            p = model.get_parameter("a")
            p.grad = torch.zeros_like(p)
            with pytest.raises(RuntimeError, match="the gradients of a were changed"):
                optimizer.synchronize()
    after = compression.state_dict()["memory"]
    assert all(torch.equal(after[name], memory) for name, memory in before.items())


def under_a_scaler_that_is_disabled() -> None:
    finals = []
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        model = Vectors(SHAPES)
        _, optimizer = wrap(model, grad_scaler=scaler)
        for step in range(3):
            optimizer.zero_grad()
            model(gradients(hvd.rank(), step)).backward()
            optimizer.step() if scaler is None else scaler.step(optimizer)
        finals.append([*model.parameters()])
    assert all(map(torch.equal, *finals))


def test_a_scaler_that_is_disabled_changes_nothing(world: World) -> None:
    world.run(under_a_scaler_that_is_disabled)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("what", ["replaced", "unscaled"])
def test_gradients_that_are_changed_unseen(world: World, what: str, given: bool) -> None:
    world.run(replaced_or_unscaled, what, given)


# What cannot work says so


def refuses_adasum() -> None:
    model = Vectors(SHAPES)
    _, _optimizer = wrap(model, hvd_op=hvd.Adasum)
    with pytest.raises(NotImplementedError, match=r"op=hvd.Average"):
        model(gradients(hvd.rank(), 0)).backward()


def refuses_other_operations() -> None:
    model = Vectors(SHAPES)
    _, optimizer = wrap(model, hvd_op=hvd.Min)
    model(gradients(hvd.rank(), 0)).backward()
    with pytest.raises(NotImplementedError, match=r"op=hvd.Average and op=hvd.Sum"):
        optimizer.step()


def refuses_a_rank_that_has_joined() -> None:
    model = Vectors(SHAPES)
    compression, _ = wrap(model)
    p = model.get_parameter("a")
    p.grad = torch.ones_like(p)
    _, context = compression.compress(p.grad)
    with pytest.raises(NotImplementedError, match=r"hvd\.join"):
        compression.decompress(torch.tensor([1 / hvd.size(), 0.0]), context)  # the average where the others have


def refuses_unbound() -> None:
    model = Vectors(SHAPES)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        named_parameters=model.named_parameters(),
        compression=Compression.topk(k=5),
    )
    with pytest.raises(RuntimeError, match=r"named_parameters=model.named_parameters\(\)"):
        model(gradients(hvd.rank(), 0)).backward()
    del optimizer


def unbound_with_sparse_gradients_only() -> None:
    """Horovod never shows them to a compressor, so it need not know their names."""
    model = torch.nn.Embedding(50, 8, sparse=True)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        named_parameters=model.named_parameters(),
        compression=Compression.topk(k=5),
    )
    model(torch.tensor([hvd.rank()])).sum().backward()
    optimizer.step()


def refuses_strangers() -> None:
    model, other = Vectors(SHAPES), Vectors(SHAPES)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        named_parameters=model.named_parameters(),
        compression=Compression.topk(k=5, named_parameters=other.named_parameters()),
    )
    with pytest.raises(RuntimeError, match="belongs to none of the 3 parameters"):
        model(gradients(hvd.rank(), 0)).backward()
    del optimizer


def refuses_a_compressor_that_was_not_made() -> None:
    """Horovod's own are given as they are, ``Compression.fp16``."""
    model = Vectors(SHAPES)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        named_parameters=model.named_parameters(),
        compression=Compression.topk,
    )
    with pytest.raises(TypeError, match=r"Compression\.topk makes compressors.*Compression\.topk\(…\)"):
        model(gradients(hvd.rank(), 0)).backward()
    del optimizer


def refuses_what_is_no_gradient() -> None:
    compression, _optimizer = wrap(Vectors(SHAPES))
    for compressor in (compression, Compression.topk(k=5)):
        with pytest.raises(RuntimeError, match=r"hvd\.allreduce\) take Compression\.none or \.fp16"):
            hvd.allreduce(torch.ones(40), compression=compressor)


def refuses_sparse_in_groups() -> None:
    model = WithEmbedding()
    _, optimizer = wrap(model, hvd_groups=1)
    with pytest.raises(NotImplementedError, match="sparse gradient in a group"):
        model(torch.tensor([1, 2])).sum().backward()
    del optimizer


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "variant",
    [
        refuses_adasum,
        refuses_other_operations,
        refuses_a_rank_that_has_joined,
        refuses_unbound,
        unbound_with_sparse_gradients_only,
        refuses_strangers,
        refuses_a_compressor_that_was_not_made,
        refuses_what_is_no_gradient,
        refuses_sparse_in_groups,
    ],
)
def test_what_cannot_work_says_so(world: World, variant: Any) -> None:
    world.run(variant)


def test_it_is_a_compressor_of_horovods() -> None:
    assert isinstance(Compression.topk(k=1), Compressor)
    assert Compression.none is hvd.Compression.none
    assert Compression.fp16 is hvd.Compression.fp16


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"ratio": 0}, ValueError, "ratio"),
        ({"ratio": 1.01}, ValueError, "ratio"),
        ({"k": 0}, ValueError, "k must"),
        ({"k": 1, "memory": "residul"}, ValueError, "did you mean 'residual'"),
        ({"k": 1, "dense_below": -1}, ValueError, "dense_below"),
        ({"k": 1, "timeout": 0}, ValueError, "timeout"),
        ({"k": 1, "seed": 2.5}, ValueError, "seed"),
        ({"k": 1, "seed": 2**63}, ValueError, "seed"),
        ({"k": 1, "bogus": 1}, TypeError, "bogus"),
        ({"k": 1, "memory": 3}, TypeError, "memory must be one of 'none', 'residual', .* got 3"),
        ({"k": 1, "memory": Residual()}, TypeError, r"a function that makes a memory.* got Residual\("),
        ({"k": 1, "memory": dict}, TypeError, r"memory must .* got <class 'dict'>"),
        ({"k": 1, "process_set": 3}, TypeError, r"process_set must be hvd\.ProcessSet.* got 3"),
        ({"k": 1, "process_set": [0, 1]}, TypeError, r"process_set must be hvd\.ProcessSet.* got \[0, 1\]"),
        ({"k": 1, "communicator": 3}, TypeError, "communicator must be mpi4py's"),
        ({"k": 1, "grad_scaler": True}, TypeError, r"grad_scaler must be a torch\.amp\.GradScaler"),
        ({"k": 1, "exchange": 3}, ValueError, "exchange must be one of 'allgather'"),
        ({"k": 1, "nodes": 3}, TypeError, "nodes must be an integer for each rank"),
        ({"k": 1, "nodes": iter([0, 1])}, TypeError, "nodes must be an integer for each rank"),
        ({"k": 1, "named_parameters": torch.nn.Linear(2, 2)}, TypeError, r"pairs .*: model\.named_parameters\(\)"),
        ({"k": 1, "named_parameters": 3}, TypeError, "pairs"),
        ({"k": 1, "named_parameters": enumerate([torch.zeros(1)])}, TypeError, "pairs"),
        ({"k": 1, "named_parameters": []}, ValueError, "empty"),
        ({"k": 1, "named_parameters": [torch.zeros(1)]}, TypeError, "pairs"),
        ({"k": 1, "named_parameters": [("w", torch.zeros(1)), ("w", torch.zeros(2))]}, ValueError, "unique"),
    ],
)
def test_bad_settings(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Compression.topk(**arguments)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("topk", {"rato": 0.1}, "topk.*'rato'; did you mean 'ratio'"),
        ("topk", {"k": 1, "densebelow": 0}, "'densebelow'; did you mean 'dense_below'"),
        ("adaptive_topk", {"rato": 0.1, "exchanges": 3}, "'rato'; did you mean 'ratio'"),
        ("threshold", {"thresh": 0.1}, "'thresh'; did you mean 'threshold'"),
        ("qsgd", {"bits": 4, "zzz": 1}, r"qsgd\(\) got an unexpected keyword argument 'zzz'$"),
        ("dgc", {"warm_up": 10}, "'warm_up'; did you mean 'warmup'"),
        ("cd_adam", {"operatr": None}, "'operatr'; did you mean 'operator'"),
        ("of", {"operator": TopK(k=1), "sed": 3}, "'sed'; did you mean 'seed'"),
    ],
)
def test_a_misspelt_setting_is_named(name: str, settings: dict[str, Any], text: str) -> None:
    """Before anything is said of others that are missing for that reason."""
    with pytest.raises(TypeError, match=text):
        getattr(Compression, name)(**settings)


@pytest.mark.parametrize("wrong", ["0.5", None, True, torch.tensor(0.5)])
@pytest.mark.parametrize(
    ("name", "settings", "number"),
    [
        ("topk", {"k": 1}, "bucket_cap_mb"),
        ("topk", {"k": 1}, "timeout"),
        ("topk", {}, "ratio"),
        ("adaptive_topk", {"exchanges": 5}, "ratio"),
        ("adaptive_topk", {"ratio": 0.1, "exchanges": 5}, "smallest"),
        ("adaptive_topk", {"ratio": 0.1, "exchanges": 5}, "exponent"),
        ("accordion", {"low": 0.1}, "high"),
        ("accordion", {"high": 0.1}, "low"),
        ("hard_threshold", {"ratio": 0.1, "exchanges": 5}, "largest"),
        ("hard_threshold", {"ratio": 0.1, "exchanges": 5}, "rate"),
        ("dgc", {}, "ratio"),
        ("dgc", {}, "momentum"),
        ("dgc", {}, "clip"),
        ("ef21", {"k": 1}, "momentum"),
        ("cat", {}, "overhead"),
        ("signtopk", {"k": 1}, "m"),
        ("terngrad", {}, "clip"),
        ("threshold", {}, "threshold"),
    ],
)
def test_what_is_not_a_number_is_named(name: str, settings: dict[str, Any], number: str, wrong: Any) -> None:
    if wrong is None and (number == "clip" or (name == "topk" and number == "ratio")):
        return  # which means something else
    with pytest.raises(TypeError, match=f"^{number} must be a number, got "):
        Compression.by_name(name, **settings, **{number: wrong})


@pytest.mark.parametrize("wrong", ["topk", TopK, None, lambda x: x])
def test_what_is_not_an_operator_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"operator must be an Operator or a Plan.*TopK\(ratio=0\.01\).*, got "):
        Compression.of(wrong)


def test_a_plan_does_not_compress_the_way_back() -> None:
    with pytest.raises(TypeError, match=r"way back operator must be an Operator.*got WarmUp"):
        Compression.cd_adam(operator=WarmUp(0.1, 10))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_knows_its_settings(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}.*'no_such_setting'"):
        Compression.by_name(name, no_such_setting=1)


def test_bad_settings_of_a_memory_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="momentum"):
        Compression.dgc(ratio=0.1, momentum=-1)


def test_by_name() -> None:
    assert Compression.by_name("none") is hvd.Compression.none
    assert Compression.by_name("topk", k=3).settings.operator.k == 3  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="did you mean 'topk'"):
        Compression.by_name("topkk")
    with pytest.raises(ValueError, match="unknown compressor 'TopK'; did you mean 'topk'"):
        Compression.by_name("TopK")
    with pytest.raises(ValueError, match=r"unknown compressor 3\. Known are"):
        Compression.by_name(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes no settings"):
        Compression.by_name("none", k=3)
