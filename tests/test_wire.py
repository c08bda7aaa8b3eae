"""The wire format: exact round trips, sizes, and input that cannot be trusted."""

from __future__ import annotations

import math
import random
import resource
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvd_compress import WireError
from hvd_compress.operators import (
    QSGD,
    TNQSGD,
    MinMax,
    Operator,
    RandK,
    RandomBlock,
    Rotated,
    Sign,
    TernGrad,
    TopK,
    compose,
)
from hvd_compress.wire import (
    HEADER_BYTES,
    Floats,
    Fused,
    Message,
    Range,
    Subset,
    Symmetric,
    SymmetricRuns,
    add_up,
    decode,
    device_of,
    encode,
    encode_failure,
    subtract,
)
from hvd_compress.wire.bits import pack_fields, pack_unary, unpack_fields, unpack_unary
from hvd_compress.wire.values import Values
from hvd_compress.wire.varint import append_varint

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


@st.composite
def messages(draw: st.DrawFn) -> Message:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=9)))
    numel = math.prod(shape)
    dtype = draw(st.sampled_from(DTYPES))
    finite_or_not = st.floats(width=16) | st.sampled_from([1.0, -2.0, 0.0, math.inf])
    if draw(st.booleans()):
        values = draw(st.lists(finite_or_not, min_size=min(numel, 50), max_size=min(numel, 50)))
        return Message.dense(torch.tensor((values * (numel // 50 + 1))[:numel], dtype=dtype).reshape(shape))
    indices = sorted(draw(st.sets(st.integers(0, numel - 1), max_size=40))) if numel else []
    values = draw(st.lists(finite_or_not, min_size=len(indices), max_size=len(indices)))
    return Message(shape, torch.tensor(indices, dtype=torch.int64), Floats(torch.tensor(values, dtype=dtype)))


def assert_equal(sent: Message, received: Message) -> None:
    """Equal as receivers see them, to the bit; only the sign of a zero that was not sent may differ."""
    a, b = sent.decode(), received.decode()
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    zero = a == 0
    assert torch.equal(zero, b == 0)
    assert bits_of(a.masked_fill(zero, 0.0)) == bits_of(b.masked_fill(zero, 0.0))


@given(st.lists(messages(), max_size=6), st.integers(0, 2**40))
def test_round_trip_is_exact(sent: list[Message], round: int) -> None:
    encoded = encode(sent, round=round, energy=0.1 * round)
    packet = decode(encoded.data)
    assert (packet.round, packet.ids, packet.failure) == (round, list(range(len(sent))), None)
    assert packet.energy == 0.1 * round
    for a, b in zip(sent, packet.messages, strict=True):
        assert_equal(a, b)
    assert HEADER_BYTES + sum(encoded.shares) == len(encoded.data)
    assert encode(packet.messages, round=round, energy=packet.energy).data.tobytes() == encoded.data.tobytes()


@st.composite
def alike(draw: st.DrawFn) -> list[list[Message]]:
    """Sparse messages of a few ranks about the same tensors, all of them floats or all levels of as many steps."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    s = draw(st.sampled_from([0, 1, 3, 7, 200]))  # none: floats
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    numels = draw(st.lists(st.integers(2, 300), min_size=1, max_size=5))
    ranks = []
    for density in draw(st.lists(st.sampled_from([0.0, 0.02, 0.3]), min_size=1, max_size=4)):
        about = []
        for numel in numels:
            indices = torch.nonzero(torch.rand(numel, generator=generator) < density).reshape(-1)[: numel - 1]
            levels = torch.randint(2 * s + 1, (len(indices),), generator=generator)
            scale = torch.randn(1, generator=generator, dtype=dtype) * draw(st.sampled_from([1.0, 0.0, math.inf]))
            numbers = torch.randn(len(indices), generator=generator, dtype=dtype)
            values = Symmetric(levels.to(torch.uint8 if s < 128 else torch.int64), scale, s) if s else Floats(numbers)
            about.append(Message((numel,), indices, values))
        ranks.append(about)
    return ranks


@given(alike(), st.sampled_from([1.0, 2.0, 3.0]), st.sampled_from([torch.float32, torch.float64]))
def test_messages_that_are_alike_are_summed_as_one(
    ranks: list[list[Message]], divisor: float, dtype: torch.dtype
) -> None:
    encoded = [encode(messages) for messages in ranks]
    sent = [e.packet for e in encoded]
    received = [decode(e.data) for e in encoded]
    for packets in (sent, received):
        for messages, packet in zip(ranks, packets, strict=True):
            assert packet is not None
            assert isinstance(packet.messages, Fused)
            for a, b in zip(messages, packet.messages, strict=True):
                assert_equal(a, b)
        for work in (add_up, subtract):
            flats = [torch.ones(m.numel, dtype=dtype) for m in ranks[0]]
            one_by_one = [flat.clone() for flat in flats]
            work([p.messages for p in packets if p], flats, divisor)
            work([list(p.messages) for p in packets if p], one_by_one, divisor)
            for ours, theirs in zip(flats, one_by_one, strict=True):  # but for a NaN's payload
                assert bits_of(ours.nan_to_num(nan=7.5)) == bits_of(theirs.nan_to_num(nan=7.5))


@given(alike())
def test_fused_messages_are_sent_as_single_ones(ranks: list[list[Message]]) -> None:
    """Those with zeros among their values too."""
    for messages in ranks:
        indices = torch.cat([i for m in messages if (i := m.indices) is not None])
        counts = [len(m.values) for m in messages]
        floats = torch.cat([m.values.floats for m in messages])
        several: list[Floats | SymmetricRuns] = [Floats(floats), Floats(floats.round())]
        if isinstance(messages[0].values, Symmetric):
            levels = torch.cat([m.values.levels for m in messages if isinstance(m.values, Symmetric)])
            several = [SymmetricRuns(levels, floats, counts, messages[0].values.s)]
        for some in several:
            fused = Fused([m.shape for m in messages], counts, indices.to(torch.int32), some)
            ids = [2 * place for place in range(len(messages))]
            together, single = encode(fused, ids=ids), encode(list(fused), ids=ids)
            assert together.data.tobytes() == single.data.tobytes()
            assert together.shares == single.shares
            assert device_of(fused) == device_of(messages) == torch.device("cpu")


@given(messages())
def test_single_message_round_trip(sent: Message) -> None:
    assert_equal(sent, Message.from_bytes(sent.to_bytes()))


def test_int32_indices_are_as_good() -> None:
    wide = TopK(k=5).encode(torch.randn(90, generator=torch.Generator().manual_seed(0)))
    assert wide.indices is not None
    narrow = replace(wide, indices=wide.indices.to(torch.int32))
    assert narrow.to_bytes() == wide.to_bytes()
    assert torch.equal(narrow.decode(), wide.decode())
    assert torch.equal(narrow.part(10, 80).decode(), wide.part(10, 80).decode())
    cleared = torch.ones(2, 90)
    wide.clear_in(cleared[0])
    narrow.clear_in(cleared[1])
    assert torch.equal(cleared[0], cleared[1])
    for pair in ([wide, narrow], [narrow, wide], [narrow, narrow]):
        flat = torch.empty(90)
        add_up([[message] for message in pair], [flat])
        assert torch.equal(flat, 2 * wide.decode())
        subtract([[message] for message in pair], [flat])
        assert not flat.any()
    mixed = [encode([first, second]).data.tobytes() for first in (wide, narrow) for second in (wide, narrow)]
    assert len({*mixed}) == 1


def test_ids_may_leave_gaps() -> None:
    ids = [0, 3, 4, 1_000_000]
    assert decode(encode([Message.dense(torch.ones(i + 1)) for i in range(4)], ids=ids).data).ids == ids


@pytest.mark.parametrize("numel", [2**24 + 5, 2**31, 2**31 + 1, 2**40])
def test_indices_beyond_what_a_float_or_an_int32_holds(numel: int) -> None:
    indices = torch.tensor([0, 2**24 + 1, numel - 2, numel - 1])
    received = Message.from_bytes(Message.sparse((numel,), indices, torch.ones(4)).to_bytes())
    assert torch.equal(received.indices, indices)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 31), st.integers(0)), max_size=200))
def test_fields_against_a_big_integer(pairs: list[tuple[int, int]]) -> None:
    widths = [w for w, _ in pairs]
    fields = [f % (1 << w) for w, f in pairs]
    number, position = 0, 0
    for width, value in zip(widths, fields, strict=True):
        number |= value << position
        position += width
    w, f = torch.tensor(widths, dtype=torch.int64), torch.tensor(fields, dtype=torch.int64)
    packed = pack_fields(f, w, position)
    assert packed.numpy().tobytes() == number.to_bytes((position + 7) // 8, "little")
    assert torch.equal(unpack_fields(packed, w), f)


@given(st.lists(st.integers(0, 300), max_size=100))
def test_unary_against_a_string(runs: list[int]) -> None:
    text = "".join("0" * run + "1" for run in runs)
    packed = pack_unary(torch.tensor(runs, dtype=torch.int64), len(text))
    assert packed.numpy().tobytes() == int("0" + text[::-1], 2).to_bytes((len(text) + 7) // 8, "little")
    assert unpack_unary(packed).tolist() == runs


def entropy_bytes(numel: int, count: int) -> float:
    """log2 C(numel, count) / 8."""
    return (math.lgamma(numel + 1) - math.lgamma(count + 1) - math.lgamma(numel - count + 1)) / math.log(2) / 8


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1])
def test_uniform_supports_cost_their_entropy(ratio: float) -> None:
    """Rule: the drawn support (fixed seed) costs at most 1 % more than log2 C(d, k) and 4 bytes per value."""
    numel = 2_560_000
    count = int(numel * ratio)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(numel, generator=generator)[:count]
    encoded = encode([Message.sparse((numel,), indices, torch.ones(count))])
    assert len(encoded.data) <= 1.01 * (entropy_bytes(numel, count) + 4 * count) + HEADER_BYTES + 9


@given(st.integers(1, 10_000), st.data())
def test_no_support_costs_more_than_fixed_width_indices(numel: int, data: st.DataObject) -> None:
    indices = sorted(data.draw(st.sets(st.integers(0, numel - 1), max_size=60)))
    encoded = encode([Message.sparse((numel,), torch.tensor(indices, dtype=torch.int64), torch.ones(len(indices)))])
    index_bits = (numel - 1).bit_length() * len(indices)
    table = 2 + 2 + 1  # form, shape and count of such sizes
    # The two index streams end at whole bytes each.
    assert len(encoded.data) <= HEADER_BYTES + table + (index_bits + 7) // 8 + 1 + 4 * len(indices)


def test_zeros_are_not_sent() -> None:
    values = torch.tensor([1.0, 0.0, -0.0, 2.0])
    sent = Message.sparse((100,), torch.tensor([3, 5, 7, 9]), values)
    received = Message.from_bytes(sent.to_bytes())
    assert received.indices is not None
    assert received.indices.tolist() == [3, 9]
    assert torch.equal(received.decode(), sent.decode())


def test_zeros_of_several_messages_are_not_sent() -> None:
    def levels(*steps: int, scale: float = 2.0) -> Symmetric:
        return Symmetric(torch.tensor(steps, dtype=torch.uint8) + 3, torch.tensor([scale]), 3)

    several: list[tuple[list[int], Values, list[int]]] = [  # indices, values, and which of the indices are left
        ([3, 5, 7], levels(0, 2, 0), [5]),
        ([1], Floats(torch.tensor([0.0])), []),
        ([2, 4], levels(1, -3), [2, 4]),
        ([], levels(), []),
        ([0, 8], levels(0, 0), []),
        ([0, 9], levels(0, 1, scale=math.inf), [0, 9]),  # an overflow, which receivers must learn of
        ([6, 8], Floats(torch.tensor([0.0, 1.5])), [8]),
    ]
    sent = [Message((10,), torch.tensor(i, dtype=torch.int64), values) for i, values, _ in several]
    received = decode(encode(sent).data).messages
    for before, after, (_, _, left) in zip(sent, received, several, strict=True):
        assert after.indices is not None
        assert after.indices.tolist() == left
        assert torch.equal(after.decode().nan_to_num(), before.decode().nan_to_num())
        assert bool(after.is_finite()) == bool(before.is_finite())


def test_nan_payloads_survive() -> None:
    odd = torch.tensor([0x7FC12345, 0x7F800000], dtype=torch.int32).view(torch.float32)
    received = Message.from_bytes(Message.sparse((9,), torch.tensor([1, 2]), odd).to_bytes())
    assert bits_of(received.values.floats) == bits_of(odd)


@pytest.mark.parametrize(
    ("indices", "complaint"),
    [([3, 3], "strictly ascending"), ([4, 2], "strictly ascending"), ([2, 10], "below"), ([-1, 2], "ascending")],
)
def test_wrong_indices_are_refused_when_sending(indices: list[int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        encode([Message((10,), torch.tensor(indices), Floats(torch.ones(2)))])


def test_other_bad_messages_are_refused_when_sending() -> None:
    with pytest.raises(ValueError, match="one length"):
        Message.sparse((5,), torch.tensor([1, 2]), torch.ones(3))
    with pytest.raises(ValueError, match="float"):
        encode([Message.dense(torch.ones(3, dtype=torch.int32))])
    with pytest.raises(ValueError, match="ascend"):
        encode([Message.dense(torch.ones(3))] * 2, ids=[1, 1])


def test_sparse_sorts() -> None:
    message = Message.sparse((5,), torch.tensor([4, 1]), torch.tensor([4.0, 1.0]))
    assert message.decode().tolist() == [0.0, 1.0, 0.0, 0.0, 4.0]


def test_a_failure_travels_as_text() -> None:
    packet = decode(encode_failure("ValueError: größer", round=7))
    assert (packet.failure, packet.round, packet.messages) == ("ValueError: größer", 7, [])


def sample() -> bytes:
    generator = torch.Generator().manual_seed(1)
    sparse = Message.sparse((50, 100), torch.randperm(5000, generator=generator)[:300], torch.ones(300))
    few = Message.sparse((4000,), torch.tensor([17]), torch.ones(1))
    return encode([sparse, few, Message.dense(torch.arange(9.0).reshape(3, 3))]).data.tobytes()


def reseal(data: bytearray) -> bytes:
    """With a right length and checksum, so that the inner checks are reached."""
    body = data[HEADER_BYTES:]
    data[28:36] = struct.pack("<Q", len(body))
    data[36:40] = struct.pack("<I", zlib.crc32(body, zlib.crc32(data[:36])))
    return bytes(data)


def test_truncated_foreign_and_corrupted_input() -> None:
    good = sample()
    for end in range(len(good)):
        with pytest.raises(WireError):
            decode(good[:end])
    with pytest.raises(WireError, match="truncated or run together"):
        decode(good + b"\0")
    with pytest.raises(WireError, match="not a message of hvd_compress"):
        decode(b"PK\3\4" + good[4:])
    with pytest.raises(WireError, match="version 9"):
        decode(good[:4] + b"\x09" + good[5:])
    for position in range(len(good)):
        with pytest.raises(WireError):
            decode(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])


@pytest.fixture
def little_memory() -> Iterator[None]:
    """1 GiB of address space beyond what is in use: an allocation out of proportion fails, and so does the test."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def every_kind() -> dict[str, bytes]:
    """A packet for each kind of values with each kind of indices, and one with all of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 20, generator=generator)
    sparse = [TopK(k=100), TopK(k=1), RandK(k=60), RandomBlock(k=60)]
    dense = [
        QSGD(bits=4),
        QSGD(bits=4, bucket=64),
        MinMax(bits=9),
        Rotated(bits=2),
        TNQSGD(bits=3),
        TernGrad(),
        Sign(),
    ]
    operators: list[Operator] = [*sparse, *dense, *(compose(a, b) for a in sparse for b in dense)]
    messages = {repr(operator): operator.encode(x, generator=generator) for operator in operators}
    for dtype in DTYPES:
        messages[f"dense {dtype}"] = Message.dense(x.to(dtype))
        messages[f"sparse {dtype}"] = Message.sparse((600,), torch.arange(0, 600, 7), torch.ones(86, dtype=dtype))
    messages["float64 levels"] = QSGD(bits=8).encode(x.double(), generator=generator)
    messages["many dimensions"] = TopK(k=9).encode(torch.randn((2,) * 9, generator=generator))
    messages["no elements"] = TopK(k=9).encode(torch.empty(5, 0, 3))
    packets = {name: encode([message]).data.tobytes() for name, message in messages.items()}
    return {**packets, "all": encode(list(messages.values())).data.tobytes(), "three": sample()}


SAMPLES = every_kind()
HUGE = [b"\xff" * n + b"\x7f" for n in range(3, 10)] + [b"\x80" * n + b"\x01" for n in range(3, 10)]  # varints


def mutated(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        kind, position = rng.random(), rng.randrange(HEADER_BYTES, len(data))
        in_table = min(position, HEADER_BYTES + rng.randrange(24))  # most often
        if kind < 0.5:
            data[in_table] = rng.randrange(256)
        elif kind < 0.6:
            data[in_table : in_table + rng.randint(0, 2)] = rng.choice(HUGE)
        elif kind < 0.8 and len(data) > HEADER_BYTES + 9:
            del data[position : position + rng.randint(1, 8)]
        else:
            data[position:position] = rng.randbytes(rng.randint(1, 8))
    if rng.random() < 0.2:
        data[8:12] = struct.pack("<I", rng.choice([0, 1, 4, 2**32 - 1]))
    return reseal(data)


# `--hypothesis-profile=fuzz` asks for more: see CONTRIBUTING.md.
@settings(
    max_examples=max(3000, settings().max_examples), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(sorted(SAMPLES)), st.integers(0, 2**32))
def test_mutated_messages_raise_or_decode_within_bounds(little_memory: None, name: str, seed: int) -> None:
    """Also with a right checksum, no mutation makes the decoder read outside, allocate out of proportion, or return
    impossible messages."""
    try:
        packet = decode(mutated(bytearray(SAMPLES[name]), random.Random(seed)))
    except WireError:
        return
    for message in packet.messages:
        assert len(message.values.decode()) == len(message.values)
        if message.indices is not None:
            assert len(message.indices) == len(message.values) < max(1, message.numel)
            steps = np.diff(message.indices.numpy(), prepend=-1)
            assert (steps > 0).all()
            assert len(message.indices) == 0 or int(message.indices[-1]) < message.numel
        else:
            assert len(message.values) == message.numel
        if message.numel <= 1 << 20:  # a sparse message may be of any size: receivers compare it with their tensor's
            assert message.decode().shape == message.shape


@pytest.mark.parametrize(
    ("form", "numbers", "rest"),
    [
        ("dense", [1 << 40], 0),
        ("fixed", [1 << 40, 1 << 39], 0),
        ("rice", [1 << 40, 1 << 39], 64),
        ("subset", [1 << 61, 1 << 30, 7], 0),
        ("block", [1 << 61, 1 << 30, 7], 0),
        ("dense rotated", [1 << 40, 1, 5], 8),
        ("dense empty", [1 << 40, 1 << 40, 0], 0),
    ],
)
def test_sizes_out_of_all_proportion_are_refused(
    little_memory: None, form: str, numbers: list[int], rest: int
) -> None:
    """Rows of the table that promise more than the packet has, or than a tensor can have."""
    support = ["dense", "rice", "fixed", "subset", "block"].index(form.split()[0])
    bits = support | 1 << 13
    if "rotated" in form:
        bits |= 2 << 8 | 1 << 12
    if "empty" in form:
        bits |= 3 << 13
        numbers = [len(numbers), *numbers]
    row = bytearray(struct.pack("<H", bits))
    for number in numbers:
        append_varint(row, number)
    header = bytearray(sample()[:HEADER_BYTES])
    header[8:12] = struct.pack("<I", 1)
    with pytest.raises(WireError):
        decode(reseal(header + row + bytes(rest)))


def test_a_bucket_is_as_large_as_its_values(little_memory: None) -> None:
    """What the packet says of a bucket's size costs nothing, and a huge tensor with few values only these."""
    values = Symmetric(torch.tensor([0, 1, 2], dtype=torch.uint8), torch.tensor([3.0]), s=1, bucket=1 << 60)
    assert Message.from_bytes(Message((3,), None, values).to_bytes()).decode().tolist() == [-3.0, 0.0, 3.0]
    few = Message.from_bytes(Message.sparse((1 << 40,), torch.tensor([5]), torch.ones(1)).to_bytes())
    assert (few.numel, few.values.decode().tolist()) == (1 << 40, [1.0])


def test_a_random_subset_of_a_huge_tensor_takes_no_more_than_its_values(little_memory: None) -> None:
    levels = torch.zeros(2_500_000, dtype=torch.uint8)  # of one bit each: 312 kB
    values = Range(levels, torch.tensor([-1.0, 1.0]), s=1)
    packet = encode([Message((10_000_000_000,), torch.empty(0), values, Subset(1))])
    (message,) = decode(packet.data).messages
    assert message.indices is not None
    assert len(message.indices) == len(levels)
    assert (message.indices[1:] > message.indices[:-1]).all()
    assert message.indices[-1] < message.numel


def test_any_text_of_an_error_arrives() -> None:
    assert decode(encode_failure("no file \udcff.png: é")).failure == "no file \\udcff.png: é"


def test_a_likely_table_changes_nothing() -> None:
    """Whatever table the receiver expects, it sees what the packet says."""
    sparse = Message.sparse((300,), torch.tensor([3, 50]), torch.tensor([1.0, 2.0]))
    other = Message.sparse((300,), torch.tensor([4, 5, 299]), torch.ones(3))
    packets = [
        encode(m) for m in ([sparse], [sparse, other], [other, sparse], [other], [], [Message.dense(torch.ones(2))])
    ]
    for packet in packets:
        expected = [(m.shape, m.decode().tolist()) for m in decode(packet.data).messages]
        for likely in packets:
            received = decode(packet.data, likely=likely.table)
            assert [(m.shape, m.decode().tolist()) for m in received.messages] == expected
            assert received.ids == decode(packet.data).ids


def test_scales_in_buckets_of_all_elements_are_sent_dense() -> None:
    values = Symmetric(torch.tensor([0, 1, 2, 1], dtype=torch.uint8), torch.tensor([3.0, 5.0]), s=1, bucket=2)
    received = Message.from_bytes(Message((4,), torch.arange(4), values).to_bytes())
    assert received.indices is None
    assert received.decode().tolist() == [-3.0, 0.0, 5.0, 0.0]


@pytest.mark.gpu
def test_gpu_packs_the_same_bytes() -> None:
    generator = torch.Generator().manual_seed(1)
    indices = torch.randperm(500_000, generator=generator)[:7000]
    values = torch.randn(7000, generator=generator)
    here = Message.sparse((500_000,), indices, values)
    there = here.to(torch.device("cuda"))
    assert encode([there]).data.tobytes() == encode([here]).data.tobytes()
    assert torch.equal(decode(here.to_bytes(), "cuda").messages[0].decode().cpu(), here.decode())
