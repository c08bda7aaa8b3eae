"""Top-k: the exact selection for every input, and its contraction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models import resnet50

from hvd_compress.kernels import native
from hvd_compress.operators import QSGD, Operator, RandK, Sign, TopK, compose
from hvd_compress.operators.topk import top_k, top_k_by_sorting
from hvd_compress.wire import Fused, Message, encode

AWKWARD = [0.0, -0.0, 1.0, -1.0, 2.0, math.nan, math.inf, -math.inf, 1e-45, 65504.0]


def by_definition(x: list[float], k: int) -> list[int]:
    """Indices of the k largest magnitudes, NaN as infinity, the lowest index first among equals."""
    magnitude = [math.inf if math.isnan(v) else abs(v) for v in x]
    return sorted(sorted(range(len(x)), key=lambda i: (-magnitude[i], i))[:k])


@given(st.lists(st.sampled_from(AWKWARD) | st.floats(width=32), min_size=1, max_size=40), st.data())
def test_selection_is_exact_for_every_input(x: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(x)))
    tensor = torch.tensor(x)
    assert top_k(tensor, k).tolist() == by_definition(tensor.tolist(), k)
    assert top_k_by_sorting(tensor, k).tolist() == by_definition(tensor.tolist(), k)


LARGE = 200_003  # several times the sample from which a threshold is guessed


@pytest.mark.parametrize("k", [1, 2, 100, 5000, LARGE - 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda g: torch.randn(LARGE, generator=g),
        lambda g: torch.randn(LARGE, generator=g).round(),  # ties everywhere
        lambda g: torch.zeros(LARGE),
        lambda g: torch.full((LARGE,), -3.0),
        lambda g: torch.zeros(LARGE).index_fill(0, torch.tensor([LARGE - 1]), 1.0),  # most likely not in the sample
        lambda g: torch.arange(LARGE).remainder(13).float(),  # periodic, like the columns of a matrix
        lambda g: torch.randn(LARGE, generator=g).cauchy_(generator=g),
        lambda g: torch.randn(LARGE, generator=g).masked_fill(torch.rand(LARGE, generator=g) < 0.01, math.nan),
    ],
    ids=["normal", "ties", "zeros", "equal", "one", "periodic", "heavy", "nan"],
)
def test_threshold_guess_never_changes_the_selection(make: object, k: int) -> None:
    x = make(torch.Generator().manual_seed(0))  # type: ignore[operator]
    expected = torch.sort(x.abs().nan_to_num(nan=math.inf), descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(top_k(x, k), expected)


@pytest.mark.parametrize(
    ("ratio", "numel", "count"), [(0.01, 1000, 10), (0.07, 100, 7), (0.29, 100, 29), (1e-9, 50, 1)]
)
def test_ratio_rounds_to_the_nearest_and_keeps_one(ratio: float, numel: int, count: int) -> None:
    assert TopK(ratio=ratio).count(numel) == count


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), st.integers(1, 70))
def test_error_is_the_energy_of_what_is_left_and_gamma_bounds_it(x: list[float], k: int) -> None:
    tensor = torch.tensor(x, dtype=torch.float64)
    operator = TopK(k=k)
    error = float((tensor - operator(tensor)).square().sum())
    squares = sorted(float(v) ** 2 for v in tensor)
    assert error == pytest.approx(math.fsum(squares[: max(0, len(x) - k)]), rel=1e-12, abs=1e-30)
    assert error <= (1 - operator.gamma(len(x))) * float(tensor.square().sum()) * (1 + 1e-12)


def test_gamma_is_attained_by_equal_magnitudes() -> None:
    x = torch.ones(8)
    assert float((x - TopK(k=3)(x)).square().sum()) == (1 - TopK(k=3).gamma(8)) * 8.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_shapes_and_dtypes(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -4.0, 0.5], [3.0, 0.0, 2.0]], dtype=dtype)
    compressed = TopK(k=2)(x)
    assert compressed.tolist() == [[0.0, -4.0, 0.0], [3.0, 0.0, 0.0]]
    assert compressed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_non_contiguous_scalar_empty_and_whole() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(TopK(k=3)(x.t()), TopK(k=3)(x.t().contiguous()))
    assert torch.equal(TopK(k=3)(x[:, ::2]), TopK(k=3)(x[:, ::2].clone()))
    assert TopK(k=5)(torch.tensor(2.0)).item() == 2.0
    assert TopK(ratio=0.5)(torch.empty(0, 3)).shape == (0, 3)
    assert torch.equal(TopK(k=12)(x), x)
    assert torch.equal(TopK(k=99)(x), x)
    assert TopK(ratio=1.0).encode(x).indices is None


def test_a_message_does_not_change_with_its_tensor() -> None:
    x = torch.arange(4.0)
    messages = [TopK(k=2).encode(x), TopK(k=4).encode(x)]
    before = [m.decode() for m in messages]
    x.zero_()
    assert all(torch.equal(m.decode(), b) for m, b in zip(messages, before, strict=True))


class Squared(TopK):
    """Changes what a single vector becomes, and says nothing of several."""

    def split(self, x: Tensor, other: Tensor, out: Tensor, **draws: torch.Generator | None) -> Message:
        out.copy_((x + other).square())
        return Message.sparse((x.numel(),), torch.tensor([0]), torch.tensor([7.0], dtype=x.dtype))


@dataclass(frozen=True)
class Halved(QSGD):
    """Changes what a single vector becomes, and says nothing of several."""

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        return super().encode(x / 2, generator=generator)


@pytest.mark.parametrize(
    "operator",
    [
        TopK(k=3),
        TopK(ratio=0.01),
        Squared(k=3),
        compose(TopK(k=3), QSGD(bits=4)),
        compose(TopK(ratio=0.3), QSGD(levels=1)),  # sends most of them to zero
        compose(TopK(ratio=0.3), QSGD(levels=200), scaled=True),
        compose(TopK(k=3), QSGD(bits=4, bucket=2)),
        compose(TopK(k=3), QSGD(bits=4, norm="l2")),
        compose(TopK(k=3), Halved(bits=4)),
        compose(TopK(k=3), Sign(m=1)),
        compose(RandK(k=3, shared=True), QSGD(bits=4)),
        compose(Squared(k=3), QSGD(bits=4)),
        QSGD(bits=4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("sizes", [[4], [50, 4, 700], [50, 3, 20], []])  # three of three elements are all
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64], [torch.float32, torch.float64]])
def test_several_vectors_become_what_each_alone_does(operator: Operator, sizes: list[int], dtypes: list) -> None:
    generator = torch.Generator().manual_seed(3)
    kinds = (dtypes * len(sizes))[: len(sizes)]
    like = [torch.empty(n, dtype=dtype) for n, dtype in zip(sizes, kinds, strict=True)]
    xs, others = ([x.clone().normal_(generator=generator) for x in like] for _ in range(2))
    alone, together = ([torch.empty_like(x) for x in xs] for _ in range(2))
    kinds_of_draws = ["generator"] * operator.draws + ["shared"] * operator.shared_draws

    def draws(place: int) -> dict[str, torch.Generator]:
        return {kind: torch.Generator().manual_seed(2 * place + len(kind)) for kind in kinds_of_draws}

    several = zip(xs, others, alone, strict=True)
    expected = [operator.split(x, y, out, **draws(place)) for place, (x, y, out) in enumerate(several)]
    messages = operator.split_all(xs, others, together, [*map(draws, range(len(sizes)))])
    assert [m.shape for m in messages] == [m.shape for m in expected]
    assert all(torch.equal(m.decode(), e.decode()) for m, e in zip(messages, expected, strict=True))
    assert all(map(torch.equal, together, alone))
    assert encode(messages).data.tobytes() == encode(expected).data.tobytes()
    if operator in (TopK(k=3), compose(TopK(k=3), QSGD(bits=4))):
        is_one_loop = len({*kinds}) == 1 and min(sizes) > 3 and native.is_here()
        assert isinstance(messages, Fused) is is_one_loop


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ValueError, "exactly one of"),
        ({"k": 1, "ratio": 0.1}, ValueError, "exactly one of"),
        ({"k": 0}, ValueError, "at least 1"),
        ({"k": -3}, ValueError, "at least 1"),
        ({"k": 0.5}, TypeError, "use ratio"),
        ({"k": True}, TypeError, "integer"),
        ({"ratio": 0.0}, ValueError, r"\(0, 1\]"),
        ({"ratio": -0.1}, ValueError, r"\(0, 1\]"),
        ({"ratio": 1.5}, ValueError, r"\(0, 1\]"),
        ({"ratio": math.nan}, ValueError, r"\(0, 1\]"),
        ({"ratio": "0.1"}, TypeError, "number"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        TopK(**arguments)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="floating point"):
        TopK(k=1)(torch.arange(3))


@pytest.mark.gpu
def test_gpu_selects_the_same() -> None:
    x = torch.randn(LARGE).round()
    assert torch.equal(TopK(k=500)(x.cuda()).cpu(), TopK(k=500)(x))


def test_resnet_50_sends_the_paper_s_99400_elements() -> None:
    """k = 1000 for each of the 161 tensors, whole where they are smaller: the k of the Qsparse-local-SGD paper."""
    with torch.device("meta"):
        sizes = [p.numel() for p in resnet50().parameters()]
    assert (len(sizes), sum(sizes)) == (161, 25_557_032)
    assert sum(TopK(k=1000).count(size) for size in sizes) == 99_400
