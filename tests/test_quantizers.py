"""Sparsifiers by chance, quantizers and their compositions against their exact means, errors and bounds.

Rule for random tests: the generators' seeds are fixed; a mean over N draws must lie within five standard errors,
computed from the exact variance, of its expectation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.kernels import hadamard, random_subset
from hvd_compress.operators import (
    CAT,
    QSGD,
    TBQSGD,
    TNQSGD,
    TQSGD,
    Composed,
    MinMax,
    OneBit,
    Operator,
    Quantizer,
    RandK,
    RandomBlock,
    Rotated,
    Sign,
    TernGrad,
    Threshold,
    TopK,
    compose,
)
from hvd_compress.wire import Message

SIGMAS = 5


def sample(d: int, kind: str = "normal", dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(d, generator=generator, dtype=dtype)
    return x * x.abs() if kind == "heavy" else x


def errors(operator: Operator, x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Mean of C(x), and each draw's ‖C(x) − x‖²."""
    generator = torch.Generator().manual_seed(1)
    total, squares = torch.zeros_like(x), []
    for _ in range(draws):
        compressed = operator(x, generator=generator)
        total += compressed
        squares.append((compressed - x).square().sum())
    return total / draws, torch.stack(squares)


def rounding_variance(steps: Tensor, step: float) -> Tensor:
    """Of each element when ``steps`` are rounded to whole numbers without bias: D² f(1 − f)."""
    f = steps - steps.floor()
    return step**2 * f * (1 - f)


def assert_unbiased_with_variance(operator: Operator, x: Tensor, variances: Tensor, draws: int = 4000) -> None:
    mean, squares = errors(operator, x, draws)
    assert bool(((mean - x).abs() <= SIGMAS * (variances / draws).sqrt() + 1e-12).all())
    spread = float(squares.std()) / draws**0.5
    assert abs(float(squares.mean() - variances.sum())) <= SIGMAS * spread + 1e-12


# Exact means and variances


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("s", [1, 3, 7])
@pytest.mark.parametrize("norm", ["l2", "max"])
def test_qsgd(norm: Any, s: int, kind: str) -> None:
    x = sample(40, kind)
    scale = float(x.norm() if norm == "l2" else x.abs().max())
    variances = rounding_variance(x.abs() * s / scale, scale / s)
    assert_unbiased_with_variance(QSGD(levels=s, norm=norm), x, variances)
    assert float(variances.sum()) <= QSGD(levels=s, norm=norm).variance_bound(40) * float(x.square().sum())


def test_max_norm_has_less_noise_than_l2() -> None:
    """The figures of docs/operators.md: on the 1000 largest of 589,824 elements, in 20 draws, with 4 bits."""

    def heavy(generator: torch.Generator) -> Tensor:
        squares = torch.randn(3, 589_824, generator=generator).square().mean(0)
        return torch.randn(589_824, generator=generator) / squares.sqrt()

    def noise(x: Tensor, scale: Tensor) -> float:
        return float(rounding_variance(7 * x / scale, float(scale) / 7).sum() / x.square().sum())

    draws: dict[str, Callable[[torch.Generator], Tensor]] = {
        "gauss": lambda generator: torch.randn(589_824, generator=generator),
        "laplace": lambda generator: torch.empty(589_824).exponential_(generator=generator),
        "student": heavy,
    }
    for name, most, low, high in (("gauss", 0.009, 400, 770), ("laplace", 0.016, 210, 490), ("student", 0.78, 3, 62)):
        for seed in range(20):
            x = draws[name](torch.Generator().manual_seed(seed)).abs().topk(1000).values.double()
            of_max, of_l2 = noise(x, x.max()), noise(x, x.norm())
            assert of_max <= most
            assert low <= of_l2 / of_max <= high


def test_qsgd_in_buckets() -> None:
    x = sample(23)
    variances = torch.cat([rounding_variance(b.abs() * 3 / float(b.norm()), float(b.norm()) / 3) for b in x.split(5)])
    assert_unbiased_with_variance(QSGD(levels=3, norm="l2", bucket=5), x, variances)


def test_bits_are_signed_levels() -> None:
    assert [QSGD(bits=b).s for b in (2, 3, 4, 8)] == [1, 3, 7, 127]
    assert [MinMax(bits=b).s for b in (1, 2, 4)] == [1, 3, 15]


@pytest.mark.parametrize("s", [1, 5, 15])
def test_min_max(s: int) -> None:
    x = sample(40)
    step = float(x.max() - x.min()) / s
    variances = rounding_variance((x - x.min()) / step, step)
    assert_unbiased_with_variance(MinMax(levels=s), x, variances)
    assert float(variances.sum()) <= MinMax(levels=s).variance_bound(40) * float(x.square().sum())


def test_terngrad() -> None:
    x = sample(40)
    largest = float(x.abs().max())
    operator = TernGrad(clip=None)
    assert_unbiased_with_variance(operator, x, rounding_variance(x.abs() / largest, largest))
    exact = largest * float(x.abs().sum()) - float(x.square().sum())
    assert float(rounding_variance(x.abs() / largest, largest).sum()) == pytest.approx(exact)
    assert set(operator(x, generator=torch.Generator().manual_seed(0)).unique().tolist()) <= {-largest, 0.0, largest}


def test_terngrad_clips_at_standard_deviations() -> None:
    x = torch.cat([sample(99), torch.tensor([50.0], dtype=torch.float64)])
    limit = 2.5 * float(x.std(correction=0))
    assert TernGrad()(x, generator=torch.Generator().manual_seed(0)).max().item() == pytest.approx(limit)
    for value, d in itertools.product((3.0, 0.1, 1 / 3, 1e-3, 1e-30), (1, 5, 999, 1000, 4097)):
        constant = torch.full((d,), value)  # its spread is not quite zero
        assert torch.equal(TernGrad()(constant), constant)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_norms_of_many_elements(m: int) -> None:
    x = torch.full((30_000_000,), 0.1)
    scale = float(Sign(m=m).encode(x).values.floats[1])
    assert scale == pytest.approx(float(x[0]) * len(x) ** (1 / m) / len(x), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("largest", [3e38, 1e-38, 1.1754944e-38])
def test_the_largest_element_arrives_as_it_was(bits: int, largest: float) -> None:
    x = torch.tensor([0.0, -largest, largest])
    assert torch.equal(QSGD(bits=bits)(x), x)


@pytest.mark.parametrize(
    "operator",
    [
        QSGD(bits=4),
        MinMax(bits=1),
        MinMax(bits=4),
        Rotated(bits=4),
        OneBit(),
        Sign(m=math.inf),
        TQSGD(bits=8),
        TQSGD(bits=8, model="power"),
    ],
)
@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("largest", [1e30, 1e37, 1e38, 3e38])
def test_receivers_are_told_of_what_they_would_make_inf(operator: Operator, largest: float, count: int) -> None:
    x = torch.cat([torch.tensor([-largest, largest]), torch.full((62,), largest / 3)])[:count]
    message = operator.encode(x, generator=torch.Generator().manual_seed(0))
    assert bool(message.is_finite()) == bool(torch.isfinite(message.decode()).all())
    assert largest > 1e30 or bool(message.is_finite())


@pytest.mark.parametrize("seed", range(8))
def test_what_is_summed_may_all_be_near_one_extreme(seed: int) -> None:
    """The four rotated elements are all 1.7e38 or all −1.7e38: their range is zero, their sum infinite."""
    x = torch.tensor([-3.4028235e38, 1.0, 0.0])
    for operator in (Rotated(bits=4), OneBit()):
        message = operator.encode(x, generator=torch.Generator().manual_seed(seed))
        assert bool(message.is_finite()) == bool(torch.isfinite(message.decode()).all())


@pytest.mark.parametrize("sparsifier", [RandK(k=50, shared=True), RandomBlock(k=50)])
def test_what_is_shared_chooses_and_does_not_round(sparsifier: Operator) -> None:
    x = torch.tensor([0.5, 1.0]).repeat(50)
    operator = compose(sparsifier, QSGD(levels=1))
    assert operator.shared_draws

    def message(rank: int) -> Message:
        own, alike = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(7)
        return operator.encode(x, generator=own, shared=alike)

    first, second = message(1), message(2)
    assert first.rule == second.rule
    levels = [m.values.levels for m in (first, second)]  # type: ignore[attr-defined]
    assert 3 < int((levels[0] != levels[1]).sum()) < 25  # every other of about 25 that are halves


def test_scaling_needs_a_bound() -> None:
    for quantizer in (Sign(), TernGrad(), TNQSGD(bits=3), OneBit(scale=1.0)):
        with pytest.raises(ValueError, match="scaled=True needs a variance bound"):
            compose(TopK(k=5), quantizer, scaled=True)


@pytest.mark.parametrize("d", [1, 8, 40])
def test_rotated_is_unbiased_within_its_bound(d: int) -> None:
    x = sample(d, "heavy")
    operator, draws = Rotated(levels=15), 4000
    mean, squares = errors(operator, x, draws)
    bound = operator.variance_bound(d) * float(x.square().sum())
    assert float(squares.mean()) <= bound
    assert float((mean - x).norm()) <= SIGMAS * math.sqrt(bound / draws)


@pytest.mark.parametrize(("d", "n"), [(64, 64), (65, 128), (100, 128)])
def test_one_bit_error_is_exact(d: int, n: int) -> None:
    """(d/n)(n λ² − ‖x‖²) when nothing is beyond λ: receivers leave out the padding, with its share of the error."""
    x = sample(d)
    scale = 10.0
    mean, squares = errors(OneBit(scale=scale), x, 4000)
    expected = d / n * (n * scale**2 - float(x.square().sum()))
    assert abs(float(squares.mean()) - expected) <= SIGMAS * float(squares.std()) / 4000**0.5
    assert float((mean - x).norm()) <= SIGMAS * math.sqrt(expected / 4000)


def test_one_bit_default_scale_has_its_relative_variance() -> None:
    x = sample(256)
    _, squares = errors(OneBit(), x, 2000)
    expected = OneBit().variance_bound(256) * float(x.square().sum())
    assert abs(float(squares.mean()) - expected) <= SIGMAS * float(squares.std()) / 2000**0.5
    # Figures of the table for δ = 0.01.
    assert OneBit().variance_bound(1024) == pytest.approx(23.5, abs=0.05)
    assert OneBit().variance_bound(2**20) == pytest.approx(37.3, abs=0.05)


@pytest.mark.parametrize("m", [1, 2, 3, 20, 500, math.inf])
@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e10])
def test_sign_by_lemma_3(m: float, scale: float) -> None:
    """The norm's powers would leave the range of a float, be the elements large or small."""
    received = Sign(m=m)(scale * sample(50, "heavy")) / scale
    x = sample(50, "heavy")
    largest = float(x.abs().max())
    norm = largest * float(torch.linalg.vector_norm(x.double() / largest, ord=m))
    error = float((received - x).square().sum())
    l1, energy = float(x.abs().sum()), float(x.square().sum())
    assert error == pytest.approx(energy - (2 * norm * l1 - norm**2) / 50)
    assert error <= (1 - Sign(m=m).gamma(50)) * energy
    if m == 1:
        assert error == pytest.approx(energy - l1**2 / 50)


@pytest.mark.parametrize(
    "operator", [QSGD(bits=4, norm="l2"), QSGD(bits=4, norm="l2", bucket=2), OneBit(), Sign(m=1), Sign(m=2)]
)
@pytest.mark.parametrize("scale", [2.0**-700, 2.0**700])
def test_norms_of_float64_in_any_unit(operator: Operator, scale: float) -> None:
    """Squares of the elements leave a float64's range. A power of two as unit changes no bit."""
    x = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.0, 0.0, 1e-3, 5e-4], dtype=torch.float64)
    received, scaled = (operator(unit * x, generator=torch.Generator().manual_seed(0)) for unit in (1.0, scale))
    assert received.any()
    assert torch.equal(scaled / scale, received)


def test_each_row_of_float64_has_its_own_unit() -> None:
    x = torch.tensor([3e200, 4e200, 3e-200, 4e-200, 0.0, 0.0], dtype=torch.float64)
    scales = QSGD(bits=4, norm="l2", bucket=2).encode(x).values.floats
    assert torch.allclose(scales, torch.tensor([5e200, 5e-200, 0.0], dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("quantizer", [QSGD(bits=4), Sign(), Sign(m=2)])
def test_nothing_is_composed_without_loss(quantizer: Quantizer) -> None:
    assert compose(TopK(k=3), quantizer).gamma(0) == 1.0


def test_sign_of_zero_is_plus() -> None:
    assert Sign()(torch.tensor([0.0, -0.0, -2.0, 2.0])).tolist() == [1.0, 1.0, -1.0, 1.0]


# Sparsifiers by chance


@pytest.mark.parametrize(("d", "k"), [(5, 2), (9, 1)])
def test_every_subset_is_equally_likely(d: int, k: int) -> None:
    """Both ways of drawing: a permutation (5, 2) and distinct draws (9, 1). Each count is binomial."""
    draws = 4000
    counts = dict.fromkeys(itertools.combinations(range(d), k), 0)
    for seed in range(draws):
        counts[tuple(random_subset(d, k, seed).tolist())] += 1
    p = 1 / len(counts)
    assert all(abs(n - draws * p) <= SIGMAS * math.sqrt(draws * p * (1 - p)) for n in counts.values())


def test_distinct_draws_are_distinct_and_uniform_in_the_large() -> None:
    chosen = random_subset(10**9, 100_000, 3)
    assert len(chosen.unique()) == 100_000
    assert abs(float(chosen.double().mean()) / 1e9 - 0.5) <= SIGMAS / math.sqrt(12 * 100_000)


@pytest.mark.parametrize("operator", [RandK(k=10), RandomBlock(k=10), RandK(ratio=0.25, shared=True)])
def test_expected_error_is_what_is_left(operator: Any) -> None:
    x = sample(40)
    _, squares = errors(operator, x, 4000)
    expected = (1 - operator.gamma(40)) * float(x.square().sum())
    assert operator.gamma(40) == 0.25
    assert abs(float(squares.mean()) - expected) <= SIGMAS * float(squares.std()) / 4000**0.5


def test_block_goes_on_at_the_front() -> None:
    x = torch.arange(1.0, 8.0)
    seen = {tuple(RandomBlock(k=3)(x, generator=torch.Generator().manual_seed(seed)).tolist()) for seed in range(200)}
    wanted = {tuple(v if (i - start) % 7 < 3 else 0.0 for i, v in enumerate(x.tolist())) for start in range(7)}
    assert seen == wanted


def test_threshold() -> None:
    x = torch.tensor([0.5, -2.0, math.nan, 1.0, -0.9])
    kept = Threshold(threshold=1.0).encode(x)
    assert kept.indices is not None
    assert kept.indices.tolist() == [1, 2, 3]
    assert not bool(kept.is_finite())


@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 3.0, math.nan, math.inf]), max_size=12),
    st.sampled_from([0.5, 1.0, 2.0, 9.0]),
    st.integers(0, 6),
    st.integers(0, 6),
)
def test_threshold_within_limits(x: list[float], threshold: float, at_least: int, more: int) -> None:
    """As top-k with the number of elements that pass, cut to the limits."""
    tensor = torch.tensor(x)
    passing = sum(not abs(v) < threshold for v in x)
    count = min(max(passing, at_least), at_least + more, len(x))
    message = Threshold(threshold, at_least, at_least + more).encode(tensor)
    assert len(message.values) == count
    expected = TopK(k=count)(tensor) if count else torch.zeros(len(x))
    assert torch.equal(message.decode().nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


# Compositions


@pytest.mark.parametrize("first", [TopK(k=8), RandK(k=8)])
@pytest.mark.parametrize("scaled", [False, True])
def test_composition_errors_by_lemmas_1_and_2(first: Any, scaled: bool) -> None:
    """‖x‖² − 2a‖c‖² + a²(‖c‖² + Var), a = 1/(1 + β) or 1; for Rand_k the expectation is over the subset too."""
    x = sample(40, "heavy")
    quantizer = QSGD(levels=4, norm="l2")
    operator = compose(first, quantizer, scaled=scaled)
    beta = min(8 / 16, math.sqrt(8) / 4)
    a = 1 / (1 + beta) if scaled else 1.0
    generator = torch.Generator().manual_seed(1)
    squares, expected = [], []
    for _ in range(3000):
        message = operator.encode(x, generator=generator)
        assert message.indices is not None
        c = x[message.indices]
        norm = float(c.norm())
        variance = float(rounding_variance(c.abs() * 4 / norm, norm / 4).sum())
        energy = float(c.square().sum())
        expected.append(float(x.square().sum()) - 2 * a * energy + a * a * (energy + variance))
        squares.append(float((message.decode() - x).square().sum()))
    difference = torch.tensor(squares) - torch.tensor(expected)
    assert abs(float(difference.mean())) <= SIGMAS * float(difference.std()) / 3000**0.5
    gamma = 8 / 40 / (1 + beta) if scaled else (1 - beta) * 8 / 40
    assert operator.gamma(40) == pytest.approx(gamma)
    assert sum(squares) / 3000 <= (1 - gamma) * float(x.square().sum())


@pytest.mark.parametrize("m", [1, 2, math.inf])
def test_sign_top_k_by_lemma_3(m: float) -> None:
    x = sample(60, "heavy")
    c = TopK(k=9)(x)
    norm, l1 = float(torch.linalg.vector_norm(c, ord=m)), float(c.abs().sum())
    operator = compose(TopK(k=9), Sign(m=m))
    error = float((operator(x) - x).square().sum())
    assert error == pytest.approx(float(x.square().sum()) - (2 * norm * l1 - norm**2) / 9)
    assert error <= (1 - operator.gamma(60)) * float(x.square().sum())
    assert operator.gamma(60) == pytest.approx(1 / 60 if m == 1 else 9 ** (2 / m - 1) / 60)


def test_betas_of_the_paper_at_k_1000() -> None:
    for s, beta in [(3, 10.54), (7, 4.518), (15, 2.108), (255, 0.01538), (256, 0.01526)]:
        assert QSGD(levels=s, norm="l2").variance_bound(1000) == pytest.approx(beta, rel=1e-3)


def test_a_composition_that_is_no_contraction_is_refused_with_the_remedies() -> None:
    with pytest.raises(ValueError, match=r"β = 4.518.*scaled=True, norm='max'.*bucket.*more bits"):
        compose(TopK(k=1000), QSGD(bits=4, norm="l2"))
    compose(TopK(k=1000), QSGD(bits=4, norm="l2"), scaled=True)
    compose(TopK(k=1000), QSGD(bits=4))
    compose(TopK(k=1000), QSGD(bits=4, norm="l2", bucket=40))
    by_ratio = compose(TopK(ratio=0.5), QSGD(bits=4, norm="l2"))
    by_ratio(torch.ones(20))
    with pytest.raises(ValueError, match="no contraction"):
        by_ratio(torch.ones(2000))


def test_max_norm_bound_is_attained() -> None:
    """The worst x of the derivation has exactly that ratio of variance to energy."""
    s, n = 3, 50
    a = s**2 / (n - 1)
    f = math.sqrt(a * a + a) - a
    x = torch.tensor([float(s)] + [f] * (n - 1), dtype=torch.float64)
    variance = float(rounding_variance(x, 1.0).sum())
    assert variance / float(x.square().sum()) == pytest.approx(QSGD(levels=s).variance_bound(n), rel=1e-12)


@given(st.integers(1, 2**15 - 1), st.integers(0, 10**9))
def test_max_norm_bound_for_any_number_of_steps(s: int, n: int) -> None:
    """Against 50 digits of the formula, which is a difference of nearly equal numbers for many steps."""
    with localcontext() as context:
        context.prec = 50
        t = Decimal(max(n - 1, 0)) / s**2
        exact = float(((1 + t).sqrt() - 1) / 2)
    bound = QSGD(levels=s).variance_bound(n)
    assert bound == pytest.approx(exact, rel=1e-14, abs=0)
    assert (bound > 0) == (n > 1)
    if bound < 1:
        assert 0 < QSGD(levels=s).gamma(n) <= 1


@pytest.mark.parametrize(
    "arguments",
    [(QSGD(bits=4), TopK(k=1)), (TopK(k=1), TopK(k=1)), (compose(TopK(k=1), Sign()), Sign()), (3, Sign())],
)
def test_only_a_sparsifier_and_a_quantizer_compose(arguments: Any) -> None:
    with pytest.raises(TypeError, match="a sparsifier and a quantizer"):
        compose(*arguments)


# What holds for all of them

EVERY: list[Operator] = [
    TopK(k=3),
    RandK(k=3),
    RandomBlock(ratio=0.3),
    Threshold(threshold=0.5),
    QSGD(bits=4),
    QSGD(levels=200, norm="l2"),
    QSGD(bits=2, bucket=3),
    MinMax(bits=1),
    MinMax(bits=11),
    Rotated(bits=3),
    OneBit(),
    Sign(),
    Sign(m=2),
    TernGrad(),
    TNQSGD(bits=4),
    TNQSGD(bits=9, model="power"),
    TQSGD(bits=3),
    TBQSGD(bits=4, zero=True),
    compose(TopK(k=4), TNQSGD(bits=3)),
    compose(TopK(k=4), QSGD(bits=4)),
    compose(TopK(k=4), QSGD(bits=3, norm="l2"), scaled=True),
    compose(RandK(k=4), Rotated(bits=4)),
    compose(RandomBlock(k=4), MinMax(bits=2)),
    compose(TopK(ratio=0.2), Sign()),
    compose(TopK(k=5), QSGD(bits=5, bucket=2)),
]
SHAPES = [(1,), (7,), (2, 3, 5), (0,), (), (64,), (3, 0)]


@pytest.mark.parametrize("operator", EVERY, ids=repr)
def test_receivers_see_what_the_sender_computes(operator: Operator) -> None:
    for shape, dtype in itertools.product(SHAPES, [torch.float32, torch.float64, torch.float16, torch.bfloat16]):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        before = x.clone()
        here = operator(x, generator=torch.Generator().manual_seed(9))
        sent = operator.encode(x, generator=torch.Generator().manual_seed(9)).to_bytes()
        there = Message.from_bytes(sent).decode()
        assert here.shape == there.shape == x.shape
        assert here.dtype == there.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(here, there)
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", [*EVERY, TopK(ratio=1.0), CAT()], ids=repr)
def test_split_is_encode_of_the_sum_and_what_that_leaves(operator: Operator, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(500, dtype=dtype, generator=generator), torch.randn(500, dtype=dtype, generator=generator)
    total, addend, before = x + other, other.clone(), x.clone()
    encoded = operator.encode(total, generator=torch.Generator().manual_seed(1))
    expected, left = encoded.to_bytes(), encoded.decode().neg().add(total)
    for out in (torch.empty_like(x), x):
        assert torch.equal(x, before)
        message = operator.split(x, other, out, generator=torch.Generator().manual_seed(1))
        assert torch.equal(out, left)
        assert torch.equal(other, addend)
        assert message.to_bytes() == expected
        out.fill_(9)  # the memory changes it at once
        assert message.to_bytes() == expected


@pytest.mark.parametrize("operator", EVERY, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_overflow_is_seen_by_receivers(operator: Operator, bad: float) -> None:
    for place in range(20):
        x = torch.randn(20, generator=torch.Generator().manual_seed(3))
        x[place] = bad
        received = Message.from_bytes(operator.encode(x, generator=torch.Generator().manual_seed(place)).to_bytes())
        assert not bool(received.is_finite())
        assert not bool(torch.isfinite(received.decode()).all())


@pytest.mark.parametrize("operator", EVERY, ids=repr)
def test_zeros_stay_finite(operator: Operator) -> None:
    compressed = operator(torch.zeros(20), generator=torch.Generator().manual_seed(0))
    assert not compressed.any()


@pytest.mark.parametrize("operator", EVERY, ids=repr)
def test_the_global_generator_is_not_touched(operator: Operator) -> None:
    before = torch.get_rng_state()
    operator(torch.ones(30), generator=torch.Generator().manual_seed(0))
    operator(torch.ones(30))
    assert torch.equal(before, torch.get_rng_state())


CONTRACTIONS = [
    *[op for op in EVERY if isinstance(op, TopK | RandK | RandomBlock | Sign)],
    *[op for op in EVERY if isinstance(op, Composed) and isinstance(op.quantizer, QSGD | Sign)],
]


@pytest.mark.parametrize("operator", CONTRACTIONS, ids=repr)
@pytest.mark.parametrize("kind", ["normal", "heavy", "one", "constant", "ramp"])
def test_gamma_holds(operator: Operator, kind: str) -> None:
    """The mean error over draws is at most (1 − γ)‖x‖², within five standard errors."""
    x = {
        "one": torch.eye(30, dtype=torch.float64)[4],
        "constant": torch.ones(30, dtype=torch.float64),
        "ramp": torch.arange(30, dtype=torch.float64),
    }.get(kind)
    x = sample(30, kind) if x is None else x
    _, squares = errors(operator, x, 500)
    try:
        gamma = operator.gamma(30)
    except NotImplementedError:
        pytest.skip("states no γ for these settings")
    bound = (1 - gamma) * float(x.square().sum()) * (1 + 1e-12)
    assert float(squares.mean()) <= bound + SIGMAS * float(squares.std()) / 500**0.5


@given(st.integers(0, 7), st.integers(0))
def test_hadamard_is_orthonormal_and_its_own_inverse(m: int, seed: int) -> None:
    x = torch.randn(2**m, generator=torch.Generator().manual_seed(seed % 2**60), dtype=torch.float64)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-12)
    assert float(hadamard(x).norm()) == pytest.approx(float(x.norm()), abs=1e-12)
    if m <= 3:
        h = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(m):
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        assert torch.allclose(hadamard(x), h @ x / 2 ** (m / 2))


# Bytes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 10])
def test_dense_levels_take_their_bits(bits: int) -> None:
    d = 100_000
    for operator in (QSGD(bits=bits), MinMax(bits=bits)):
        sent = operator.encode(torch.randn(d), generator=torch.Generator().manual_seed(0)).to_bytes()
        assert math.ceil(d * bits / 8) <= len(sent) <= math.ceil(d * bits / 8) + 40 + 17
    assert len(Sign().encode(torch.randn(d)).to_bytes()) <= d / 8 + 40 + 17


def test_composition_takes_indices_at_entropy_and_values_at_their_bits() -> None:
    d, k = 1_000_000, 10_000
    generator = torch.Generator().manual_seed(0)
    limit = (math.lgamma(d + 1) - math.lgamma(k + 1) - math.lgamma(d - k + 1)) / math.log(2) / 8
    x = torch.randn(d, generator=generator)
    for operator, bits in [(compose(TopK(k=k), QSGD(bits=4)), 4), (compose(TopK(k=k), Sign()), 1)]:
        assert len(operator.encode(x, generator=generator).to_bytes()) <= 1.01 * (limit + k * bits / 8) + 80
    # Levels that are zero are not sent: with the l2 norm most are.
    sent = compose(TopK(k=k), QSGD(bits=4, norm="l2"), scaled=True).encode(x, generator=generator)
    assert len(sent.to_bytes()) < 0.25 * (limit + k * 4 / 8)
    # Indices that receivers draw again cost nothing.
    assert len(compose(RandK(k=k), QSGD(bits=4)).encode(x, generator=generator).to_bytes()) <= k * 4 / 8 + 80
    assert len(RandomBlock(k=k).encode(x, generator=generator).to_bytes()) <= 4 * k + 80


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: QSGD(), ValueError),
        (lambda: QSGD(levels=3, bits=2), ValueError),
        (lambda: QSGD(levels=0), ValueError),
        (lambda: QSGD(bits=1), ValueError),
        (lambda: QSGD(bits=40), ValueError),
        (lambda: cast(Any, QSGD)(bits=2.0), TypeError),
        (lambda: cast(Any, QSGD)(bits=4, norm="l1"), ValueError),
        (lambda: QSGD(bits=4, bucket=-1), ValueError),
        (lambda: MinMax(bits=0), ValueError),
        (lambda: MinMax(levels=2**16), ValueError),
        (lambda: Rotated(), ValueError),
        (lambda: OneBit(scale=0.0), ValueError),
        (lambda: OneBit(failure=1.0), ValueError),
        (lambda: Sign(m=0.5), ValueError),
        (lambda: Sign(m=1.5), ValueError),
        (lambda: TernGrad(clip=0.0), ValueError),
        (lambda: Threshold(threshold=0.0), ValueError),
        (lambda: RandK(k=0), ValueError),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


@pytest.mark.parametrize(
    ("make", "which"),
    [
        (lambda: QSGD(bits=17), "bits must be from 2 to 16, got 17"),
        (lambda: MinMax(bits=0), "bits must be from 1 to 16, got 0"),
        (lambda: TNQSGD(bits=1, zero=True), "bits must be from 2 to 12, got 1"),
        (lambda: QSGD(levels=2**15), "levels must be from 1 to 32767, got 32768"),
    ],
)
def test_what_is_out_of_range_is_told_the_range(make: Any, which: str) -> None:
    with pytest.raises(ValueError, match=which):
        make()


@pytest.mark.gpu
@pytest.mark.parametrize("operator", EVERY, ids=repr)
def test_gpu_messages_decode_alike_everywhere(operator: Operator) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).cuda()
    message = operator.encode(x, generator=torch.Generator("cuda").manual_seed(0))
    assert message.device.type == "cuda"
    assert torch.allclose(message.decode().cpu(), Message.from_bytes(message.to_bytes()).decode(), atol=1e-6)
