"""The binary packet that one rank sends in one exchange: any number of messages, fused.

Layout (little-endian; ``docs/wire-format.md`` has it byte by byte)::

    header (32 bytes) | table | gap quotients | fixed-width fields | values

The table has one entry for each message. Each of the other three sections is one stream over all messages, so
that encoding and decoding take a constant number of tensor operations. Indices are coded as Golomb-Rice gaps,
the quotients in unary and the remainders in ``r`` bits, or in ``ceil(log2 numel)`` bits each where even the worst
case of that is shorter. Elements whose value is zero are not sent.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import WireError
from .bits import MAX_WIDTH, pack_fields, pack_unary, unpack_fields, unpack_unary
from .message import Message
from .varint import append_varint, read_varint

VERSION = 1

_MAGIC = b"HVDC"
_HEADER = struct.Struct("<4sBBHIQQI")  # magic, version, kind, reserved, messages, round, body bytes, CRC-32
HEADER_BYTES = _HEADER.size
_MESSAGES, _FAILURE = 0, 1  # kinds of packet
_DENSE, _RICE, _FIXED = 0, 1, 2  # how a message's indices are coded
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MANY_DIMENSIONS = 7  # as the number of dimensions: a varint with the real one follows

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Encoded:
    """A packet ready to be sent."""

    data: Bytes  # uint8 [n], on the host
    shares: list[int]  # bytes that each message takes; with the header they add up to len(data)


@dataclass(frozen=True)
class Packet:
    """What a received packet holds."""

    round: int  # the sender's exchange number
    ids: list[int]  # ascending; which tensor each message is about
    messages: list[Message]
    failure: str | None = None  # the sender's error, in place of messages


@dataclass
class _Entry:
    """One row of the table."""

    id: int
    shape: tuple[int, ...]
    support: int
    parameter: int  # Rice: bits of the remainder; fixed: bits of an index
    dtype: int  # position in _DTYPES
    count: int  # values that are sent

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def encode(messages: Sequence[Message], *, ids: Sequence[int] | None = None, round: int = 0) -> Encoded:
    """Fuse ``messages`` into one packet.

    Args:
        messages: of any shapes, dtypes and devices; the packing runs on the first one's device.
        ids: ascending non-negative numbers that say what each message is about; 0, 1, 2, … by default.
        round: the exchange number, which receivers compare.

    Raises:
        ValueError: indices that are not strictly ascending or not below ``numel``, ids that do not ascend, or
            values of a dtype that is not floating point.
    """
    ids = range(len(messages)) if ids is None else ids
    if any(b <= a for a, b in zip([-1, *ids], ids, strict=False)):
        raise ValueError(f"message ids must ascend from 0 or more, got {list(ids)}")
    device = messages[0].values.device if messages else torch.device("cpu")
    kept = _without_zeros(messages, device)
    entries = [_entry(id, m, v) for id, m, (_, v) in zip(ids, messages, kept, strict=True)]

    indices = [i for i, _ in kept if i is not None]
    unary, fixed, unary_bits = _encode_indices([e for e in entries if e.support != _DENSE], indices, device)
    values = [v for code in range(len(_DTYPES)) for (_, v), e in zip(kept, entries, strict=True) if e.dtype == code]
    sections = [unary, fixed, *(v.contiguous().view(torch.uint8) for v in values)]
    streams = torch.cat([s.to(device) for s in sections]).cpu().numpy()

    rows = [_write_entry(e, previous) for e, previous in zip(entries, [-1, *ids], strict=False)]
    body = b"".join(rows) + streams.tobytes()
    return Encoded(_seal(_MESSAGES, len(entries), round, body), _shares(entries, rows, unary_bits))


def encode_failure(text: str, *, round: int = 0) -> Bytes:
    """A packet that carries an error in place of messages, so that no other rank waits in vain."""
    return _seal(_FAILURE, 0, round, text.encode())


def decode(data: bytes | Bytes, device: torch.device | str = "cpu") -> Packet:
    """Open a packet; its tensors are on ``device``. Nothing outside ``data`` is read, whatever it holds.

    Raises:
        WireError: ``data`` is truncated, too long, corrupted, foreign or of another version.
    """
    buffer = np.frombuffer(data, np.uint8)
    if len(buffer) < HEADER_BYTES:
        raise WireError(f"a message has at least {HEADER_BYTES} bytes, got {len(buffer)}: it was truncated")
    magic, version, kind, _, count, round, length, checksum = _HEADER.unpack(buffer[:HEADER_BYTES].data)
    if magic != _MAGIC:
        raise WireError(f"not a message of hvd_compress: it starts with {magic!r}, not {_MAGIC!r}")
    if version != VERSION:
        raise WireError(
            f"message of format version {version}, this is version {VERSION}: use one release on all ranks"
        )
    body = buffer[HEADER_BYTES:]
    if len(body) != length:
        raise WireError(f"message of {length} bytes arrived with {len(body)}: truncated or run together")
    if checksum != _checksum(buffer[: HEADER_BYTES - 4].data, body.data):
        raise WireError("message is corrupted: its checksum does not match")
    if kind == _FAILURE:
        return Packet(round, [], [], bytes(body).decode(errors="replace"))
    if kind != _MESSAGES:
        raise WireError(f"unknown kind of packet {kind}")
    entries, offset = _read_table(body.data, count)
    # A copy: received buffers are reused, and bytes are read-only.
    streams = torch.from_numpy(body[offset:].copy()).to(device)
    return Packet(round, [e.id for e in entries], _decode_streams(entries, streams))


def _seal(kind: int, count: int, round: int, body: bytes) -> Bytes:
    head = _HEADER.pack(_MAGIC, VERSION, kind, 0, count, round, len(body), 0)[:-4]
    return np.frombuffer(head + struct.pack("<I", _checksum(head, body)) + body, np.uint8)


def _checksum(head: bytes | memoryview, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(head))


# Encoding


def _without_zeros(messages: Sequence[Message], device: torch.device) -> list[tuple[Tensor | None, Tensor]]:
    """(indices, values) of each message, less the entries that say nothing; full ones become dense."""
    sparse = [m for m in messages if m.indices is not None]
    if not sparse:
        return [(None, m.values) for m in messages]
    masks = [m.values != 0 for m in sparse]
    # One transfer for all counts: on a GPU each read of a number waits for the device.
    counts = iter(torch.stack([mask.sum().to(device) for mask in masks]).tolist())
    masks_iter = iter(masks)
    kept: list[tuple[Tensor | None, Tensor]] = []
    for m in messages:
        if m.indices is None:
            kept.append((None, m.values))
            continue
        count, mask = next(counts), next(masks_iter)
        indices, values = (m.indices, m.values) if count == len(mask) else (m.indices[mask], m.values[mask])
        kept.append((None if count == m.numel else indices, values))
    return kept


def _entry(id: int, message: Message, values: Tensor) -> _Entry:
    if values.dtype not in _DTYPES:
        raise ValueError(f"values must be one of {_DTYPES}, got {values.dtype}")
    count, numel = len(values), message.numel
    support, parameter = (_DENSE, 0) if count == numel else _index_code(numel, count)
    return _Entry(id, message.shape, support, parameter, _DTYPES.index(values.dtype), count)


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


def _encode_indices(
    entries: list[_Entry], indices: list[Tensor], device: torch.device
) -> tuple[Tensor, Tensor, dict[int, int]]:
    """The two index streams, and how many unary bits each id takes."""
    flat = torch.cat([i.to(device) for i in indices]) if indices else torch.empty(0, dtype=torch.int64, device=device)
    owner, starts = _owners([e.count for e in entries], device)
    remainder, is_rice, numel = _per_element(owner, entries)

    previous = torch.cat([flat.new_full((1,), -1), flat[:-1]])[: len(flat)]
    previous[starts] = -1
    gaps = flat - previous - 1
    quotients = torch.where(is_rice, gaps >> remainder, 0)
    fields = torch.where(is_rice, gaps & ((1 << remainder) - 1), flat)

    unary = torch.zeros(len(entries) + 1, dtype=torch.int64, device=device)
    unary.index_add_(0, owner, torch.where(is_rice, quotients + 1, 0))
    unary[-1] = ((gaps < 0) | (flat >= numel)).sum()
    *unary_bits, wrong = unary.tolist()
    if wrong:
        raise ValueError("a message's indices must be strictly ascending and below the tensor's size")
    unary_stream = pack_unary(quotients[is_rice], sum(unary_bits))
    fixed_stream = pack_fields(fields, remainder, sum(e.count * e.parameter for e in entries))
    return unary_stream, fixed_stream, {e.id: bits for e, bits in zip(entries, unary_bits, strict=True)}


def _owners(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each element the position of its message, and where the non-empty messages start."""
    sizes = torch.tensor(counts, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(counts)), sizes)
    starts = (torch.cumsum(sizes, 0) - sizes)[sizes > 0]
    return owner.to(device), starts.to(device)


def _per_element(owner: Tensor, entries: list[_Entry]) -> tuple[Tensor, Tensor, Tensor]:
    """Coding parameter, whether Rice coded, and tensor size, for each element."""
    columns = torch.tensor(
        [[e.parameter, e.support == _RICE, e.numel] for e in entries], dtype=torch.int64, device=owner.device
    ).reshape(-1, 3)[owner]
    return columns[:, 0], columns[:, 1] == 1, columns[:, 2]


def _shares(entries: list[_Entry], rows: list[bytes], unary_bits: dict[int, int]) -> list[int]:
    """Whole bytes for each message that add up to the body: streams are shared to the bit, so carry the rest."""
    shares, unary, fixed = [], 0, 0
    for entry, row in zip(entries, rows, strict=True):
        before = (unary + 7) // 8 + (fixed + 7) // 8
        unary += unary_bits.get(entry.id, 0)
        fixed += entry.count * entry.parameter
        streams = (unary + 7) // 8 + (fixed + 7) // 8 - before
        shares.append(len(row) + streams + entry.count * _DTYPES[entry.dtype].itemsize)
    return shares


# The table. An entry: uint16 form, [id], shape, [count]; the form's bits from the lowest:
# 2 support, 5 parameter, 4 dtype, 3 number of dimensions, 1 reserved, 1 "an id follows" (else the last one + 1).


def _write_entry(entry: _Entry, previous_id: int) -> bytes:
    skipped = entry.id - previous_id - 1
    dimensions = min(len(entry.shape), _MANY_DIMENSIONS)
    form = entry.support | entry.parameter << 2 | entry.dtype << 7 | dimensions << 11 | (skipped > 0) << 15
    row = bytearray(struct.pack("<H", form))
    if skipped:
        append_varint(row, skipped)
    if dimensions == _MANY_DIMENSIONS:
        append_varint(row, len(entry.shape))
    for size in entry.shape:
        append_varint(row, size)
    if entry.support != _DENSE:
        append_varint(row, entry.count)
    return bytes(row)


def _read_table(body: memoryview, count: int) -> tuple[list[_Entry], int]:
    """``count`` entries from the start of ``body``, and the offset behind them."""
    if 2 * count > len(body):  # an entry has at least two bytes
        raise WireError(f"{count} messages cannot lie in {len(body)} bytes")
    entries: list[_Entry] = []
    id, offset = -1, 0
    for _ in range(count):
        if offset + 2 > len(body):
            raise WireError("the message table is truncated")
        (form,) = struct.unpack_from("<H", body, offset)
        offset += 2
        support, parameter, dtype = form & 3, form >> 2 & 31, form >> 7 & 15
        dimensions, skips = form >> 11 & 7, form >> 15
        if support > _FIXED or dtype >= len(_DTYPES) or form >> 14 & 1 or (support == _DENSE and parameter):
            raise WireError(f"unknown form {form:#06x} in the message table")
        skipped = 0
        if skips:
            skipped, offset = read_varint(body, offset)
        id += skipped + 1
        if dimensions == _MANY_DIMENSIONS:
            dimensions, offset = read_varint(body, offset)
            if dimensions > len(body) - offset:
                raise WireError(f"{dimensions} dimensions cannot lie in {len(body) - offset} bytes")
        shape = []
        for _ in range(dimensions):
            size, offset = read_varint(body, offset)
            shape.append(size)
        entry = _Entry(id, tuple(shape), support, parameter, dtype, 0)
        if entry.numel >= 1 << 62:
            raise WireError(f"a tensor of shape {entry.shape} is too large to be true")
        entry.count = entry.numel
        if support != _DENSE:
            entry.count, offset = read_varint(body, offset)
            if entry.count >= entry.numel + (entry.numel == 0):
                raise WireError(f"{entry.count} sparse values of {entry.numel} elements")
        entries.append(entry)
    return entries, offset


# Decoding


def _decode_streams(entries: list[_Entry], streams: Tensor) -> list[Message]:
    sparse = [e for e in entries if e.support != _DENSE]
    fixed_bytes = (sum(e.count * e.parameter for e in sparse) + 7) // 8
    value_bytes = sum(e.count * _DTYPES[e.dtype].itemsize for e in entries)
    unary_bytes = len(streams) - fixed_bytes - value_bytes
    if unary_bytes < 0:
        raise WireError(f"the table asks for {-unary_bytes} bytes more than the message has")
    unary, fixed, rest = streams.split([unary_bytes, fixed_bytes, value_bytes])
    indices = iter(_decode_indices(sparse, unary, fixed))
    values = _decode_values(entries, rest)
    return [
        Message(e.shape, None if e.support == _DENSE else next(indices), v)
        for e, v in zip(entries, values, strict=True)
    ]


def _decode_indices(entries: list[_Entry], unary: Tensor, fixed: Tensor) -> list[Tensor]:
    owner, starts = _owners([e.count for e in entries], unary.device)
    remainder, is_rice, numel = _per_element(owner, entries)
    expected = sum(e.count for e in entries if e.support == _RICE)
    runs = unpack_unary(unary)
    if len(runs) != expected or len(unary) != (int(runs.sum()) + expected + 7) // 8:
        raise WireError(f"the message has {len(runs)} index gaps where its table says {expected}")
    fields = unpack_fields(fixed, remainder)

    steps = torch.zeros_like(fields)
    steps[is_rice] = (runs << remainder[is_rice]) + fields[is_rice] + 1
    sums = torch.cumsum(steps, 0)
    base = torch.zeros(len(entries), dtype=torch.int64, device=fields.device)
    base[owner[starts]] = sums[starts] - steps[starts]
    flat = torch.where(is_rice, sums - base[owner] - 1, fields)

    previous = torch.cat([flat.new_full((1,), -1), flat[:-1]])[: len(flat)]
    previous[starts] = -1
    if bool(((flat <= previous) | (flat >= numel)).any()):
        raise WireError("the message's indices are not strictly ascending and below the tensor's size")
    return list(flat.split([e.count for e in entries]))


def _decode_values(entries: list[_Entry], stream: Tensor) -> list[Tensor]:
    values: dict[int, Tensor] = {}
    for code, dtype in enumerate(_DTYPES):
        chosen = [e for e in entries if e.dtype == code]
        size = sum(e.count for e in chosen) * dtype.itemsize
        section = stream.new_empty(size)  # of its own, since a section may start at any byte and must be aligned
        section.copy_(stream[:size])
        stream = stream[size:]
        values.update(zip((e.id for e in chosen), section.view(dtype).split([e.count for e in chosen]), strict=True))
    return [values[e.id] for e in entries]
