"""Compiled loops: equal to their torch expressions bit for bit, and safe whatever they are given."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire import reseal, sample
from torch import Tensor

from hvd_compress import WireError
from hvd_compress.kernels import Sparse, add_at, all_finite, is_finite, native, none_is, subtract_at, sum_at
from hvd_compress.kernels.vectors import (
    add_at_by_torch,
    is_finite_by_torch,
    subtract_at_by_torch,
    sum_at_by_torch,
)
from hvd_compress.operators import QSGD, TopK, compose
from hvd_compress.operators.topk import top_k
from hvd_compress.wire import HEADER_BYTES, Message, decode, encode
from hvd_compress.wire.bits import pack_levels, pack_levels_by_torch, unpack_levels, unpack_levels_by_torch
from hvd_compress.wire.indices import (
    decode_indices,
    decode_indices_by_torch,
    encode_indices,
    encode_indices_by_torch,
)

loops = pytest.importorskip("hvd_compress.kernels._native", reason="the extension was not built")

FLOATS = [torch.float32, torch.float64]
INFINITY = math.inf
AWKWARD = [0.0, -0.0, 1.0, -1.0, 2.0, math.nan, -math.nan, INFINITY, -INFINITY, 1e-45, -1e-45, 1e-38, 3e38, 65504.0]
numbers = st.sampled_from(AWKWARD) | st.floats(width=32)


def bits_of(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def equal(a: Tensor, b: Tensor) -> bool:
    """To the bit, but for the payload of a NaN."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and bits_of(a.masked_fill(nan, 0)) == bits_of(b.masked_fill(nan, 0))


# Top-k


def assert_selects_the_same(x: Tensor, k: int, threads: tuple[int, ...] = (1,)) -> None:
    expected = top_k(x, k)
    for unit in loops.vector_units():
        for number in threads:
            indices, values = loops.top_k(x.numpy(), k, number, unit)
            assert np.array_equal(indices, expected.numpy()), (unit, number)
            assert values.tobytes() == bits_of(x[expected]), (unit, number)
    half = x * 0.5
    assert_selects_the_same_of_a_sum(half, half.clone(), k, threads[-1:])  # of what was selected from above, mostly
    assert_selects_the_same_of_a_sum(x, x.flip(0), k, threads[-1:])


def assert_selects_the_same_of_a_sum(x: Tensor, other: Tensor, k: int, threads: tuple[int, ...]) -> None:
    total = x + other
    expected = top_k(total, k)
    for unit in loops.vector_units():
        for number in threads:
            for split, dtype in ((loops.split_top_k32, np.int32), (loops.split_top_k64, np.int64)):
                ours = x.clone()
                for out in (torch.empty_like(ours), ours):  # in place at last
                    indices, values = split([ours.numpy()], [other.numpy()], [out.numpy()], [k], number, unit)
                    assert indices.dtype == dtype
                    assert np.array_equal(indices, expected.numpy()), (unit, number)
                    # But for a NaN's payload: which of two NaNs their sum is depends on the order of the terms.
                    assert equal(torch.from_numpy(values), total[expected]), (unit, number)
                    assert equal(out, total.index_add(0, expected, total[expected], alpha=-1)), (unit, number)


@given(st.lists(st.lists(numbers, min_size=2, max_size=40), max_size=5), st.sampled_from(FLOATS), st.data())
def test_several_vectors_are_split_as_each_alone(lists: list[list[float]], dtype: torch.dtype, data: Any) -> None:
    vectors = [torch.tensor(x, dtype=dtype) for x in lists]
    ks = [data.draw(st.integers(1, len(x))) for x in lists]
    expected = [x.clone() for x in vectors]
    one_by_one = [
        native.split_top_k([x], [y], [x], [k])
        for x, y, k in zip(expected, [x.flip(0) for x in vectors], ks, strict=True)
    ]
    indices, values = native.split_top_k(vectors, [x.flip(0) for x in vectors], vectors, ks)
    assert len(indices) == len(values) == sum(ks)
    for (i, v), its_i, its_v in zip(one_by_one, indices.split(ks), values.split(ks), strict=True):
        assert torch.equal(its_i, i)
        assert bits_of(its_v) == bits_of(v)
    assert list(map(bits_of, vectors)) == list(map(bits_of, expected))


@given(st.lists(numbers, min_size=1, max_size=300), st.sampled_from(FLOATS), st.data())
def test_top_k_of_any_numbers(x: list[float], dtype: torch.dtype, data: st.DataObject) -> None:
    assert_selects_the_same(torch.tensor(x, dtype=dtype), data.draw(st.integers(1, len(x))))


@given(st.integers(1, 70_000), st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 3.0]), st.data())
@settings(max_examples=40)
def test_top_k_of_any_length(numel: int, seed: int, step: float, data: st.DataObject) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    x = x.div(step).round() if step else x
    assert_selects_the_same(x, data.draw(st.integers(1, numel)))


LARGE = 800_003  # enough for three threads
SHAPES = {
    "normal": lambda g: torch.randn(LARGE, generator=g),
    "heavy": lambda g: torch.empty(LARGE).cauchy_(generator=g),
    "ties": lambda g: torch.randn(LARGE, generator=g).round(),
    "zeros": lambda g: torch.zeros(LARGE),
    "signed zeros": lambda g: torch.randn(LARGE, generator=g) * 0,
    "equal": lambda g: torch.full((LARGE,), -3.0),
    "ascending": lambda g: torch.arange(LARGE).float(),
    "descending": lambda g: torch.arange(LARGE, 0, -1).float(),
    "periodic": lambda g: torch.arange(LARGE).remainder(13).float(),
    "one": lambda g: torch.zeros(LARGE).index_fill(0, torch.tensor([LARGE - 1]), 1.0),
    "few": lambda g: torch.randn(LARGE, generator=g) * (torch.rand(LARGE, generator=g) < 1e-4),
    "large at the end": lambda g: torch.cat([torch.randn(LARGE - 5000, generator=g), torch.full((5000,), 9.0)]),
    "denormals": lambda g: torch.randn(LARGE, generator=g) * 1e-40,
    "nan": lambda g: torch.randn(LARGE, generator=g).masked_fill(torch.rand(LARGE, generator=g) < 0.01, math.nan),
    "all nan": lambda g: torch.full((LARGE,), math.nan),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", SHAPES)
def test_top_k_of_large_tensors_in_any_number_of_threads(kind: str, dtype: torch.dtype) -> None:
    x = SHAPES[kind](torch.Generator().manual_seed(0)).to(dtype)
    for k in (1, LARGE // 100, LARGE - 1):
        assert_selects_the_same(x, k, threads=(1, 3))


def hidden_from_the_sample(k: int) -> Tensor:
    """Elements that look large wherever top_k samples, and small elsewhere, so that its threshold is far too high."""
    x = torch.full((LARGE,), 0.5).mul_(torch.rand(LARGE, generator=torch.Generator().manual_seed(0)))
    runs, run = 1024, 4
    stride = LARGE // runs
    for r in range(runs):
        at = r * stride + (((r * 0x9E3779B97F4A7C15) % 2**64 >> 32) * (stride - run + 1) >> 32)
        x[at : at + run] += 1
    return x


def test_top_k_repeats_the_pass_when_its_threshold_was_too_high() -> None:
    assert_selects_the_same(hidden_from_the_sample(LARGE // 100), LARGE // 100, threads=(1, 3))
    assert_selects_the_same(1 - hidden_from_the_sample(LARGE // 100), LARGE // 100, threads=(1, 3))


# Vectors


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_is_finite_in_threads(threads: int) -> None:
    memory = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
    assert loops.is_finite(memory.numpy(), threads)
    for place in (0, 4096, LARGE // 2, LARGE - 1):
        for bad in (math.nan, INFINITY, -INFINITY):
            changed = memory.clone()
            changed[place] = bad
            assert not loops.is_finite(changed.numpy(), threads)


@given(st.lists(numbers, max_size=50), st.sampled_from([*FLOATS, torch.float16]))
def test_is_finite(x: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(x, dtype=dtype)
    assert torch.equal(is_finite(tensor), is_finite_by_torch(tensor))


@given(st.integers(1, 60), st.data(), st.sampled_from(FLOATS), st.sampled_from([1.0, -1.0, 0.3]))
def test_add_at(numel: int, data: st.DataObject, dtype: torch.dtype, alpha: float) -> None:
    indices = torch.tensor(data.draw(st.lists(st.integers(0, numel - 1), max_size=60)), dtype=torch.int64)
    some = [data.draw(st.lists(numbers, min_size=n, max_size=n)) for n in (numel, len(indices))]
    flat, values = (torch.tensor(x, dtype=dtype) for x in some)
    theirs = flat.clone()
    ours = [flat, flat.clone()]
    add_at(ours[0], indices, values, alpha)
    add_at(ours[1], indices.to(torch.int32), values, alpha)
    add_at_by_torch(theirs, indices, values, alpha)
    assert all(equal(one, theirs) for one in ours)


@given(
    st.lists(st.sampled_from([1, 2, 100, 8191, 8192, 8193, 20_000]), max_size=3),
    st.sampled_from(FLOATS),
    st.sampled_from([1.0, 2.0, 3.0, 7.0]),
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.5])), max_size=4),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(0, 2**32),
)
def test_sums_at(
    numels: list[int],
    dtype: torch.dtype,
    divisor: float,
    ranks: list[tuple[float, float]],
    places: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def awkward_numbers(n: int) -> Tensor:
        return torch.tensor(AWKWARD, dtype=dtype)[torch.randint(len(AWKWARD), (n,), generator=generator)]

    sparse = []
    for density, awkward in ranks:
        chosen = [torch.nonzero(torch.rand(n, generator=generator) < density).reshape(-1) for n in numels]
        indices = torch.cat([torch.empty(0, dtype=torch.int64), *chosen])
        drawn = torch.randn(len(indices), generator=generator, dtype=dtype)
        is_odd = torch.rand(len(drawn), generator=generator) < awkward
        values = torch.where(is_odd, awkward_numbers(len(drawn)), drawn)
        sparse.append(Sparse(indices.to(places), values, [len(these) for these in chosen]))
    ours = [awkward_numbers(n) for n in numels]
    theirs = [flat.clone() for flat in ours]
    subtract_at(ours, sparse, divisor)
    subtract_at_by_torch(theirs, sparse, divisor)
    assert all(map(equal, ours, theirs))
    ours, theirs = ([torch.full((n,), math.nan, dtype=dtype) for n in numels] for _ in range(2))
    sum_at(ours, sparse, divisor)
    sum_at_by_torch(theirs, sparse, divisor)
    assert all(map(equal, ours, theirs))
    for threads in (2, 3):  # in blocks that begin elsewhere
        loop_sum_at(ours, sparse, divisor, threads)
        assert all(map(equal, ours, theirs))


def loop_sum_at(flats: list[Tensor], sparse: list[Sparse], *others: Any) -> None:
    indices, values = [rank.indices.numpy() for rank in sparse], [rank.values.numpy() for rank in sparse]
    loops.sum_at([f.numpy() for f in flats], indices, values, [rank.counts for rank in sparse], *others)


def test_sum_at_of_many_by_several_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = [torch.randperm(LARGE, generator=generator)[:50_000].sort().values for _ in range(3)]
    sparse = [Sparse(i, torch.randn(50_000, generator=generator), [50_000]) for i in indices]
    ours, theirs = torch.empty(LARGE), torch.empty(LARGE)
    sum_at_by_torch([theirs], sparse, 3.0)
    loop_sum_at([ours], sparse, 3.0, 3)
    assert equal(ours, theirs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("start", range(17))
def test_sum_at_writes_all_of_a_large_vector_and_nothing_else(start: int, dtype: torch.dtype) -> None:
    numel = 100_000 + start  # written past the caches, in lines, of which the first and the last may be incomplete
    around = torch.full((numel + 40,), 7, dtype=dtype)
    flat = around[start : start + numel]
    places = torch.tensor([0, 1, 5000, numel - 2, numel - 1])
    sum_at([flat], [Sparse(p, torch.ones(len(p), dtype=dtype), [len(p)]) for p in (places, places[1:])], 2.0)
    expected = torch.zeros(numel, dtype=dtype)
    expected[places] = torch.tensor([0.5, 1, 1, 1, 1], dtype=dtype)
    assert torch.equal(flat, expected)
    assert bool((around[:start] == 7).all())
    assert bool((around[start + numel :] == 7).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("start", range(8))
def test_sum_at_a_place_where_no_element_should_begin(start: int, dtype: torch.dtype) -> None:
    """As in a file behind a header of some bytes."""
    numel, size = 70_000, dtype.itemsize
    flat = torch.from_numpy(np.frombuffer(bytearray((numel + 2) * size), f"f{size}", numel, offset=start))
    sparse = [Sparse(torch.tensor([0, 1, numel - 1]), torch.ones(3, dtype=dtype), [3])]
    sum_at([flat], sparse, 2.0)
    expected = torch.zeros(numel, dtype=dtype)
    sum_at_by_torch([expected], sparse, 2.0)
    assert equal(flat, expected)


@pytest.mark.parametrize("loop", [sum_at, subtract_at])
@pytest.mark.parametrize("places", [[-1, 2], [3, 10], [4, 4], [5, 3]])
def test_sums_at_bad_indices_change_nothing(loop: Callable[..., None], places: list[int]) -> None:
    flat = torch.arange(10.0)
    with pytest.raises(ValueError, match="strictly ascending and below"):
        loop([flat], [Sparse(torch.tensor(two), torch.ones(2), [2]) for two in ([0, 1], places)])
    assert torch.equal(flat, torch.arange(10.0))


@pytest.mark.parametrize("loop", [sum_at, subtract_at])
@pytest.mark.parametrize("counts", [[2, 0], [2, 2], [4, -1], [3], [], [1, 1, 1]])
def test_sums_at_wrong_counts_change_nothing(loop: Callable[..., None], counts: list[int]) -> None:
    flats = [torch.arange(5.0), torch.arange(5.0)]
    with pytest.raises(ValueError, match="count"):
        loop(flats, [Sparse(torch.tensor([0, 1, 2]), torch.ones(3), counts)])
    assert all(torch.equal(flat, torch.arange(5.0)) for flat in flats)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16, torch.bfloat16])
def test_all_finite(dtype: torch.dtype) -> None:
    good = [torch.ones(0, dtype=dtype), torch.ones(5, dtype=dtype), torch.ones(4, 3, dtype=dtype).t()]
    assert all_finite(good)
    assert all_finite([])
    for bad in (math.nan, INFINITY, -INFINITY):
        assert not all_finite([*good, torch.tensor([1, bad], dtype=dtype)])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16, torch.bfloat16])
def test_none_is_zero(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    good = [
        torch.ones(0, dtype=dtype),
        torch.tensor([math.nan, INFINITY, tiny], dtype=dtype),
        torch.ones(5, dtype=dtype),
    ]
    assert none_is(good, 0)
    for zero in (0.0, -0.0):
        assert not none_is([torch.tensor([1, zero], dtype=dtype), *good], 0)
        assert not none_is([*good, torch.tensor([zero, 1], dtype=dtype)], 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_none_is_a_level(dtype: torch.dtype) -> None:
    levels = torch.arange(200).to(dtype)
    for place in (0, 63, 199):
        assert not none_is([levels[:0], levels], place)
        assert none_is([levels[:0], levels[:place], levels[place + 1 :]], place)
    assert none_is([levels], 200)


@pytest.mark.parametrize("index", [-1, 5, 2**62, -(2**63)])
def test_add_at_out_of_bounds_changes_nothing(index: int) -> None:
    flat = torch.zeros(5)
    with pytest.raises(IndexError):
        add_at(flat, torch.tensor([0, 1, index]), torch.ones(3))
    assert not flat.any()


# Index streams


@st.composite
def coded(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Ascending indices of some messages, one after the other, and their table."""
    rows: list[list[int]] = []
    all_indices: list[int] = []
    for _ in range(draw(st.integers(0, 5))):
        numel = draw(st.sampled_from([1, 2, 100, 5000, 2**24 + 1, 2**33]))
        indices = sorted(draw(st.sets(st.integers(0, numel - 1), max_size=30)))
        rice = draw(st.booleans()) or numel > 2**31
        # A remainder of few bits would make quotients of millions of bits here.
        parameter = draw(st.integers(max(0, numel.bit_length() - 9), 31)) if rice else (numel - 1).bit_length()
        rows.append([len(indices), parameter, rice, numel])
        all_indices += indices
    return torch.tensor(all_indices, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


@given(coded())
def test_index_streams(message: tuple[Tensor, Tensor]) -> None:
    indices, table = message
    unary, fixed, bits = encode_indices(indices, table)
    unary_by_torch, fixed_by_torch, bits_by_torch = encode_indices_by_torch(indices, table)
    assert (bits_of(unary), bits_of(fixed)) == (bits_of(unary_by_torch), bits_of(fixed_by_torch))
    assert bits == bits_by_torch
    is_narrow = bool((table[:, 3] <= 2**31).all())
    for decoder in (decode_indices, decode_indices_by_torch):
        assert torch.equal(decoder(unary, fixed, table), indices)
        if is_narrow:
            narrow = decoder(unary, fixed, table, torch.int32)
            assert narrow.dtype == torch.int32
            assert torch.equal(narrow.to(torch.int64), indices)
        else:
            with pytest.raises(WireError, match="more elements than"):
                decoder(unary, fixed, table, torch.int32)


@given(coded(), st.data())
def test_wrong_indices_are_not_coded(message: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    indices, table = message
    if not len(indices):
        return
    indices[data.draw(st.integers(0, len(indices) - 1))] = data.draw(st.integers(-(2**62), 2**62))
    outcomes = []
    for code in (encode_indices, encode_indices_by_torch):
        try:
            unary, fixed, bits = code(indices, table)
            outcomes.append((bits_of(unary), bits_of(fixed), bits))
        except ValueError:
            outcomes.append((b"", b"", []))
    assert outcomes[0] == outcomes[1]


@settings(max_examples=1000)
@given(coded(), st.integers(0, 2**32))
def test_changed_index_streams_have_one_outcome(message: tuple[Tensor, Tensor], seed: int) -> None:
    """Streams or tables with random changes: both decoders refuse them, or both return the same indices."""
    indices, table = message
    unary, fixed, _ = encode_indices(indices, table)
    rng = random.Random(seed)
    for stream in (unary, fixed):
        for _ in range(rng.randint(0, 3)):
            if len(stream):
                stream[rng.randrange(len(stream))] = rng.randrange(256)
    if rng.random() < 0.3:
        unary = torch.cat([unary, torch.tensor(list(rng.randbytes(rng.randint(1, 9))), dtype=torch.uint8)])
    elif rng.random() < 0.3:
        unary = unary[: rng.randint(0, len(unary))].clone()
    if len(table) and rng.random() < 0.3:
        table[rng.randrange(len(table)), 3] = rng.choice([0, 1, 50, 2**40])
    outcomes: list[list[int] | None] = []
    dtype = rng.choice([torch.int32, torch.int64])
    for decoder in (decode_indices, decode_indices_by_torch):
        try:
            outcomes.append(decoder(unary, fixed, table, dtype).tolist())
        except WireError:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


@given(
    st.binary(max_size=80),
    st.binary(max_size=80),
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4), max_size=3),
)
def test_any_table_and_streams_are_refused_or_within_bounds(
    unary: bytes, fixed: bytes, rows: list[list[int]]
) -> None:
    rows = [[abs(count) % 40, parameter % 33, rice % 2, numel] for count, parameter, rice, numel in rows]
    table = np.array(rows, np.int64).reshape(-1, 4)
    try:
        indices = loops.decode_indices64(np.frombuffer(unary, np.uint8), np.frombuffer(fixed, np.uint8), table)
    except ValueError:
        return
    assert len(indices) == table[:, 0].sum()
    for row, part in zip(table, np.split(indices, np.cumsum(table[:, 0])[:-1]) if len(table) else [], strict=True):
        assert (np.diff(part, prepend=-1) > 0).all()
        assert not len(part) or part[-1] < row[3]


# Levels


@given(st.integers(1, 16), st.integers(0, 200), st.integers(0, 2**32))
def test_levels(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 2**bits, (count,), generator=generator)
    levels = levels.to(torch.uint8) if bits <= 8 else levels
    packed = pack_levels([levels], bits)
    assert bits_of(packed) == bits_of(pack_levels_by_torch(levels, bits))
    for wider in (torch.int32, torch.int64):
        assert bits_of(packed) == bits_of(pack_levels([levels.to(wider)], bits))
    unpacked = unpack_levels(packed, bits, [count])
    assert unpacked.dtype == unpack_levels_by_torch(packed, bits, count).dtype
    assert torch.equal(unpacked, levels)


@given(st.integers(1, 16), st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**32))
def test_runs_of_levels(bits: int, counts: list[int], seed: int) -> None:
    """Each begins with a byte of its own."""
    levels = torch.randint(0, 2**bits, (sum(counts),), generator=torch.Generator().manual_seed(seed))
    levels = levels.to(torch.uint8) if bits <= 8 else levels
    packed = pack_levels(levels.split(counts), bits)
    assert bits_of(packed) == b"".join(bits_of(pack_levels_by_torch(run, bits)) for run in levels.split(counts))
    assert torch.equal(unpack_levels(packed, bits, counts), levels)


# Packets


def packets() -> list[bytes]:
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(n, generator=generator) for n in (5000, 40, 1, 777)]
    operators = [TopK(k=50), TopK(k=3), QSGD(bits=5), compose(TopK(k=60), QSGD(bits=4))]
    return [
        sample(),
        encode([o.encode(v, generator=generator) for o, v in zip(operators, x, strict=True)]).data.tobytes(),
        encode([operators[3].encode(v, generator=generator) for v in x for _ in range(3)]).data.tobytes(),
    ]


def seen(data: bytes) -> list[tuple[Any, ...]] | None:
    try:
        messages = decode(data).messages
    except WireError:
        return None
    return [
        (m.shape, None if m.indices is None else m.indices.tolist(), bits_of(m.values.decode())) for m in messages
    ]


@pytest.mark.parametrize("seed", range(3))
def test_changed_packets_have_one_outcome(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random changes behind a right checksum: the compiled and the torch decoder agree about 1,000 packets."""
    rng = random.Random(seed)
    good = packets()[seed]
    changed = []
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            kind, at = rng.random(), rng.randrange(HEADER_BYTES, len(data))
            if kind < 0.8:
                data[at if kind < 0.5 else HEADER_BYTES + rng.randrange(30)] = rng.randrange(256)
            elif kind < 0.9:
                del data[at : at + rng.randint(1, 8)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
        changed.append(reseal(data))
    compiled = [seen(data) for data in changed]
    monkeypatch.setattr(native, "serves", lambda *tensors: False)
    assert compiled == [seen(data) for data in changed]
    assert 0 < sum(outcome is None for outcome in compiled) < 1000


def test_packets_are_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = packets()
    monkeypatch.setattr(native, "serves", lambda *tensors: False)
    assert packets() == compiled


# What is refused, and what is left to torch


def test_wrong_arguments_are_errors() -> None:
    x = np.zeros(8, np.float32)
    unit, bytes_ = loops.vector_units()[0], np.zeros(4, np.uint8)
    read_only = np.zeros(8, np.float32)
    read_only.flags.writeable = False
    indices = np.array([1, 2])
    for call in (
        lambda: loops.top_k(x[::2], 1, 1, unit),
        lambda: loops.top_k(x.astype(np.float16), 1, 1, unit),
        lambda: loops.top_k(x.tolist(), 1, 1, unit),
        lambda: loops.split_top_k32([x], [x.astype(np.float64)], [x], [1], 1, unit),
        lambda: loops.is_finite(x[::2], 1),
        lambda: loops.add_at(x, indices.astype(np.uint32), x[:2], 1.0),
        lambda: loops.sum_at([x, x], [indices, indices.astype(np.int32)], [x[:2]] * 2, [[1, 1]] * 2, 1.0, 1),
        lambda: loops.add_at(x, indices, x[:2].astype(np.float64), 1.0),
        lambda: loops.pack_levels([x], 3),
        lambda: loops.pack_levels([bytes_, indices], 3),
        lambda: loops.none_is([bytes_, indices], 0),
    ):
        with pytest.raises(TypeError):
            call()
    for call in (
        lambda: loops.top_k(x, 0, 1, unit),
        lambda: loops.top_k(x, 9, 1, unit),
        lambda: loops.top_k(x.reshape(2, 4), 1, 1, unit),
        lambda: loops.split_top_k32([x], [np.zeros(8, np.float32)], [x], [9], 1, unit),
        lambda: loops.split_top_k32([x], [np.zeros(7, np.float32)], [x], [1], 1, unit),
        lambda: loops.split_top_k32([x], [np.zeros(8, np.float32)], [np.zeros(7, np.float32)], [1], 1, unit),
        lambda: loops.split_top_k32([x, x], [np.zeros(8, np.float32)], [x, x], [1, 1], 1, unit),
        lambda: loops.split_top_k32([x[1:]], [x[:-1]], [x[1:]], [1], 1, unit),
        lambda: loops.split_top_k32([x[1:]], [np.zeros(7, np.float32)], [x[:-1]], [1], 1, unit),
        lambda: loops.split_top_k32([read_only], [x], [read_only], [1], 1, unit),
        lambda: loops.add_at(read_only, indices, x[:2], 1.0),
        lambda: loops.add_at(x, indices, x[:3], 1.0),
        lambda: loops.sum_at([x], [indices], [x[:2]], [], 1.0, 1),
        lambda: loops.sum_at([x], [indices], [x[:2]], [[2], [2]], 1.0, 1),
        lambda: loops.sum_at([x], [indices], [x[:3]], [[2]], 1.0, 1),
        lambda: loops.encode_indices(indices, np.array([[3, 1, 1, 9]])),
        lambda: loops.encode_indices(indices, np.array([[2, 32, 1, 9]])),
        lambda: loops.encode_indices(indices, np.array([2, 1, 1, 9])),
        lambda: loops.encode_indices(indices, np.array([[1, 1, 1, 9], [2, 1, 1, 9]])),
        lambda: loops.encode_indices(indices, np.array([[2**62, 1, 1, 9]])),
        lambda: loops.decode_indices64(bytes_, bytes_, np.array([[2, 1, 1, 9]])),
        lambda: loops.decode_indices64(bytes_, bytes_, np.array([[2**62, 0, 1, 9]])),
        lambda: loops.decode_indices32(bytes_, bytes_, np.array([[-1, 1, 1, 9]])),
        lambda: loops.pack_levels([bytes_], 17),
        lambda: loops.pack_levels([bytes_.reshape(2, 2)], 4),
        lambda: loops.unpack_levels(bytes_, 4, [9]),
        lambda: loops.unpack_levels(bytes_, 4, [3, 3, 1]),
        lambda: loops.unpack_levels(bytes_, 4, [9, -1]),
        lambda: loops.unpack_levels(bytes_, 4, [2**62]),
        lambda: loops.unpack_levels(bytes_, 16, [2**55] * 9),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            call()


def test_what_the_loops_do_not_have_goes_to_torch() -> None:
    x = torch.randn(6, 4)
    assert native.serves(x)
    for other in (x.t(), x[:, 1], x.half(), x.to(torch.int16), x.clone().requires_grad_(), x.to("meta")):
        assert not native.serves(other)
    apart = torch.zeros(8)[::2]
    add_at(apart, torch.tensor([1, 3]), torch.ones(2))
    assert apart.tolist() == [0, 1, 0, 1]
    half = torch.zeros(4, dtype=torch.float16)
    Message.sparse((4,), torch.tensor([2]), torch.ones(1)).add_to(half)
    assert half.tolist() == [0, 0, 1, 0]


WITHOUT = """
import sys, warnings, logging
sys.modules["hvd_compress.kernels._native"] = None  # import raises
import torch
from hvd_compress.kernels import native
from hvd_compress.operators import TopK
from hvd_compress.wire import Message
x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
assert native.description() == "torch"
sent = TopK(k=70).encode(x)
sys.stdout.buffer.write(sent.to_bytes())
assert torch.equal(Message.from_bytes(sent.to_bytes()).decode(), sent.decode())
"""


def test_without_the_extension_all_is_the_same_and_said_once() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, check=True)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    assert run.stdout == TopK(k=70).encode(x).to_bytes()
    assert run.stderr.decode().count("compiled kernels are missing") == 1
    assert native.description().startswith("compiled, ")
