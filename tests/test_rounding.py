"""Random draws, and rounding by them: the published generator, and compiled loops that equal their definitions."""

from __future__ import annotations

import math
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import AWKWARD, FLOATS, equal
from torch import Tensor

from hvd_compress.kernels import (
    choose_by_chance,
    hadamard,
    look_up,
    look_up_runs,
    native,
    random_signs,
    random_subset,
    round_by_chance,
    round_runs_to_largest,
    round_to_largest,
)
from hvd_compress.kernels.draws import draw_seed, uniform, uniform_by_torch, uniform_of, words
from hvd_compress.kernels.hadamard import hadamard_by_torch, random_signs_by_torch
from hvd_compress.kernels.rounding import (
    choose_by_chance_by_torch,
    look_up_by_torch,
    look_up_runs_by_torch,
    round_by_chance_by_torch,
    round_to_largest_by_torch,
)
from hvd_compress.kernels.subset import first_different
from hvd_compress.operators import QSGD, TNQSGD, MinMax, OneBit, Operator, RandK, Rotated

loops = pytest.importorskip("hvd_compress.kernels._native", reason="the extension was not built")

SIZES = [0, 1, 3, 4, 5, 255, 256, 257, 600, 70_001]  # around a counter's words, a chunk, several
LARGE = 1_000_003  # worth several threads


# Draws


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10, as its authors write it down."""
    mask = 2**32 - 1
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & mask, a >> 32 ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # "Known answers" of Random123, the authors' library
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_generator_below_is_the_published_one(counter: str, key: str, expected: str) -> None:
    numbers = [[int(word, 16) for word in some.split()] for some in (counter, key, expected)]
    assert philox(numbers[0], numbers[1]) == numbers[2]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**61 + 2**31 + 5, 2**62 - 1])
def test_words_are_the_published_generators(seed: int) -> None:
    expected = [word for i in range(100) for word in philox([i, 0, 0, 0], [seed % 2**32, seed >> 32])]
    assert words(seed, 399).tolist() == expected[:399]
    assert uniform_of(seed, 399, torch.float32).tolist() == [word // 2**8 / 2**24 for word in expected[:399]]
    pairs = zip(expected[::2], expected[1::2], strict=True)
    in_full = [float(Fraction((high >> 5) * 2**26 + (low >> 6), 2**53)) for high, low in pairs]
    assert uniform_of(seed, 199, torch.float64).tolist() == in_full[:199]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [*SIZES, LARGE])
def test_compiled_draws(n: int, dtype: torch.dtype) -> None:
    draw = loops.uniform32 if dtype == torch.float32 else loops.uniform64
    expected = uniform_by_torch(7, n, dtype)
    for threads in (1, 2, 3):
        assert torch.equal(torch.from_numpy(draw(7, n, threads)), expected)


def test_draws_go_on_with_the_generator() -> None:
    generator = torch.Generator().manual_seed(3)
    like = torch.empty(0)
    first, second = uniform(50, generator, like), uniform(50, generator, like)
    assert not torch.equal(first, second)
    assert torch.equal(uniform(50, generator.manual_seed(3), like), first)
    assert bool((first >= 0).all())
    assert bool((first < 1).all())


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 8191, 8192, 8193, LARGE])
def test_compiled_signs(n: int) -> None:
    expected = random_signs_by_torch(n, 2**61 + 3)
    assert torch.equal(random_signs(n, 2**61 + 3, torch.device("cpu")), expected)
    for threads in (2, 3):
        assert torch.equal(torch.from_numpy(loops.random_signs(2**61 + 3, n, threads)), expected)


@given(st.integers(0, 3000), st.data(), st.integers(0, 2**62 - 1))
def test_compiled_subsets(numel: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(0, numel // 4))
    subset = random_subset(numel, count, seed)
    assert torch.equal(subset, first_different(numel, count, seed))
    assert len(subset) == count
    assert torch.equal(subset, subset.unique())
    assert count == 0 or (int(subset[0]) >= 0 and int(subset[-1]) < numel)


@pytest.mark.parametrize("numel", [2**31 + 11, 2**40 + 7])
def test_subsets_of_what_has_more_than_32_bits(numel: int) -> None:
    # Within five standard deviations but for one seed of two million.
    subset = random_subset(numel, 1000, 5)
    assert len(subset) == 1000
    assert int(subset[-1]) < numel
    assert abs(float((subset > numel // 2).sum()) - 500) < 80


# The rotation


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("exponent", range(18))
def test_compiled_transform(exponent: int, dtype: torch.dtype) -> None:
    x = some(1 << exponent, dtype, 0.0, exponent)
    assert torch.equal(hadamard(x), hadamard_by_torch(x))
    odd = some(1 << exponent, dtype, 1.0, exponent)
    assert equal(hadamard(odd), hadamard_by_torch(odd))


# Rounding


def some(numel: int, dtype: torch.dtype, awkward: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(numel, generator=generator, dtype=dtype)
    odd = torch.tensor(AWKWARD, dtype=dtype)[torch.randint(len(AWKWARD), (numel,), generator=generator)]
    return torch.where(torch.rand(numel, generator=generator) < awkward, odd, drawn)


def draws_of(seed: int, flat: Tensor) -> Tensor:
    return uniform(len(flat), torch.Generator().manual_seed(seed), flat)


@given(
    st.sampled_from(SIZES),
    st.sampled_from(FLOATS),
    st.sampled_from([0, 1, 3, 64, 256, 1000]),
    st.sampled_from([(-1, 1), (-7, 7), (0, 1), (0, 255), (0, 256), (-(2**15) + 1, 2**15 - 1), (0, 2**16 - 1)]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.integers(0, 2**32),
)
def test_round_by_chance(
    numel: int, dtype: torch.dtype, bucket: int, bounds: tuple[int, int], awkward: float, seed: int
) -> None:
    flat = some(numel, dtype, awkward, seed)
    steps = some(max(1, -(-numel // bucket)) if bucket else 1, dtype, awkward, seed + 1).abs() / bounds[1]
    offset = some(1, dtype, awkward, seed + 2)[0]
    ours = round_by_chance(flat, offset, steps, bucket, *bounds, torch.Generator().manual_seed(seed))
    theirs = round_by_chance_by_torch(flat, offset, steps, bucket, *bounds, draws_of(seed, flat))
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    assert numel == 0 or (int(ours.min()) >= 0 and int(ours.max()) <= bounds[1] - bounds[0])


@given(
    st.sampled_from(SIZES),
    st.sampled_from(FLOATS),
    st.sampled_from([1, 7, 127, 128, 2**15 - 1]),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.integers(0, 2**32),
)
def test_round_to_largest(numel: int, dtype: torch.dtype, s: int, awkward: float, seed: int) -> None:
    flat = some(numel, dtype, awkward, seed)
    levels, largest = round_to_largest(flat, s, torch.Generator().manual_seed(seed))
    expected, norm = round_to_largest_by_torch(flat, s, draws_of(seed, flat))
    assert equal(largest, norm)
    assert levels.dtype == expected.dtype
    assert torch.equal(levels, expected)


@given(
    st.lists(st.sampled_from(SIZES), min_size=1, max_size=5),
    st.sampled_from(FLOATS),
    st.sampled_from([1, 7, 127, 128]),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.integers(0, 2**32),
)
def test_round_runs_to_largest(counts: list[int], dtype: torch.dtype, s: int, awkward: float, seed: int) -> None:
    flat = some(sum(counts), dtype, awkward, seed)
    seeds = [seed + run for run in range(len(counts))]
    ours = round_runs_to_largest(flat, counts, s, [torch.Generator().manual_seed(one) for one in seeds])
    runs = zip(flat.split(counts), seeds, strict=True)
    each = [round_to_largest(run, s, torch.Generator().manual_seed(one)) for run, one in runs]
    for all_of_them, some_of_them in zip(ours, map(torch.cat, zip(*each, strict=True)), strict=True):
        assert all_of_them.dtype == some_of_them.dtype
        assert equal(all_of_them, some_of_them)
    with mock.patch.object(native, "serves", return_value=False):
        theirs = round_runs_to_largest(flat, counts, s, [torch.Generator().manual_seed(one) for one in seeds])
    assert all(map(equal, ours, theirs))


def test_wrong_runs() -> None:
    flat = torch.ones(5)
    with pytest.raises(ValueError, match="counts are not as many"):
        native.round_runs_to_largest(flat, [2, 2], 7, [0, 1])
    with pytest.raises(ValueError, match="counts are impossible"):
        native.round_runs_to_largest(flat, [6, -1], 7, [0, 1])
    with pytest.raises(ValueError, match="a seed for each run"):
        native.round_runs_to_largest(flat, [2, 3], 7, [0])


@pytest.mark.parametrize(
    "values", [[], [0.0, -0.0], [-3.0, 2.0], [1.0, -math.inf], [math.nan, math.inf], [-1e-45, 0]]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_magnitude(dtype: torch.dtype, values: list[float]) -> None:
    for copies in (1, 40):  # of vectors of a processor, too
        flat = torch.tensor(values * copies, dtype=dtype)
        largest = round_to_largest(flat, 7, None)[1].tolist()
        magnitudes = flat.abs().tolist()
        if any(map(math.isnan, magnitudes)):
            assert math.isnan(largest[0])
        else:
            assert largest == [max(magnitudes, default=0.0)]


@given(
    st.sampled_from(SIZES),
    st.sampled_from(FLOATS),
    st.sampled_from([2, 3, 8, 64, 65, 256, 257, 4097]),
    st.sampled_from(["even", "uneven", "equal", "nan"]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.integers(0, 2**32),
)
def test_choose_by_chance(numel: int, dtype: torch.dtype, entries: int, kind: str, awkward: float, seed: int) -> None:
    flat = some(numel, dtype, awkward, seed)
    table = {
        "even": torch.linspace(-1, 1, entries, dtype=dtype),
        "uneven": some(entries, dtype, 0.0, seed + 1).sort().values,
        "equal": torch.zeros(entries, dtype=dtype),
        "nan": torch.full((entries,), math.nan, dtype=dtype),
    }[kind]
    ours = choose_by_chance(flat, table, torch.Generator().manual_seed(seed))
    theirs = choose_by_chance_by_torch(flat, table, draws_of(seed, flat))
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    assert numel == 0 or (int(ours.min()) >= 0 and int(ours.max()) < entries)


def test_rounding_of_many_by_several_threads() -> None:
    flat = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
    seed = draw_seed(torch.Generator().manual_seed(5))
    steps, table = torch.rand(-(-LARGE // 700)) + 0.1, torch.linspace(-2, 2, 16)
    rounded = round_by_chance_by_torch(flat, torch.zeros(()), steps, 700, -7, 7, draws_of(5, flat))
    chosen = choose_by_chance_by_torch(flat, table, draws_of(5, flat))
    for threads in (1, 2, 3):
        ours = loops.round_by_chance(flat.numpy(), 0.0, steps.numpy(), 700, -7, 7, seed, threads)
        assert torch.equal(torch.from_numpy(ours), rounded)
        ours = loops.choose_by_chance(flat.numpy(), table.numpy(), seed, threads)
        assert torch.equal(torch.from_numpy(ours), chosen)
        values = loops.look_up(table.numpy(), chosen.numpy(), threads)
        assert torch.equal(torch.from_numpy(values), table[chosen.long()])


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_element_is_rounded_up_as_often_as_its_draws_say(dtype: torch.dtype) -> None:
    # Exact: of the draws of one seed, so many are below the fraction.
    n = 100_000
    for fraction in (0.0, 0.125, 0.7):
        flat = torch.full((n,), 3 + fraction, dtype=dtype)
        below = int((draws_of(1, flat) < flat - 3).sum())
        levels = round_by_chance(
            flat, flat.new_zeros(()), flat.new_ones(1), 0, 0, 7, torch.Generator().manual_seed(1)
        )
        assert levels.bincount(minlength=8).tolist() == [0, 0, 0, n - below, below, 0, 0, 0]
        # A binomial count is within five standard deviations but for one seed of two million.
        assert abs(below - n * fraction) <= 5 * math.sqrt(n * fraction * (1 - fraction))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("levels", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("entries", [1, 2, 200])
def test_look_up(entries: int, levels: torch.dtype, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    table = some(entries, dtype, 0.5, 0)
    chosen = torch.randint(entries, (5000,), generator=generator).to(levels)
    assert equal(look_up(table, chosen), look_up_by_torch(table, chosen))
    assert look_up(table, chosen[:0]).shape == (0,)
    chosen[77] = entries
    with pytest.raises(IndexError):
        look_up(table, chosen)
    if levels.is_signed:
        chosen[77] = -1
        with pytest.raises(IndexError):
            look_up(table, chosen)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("levels", [torch.uint8, torch.int32, torch.int64])
def test_look_up_runs(levels: torch.dtype, dtype: torch.dtype) -> None:
    table, counts = some(15, dtype, 0.2, 0), [3, 0, 500, 1]
    scales = some(4, dtype, 0.5, 1)
    chosen = torch.randint(15, (504,), generator=torch.Generator().manual_seed(0)).to(levels)
    runs = zip(chosen.split(counts), scales, strict=True)
    assert equal(look_up_runs(table, chosen, counts, scales), torch.cat([table[run.long()] * s for run, s in runs]))
    assert equal(look_up_runs(table, chosen, counts, scales), look_up_runs_by_torch(table, chosen, counts, scales))
    assert look_up_runs(table, chosen[:0], [], scales[:0]).shape == (0,)
    for wrong in ([3, 0, 500], [3, 0, 500, 2], [504, 0, -1, 1]):
        with pytest.raises(ValueError, match="count"):
            look_up_runs(table, chosen, wrong, scales[: len(wrong)])
    with pytest.raises(ValueError, match="a scale for each run"):
        look_up_runs(table, chosen, counts, scales[:3])
    chosen[503] = 15
    with pytest.raises(IndexError):
        look_up_runs(table, chosen, counts, scales)


def test_wrong_arguments_are_errors() -> None:
    x, step, table = torch.zeros(10).numpy(), torch.ones(1).numpy(), torch.arange(3.0).numpy()
    with pytest.raises(ValueError, match="a step for each bucket"):
        loops.round_by_chance(x, 0.0, step, 9, 0, 1, 0, 1)
    with pytest.raises(ValueError, match="one element or more"):
        loops.round_by_chance(x, 0.0, step, 0, 0, 1, 0, 1)
    with pytest.raises(ValueError, match="16 bits"):
        loops.round_by_chance(x, 0.0, step, 10, 5, 5, 0, 1)
    with pytest.raises(ValueError, match="2 to 65536 entries"):
        loops.choose_by_chance(x, table[:1], 0, 1)
    with pytest.raises(ValueError, match="one dimension"):
        loops.choose_by_chance(x.reshape(2, 5), table, 0, 1)
    with pytest.raises(TypeError):
        loops.look_up(table, x, 1)


@pytest.mark.parametrize(
    "operator",
    [
        QSGD(bits=4),
        QSGD(bits=4, bucket=100),
        MinMax(bits=4),
        Rotated(bits=4),
        OneBit(),
        RandK(ratio=0.01),
        TNQSGD(bits=3),
    ],
)
def test_messages_are_the_same_without_the_loops(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_compress.kernels import native

    x = some(10_000, torch.float32, 0.0, 0)
    ours = operator.encode(x, generator=torch.Generator().manual_seed(2))
    decoded = ours.decode()
    monkeypatch.setattr(native, "_available", False)
    theirs = operator.encode(x, generator=torch.Generator().manual_seed(2))
    assert theirs.to_bytes() == ours.to_bytes()
    assert equal(theirs.decode(), decoded)


@pytest.mark.parametrize("model", ["laplace", "power"])
@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_truncated_levels_tell_what_is_not_finite(model: str, bits: int, odd: float) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[500], x[600] = odd, 0.0
    message = TNQSGD(bits=bits, model=model).encode(x)  # type: ignore[arg-type]
    assert not bool(message.is_finite())
    assert bool(message.decode().isnan().all())
