"""Memories: nothing is lost, and nothing changes before an exchange has succeeded."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hvd_compress.memory import DGC, EF21, Memory, NoMemory, Residual, TwoSided
from hvd_compress.operators import Operator, Sign, TopK


def compensate(memory: Memory, name: str, x: Tensor) -> Tensor:
    """What is compressed in place of ``x``."""
    compensated, other = memory.compensate(name, x)
    return compensated if other is None else compensated.add_(other)


def exchange(memories: list[Memory], operator: Operator, xs: list[Tensor], name: str = "w") -> list[Tensor]:
    """One exchange between ranks, each with its memory; what each one's optimizer gets: the sum over ranks."""
    messages = [operator.encode(compensate(m, name, x.clone())) for m, x in zip(memories, xs, strict=True)]
    for memory, message in zip(memories, messages, strict=True):
        memory.update(name, message)
        memory.commit(name)
    total = sum((message.decode() for message in messages), torch.zeros_like(xs[0]))
    return [m.receive(name, total.clone(), len(xs), torch.Generator) for m in memories]


def test_what_was_put_in_is_what_was_sent_and_what_is_left() -> None:
    """With dyadic numbers of few bits every sum is exact, so the identity holds to the bit."""
    memory, operator = Residual(), TopK(k=3)
    generator = torch.Generator().manual_seed(0)
    put_in, sent = torch.zeros(50), torch.zeros(50)
    for _ in range(200):
        x = torch.randint(-64, 64, (50,), generator=generator) / 16
        compensated = compensate(memory, "w", x.clone())
        message = operator.encode(compensated)
        message.add_to(sent)
        memory.update("w", message)
        memory.commit("w")
        put_in += x
        assert torch.equal(put_in, sent + memory.state_dict()["w"])


def test_error_feedback_by_hand() -> None:
    """Top-1 of (3, 2), then of (1, 1) with what was left."""
    memory, operator = Residual(), TopK(k=1)
    steps = [([3.0, 2.0], [3, 0], [0, 2]), ([1.0, 1.0], [0, 3], [1, 0]), ([0.5, -2.0], [0, -2], [Fraction(3, 2), 0])]
    for x, sent, left in steps:
        compensated = compensate(memory, "w", torch.tensor(x))
        message = operator.encode(compensated)
        assert message.decode().tolist() == sent
        memory.update("w", message)
        memory.commit("w")
        assert memory.state_dict()["w"].tolist() == left


def test_decay_by_hand() -> None:
    """Top-1 with decay 1/2: what waits is halved at each exchange."""
    memory, operator = Residual(decay=0.5), TopK(k=1)
    for x, sent, left in [([3.0, 2.0], [3, 0], [0, 2]), ([1.5, 0.0], [1.5, 0], [0, 1]), ([0, 0], [0, 0.5], [0, 0])]:
        compensated = compensate(memory, "w", torch.tensor(x, dtype=torch.float32))
        message = operator.encode(compensated)
        assert message.decode().tolist() == sent
        memory.update("w", message)
        memory.commit("w")
        assert memory.state_dict()["w"].tolist() == left
    for decay in (0.0, 1.5):
        with pytest.raises(ValueError, match="decay"):
            Residual(decay=decay)
    with pytest.raises(TypeError, match=r"^decay must be a number, got '0\.5'"):
        Residual(decay="0.5")  # type: ignore[arg-type]


def test_decay_rounds_the_product() -> None:
    """0.9 · m rounds in float32; a fused multiply-add would leave another number here."""
    memory, operator = Residual(decay=0.9), TopK(k=1)
    m = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    memory.load_state_dict({"w": m})
    x, other = memory.compensate("w", -(m * 0.9))
    assert other is not None
    operator.split(x, other, x)
    assert not x.any()


def test_parameters_do_not_mix() -> None:
    memory, operator = Residual(), TopK(k=1)
    for name, x in (("a", [1.0, 2.0]), ("b", [4.0, 3.0])):
        compensated = compensate(memory, name, torch.tensor(x))
        memory.update(name, operator.encode(compensated))
        memory.commit(name)
    assert {n: m.tolist() for n, m in memory.state_dict().items()} == {"a": [1.0, 0.0], "b": [0.0, 3.0]}


def test_loading_copies() -> None:
    memory = Residual()
    state = {"w": torch.tensor([1.0, 2.0])}
    memory.load_state_dict(state)
    state["w"].zero_()
    assert compensate(memory, "w", torch.zeros(2)).tolist() == [1.0, 2.0]


def test_no_memory_forgets_and_refuses_to_lose_one() -> None:
    memory, operator = NoMemory(), TopK(k=1)
    compensated = compensate(memory, "w", torch.tensor([3.0, 2.0]))
    memory.update("w", operator.encode(compensated))
    memory.commit("w")
    assert compensate(memory, "w", torch.tensor([1.0, 1.0])).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="residual"):
        memory.load_state_dict({"w": torch.ones(2)})


MAKERS: list[Callable[[], Memory]] = [
    Residual,
    lambda: Residual(decay=0.5),
    DGC,
    lambda: DGC(nesterov=True, clip=1.0),
    EF21,
    lambda: EF21(momentum=0.75),
    lambda: TwoSided(Sign()),
]


@pytest.mark.parametrize("make", MAKERS)
def test_rollback_leaves_every_bit(make: Callable[[], Memory]) -> None:
    """A failed exchange, with NaN for good measure, between two good ones changes nothing."""
    undisturbed, disturbed = make(), make()
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        x = torch.randn(20, generator=generator)
        for _ in range((step + 1) % 3):
            before = {n: m.clone() for n, m in disturbed.state_dict().items()}
            compensate(disturbed, "w", torch.full((20,), torch.nan))
            disturbed.rollback("w")
            disturbed.rollback("never seen")
            assert before.keys() == disturbed.state_dict().keys()
            assert all(torch.equal(before[n], m) for n, m in disturbed.state_dict().items())
        results = [exchange([memory], TopK(k=3), [x]) for memory in (undisturbed, disturbed)]
        assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("make", MAKERS)
def test_states_go_on_and_keep(make: Callable[[], Memory]) -> None:
    """A loaded state goes on alike, and neither it nor its copy is changed by what comes after."""
    first, second = make(), make()
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(20, generator=generator) for _ in range(8)]
    for x in xs[:4]:
        exchange([first], TopK(k=3), [x])
    state = first.state_dict()
    copies = {name: memory.clone() for name, memory in state.items()}
    second.load_state_dict(state)
    for x in xs[4:]:
        (a,), (b,) = (exchange([memory], TopK(k=3), [x]) for memory in (first, second))
        assert torch.equal(a, b)
    assert all(torch.equal(copies[name], memory) for name, memory in state.items())
    first.reset()
    assert first.state_dict() == {}
    (fresh,), (forgetful,) = (exchange([memory], TopK(k=3), [xs[0]]) for memory in (make(), first))
    assert torch.equal(fresh, forgetful)


@pytest.mark.parametrize("make", MAKERS)
def test_a_state_on_the_cpu_goes_on_for_tensors_on_a_gpu(make: Callable[[], Memory]) -> None:
    """As Checkpoints.load() gives it. The tensors are pretended; torch checks their devices as it does real ones'."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        memory = make()
        x = torch.randn(8, device="cuda")
        memory.load_state_dict({"w": torch.zeros(len(memory.rows), 8) if len(memory.rows) > 1 else torch.zeros(8)})
        for _ in range(2):
            (received,) = exchange([memory], Sign(), [x])
            assert received.device == x.device
            assert memory.state_dict()["w"].device == x.device


def test_states_of_other_memories_are_refused() -> None:
    for vectors, memory in [(1, Residual()), (2, DGC()), (2, EF21()), (3, EF21(momentum=0.5)), (3, TwoSided(Sign()))]:
        memory.load_state_dict({"w": torch.ones(vectors, 4) if vectors > 1 else torch.ones(4)})
        before = memory.state_dict()
        with pytest.raises(ValueError, match="saved with another memory"):
            memory.load_state_dict({"w": torch.ones(vectors + 1, 4)})
        assert all(torch.equal(before[name], m) for name, m in memory.state_dict().items())


# DGC


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_dgc_in_exact_fractions(nesterov: bool, masking: bool) -> None:
    """Top-1 of three with μ = 1/2, line by line."""
    memory, mu = DGC(0.5, nesterov=nesterov, masking=masking), Fraction(1, 2)
    u, v = [Fraction(0)] * 3, [Fraction(0)] * 3
    for x in [(4, 2, -1), (0, 1, 1), (-2, 3, 0), (1, 1, 1), (0, 0, -6), (2, -2, 0)]:
        if nesterov:
            u = [mu * (a + b) for a, b in zip(u, x, strict=True)]
            v = [a + b + c for a, b, c in zip(v, u, x, strict=True)]
        else:
            u = [mu * a + b for a, b in zip(u, x, strict=True)]
            v = [a + b for a, b in zip(v, u, strict=True)]
        kept = max(range(3), key=lambda i: (abs(v[i]), -i))
        sent = [v[i] if i == kept else 0 for i in range(3)]
        v[kept] = Fraction(0)
        if masking:
            u[kept] = Fraction(0)
        (received,) = exchange([memory], TopK(k=1), [torch.tensor(x, dtype=torch.float32)])
        assert received.tolist() == sent
        assert memory.state_dict()["w"].tolist() == [u, v]


def test_dgc_of_everything_is_momentum_sgd() -> None:
    """Whole messages mask nothing, so that what is received is torch's momentum, to the bit."""
    memory, w = DGC(momentum=0.9), torch.zeros(30, requires_grad=True)
    sgd = torch.optim.SGD([w], lr=1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = torch.randn(30, generator=generator)
        (received,) = exchange([memory], TopK(ratio=1.0), [x])
        before, w.grad = w.detach().clone(), x
        sgd.step()
        assert torch.equal(w.detach(), before - received)


def test_dgc_without_masking_delays_momentum_sgd_only() -> None:
    """Dyadic numbers: what was sent and what waits add up to the steps of momentum SGD."""
    memory, generator = DGC(momentum=0.5, masking=False), torch.Generator().manual_seed(0)
    velocity, walked, received = torch.zeros(20), torch.zeros(20), torch.zeros(20)
    for _ in range(12):
        x = torch.randint(-8, 8, (20,), generator=generator).float()
        velocity = 0.5 * velocity + x
        walked += velocity
        received += exchange([memory], TopK(k=2), [x])[0]
        assert torch.equal(walked, received + memory.state_dict()["w"][1])


def test_dgc_clips_each_gradient() -> None:
    memory = DGC(momentum=0.0, clip=1.0)
    for x, clipped in [([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4]), ([0.0, 0.0], [0.0, 0.0])]:
        (received,) = exchange([memory], TopK(ratio=1.0), [torch.tensor(x)])
        assert torch.allclose(received, torch.tensor(clipped))
    # The norm of large elements, and of many, is known as well.
    received, _ = memory.compensate("large", torch.full((4,), 1e20))
    assert torch.allclose(received, torch.full((4,), 0.5))
    received, _ = memory.compensate("many", torch.ones(10_000_000))
    assert torch.allclose(received, torch.tensor(10_000_000**-0.5), rtol=1e-6)
    assert compensate(memory, "w", torch.tensor([torch.inf, 1.0])).isnan().any()
    for settings in ({"momentum": 1.0}, {"clip": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            DGC(**settings)  # type: ignore[arg-type]


# EF21 and CD-Adam's two-sided form


def test_ef21_in_exact_fractions() -> None:
    """Two ranks, top-1 of two, with momentum 1/2."""
    memories, half = [EF21(momentum=0.5), EF21(momentum=0.5)], Fraction(1, 2)
    g = [[Fraction(0)] * 2 for _ in range(2)]
    v: list[list[Fraction]] = []
    for step in [((4, 2), (-1, 3)), ((4, 2), (-1, 3)), ((0, 2), (1, 1)), ((8, -8), (0, 0)), ((1, 1), (2, 2))]:
        xs = [[Fraction(a) for a in x] for x in step]
        v = (
            [[half * a + half * b for a, b in zip(*pair, strict=True)] for pair in zip(v, xs, strict=True)]
            if v
            else xs
        )
        for r in range(2):
            wrong = [a - b for a, b in zip(v[r], g[r], strict=True)]
            kept = 0 if abs(wrong[0]) >= abs(wrong[1]) else 1
            g[r][kept] += wrong[kept]
        received = exchange(list(memories), TopK(k=1), [torch.tensor(x, dtype=torch.float32) for x in step])
        for got, memory, own in zip(received, memories, g, strict=True):
            assert got.tolist() == [a + b for a, b in zip(*g, strict=True)]
            assert memory.state_dict()["w"][0].tolist() == own


def test_ef21_of_everything_is_the_sum() -> None:
    memories: list[Memory] = [EF21(), EF21(), EF21()]
    for step in range(4):
        xs = [torch.tensor([1.0, -2.0, 4.0]) * (rank + step) for rank in range(3)]
        for received in exchange(memories, TopK(ratio=1.0), xs):
            assert torch.equal(received, xs[0] + xs[1] + xs[2])


def test_cd_adam_by_its_listing() -> None:
    """Three workers and a server with scaled signs, as in the paper's algorithm, in float64."""
    n, d, operator = 3, 16, Sign()
    memories: list[Memory] = [TwoSided(operator) for _ in range(n)]
    own = [torch.zeros(d, dtype=torch.float64) for _ in range(n)]
    server, handed_out = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)

    def scaled_sign(x: Tensor) -> Tensor:
        return x.abs().mean() * torch.where(x >= 0, 1.0, -1.0).double()

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        xs = [torch.randn(d, generator=generator, dtype=torch.float64) for _ in range(n)]
        corrections = [scaled_sign(x - g) for x, g in zip(xs, own, strict=True)]
        own = [g + c for g, c in zip(own, corrections, strict=True)]
        server = server + torch.stack(corrections).mean(0)
        handed_out = handed_out + scaled_sign(server - handed_out)
        received = exchange(memories, operator, xs)
        for rank in range(n):
            torch.testing.assert_close(received[rank] / n, handed_out, rtol=1e-12, atol=1e-12)
            assert torch.equal(received[rank], received[0])
            torch.testing.assert_close(memories[rank].state_dict()["w"][0], own[rank], rtol=1e-12, atol=1e-12)


# What needs a memory, and which


BEZNOSIKOV = torch.tensor([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]], dtype=torch.float64)


def descend(make: Callable[[], Memory], steps: int, lr: float) -> Tensor:
    """Top-1 on f_r(x) = (a_r·x)² + ‖x‖²/4, three ranks, from (1, 1, 1); the minimum is 0."""
    memories = [make() for _ in range(3)]
    x = torch.ones(3, dtype=torch.float64)
    for _ in range(steps):
        gradients = [2 * (a @ x) * a + x / 2 for a in BEZNOSIKOV]
        x = x - lr * exchange(memories, TopK(k=1), gradients)[0] / 3
    return x


def test_top_1_without_memory_diverges_and_with_one_converges() -> None:
    """Beznosikov et al. (arXiv 2002.12410), example 1: without memory x grows by 1 + 11η/6 in every step, exactly."""
    lr = 1 / 32
    assert torch.allclose(descend(NoMemory, 50, lr), torch.ones(3, dtype=torch.float64) * (1 + 11 * lr / 6) ** 50)
    for make in (Residual, EF21, lambda: EF21(momentum=0.5), lambda: TwoSided(TopK(k=1))):
        assert descend(make, 2000, lr).norm() < 1e-6
    assert descend(lambda: DGC(momentum=0.5, masking=False), 4000, lr / 4).norm() < 1e-6


def test_sign_without_memory_stays_on_a_line_and_with_one_gets_off() -> None:
    """Karimireddy et al. (arXiv 1901.09847), section 3: f = ε|x₁ + x₂| + |x₁ − x₂|; signs are always ±(1, −1)."""
    epsilon, results = 0.5, []
    memories: list[Memory] = [NoMemory(), Residual()]
    for memory in memories:
        x = torch.tensor([1.0, 1.0], dtype=torch.float64)
        for step in range(4000):
            along, across = torch.sign(x.sum()), torch.sign(x[0] - x[1])
            gradient = epsilon * along * torch.ones(2, dtype=torch.float64)
            gradient = gradient + (across if across else 1.0) * torch.tensor([1.0, -1.0], dtype=torch.float64)
            x = x - 0.5 / (step + 10) * exchange([memory], Sign(), [gradient])[0]
        results.append(float(epsilon * x.sum().abs() + (x[0] - x[1]).abs()))
    assert results[0] >= 2 * epsilon - 1e-9  # x₁ + x₂ = 2 for ever
    assert results[1] < 0.05


@pytest.mark.parametrize("kind", [Residual, DGC, EF21, lambda: EF21(momentum=0.5), lambda: TwoSided(TopK(k=2))])
@pytest.mark.parametrize("before", [torch.float32, torch.float64])
def test_a_loaded_memory_takes_the_dtype_of_what_comes(kind: Callable[[], Memory], before: torch.dtype) -> None:
    """float32 is sent as float32, whatever the model was when it was saved."""
    after = torch.float64 if before == torch.float32 else torch.float32
    memories = [kind(), kind()]
    for x in torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=before):
        exchange(memories, TopK(k=5), [x, -x])
    loaded, expected = [kind(), kind()], [kind(), kind()]
    for old, new, other in zip(memories, loaded, expected, strict=True):
        new.load_state_dict(old.state_dict())
        other.load_state_dict({name: memory.to(after) for name, memory in old.state_dict().items()})
    for x in torch.randn(3, 40, generator=torch.Generator().manual_seed(1), dtype=after):
        received = exchange(loaded, TopK(k=5), [x, 2 * x])
        assert {r.dtype for r in received} == {after}
        assert all(map(torch.equal, received, exchange(expected, TopK(k=5), [x, 2 * x])))
    assert {memory.dtype for memory in loaded[0].state_dict().values()} == {after}
