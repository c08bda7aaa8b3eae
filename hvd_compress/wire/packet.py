"""The binary packet that one rank sends in one exchange: any number of messages, fused.

Layout (little-endian; ``docs/wire-format.md`` has it byte by byte)::

    header (40 bytes) | table | gap quotients | fixed-width fields | levels | floats

The table (:mod:`.table`) has one row for each message. The index sections are one stream each over all messages, so
that coding them takes a constant number of tensor operations. Indices are coded as Golomb-Rice gaps, the quotients in
unary and the remainders in ``r`` bits, or in ``ceil(log2 numel)`` bits each where even the worst case of that is
shorter. Elements whose value is zero are not sent.
"""

from __future__ import annotations

import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import WireError
from ..kernels import all_finite, none_is
from .bits import pack_levels, unpack_levels
from .indices import decode_indices, encode_indices
from .message import Block, Fused, Message, Subset, device_of, numels_of
from .table import (
    BLOCK,
    DENSE,
    DTYPES,
    FLOATS,
    RANGE,
    SUBSET,
    SYMMETRIC,
    Row,
    Table,
    read_table,
    row_of,
    table_of,
    table_of_fused,
    unrotated,
)
from .values import Codebook, Floats, Levels, Range, Rotated, Symmetric, Values

VERSION = 1

_MAGIC = b"HVDC"
_HEADER = struct.Struct("<4sBBHIQdQI")  # magic, version, kind, flags, messages, round, energy, body bytes, CRC-32
HEADER_BYTES = _HEADER.size
_MESSAGES, _FAILURE = 0, 1  # kinds of packet
_OVERFLOW = 1  # the only flag

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Packet:
    """What a packet holds."""

    round: int  # of exchanges or steps, whatever receivers compare
    ids: Sequence[int]  # ascending; which tensor each message is about
    messages: Sequence[Message]
    energy: float  # squared norm of what the sender compressed, if its schedule asks for it
    overflow: bool  # whether the sender met inf or NaN in what is not among the messages
    failure: str | None = None  # the sender's error, in place of messages
    table: Table | None = None  # that it was sent with
    floats: Sequence[Tensor] = ()  # all that the messages hold, in few tensors; once it was sent

    @property
    def numels(self) -> Sequence[int]:
        """Of the tensor that each message is about."""
        return numels_of(self.messages) if self.table is None else self.table.numels

    @property
    def counts(self) -> Sequence[int]:
        """Values in each message."""
        return [len(m.values) for m in self.messages] if self.table is None else self.table.counts


@dataclass(frozen=True)
class Encoded:
    """A packet ready to be sent."""

    data: Bytes  # uint8 [n], on the host
    shares: list[int]  # bytes that each message takes; with the header they add up to len(data)
    table: Table  # for the receiver of packets that are likely to have the same
    packet: Packet | None  # what receivers make of these bytes, where that is known without opening them


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
        round: a number of exchanges or steps, whatever receivers compare.
        energy: a number for all receivers.
        overflow: a mark for all receivers; see :class:`Packet`.

    Raises:
        ValueError: indices that are not strictly ascending or not below ``numel``, ids that do not ascend, or
            values of a dtype that is not floating point.
    """
    ids = range(len(messages)) if ids is None else ids
    if any(b <= a for a, b in zip([-1, *ids], ids, strict=False)):
        raise ValueError(f"message ids must ascend from 0 or more, got {list(ids)}")
    device = device_of(messages)
    table, indices, quantized, floats = _columns(ids, messages, device)
    unary, fixed, unary_bits = encode_indices(indices, table.index_rows)
    alike = groupby(quantized, key=lambda its: (its[0], its[1].dtype))
    levels = [pack_levels([run for _, run in some], bits) for (bits, _), some in alike]
    front = torch.frombuffer(bytearray(HEADER_BYTES) + table.data, dtype=torch.uint8)
    sections = [front.to(device), unary.to(device), fixed.to(device), *levels, *(f.view(torch.uint8) for f in floats)]
    data = _on_host(torch.cat(sections)).numpy()
    _seal(data, _MESSAGES, len(table.rows), round, energy, _OVERFLOW if overflow else 0)
    packet = None
    if table.is_uniform:
        fused = table.fused(indices, torch.cat([run for _, run in quantized]) if quantized else None, *floats)
        packet = Packet(round, table.ids, fused, energy, overflow, None, table, floats)
    return Encoded(data, table.shares(unary_bits), table, packet)


def encode_failure(text: str, *, round: int = 0) -> Bytes:
    """A packet that carries an error in place of messages, so that no other rank waits in vain."""
    # A file's name may hold bytes that are not UTF-8.
    data = np.frombuffer(bytearray(HEADER_BYTES) + text.encode(errors="backslashreplace"), np.uint8)
    _seal(data, _FAILURE, 0, round, 0.0)
    return data


def decode(data: bytes | Bytes, device: torch.device | str = "cpu", *, likely: Table | None = None) -> Packet:
    """Open a packet; its tensors are on ``device``. Nothing outside ``data`` is read, whatever it holds.

    Args:
        data: as it was received.
        device: of the messages.
        likely: a table that this packet's may be equal to, which then need not be read.

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
    # A table is read from front to back, so the same bytes in front are the same table.
    is_likely = likely is not None and len(likely.rows) == count and body.data[: len(likely.data)] == likely.data
    table = likely if likely is not None and is_likely else read_table(body.data, count)
    # Messages have storage of their own, since received buffers are reused; torch takes none that is read-only.
    streams = torch.from_numpy(np.require(body[len(table.data) :], requirements="W")).to(device)
    messages, floats = _decode_streams(table, streams)
    return Packet(round, table.ids, messages, energy, bool(flags & _OVERFLOW), None, table, floats)


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


def _columns(
    ids: Sequence[int], messages: Sequence[Message], device: torch.device
) -> tuple[Table, Tensor, list[tuple[int, Tensor]], list[Tensor]]:
    """The table, and what is written behind it: indices, levels, and for each of DTYPES that there is the floats.

    Levels are a pair for each message that has some: of how many bits they are, and they themselves.
    """
    if isinstance(messages, Fused) and (fused := _fused_without_zeros(messages)) is not None:
        values, counts = fused.values, [*fused.counts]
        runs = [] if isinstance(values, Floats) else [(values.bits, run) for run in values.levels.split(counts)]
        s = 0 if isinstance(values, Floats) else values.s
        table = table_of_fused(tuple(ids), tuple(fused.shapes), tuple(counts), fused.kind[0], s)
        return table, fused.indices, runs, [values.floats]
    kept = _without_zeros([m.to(device) for m in messages])
    table = table_of(tuple(map(row_of, ids, kept)))
    coded = [i for place in table.coded if (i := kept[place].indices) is not None]
    indices = torch.cat(coded) if coded else torch.empty(0, dtype=torch.int64, device=device)
    indices = indices if indices.dtype == torch.int32 else indices.to(torch.int64)
    quantized = [(q.bits, q.levels) for m in kept if isinstance(q := unrotated(m.values), Levels)]
    floats = [torch.cat([kept[place].values.floats for place in places]) for places in table.floats if places]
    return table, indices, quantized, floats


def _fused_without_zeros(messages: Fused) -> Fused | None:
    """The same less the entries that say nothing; None if there are some, and not all is finite."""
    numbers, zero = messages.values.zero
    if none_is([numbers], zero):
        return messages
    if not all_finite([messages.values.floats]):
        return None
    places = numbers.ne(zero).nonzero().reshape(-1)
    ends = torch.tensor([0, *accumulate(messages.counts)], device=places.device)
    counts = torch.searchsorted(places, ends).diff().tolist()
    return Fused(messages.shapes, counts, messages.indices[places], messages.values.select_runs(places, counts))


def _without_zeros(messages: Sequence[Message]) -> list[Message]:
    """The messages less the entries that say nothing; full ones become dense."""
    kept = list(messages)
    coded = [place for place, m in enumerate(messages) if m.indices is not None and m.rule is None]
    kinds: defaultdict[tuple[torch.dtype, int], list[tuple[int, Tensor]]] = defaultdict(list)
    for place in coded:
        if (zeros := messages[place].values.zero) is not None:
            kinds[zeros[0].dtype, zeros[1]].append((place, zeros[0]))
    for (_, zero), some in kinds.items():
        places, numbers = [place for place, _ in some], [n for _, n in some]
        # One question for all of a kind, and most often there are none: on a GPU each question waits for it.
        if not none_is(numbers, zero):
            fewer = _at([messages[place] for place in places], torch.cat(numbers).ne(zero))
            for place, message in zip(places, fewer, strict=True):
                kept[place] = message
    for place in coded:
        if len(kept[place].values) == kept[place].numel:
            kept[place] = replace(kept[place], indices=None)
    return kept


def _at(messages: Sequence[Message], chosen: Tensor) -> Iterator[Message]:
    """The entries of all messages where ``chosen`` is true; messages that are not finite as they are."""
    places = chosen.nonzero().reshape(-1)
    indices = torch.cat([m.indices for m in messages if m.indices is not None])[places]
    starts = [0, *accumulate(len(m.values) for m in messages)]
    bounds = torch.searchsorted(places, torch.tensor(starts, device=places.device)).tolist()
    are_finite = all_finite([m.values.floats for m in messages])
    for m, start, (low, high) in zip(messages, starts, pairwise(bounds), strict=False):
        if high - low < len(m.values) and (are_finite or bool(m.is_finite())):
            m = replace(m, indices=indices[low:high], values=m.values.select(places[low:high] - start))
        yield m


def _decode_streams(table: Table, streams: Tensor) -> tuple[Sequence[Message], list[Tensor]]:
    """The messages, and all their floats in one tensor for each dtype that there are some of."""
    sizes = [table.fixed_bytes, sum(table.level_bytes), sum(table.float_bytes)]
    unary_bytes = len(streams) - sum(sizes)
    if unary_bytes < 0:
        raise WireError(f"the table asks for {-unary_bytes} bytes more than the message has")
    unary, fixed, levels, rest = streams.split([unary_bytes, *sizes])
    coded = decode_indices(unary, fixed, table.index_rows, table.index_dtype if table.is_uniform else torch.int64)
    sections = _decode_floats(table, rest)
    there = [section for section in sections if section.numel()]
    if table.is_uniform:
        is_floats = table.rows[0].kind == FLOATS
        unpacked = None if is_floats else _decode_levels(table.rows[0], levels, table.counts)
        return table.fused(coded, unpacked, sections[table.rows[0].dtype]), there
    indices = iter(coded.split([table.counts[place] for place in table.coded]))
    floats = dict(_shared_out(table, sections))
    messages = []
    for place, (row, packed) in enumerate(zip(table.rows, levels.split(table.level_bytes), strict=True)):
        values = _decode_values(row, packed, floats[place])
        if row.support == DENSE:
            messages.append(Message(row.shape, None, values))
        elif row.support in (SUBSET, BLOCK):
            rule = Subset(row.rule) if row.support == SUBSET else Block(row.rule)
            messages.append(Message(row.shape, rule.indices(row.numel, row.sent).to(streams.device), values, rule))
        else:
            messages.append(Message(row.shape, next(indices), values))
    return messages, there


def _decode_values(row: Row, packed: Tensor, floats: Tensor) -> Values:
    if row.kind == FLOATS:
        return Floats(floats)
    levels = _decode_levels(row, packed, [row.level_count])
    values: Levels
    if row.kind == SYMMETRIC:
        values = Symmetric(levels, floats, row.s, row.bucket)
    elif row.kind == RANGE:
        values = Range(levels, floats, row.s)
    else:
        values = Codebook(levels, floats)
    return values if row.rotation is None else Rotated(values, row.rotation, row.sent)


def _decode_levels(row: Row, packed: Tensor, counts: Sequence[int]) -> Tensor:
    """The levels of one message or of several like it, which have so many."""
    levels = unpack_levels(packed, row.level_bits, counts)
    highest = 2 * row.s if row.kind == SYMMETRIC else row.s
    if highest + 1 < 1 << row.level_bits and len(levels) and int(levels.max()) > highest:
        raise WireError(f"a level lies above the highest, {highest}")
    return levels


def _decode_floats(table: Table, stream: Tensor) -> list[Tensor]:
    """For each of DTYPES, all numbers of it."""
    sections = []
    for dtype, places in zip(DTYPES, table.floats, strict=True):
        size = sum(table.float_bytes[place] for place in places)
        section = stream.new_empty(size)  # of its own, since a section may start at any byte and must be aligned
        section.copy_(stream[:size])
        stream = stream[size:]
        sections.append(section.view(dtype))
    return sections


def _shared_out(table: Table, sections: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The place of each message, and its numbers."""
    for places, section in zip(table.floats, sections, strict=True):
        yield from zip(places, section.split([table.float_counts[place] for place in places]), strict=True)
