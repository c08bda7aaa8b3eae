"""CAT: the best k for each tensor, by search over all of them in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.operators import CAT, TopK


def best_k(x: list[float], operator: CAT) -> int:
    """By the definition: the first of the k with the greatest share of the energy per bit."""
    squares = sorted((Fraction(v) ** 2 for v in x), reverse=True)
    d = len(x)
    bits = Fraction(32 + math.log2(d))
    best, most = 1, Fraction(-1)
    for k in range(1, d + 1):
        cost = Fraction(operator.overhead) + operator.packet * math.ceil(Fraction(float(k * bits)) / operator.packet)
        if sum(squares[:k]) / cost > most:
            best, most = k, sum(squares[:k]) / cost
    return best


@given(
    st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=40),
    st.sampled_from([0, 1, 64, 1000]),
    st.sampled_from([1, 33, 100, 512]),
)
def test_no_k_gives_more_for_its_bits(x: list[float], overhead: float, packet: int) -> None:
    """Whole numbers, whose sums of squares are exact; equal quotients are not told apart by their rounding, so that
    the energy per bit is compared, and k as well wherever the best is unique."""
    operator = CAT(overhead=overhead, packet=packet)
    tensor = torch.tensor(x)
    message = operator.encode(tensor)
    k = len(message.values)
    assert torch.equal(message.decode(), TopK(k=k)(tensor))
    squares = sorted((Fraction(v) ** 2 for v in x), reverse=True)
    costs = [Fraction(c) for c in operator.cost(torch.arange(1, len(x) + 1), len(x)).tolist()]
    worth = [sum(squares[: i + 1]) / cost for i, cost in enumerate(costs)]
    assert worth[k - 1] >= max(worth) * (1 - Fraction(1, 10**14))
    if sum(w >= max(worth) * (1 - Fraction(1, 10**12)) for w in worth) == 1:
        assert k == best_k(x, operator)


def test_by_hand() -> None:
    """32 elements, so 37 bits each: two to a packet of 74. Costs are 74, 74, 148, 148, …, shares of 100 below."""
    x = torch.zeros(32)
    x[[3, 30, 7, 9]] = torch.tensor([7.0, -6.0, 3.0, 1.0])  # squares 49, 36, 9, 1: in all 95
    assert CAT(overhead=0, packet=74).encode(x).decode().nonzero().reshape(-1).tolist() == [3, 30]  # 85/74
    # 85/174 = 0.4885, 94/248 = 0.379: still two. With a dearer start, 94/1148 < 85/1074 < 95/1148: all four.
    assert len(CAT(overhead=100, packet=74).encode(x).values) == 2
    assert len(CAT(overhead=1000, packet=74).encode(x).values) == 4
    assert CAT(overhead=10, packet=100).cost(torch.tensor([1, 2, 3]), 32).tolist() == [110, 110, 210]


def test_smallest_k_among_equals() -> None:
    assert len(CAT(overhead=5, packet=10**6).encode(torch.tensor([3.0, 0.0, 4.0, 0.0])).values) == 2
    assert len(CAT(overhead=0, packet=34).encode(torch.ones(4)).values) == 1  # 34 bits each: k/k for every k
    assert len(CAT().encode(torch.zeros(9)).values) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_shapes_dtypes_and_extremes(dtype: torch.dtype) -> None:
    operator = CAT(overhead=0, packet=1)
    x = torch.tensor([[1.0, -8.0, 0.5], [2.0, 0.0, 8.0]], dtype=dtype).t()
    assert operator(x).tolist() == [[0.0, 0.0], [-8.0, 0.0], [0.0, 0.0]]  # one of two equal ones: the lowest index
    assert operator(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert operator(torch.tensor(2.0, dtype=dtype)).item() == 2.0  # d = 1 costs 32 bits
    assert operator(torch.empty(0, 3, dtype=dtype)).shape == (0, 3)
    huge = torch.tensor([torch.finfo(dtype).max, 1.0], dtype=dtype)  # its square is beyond float64's for float64
    assert operator(huge).tolist()[0] == torch.finfo(dtype).max
    assert len(CAT(packet=10**9).encode(torch.full((100,), torch.finfo(dtype).tiny, dtype=dtype)).values) == 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_sent(bad: float) -> None:
    x = torch.ones(1000)
    x[[17, 500]] = bad
    sent = CAT(overhead=1000, packet=100).encode(x)
    assert not bool(sent.is_finite())
    assert sent.indices is not None
    assert sent.indices.tolist() == [17, 500]


CASES: list[Any] = [
    lambda d: torch.ones(d),
    lambda d: 1 / torch.arange(1.0, d + 1),
    lambda d: torch.cat([torch.full((1,), 10.0), torch.ones(d - 1)]),
    lambda d: torch.randn(d, generator=torch.Generator().manual_seed(d)),
]


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("d", [2, 50, 3000])
@pytest.mark.parametrize(("overhead", "packet"), [(0, 1), (0, 12_000), (20_000, 12_000), (1e6, 500)])
def test_gamma_holds(make: Any, d: int, overhead: float, packet: int) -> None:
    x: Tensor = make(d).double()
    operator = CAT(overhead=overhead, packet=packet)
    error = float((x - operator(x)).square().sum() / x.square().sum())
    assert 0 < operator.gamma(d) <= 1
    assert error <= 1 - operator.gamma(d) + 1e-12


def test_gamma_by_hand() -> None:
    assert CAT(overhead=0, packet=1).gamma(32) == 1 / 32  # the share of one packet of one element
    assert CAT(overhead=0, packet=100).gamma(32) == max(2 / 32, 1 / 12)  # 32 · 37 bits are 12 packets
    assert CAT(overhead=10**9, packet=1).gamma(32) == pytest.approx(1, abs=1e-5)
    assert CAT(packet=10**9).gamma(32) == 1.0
    assert CAT().gamma(0) == 1.0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"overhead": -1}, "overhead"),
        ({"overhead": math.inf}, "overhead"),
        ({"packet": 0}, "packet"),
        ({"packet": 1.5}, "packet"),
        ({"packet": True}, "packet"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CAT(**settings)


@pytest.mark.gpu
def test_gpu_selects_the_same() -> None:
    x = torch.randn(200_003, generator=torch.Generator().manual_seed(0))
    assert torch.equal(CAT()(x.cuda()).cpu(), CAT()(x))
