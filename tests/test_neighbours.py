"""DEF, DQGAN, outer optimizers, CD-Adam's optimizer and forgetful memories: each by its definition."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from models import Vectors, assert_replicas_identical, gradient, through_a_file
from torch import Tensor
from world import World

from hvd_compress import DQGAN, CDAdam, Compression, QsparseLocalSGD
from hvd_compress.memory import EF21, Residual

Numbers = list[Fraction]

SLOPES = [[[3, 2], [1, 1], [0, -2], [5, 4], [1, 0], [0, 0], [-1, 3], [2, 2]],
          [[-1, 4], [2, -2], [1, 1], [0, 3], [-4, 1], [2, 0], [1, -1], [0, 6]]]  # fmt: skip


def top_1(p: Numbers) -> Numbers:
    """The lower index wins among equals."""
    kept = 0 if abs(p[0]) >= abs(p[1]) else 1
    return [value if i == kept else Fraction(0) for i, value in enumerate(p)]


def plus(a: Numbers, b: Numbers, factor: Fraction | int = 1) -> Numbers:
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def mean(vectors: list[Numbers]) -> Numbers:
    return [sum(column, Fraction(0)) / len(vectors) for column in zip(*vectors, strict=True)]


def fractions(tensor: Tensor) -> Numbers:
    return [Fraction(value) for value in tensor.tolist()]


def step_along(model: Vectors, optimizer: Any, slope: list[int]) -> None:
    optimizer.zero_grad()
    model({"w": torch.tensor(slope, dtype=torch.float32)}).backward()
    optimizer.step()


def top_1_compression() -> Any:
    return Compression.topk(k=1, dense_below=0)


# DEF


def def_in_exact_fractions(detach: float, weight_decay: float) -> None:
    """DEF as published: e in the units of gradients, rescaled when the learning rate changes; ours is in parameters'.

    The learning rate is halved in mid-run. All numbers are dyadic and stay short enough for float64.
    """
    size, lam, wd, mu = hvd.size(), Fraction(detach), Fraction(weight_decay), Fraction(1, 2)
    model = Vectors({"w": (2,)}, torch.float64)
    inner = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5, weight_decay=weight_decay)
    optimizer = QsparseLocalSGD(
        inner,
        named_parameters=model.named_parameters(),
        compression=top_1_compression(),
        look_ahead=detach,
    )
    zero = [Fraction(0), Fraction(0)]
    x, y, b, e = zero, [zero] * size, [zero] * size, [zero] * size
    previous = eta = Fraction(1, 2)
    for t in range(8):
        if t == 4:
            eta = inner.param_groups[0]["lr"] = Fraction(1, 4)
            inner.param_groups[0]["lr"] = 0.25
        optimizer.zero_grad()
        model({"w": torch.tensor(SLOPES[hvd.rank()][t], dtype=torch.float64)}).backward()
        optimizer.step()
        sent = []
        for r in range(size):
            g = plus([Fraction(v) for v in SLOPES[r][t]], y[r], wd)
            b[r] = plus(g, b[r], mu)
            delta = plus(b[r], e[r], previous / eta)
            sent.append(top_1(delta))
            e[r] = plus(delta, sent[r], -1)
        x = plus(x, mean(sent), -eta)
        y = [plus(x, e[r], -lam * eta) for r in range(size)]
        previous = eta
        assert fractions(model.get_parameter("w")) == y[hvd.rank()]
        with optimizer.evaluation():
            assert fractions(model.get_parameter("w")) == x
            assert_replicas_identical(list(model.parameters()))
        assert fractions(model.get_parameter("w")) == y[hvd.rank()]


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("detach", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_def_in_exact_fractions(world: World, detach: float, weight_decay: float) -> None:
    world.run(def_in_exact_fractions, detach, weight_decay)


def look_ahead_without_compression() -> None:
    """With nothing left to send, looking ahead changes nothing, whatever λ is."""
    ends = []
    for look_ahead in (0.0, 0.7):
        model = Vectors({"w": (30,)})
        optimizer = QsparseLocalSGD(
            torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
            named_parameters=model.named_parameters(),
            compression=Compression.topk(ratio=1.0),
            sync_every=3,
            look_ahead=look_ahead,
        )
        for step in range(7):
            optimizer.zero_grad()
            model({"w": gradient((30,), hvd.rank(), step)}).backward()
            optimizer.step()
        ends.append(model.get_parameter("w").detach().clone())
    assert torch.equal(*ends)


@pytest.mark.ranks(2)
def test_look_ahead_without_compression(world: World) -> None:
    world.run(look_ahead_without_compression)


def test_look_ahead_needs_a_residual() -> None:
    model = Vectors({"w": (30,)})
    for memory in ("dgc", "ef21"):
        with pytest.raises(TypeError, match="residual"):
            QsparseLocalSGD(
                torch.optim.SGD(model.parameters(), lr=0.5),
                named_parameters=model.named_parameters(),
                compression=Compression.topk(k=2, memory=memory),
                look_ahead=0.3,
            )
    with pytest.raises(ValueError, match="look_ahead"):
        QsparseLocalSGD(
            torch.optim.SGD(model.parameters(), lr=0.5), named_parameters=model.named_parameters(), look_ahead=1.5
        )


# DQGAN on the game min_x max_y xy, whose solution is (0, 0)


def play(optimizer_of: Any, steps: int) -> list[np.ndarray]:
    """Where all ranks are after each step, from (1, 1); the ranks' gradients differ but average to the game's."""
    model = torch.nn.Module()
    model.register_parameter("w", torch.nn.Parameter(torch.ones(2, dtype=torch.float64)))
    optimizer = optimizer_of(model)
    spread = 0.5 * (hvd.rank() - (hvd.size() - 1) / 2)
    visited = []
    for _ in range(steps):
        x, y = model.get_parameter("w").tolist()
        model.get_parameter("w").grad = torch.tensor([y + spread, -x - spread], dtype=torch.float64)
        optimizer.step()
        with optimizer.evaluation():
            visited.append(model.get_parameter("w").detach().numpy().copy())
    return visited


def plain_play(eta: float, steps: int) -> list[np.ndarray]:
    def of(model: torch.nn.Module) -> Any:
        return QsparseLocalSGD(torch.optim.SGD(model.parameters(), lr=eta), named_parameters=model.named_parameters())

    return play(of, steps)


def dqgan_play(eta: float, steps: int, compression: Any) -> list[np.ndarray]:
    def of(model: torch.nn.Module) -> Any:
        return DQGAN(
            torch.optim.SGD(model.parameters(), lr=eta),
            named_parameters=model.named_parameters(),
            compression=compression or Compression.topk(ratio=1.0, dense_below=0),
        )

    return play(of, steps)


def plain_descent_spirals_out() -> None:
    """‖w‖² grows by 1 + η² in every step, exactly."""
    for t, w in enumerate(plain_play(0.25, 20), start=1):
        assert math.isclose(w @ w, 2 * (1 + 0.25**2) ** t, rel_tol=1e-12)


def optimistic_descent_by_recursion(eta: float) -> None:
    """Without compression: y_t = x_{t−1} − η A y_{t−1} and x_t = x_{t−1} − η A y_t, from A y_0 = 0.

    x shrinks as the spectral radius of that recursion says: below 1 if and only if η < 1/√3.
    """
    game = np.array([[0.0, 1.0], [-1.0, 0.0]])
    x, last = np.ones(2), np.zeros(2)
    visited = dqgan_play(eta, 200, None)
    for w in visited:
        y = x - last
        last = eta * game @ y
        x = x - last
        np.testing.assert_allclose(w, x, rtol=1e-9, atol=1e-12)
    block = np.block([[np.eye(2) - eta * game, eta**2 * game @ game], [np.eye(2), -eta * game]])
    radius = max(abs(np.linalg.eigvals(block)))
    assert math.isclose(radius, {0.1: 0.994936, 0.3: 0.948683, 0.5: 2**-0.5, 0.58: 1.006861}[eta], rel_tol=1e-5)
    late = [np.linalg.norm(w) for w in visited[100:200]]
    rate = np.polyfit(np.arange(100), np.log(late), 1)[0] if min(late) > 1e-12 else math.log(radius)
    assert math.isclose(rate, math.log(radius), abs_tol=2e-3)


def compressed_game_converges() -> None:
    """Top-1 of two. Ranks that pull to opposite sides do so without end, which leaves a ball of that size times η."""
    (*_, last) = dqgan_play(0.2, 300, top_1_compression())
    assert np.linalg.norm(last) < (0.01 if hvd.size() == 1 else 0.05)


@pytest.mark.ranks(1, 2)
def test_plain_descent_spirals_out_of_the_bilinear_game(world: World) -> None:
    world.run(plain_descent_spirals_out)


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("eta", [0.1, 0.3, 0.5, 0.58])
def test_dqgan_without_compression_is_optimistic_descent(world: World, eta: float) -> None:
    world.run(optimistic_descent_by_recursion, eta)


@pytest.mark.ranks(1, 2)
def test_dqgan_solves_the_bilinear_game(world: World) -> None:
    world.run(compressed_game_converges)


def dqgan_in_exact_fractions() -> None:
    """The paper's listing, which has e in the units of parameters, with top-1 and slopes that do not depend on y."""
    size, eta = hvd.size(), Fraction(1, 2)
    model = Vectors({"w": (2,)})
    optimizer = DQGAN(
        torch.optim.SGD(model.parameters(), lr=0.5),
        named_parameters=model.named_parameters(),
        compression=top_1_compression(),
    )
    zero = [Fraction(0), Fraction(0)]
    w, e, last = zero, [zero] * size, [zero] * size
    for t in range(8):
        looked_from = [plus(plus(w, last[r], -1), e[r], -1) for r in range(size)]
        assert fractions(model.get_parameter("w")) == looked_from[hvd.rank()]
        step_along(model, optimizer, SLOPES[hvd.rank()][t])
        sent = []
        for r in range(size):
            last[r] = [eta * v for v in SLOPES[r][t]]
            p = plus(last[r], e[r])
            sent.append(top_1(p))
            e[r] = plus(p, sent[r], -1)
        w = plus(w, mean(sent), -1)
        with optimizer.evaluation():
            assert fractions(model.get_parameter("w")) == w


@pytest.mark.ranks(1, 2)
def test_dqgan_in_exact_fractions(world: World) -> None:
    world.run(dqgan_in_exact_fractions)


# Outer optimizers


def outer_in_exact_fractions(sync_every: int) -> None:
    """Nesterov on the average, as in DiLoCo: b ← β b + Δ,  x ← x − γ (Δ + β b); β = 1/2, γ = 1/2."""
    size, half = hvd.size(), Fraction(1, 2)
    model = Vectors({"w": (2,)}, torch.float64)
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.5),
        named_parameters=model.named_parameters(),
        compression=top_1_compression(),
        sync_every=sync_every,
        outer=lambda x: torch.optim.SGD(x, lr=0.5, momentum=0.5, nesterov=True),
    )
    zero = [Fraction(0), Fraction(0)]
    x, local, memory, buffer = zero, [zero] * size, [zero] * size, zero
    for t in range(8):
        optimizer.zero_grad()
        model({"w": torch.tensor(SLOPES[hvd.rank()][t], dtype=torch.float64)}).backward()
        optimizer.step()
        local = [plus(local[r], [Fraction(v) for v in SLOPES[r][t]], -half) for r in range(size)]
        if (t + 1) % sync_every == 0:
            sent = []
            for r in range(size):
                p = plus(plus(memory[r], x), local[r], -1)
                sent.append(top_1(p))
                memory[r] = plus(p, sent[r], -1)
            buffer = plus(mean(sent), buffer, half)
            x = plus(x, plus(mean(sent), buffer, half), -half)
            local = [x] * size
        assert fractions(model.get_parameter("w")) == local[hvd.rank()]


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("sync_every", [1, 2])
def test_outer_nesterov_in_exact_fractions(world: World, sync_every: int) -> None:
    world.run(outer_in_exact_fractions, sync_every)


def forgets_at_drops() -> None:
    """Learning rates 1, 1, 0.9, 0.4, 0.4, 0.2: wiped before the exchanges at 0.4 and, being half of that, at 0.2."""
    model = Vectors({"w": (2,)})
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = QsparseLocalSGD(
        inner, named_parameters=model.named_parameters(), compression=top_1_compression(), forget_at_drop=0.5
    )
    left = []
    for lr in (1.0, 1.0, 0.9, 0.4, 0.4, 0.2):
        inner.param_groups[0]["lr"] = lr
        # The second element is always smaller, so the memory is its sum since the last time it was wiped.
        optimizer.zero_grad()
        model({"w": torch.tensor([100.0, 1.0])}).backward()
        optimizer.step()
        left.append(optimizer.state_dict()["qsparse_local_sgd"]["average"]["memory"]["w"][1].item())
    assert left == pytest.approx([1.0, 2.0, 2.9, 0.4, 0.8, 0.2])


@pytest.mark.ranks(1, 2)
def test_memory_may_be_wiped_at_learning_rate_drops(world: World) -> None:
    world.run(forgets_at_drops)


# CD-Adam


def test_cd_adam_is_amsgrad_by_its_listing() -> None:
    w = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = CDAdam([w], lr=0.1, weight_decay=0.01)
    x, m, v, largest = (np.zeros(5) for _ in range(4))
    generator = np.random.default_rng(0)
    for t in range(1, 30):
        g = generator.normal(size=5) * (10 if t < 5 else 1)
        w.grad = torch.tensor(g)
        optimizer.step()
        g = g + 0.01 * x
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        largest = np.maximum(largest, v)
        x = x - 0.1 / (1 - 0.9**t) * m / (np.sqrt(largest) / math.sqrt(1 - 0.99**t) + 1e-8)
        np.testing.assert_allclose(w.detach().numpy(), x, rtol=1e-9)


# Every memory on both paths: resumed bit for bit, and untouched by an overflow

COMPRESSORS: dict[str, Any] = {
    "dgc": lambda **o: Compression.dgc(ratio=0.1, momentum=0.5, nesterov=True, clip=3.0, **o),
    "ef21": lambda **o: Compression.ef21(ratio=0.1, **o),
    "ef21-sgdm": lambda **o: Compression.ef21(ratio=0.1, momentum=0.5, **o),
    "cd_adam": lambda **o: Compression.cd_adam(**o),
    "decaying": lambda **o: Compression.topk(ratio=0.1, memory=lambda: Residual(decay=0.5), **o),
}
SHAPES = {"small": (10,), "large": (20, 9), "last": (130,)}


def build(name: str, path: str, adam: bool = True) -> tuple[Vectors, Any, Any]:
    """A model, its optimizer, and what has the compressor's state."""
    torch.manual_seed(0)
    model = Vectors(SHAPES)
    compression = COMPRESSORS[name](named_parameters=model.named_parameters(), dense_below=50)
    inner: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if adam and name == "cd_adam":
        inner = CDAdam(model.parameters(), lr=0.01)
    if path == "gradient":
        optimizer = hvd.DistributedOptimizer(
            inner, named_parameters=model.named_parameters(), compression=compression
        )
        return model, optimizer, compression
    if path == "dqgan":
        optimizer = DQGAN(inner, named_parameters=model.named_parameters(), compression=compression)
    else:
        optimizer = QsparseLocalSGD(
            inner,
            named_parameters=model.named_parameters(),
            compression=compression,
            sync_every=2,
            look_ahead=0.5 if name == "decaying" else 0.0,
            outer=lambda x: torch.optim.SGD(x, lr=0.7, momentum=0.9, nesterov=True),
        )
    return model, optimizer, optimizer


def train(model: Vectors, optimizer: Any, first: int, last: int, bad: bool = False) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        slopes = {name: gradient(SHAPES[name], hvd.rank(), step, i) for i, name in enumerate(SHAPES)}
        if bad and hvd.rank() == hvd.size() - 1:
            slopes["large"][0, 0] = torch.inf
        model(slopes).backward()
        optimizer.step()


def resumes(name: str, path: str, at: int) -> None:
    straight, optimizer, _ = build(name, path)
    train(straight, optimizer, 0, 11)
    model, optimizer, holder = build(name, path)
    train(model, optimizer, 0, at)
    saved = through_a_file((model.state_dict(), optimizer.state_dict(), holder.state_dict()))
    model, optimizer, holder = build(name, path)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    holder.load_state_dict(saved[2])
    train(model, optimizer, at, 11)
    for a, b in zip(straight.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("at", [5])  # in mid-round under local SGD
@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in COMPRESSORS for path in ("gradient", "local")] + [("decaying", "dqgan")],
)
def test_resumes_bit_for_bit(world: World, name: str, path: str, at: int) -> None:
    world.run(resumes, name, path, at)


def overflow_spoils_nothing(name: str) -> None:
    model, optimizer, compression = build(name, "gradient", adam=False)  # whose own state an overflow would spoil
    train(model, optimizer, 0, 4)
    before = copy.deepcopy(compression.state_dict()["memory"])
    assert set(before) == ({*SHAPES} if name == "dgc" else {"large", "last"})
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, 4, 5, bad=True)
    assert not torch.isfinite(model.get_parameter("large")).all()  # the overflow reaches the optimizer everywhere
    after = compression.state_dict()["memory"]
    assert all(torch.equal(before[n], m) for n, m in after.items())
    model.load_state_dict(weights)
    train(model, optimizer, 5, 8)
    assert_replicas_identical(list(model.parameters()))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", list(COMPRESSORS))
def test_an_overflow_leaves_every_memory_as_it_was(world: World, name: str) -> None:
    world.run(overflow_spoils_nothing, name)


def dgc_is_momentum_sgd_for_small_tensors_too() -> None:
    """At ratio 1 the whole run is that of momentum SGD on the mean gradient; dyadic numbers, R a power of two."""
    models = [Vectors(SHAPES) for _ in range(2)]
    compression = Compression.dgc(
        ratio=1.0, momentum=0.5, named_parameters=models[0].named_parameters(), dense_below=50
    )
    ours = hvd.DistributedOptimizer(
        torch.optim.SGD(models[0].parameters(), lr=0.5),
        named_parameters=models[0].named_parameters(),
        compression=compression,
    )
    plain = hvd.DistributedOptimizer(
        torch.optim.SGD(models[1].parameters(), lr=0.5, momentum=0.5),
        named_parameters=models[1].named_parameters(),
    )
    for step in range(8):
        for model, optimizer in zip(models, (ours, plain), strict=True):
            slopes = {n: (4 * gradient(SHAPES[n], hvd.rank(), step, i)).round() for i, n in enumerate(SHAPES)}
            optimizer.zero_grad()
            model(slopes).backward()
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.ranks(2, 4)
def test_dgc_of_everything_is_momentum_sgd(world: World) -> None:
    world.run(dgc_is_momentum_sgd_for_small_tensors_too)


def ef21_of_everything_is_plain() -> None:
    """Average and Sum alike: with nothing left out, EF21 hands out the gradients' sum or mean."""
    for op in (hvd.Average, hvd.Sum):
        model = Vectors(SHAPES)
        compression = Compression.topk(
            ratio=1.0, memory=EF21, named_parameters=model.named_parameters(), dense_below=0
        )
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0),
            named_parameters=model.named_parameters(),
            compression=compression,
            op=op,
        )
        for step in range(4):
            slopes = [
                {n: (4 * gradient(SHAPES[n], r, step, i)).round() for i, n in enumerate(SHAPES)}
                for r in range(hvd.size())
            ]
            optimizer.zero_grad()
            model(slopes[hvd.rank()]).backward()
            optimizer.synchronize()
            for n in SHAPES:
                total = sum(s[n] for s in slopes)
                expected = total / hvd.size() if op == hvd.Average else total
                assert torch.equal(model.get_parameter(n).grad, expected)  # type: ignore[arg-type]
            with optimizer.skip_synchronize():
                optimizer.step()


@pytest.mark.ranks(2, 3)
def test_ef21_of_everything_is_plain(world: World) -> None:
    world.run(ef21_of_everything_is_plain)
