"""The binary packet that one rank sends in one exchange: any number of messages, fused.

Layout (little-endian; ``docs/wire-format.md`` has it byte by byte)::

    header (40 bytes) | table | gap quotients | fixed-width fields | levels | floats

The table has one entry for each message. The index sections are one stream each over all messages, so that coding
them takes a constant number of tensor operations. Indices are coded as Golomb-Rice gaps, the quotients in unary and
the remainders in ``r`` bits, or in ``ceil(log2 numel)`` bits each where even the worst case of that is shorter.
Elements whose value is zero are not sent.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import WireError
from ..kernels import next_power_of_two
from .bits import MAX_WIDTH, pack_levels, unpack_levels
from .indices import decode_indices, encode_indices
from .message import Block, Message, Subset
from .values import Codebook, Floats, Levels, Range, Rotated, Symmetric, Values
from .varint import append_varint, read_varint

VERSION = 1

_MAGIC = b"HVDC"
_HEADER = struct.Struct("<4sBBHIQdQI")  # magic, version, kind, flags, messages, round, energy, body bytes, CRC-32
HEADER_BYTES = _HEADER.size
_MESSAGES, _FAILURE = 0, 1  # kinds of packet
_OVERFLOW = 1  # the only flag
_DENSE, _RICE, _FIXED, _SUBSET, _BLOCK = range(5)  # how receivers learn a message's indices
_CODED = (_RICE, _FIXED)  # those that take part in the index streams
_FLOATS, _SYMMETRIC, _RANGE, _CODEBOOK = range(4)  # what a message's values are
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MANY_DIMENSIONS = 3  # as the number of dimensions: a varint with the real one follows
_MOST_DIMENSIONS = 64  # torch has no tensors with more
_MAX_BITS = 16  # of a level

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Encoded:
    """A packet ready to be sent."""

    data: Bytes  # uint8 [n], on the host
    shares: list[int]  # bytes that each message takes; with the header they add up to len(data)


@dataclass(frozen=True)
class Packet:
    """What a received packet holds."""

    round: int  # the sender's exchange or step number
    ids: list[int]  # ascending; which tensor each message is about
    messages: list[Message]
    energy: float  # squared norm of what the sender compressed, if its schedule asks for it
    overflow: bool  # whether the sender met inf or NaN in what is not among the messages
    failure: str | None = None  # the sender's error, in place of messages


@dataclass
class _Entry:
    """One row of the table."""

    id: int
    shape: tuple[int, ...]
    support: int
    parameter: int  # Rice: bits of the remainder; fixed: bits of an index
    rule: int  # subset: seed; block: start
    count: int  # values that are sent
    kind: int
    dtype: int  # of the floats: position in _DTYPES
    s: int  # symmetric, range, codebook: number of steps
    bucket: int  # symmetric: values that share a scale, or 0
    rotation: int | None  # seed

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def level_bits(self) -> int:
        return (2 * self.s if self.kind == _SYMMETRIC else self.s).bit_length()

    @property
    def level_count(self) -> int:
        if self.kind == _FLOATS:
            return 0
        return self.count if self.rotation is None else next_power_of_two(self.count)

    @property
    def level_bytes(self) -> int:
        return (self.level_count * self.level_bits + 7) // 8

    @property
    def float_count(self) -> int:
        if self.kind == _FLOATS:
            return self.count
        if self.kind == _SYMMETRIC:
            return max(1, -(-self.level_count // self.bucket)) if self.bucket else 1
        return 2 if self.kind == _RANGE else self.s + 1

    @property
    def float_bytes(self) -> int:
        return self.float_count * _DTYPES[self.dtype].itemsize


def encode(
    messages: Sequence[Message],
    *,
    ids: Sequence[int] | None = None,
    round: int = 0,
    energy: float = 0.0,
    overflow: bool = False,
) -> Encoded:
    """Fuse ``messages`` into one packet.

    Args:
        messages: of any shapes, dtypes and devices; the packing runs on the first one's device.
        ids: ascending non-negative numbers that say what each message is about; 0, 1, 2, … by default.
        round: the exchange or step number, which receivers compare.
        energy: a number for all receivers.
        overflow: a mark for all receivers; see :class:`Packet`.

    Raises:
        ValueError: indices that are not strictly ascending or not below ``numel``, ids that do not ascend, or
            values of a dtype that is not floating point.
    """
    ids = range(len(messages)) if ids is None else ids
    if any(b <= a for a, b in zip([-1, *ids], ids, strict=False)):
        raise ValueError(f"message ids must ascend from 0 or more, got {list(ids)}")
    device = messages[0].device if messages else torch.device("cpu")
    kept = _without_zeros(messages, device)
    entries = [_entry(id, m) for id, m in zip(ids, kept, strict=True)]

    coded = [e for e in entries if e.support in _CODED]
    indices = [m.indices for m, e in zip(kept, entries, strict=True) if e.support in _CODED and m.indices is not None]
    no_index = torch.empty(0, dtype=torch.int64, device=device)
    unary, fixed, bits = encode_indices(torch.cat([no_index, *(i.to(device) for i in indices)]), _index_table(coded))
    unary_bits = {e.id: b for e, b in zip(coded, bits, strict=True)}
    levels = [pack_levels(q.levels, q.bits) for m in kept if isinstance(q := _unrotated(m.values), Levels)]
    floats = [
        m.values.floats.contiguous().view(torch.uint8)
        for code in range(len(_DTYPES))
        for m, e in zip(kept, entries, strict=True)
        if e.dtype == code
    ]
    rows = [_write_entry(e, previous) for e, previous in zip(entries, [-1, *ids], strict=False)]
    front = torch.frombuffer(bytearray(HEADER_BYTES) + b"".join(rows), dtype=torch.uint8)
    data = _on_host(torch.cat([section.to(device) for section in (front, unary, fixed, *levels, *floats)])).numpy()
    _seal(data, _MESSAGES, len(entries), round, energy, _OVERFLOW if overflow else 0)
    return Encoded(data, _shares(entries, rows, unary_bits))


def encode_failure(text: str, *, round: int = 0) -> Bytes:
    """A packet that carries an error in place of messages, so that no other rank waits in vain."""
    data = np.frombuffer(bytearray(HEADER_BYTES) + text.encode(), np.uint8)
    _seal(data, _FAILURE, 0, round, 0.0)
    return data


def decode(data: bytes | Bytes, device: torch.device | str = "cpu") -> Packet:
    """Open a packet; its tensors are on ``device``. Nothing outside ``data`` is read, whatever it holds.

    Raises:
        WireError: ``data`` is truncated, too long, corrupted, foreign or of another version.
    """
    buffer = np.frombuffer(data, np.uint8)
    if len(buffer) < HEADER_BYTES:
        raise WireError(f"a message has at least {HEADER_BYTES} bytes, got {len(buffer)}: it was truncated")
    magic, version, kind, flags, count, round, energy, length, checksum = _HEADER.unpack(buffer[:HEADER_BYTES].data)
    if magic != _MAGIC:
        raise WireError(f"not a message of hvd_compress: it starts with {magic!r}, not {_MAGIC!r}")
    if version != VERSION:
        raise WireError(
            f"message of format version {version}, this is version {VERSION}: use one release on all ranks"
        )
    body = buffer[HEADER_BYTES:]
    if len(body) != length:
        raise WireError(f"message of {length} bytes arrived with {len(body)}: truncated or run together")
    if checksum != _checksum(buffer):
        raise WireError("message is corrupted: its checksum does not match")
    if kind == _FAILURE:
        return Packet(round, [], [], energy, False, bytes(body).decode(errors="replace"))
    if kind != _MESSAGES:
        raise WireError(f"unknown kind of packet {kind}")
    if flags & ~_OVERFLOW:
        raise WireError(f"unknown flags {flags:#x}")
    entries, offset = _read_table(body.data, count)
    # Messages have storage of their own, since received buffers are reused; torch takes none that is read-only.
    streams = torch.from_numpy(np.require(body[offset:], requirements="W")).to(device)
    messages = _decode_streams(entries, streams)
    return Packet(round, [e.id for e in entries], messages, energy, bool(flags & _OVERFLOW))


def _on_host(data: Tensor) -> Tensor:
    """In page-locked memory if it comes from a GPU, which copies there without a detour."""
    return torch.empty(data.shape, dtype=data.dtype, pin_memory=True).copy_(data) if data.is_cuda else data


def _seal(data: Bytes, kind: int, count: int, round: int, energy: float, flags: int = 0) -> None:
    """Fill in the header in front of a body."""
    _HEADER.pack_into(data.data, 0, _MAGIC, VERSION, kind, flags, count, round, energy, len(data) - HEADER_BYTES, 0)
    struct.pack_into("<I", data.data, HEADER_BYTES - 4, _checksum(data))


def _checksum(data: Bytes) -> int:
    """CRC-32 of all but the checksum."""
    return zlib.crc32(data[HEADER_BYTES:].data, zlib.crc32(data[: HEADER_BYTES - 4].data))


# Encoding


def _without_zeros(messages: Sequence[Message], device: torch.device) -> list[Message]:
    """The messages less the entries that say nothing; full ones become dense."""
    masks = [m.values.nonzero() if m.indices is not None and m.rule is None else None for m in messages]
    present = [mask for mask in masks if mask is not None]
    # One question for all messages, most often with this answer: on a GPU each one waits for the device.
    if not present or bool(torch.cat([mask.to(device) for mask in present]).all()):
        counts = [len(mask) for mask in present]
    else:
        counts = torch.stack([mask.sum().to(device) for mask in present]).tolist()
    left = iter(counts)
    kept = []
    for m, mask in zip(messages, masks, strict=True):
        if mask is not None and m.indices is not None:
            count = next(left)
            if count < len(mask):
                m = replace(m, indices=m.indices[mask], values=m.values.select(mask))
            if count == m.numel:
                m = replace(m, indices=None)
        kept.append(m)
    return kept


def _unrotated(values: Values) -> Values:
    return values.inner if isinstance(values, Rotated) else values


def _entry(id: int, message: Message) -> _Entry:
    if message.dtype not in _DTYPES:
        raise ValueError(f"values must be one of {_DTYPES}, got {message.dtype}")
    count, numel = len(message.values), message.numel
    parameter = rule = 0
    if message.indices is None:
        support = _DENSE
        if count != numel:
            raise ValueError(f"a dense message of {numel} elements has {count} values")
    elif isinstance(message.rule, Subset):
        support, rule = _SUBSET, message.rule.seed
    elif isinstance(message.rule, Block):
        support, rule = _BLOCK, message.rule.start
    else:
        support, parameter = _index_code(numel, count)
    kind = s = bucket = 0
    values = _unrotated(message.values)
    if isinstance(values, Floats):
        kind = _FLOATS
    elif isinstance(values, Symmetric):
        kind, s, bucket = _SYMMETRIC, values.s, values.bucket
    elif isinstance(values, Range):
        kind, s = _RANGE, values.s
    elif isinstance(values, Codebook):
        kind, s = _CODEBOOK, len(values.parameters) - 1
    else:
        raise TypeError(f"this format has no code for {type(values).__name__}")
    if isinstance(values, Levels) and not 1 <= values.bits <= _MAX_BITS:
        raise ValueError(f"a level may have 1 to {_MAX_BITS} bits, got {values.bits}")
    rotation = message.values.seed if isinstance(message.values, Rotated) else None
    dtype = _DTYPES.index(message.dtype)
    return _Entry(id, message.shape, support, parameter, rule, count, kind, dtype, s, bucket, rotation)


def _index_code(numel: int, count: int) -> tuple[int, int]:
    """The coding whose longest possible result is the shortest, and its parameter."""
    if count == 0:
        return _FIXED, 0
    remainder = _rice_parameter(numel, count)
    rice = count * (remainder + 1) + ((numel - count) >> remainder)
    width = (numel - 1).bit_length()
    return (_FIXED, width) if width <= MAX_WIDTH and count * width <= rice else (_RICE, remainder)


def _rice_parameter(numel: int, count: int) -> int:
    """Best r for gaps between ``count`` uniformly chosen of ``numel``: geometric with p = count / numel.

    Kiely, "Selecting the Golomb parameter in Rice coding" (2004): the golden-ratio rule.
    """
    ratio = math.log((math.sqrt(5) - 1) / 2) / math.log1p(-count / numel)
    return min(max(0, 1 + math.floor(math.log2(ratio))), MAX_WIDTH)


def _index_table(entries: list[_Entry]) -> Tensor:
    """See :mod:`.indices`."""
    rows = [[e.count, e.parameter, e.support == _RICE, e.numel] for e in entries]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


def _shares(entries: list[_Entry], rows: list[bytes], unary_bits: dict[int, int]) -> list[int]:
    """Whole bytes for each message, adding up to the body: index streams are shared to the bit, so carry the rest."""
    shares, unary, fixed = [], 0, 0
    for entry, row in zip(entries, rows, strict=True):
        before = (unary + 7) // 8 + (fixed + 7) // 8
        unary += unary_bits.get(entry.id, 0)
        fixed += entry.count * entry.parameter
        indices = (unary + 7) // 8 + (fixed + 7) // 8 - before
        shares.append(len(row) + indices + entry.level_bytes + entry.float_bytes)
    return shares


# The table. An entry: uint16 form, then varints. The form's bits from the lowest: 3 support, 5 parameter, 2 kind,
# 2 dtype, 1 rotated, 2 number of dimensions, 1 "ids were skipped" (else the id is the last one + 1).


def _write_entry(entry: _Entry, previous_id: int) -> bytes:
    skipped = entry.id - previous_id - 1
    dimensions = min(len(entry.shape), _MANY_DIMENSIONS)
    form = entry.support | entry.parameter << 3 | entry.kind << 8 | entry.dtype << 10
    form |= (entry.rotation is not None) << 12 | dimensions << 13 | (skipped > 0) << 15
    row = bytearray(struct.pack("<H", form))
    if skipped:
        append_varint(row, skipped)
    if dimensions == _MANY_DIMENSIONS:
        append_varint(row, len(entry.shape))
    for size in entry.shape:
        append_varint(row, size)
    if entry.support != _DENSE:
        append_varint(row, entry.count)
    if entry.support in (_SUBSET, _BLOCK):
        append_varint(row, entry.rule)
    if entry.kind != _FLOATS:
        append_varint(row, entry.s)
    if entry.kind == _SYMMETRIC:
        append_varint(row, entry.bucket)
    if entry.rotation is not None:
        append_varint(row, entry.rotation)
    return bytes(row)


def _read_table(body: memoryview, count: int) -> tuple[list[_Entry], int]:
    """``count`` entries from the start of ``body``, and the offset behind them."""
    if 2 * count > len(body):  # an entry has at least two bytes
        raise WireError(f"{count} messages cannot lie in {len(body)} bytes")
    entries: list[_Entry] = []
    id, offset = -1, 0

    def number() -> int:
        nonlocal offset
        value, offset = read_varint(body, offset)
        return value

    for _ in range(count):
        if offset + 2 > len(body):
            raise WireError("the message table is truncated")
        (form,) = struct.unpack_from("<H", body, offset)
        offset += 2
        id += 1 + (number() if form >> 15 else 0)
        dimensions = form >> 13 & 3
        if dimensions == _MANY_DIMENSIONS:
            dimensions = number()
            if dimensions > len(body) - offset:
                raise WireError(f"{dimensions} dimensions cannot lie in {len(body) - offset} bytes")
        shape = tuple(number() for _ in range(dimensions))
        support, kind, numel = form & 7, form >> 8 & 3, math.prod(shape)
        entry = _Entry(
            id=id,
            shape=shape,
            support=support,
            parameter=form >> 3 & 31,
            count=numel if support == _DENSE else number(),
            rule=number() if support in (_SUBSET, _BLOCK) else 0,
            kind=kind,
            dtype=form >> 10 & 3,
            s=number() if kind != _FLOATS else 0,
            bucket=number() if kind == _SYMMETRIC else 0,
            rotation=number() if form >> 12 & 1 else None,
        )
        _check_entry(entry)
        entries.append(entry)
    return entries, offset


def _check_entry(entry: _Entry) -> None:
    if len(entry.shape) > _MOST_DIMENSIONS:
        raise WireError(f"a tensor of {len(entry.shape)} dimensions")
    if math.prod(max(1, size) for size in entry.shape) >= 1 << 62:  # an empty tensor's other sizes are multiplied too
        raise WireError(f"a tensor of shape {entry.shape} is too large to be true")
    if entry.support > _BLOCK or (entry.parameter and entry.support not in _CODED):
        raise WireError(f"unknown form of indices ({entry.support}, {entry.parameter})")
    if entry.support != _DENSE and (entry.count >= entry.numel and entry.count > 0):
        raise WireError(f"{entry.count} sparse values of {entry.numel} elements")
    if entry.support == _BLOCK and entry.rule >= entry.numel:
        raise WireError(f"a block starts at {entry.rule} of {entry.numel} elements")
    if entry.kind != _FLOATS and not 1 <= entry.level_bits <= _MAX_BITS:
        raise WireError(f"levels of {entry.level_bits} bits")
    if entry.kind == _FLOATS and entry.rotation is not None:
        raise WireError("floats are not sent rotated")


# Decoding


def _decode_streams(entries: list[_Entry], streams: Tensor) -> list[Message]:
    coded = [e for e in entries if e.support in _CODED]
    fixed_bytes = (sum(e.count * e.parameter for e in coded) + 7) // 8
    level_bytes = [e.level_bytes for e in entries]
    float_bytes = sum(e.float_bytes for e in entries)
    unary_bytes = len(streams) - fixed_bytes - sum(level_bytes) - float_bytes
    if unary_bytes < 0:
        raise WireError(f"the table asks for {-unary_bytes} bytes more than the message has")
    unary, fixed, levels, rest = streams.split([unary_bytes, fixed_bytes, sum(level_bytes), float_bytes])
    indices = iter(decode_indices(unary, fixed, _index_table(coded)).split([e.count for e in coded]))
    floats = _decode_floats(entries, rest)
    messages = []
    for entry, packed, numbers in zip(entries, levels.split(level_bytes), floats, strict=True):
        values = _decode_values(entry, packed, numbers)
        if entry.support == _DENSE:
            messages.append(Message(entry.shape, None, values))
        elif entry.support in _CODED:
            messages.append(Message(entry.shape, next(indices), values))
        else:
            rule = Subset(entry.rule) if entry.support == _SUBSET else Block(entry.rule)
            drawn = rule.indices(entry.numel, entry.count).to(streams.device)
            messages.append(Message(entry.shape, drawn, values, rule))
    return messages


def _decode_values(entry: _Entry, packed: Tensor, floats: Tensor) -> Values:
    if entry.kind == _FLOATS:
        return Floats(floats)
    levels = unpack_levels(packed, entry.level_bits, entry.level_count)
    highest = 2 * entry.s if entry.kind == _SYMMETRIC else entry.s
    if highest + 1 < 1 << entry.level_bits and bool((levels > highest).any()):
        raise WireError(f"a level lies above the highest, {highest}")
    values: Levels
    if entry.kind == _SYMMETRIC:
        values = Symmetric(levels, floats, entry.s, entry.bucket)
    elif entry.kind == _RANGE:
        values = Range(levels, floats, entry.s)
    else:
        values = Codebook(levels, floats)
    return values if entry.rotation is None else Rotated(values, entry.rotation, entry.count)


def _decode_floats(entries: list[_Entry], stream: Tensor) -> list[Tensor]:
    floats: dict[int, Tensor] = {}
    for code, dtype in enumerate(_DTYPES):
        chosen = [e for e in entries if e.dtype == code]
        size = sum(e.float_bytes for e in chosen)
        section = stream.new_empty(size)  # of its own, since a section may start at any byte and must be aligned
        section.copy_(stream[:size])
        stream = stream[size:]
        parts = section.view(dtype).split([e.float_count for e in chosen])
        floats.update(zip((e.id for e in chosen), parts, strict=True))
    return [floats[e.id] for e in entries]
