"""The table of a packet: a row for each message, which says how its numbers lie in the streams.

A row is a uint16 *form*, then varints. The form's bits from the lowest: 3 support, 5 parameter, 2 kind, 2 dtype, 1
rotated, 2 number of dimensions, 1 "ids were skipped" (else the id is the last one + 1).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WireError
from ..kernels import next_power_of_two
from .bits import MAX_WIDTH
from .message import Fused, Message, Subset
from .values import Codebook, Floats, Levels, Range, Rotated, Symmetric, SymmetricRuns, Values
from .varint import append_varint, read_varint

DENSE, RICE, FIXED, SUBSET, BLOCK = range(5)  # how receivers learn a message's indices
_CODED = (RICE, FIXED)  # those that take part in the index streams
FLOATS, SYMMETRIC, RANGE, CODEBOOK = range(4)  # what a message's values are
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MANY_DIMENSIONS = 3  # as the number of dimensions: a varint with the real one follows
_MOST_DIMENSIONS = 64  # torch has no tensors with more
_MAX_BITS = 16  # of a level
_KEPT = 64  # tables that are remembered: mostly, a bucket's table is that of the last exchange


class Row(NamedTuple):
    """What a receiver must know of one message."""

    id: int
    shape: tuple[int, ...]
    support: int
    parameter: int  # Rice: bits of the remainder; fixed: bits of an index
    rule: int  # subset: seed; block: start
    sent: int  # values
    kind: int
    dtype: int  # of the floats: position in DTYPES
    s: int  # symmetric, range, codebook: number of steps
    bucket: int  # symmetric: values that share a scale, or 0
    rotation: int | None  # seed

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def level_bits(self) -> int:
        """Of each level."""
        return (2 * self.s if self.kind == SYMMETRIC else self.s).bit_length()

    @property
    def level_count(self) -> int:
        """Levels that are sent, with those that only complete a rotation."""
        if self.kind == FLOATS:
            return 0
        return self.sent if self.rotation is None else next_power_of_two(self.sent)

    @property
    def level_bytes(self) -> int:
        """Of the stream of levels."""
        return (self.level_count * self.level_bits + 7) // 8

    @property
    def float_count(self) -> int:
        """Floats that are sent."""
        if self.kind == FLOATS:
            return self.sent
        if self.kind == SYMMETRIC:
            return max(1, -(-self.level_count // self.bucket)) if self.bucket else 1
        return 2 if self.kind == RANGE else self.s + 1


@dataclass(frozen=True)
class Table:
    """All rows of a packet, their bytes, and what follows from them."""

    rows: tuple[Row, ...]
    data: bytes
    row_bytes: list[int]
    ids: list[int]  # of each row, as the next ones
    shapes: list[tuple[int, ...]]
    numels: list[int]
    counts: list[int]  # values that are sent
    coded: list[int]  # places of the rows that take part in the index streams
    index_rows: Tensor  # of these; see :mod:`.indices`
    level_bytes: list[int]  # of each row
    float_counts: list[int]
    float_bytes: list[int]
    floats: list[list[int]]  # for each of DTYPES, places of the rows with floats of it

    @classmethod
    def of(cls, rows: tuple[Row, ...], data: bytes, row_bytes: list[int]) -> Table:
        """From the rows and their bytes."""
        coded = [place for place, row in enumerate(rows) if row.support in _CODED]
        columns = [[r.sent, r.parameter, r.support == RICE, r.numel] for r in (rows[place] for place in coded)]
        float_counts = [row.float_count for row in rows]
        return cls(
            rows,
            data,
            row_bytes,
            [row.id for row in rows],
            [row.shape for row in rows],
            [row.numel for row in rows],
            [row.sent for row in rows],
            coded,
            torch.tensor(columns, dtype=torch.int64, device="cpu").reshape(-1, 4),
            [row.level_bytes for row in rows],
            float_counts,
            [count * DTYPES[row.dtype].itemsize for count, row in zip(float_counts, rows, strict=True)],
            [[place for place, row in enumerate(rows) if row.dtype == code] for code in range(len(DTYPES))],
        )

    @cached_property
    def is_uniform(self) -> bool:
        """Whether there are messages, and all have indices that are sent, and values that can be taken as one."""
        kinds = {(row.kind, row.dtype, row.s, row.bucket, row.rotation) for row in self.rows}
        if len(self.coded) < len(self.rows) or len(kinds) != 1:
            return False
        kind, _, _, bucket, rotation = kinds.pop()
        return kind == FLOATS or (kind == SYMMETRIC and not bucket and rotation is None)

    @cached_property
    def index_dtype(self) -> torch.dtype:
        """The narrower one that suffices: int32 or int64."""
        return torch.int32 if max(self.numels, default=0) <= 1 << 31 else torch.int64

    def fused(self, indices: Tensor, levels: Tensor | None, floats: Tensor) -> Fused:
        """The messages, if the table :attr:`is_uniform`.

        Args:
            indices: of all of them.
            levels: of all of them, if their values are levels.
            floats: of all of them.
        """
        values: Floats | SymmetricRuns = Floats(floats)
        if levels is not None:
            values = SymmetricRuns(levels, floats, self.counts, self.rows[0].s)
        return Fused(self.shapes, self.counts, indices.to(self.index_dtype), values)

    @property
    def fixed_bytes(self) -> int:
        """Of the stream of fixed-width fields."""
        return (sum(self.rows[place].sent * self.rows[place].parameter for place in self.coded) + 7) // 8

    def shares(self, unary_bits: Sequence[int]) -> list[int]:
        """Bytes for each message, adding up to the body: index streams are shared to the bit, so carry the rest.

        Args:
            unary_bits: that each coded message takes in the first stream.
        """
        shares = [sum(sizes) for sizes in zip(self.row_bytes, self.level_bytes, self.float_bytes, strict=True)]
        unary = fixed = 0
        for place, bits in zip(self.coded, unary_bits, strict=True):
            before = (unary + 7) // 8 + (fixed + 7) // 8
            unary += bits
            fixed += self.rows[place].sent * self.rows[place].parameter
            shares[place] += (unary + 7) // 8 + (fixed + 7) // 8 - before
        return shares


# Sending


def row_of(id: int, message: Message) -> Row:
    """The row of a message.

    Raises:
        ValueError: its values are of a dtype or of a number of bits that the format does not have, or not as many as
            its elements though it is dense.
        TypeError: its values are of a kind that the format does not have.
    """
    values = message.values
    count, numel, dtype = len(values), message.numel, message.dtype
    if dtype not in DTYPES:
        raise ValueError(f"values must be one of {DTYPES}, got {dtype}")
    parameter = rule = 0
    if message.indices is None:
        support = DENSE
        if count != numel:
            raise ValueError(f"a dense message of {numel} elements has {count} values")
    elif message.rule is None:
        support, parameter = _index_code(numel, count)
    elif isinstance(message.rule, Subset):
        support, rule = SUBSET, message.rule.seed
    else:
        support, rule = BLOCK, message.rule.start
    rotation = values.seed if isinstance(values, Rotated) else None
    kind, s, bucket = _kind(unrotated(values))
    return Row(id, message.shape, support, parameter, rule, count, kind, DTYPES.index(dtype), s, bucket, rotation)


def unrotated(values: Values) -> Values:
    """What is sent of them, besides the rotation's seed."""
    return values.inner if isinstance(values, Rotated) else values


def _kind(values: Values) -> tuple[int, int, int]:
    if isinstance(values, Floats):
        return FLOATS, 0, 0
    if isinstance(values, Levels) and not 1 <= values.bits <= _MAX_BITS:
        raise ValueError(f"a level may have 1 to {_MAX_BITS} bits, got {values.bits}")
    if isinstance(values, Symmetric):
        return SYMMETRIC, values.s, values.bucket
    if isinstance(values, Range):
        return RANGE, values.s, 0
    if isinstance(values, Codebook):
        return CODEBOOK, len(values.parameters) - 1, 0
    raise TypeError(f"this format has no code for {type(values).__name__}")


@lru_cache(maxsize=1 << 12)
def _index_code(numel: int, count: int) -> tuple[int, int]:
    """The coding whose longest possible result is the shortest, and its parameter."""
    if count == 0:
        return FIXED, 0
    remainder = _rice_parameter(numel, count)
    rice = count * (remainder + 1) + ((numel - count) >> remainder)
    width = (numel - 1).bit_length()
    return (FIXED, width) if width <= MAX_WIDTH and count * width <= rice else (RICE, remainder)


def _rice_parameter(numel: int, count: int) -> int:
    """Best r for gaps between ``count`` uniformly chosen of ``numel``: geometric with p = count / numel.

    Kiely, "Selecting the Golomb parameter in Rice coding" (2004): the golden-ratio rule.
    """
    ratio = math.log((math.sqrt(5) - 1) / 2) / math.log1p(-count / numel)
    return min(max(0, 1 + math.floor(math.log2(ratio))), MAX_WIDTH)


@lru_cache(maxsize=_KEPT)
def table_of(rows: tuple[Row, ...]) -> Table:
    """The table that has ``rows``, whose ids ascend."""
    written = [_write(row, previous) for row, previous in zip(rows, [-1, *(r.id for r in rows)], strict=False)]
    return Table.of(rows, b"".join(written), list(map(len, written)))


@lru_cache(maxsize=_KEPT)
def table_of_fused(
    ids: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], counts: tuple[int, ...], dtype: torch.dtype, s: int
) -> Table:
    """The table of sparse messages, each of which has fewer than all elements: s steps to a side, or floats if 0."""
    codes = [_index_code(math.prod(shape), count) for shape, count in zip(shapes, counts, strict=True)]
    number, kind = DTYPES.index(dtype), SYMMETRIC if s else FLOATS
    rows = [
        Row(id, shape, support, parameter, 0, count, kind, number, s, 0, None)
        for id, shape, (support, parameter), count in zip(ids, shapes, codes, counts, strict=True)
    ]
    return table_of(tuple(rows))


def _write(row: Row, previous_id: int) -> bytes:
    skipped = row.id - previous_id - 1
    dimensions = min(len(row.shape), _MANY_DIMENSIONS)
    form = row.support | row.parameter << 3 | row.kind << 8 | row.dtype << 10
    form |= (row.rotation is not None) << 12 | dimensions << 13 | (skipped > 0) << 15
    data = bytearray(struct.pack("<H", form))
    if skipped:
        append_varint(data, skipped)
    if dimensions == _MANY_DIMENSIONS:
        append_varint(data, len(row.shape))
    for size in row.shape:
        append_varint(data, size)
    if row.support != DENSE:
        append_varint(data, row.sent)
    if row.support in (SUBSET, BLOCK):
        append_varint(data, row.rule)
    if row.kind != FLOATS:
        append_varint(data, row.s)
    if row.kind == SYMMETRIC:
        append_varint(data, row.bucket)
    if row.rotation is not None:
        append_varint(data, row.rotation)
    return bytes(data)


# Receiving


def read_table(body: memoryview, count: int) -> Table:
    """The table of ``count`` rows at the start of ``body``.

    Raises:
        WireError: there is none.
    """
    if 2 * count > len(body):  # a row has at least two bytes
        raise WireError(f"{count} messages cannot lie in {len(body)} bytes")
    rows: list[Row] = []
    ends = [0]
    id = -1
    for _ in range(count):
        row, end = _read(body, ends[-1], id)
        rows.append(row)
        ends.append(end)
        id = row.id
    row_bytes = [end - start for start, end in pairwise(ends)]
    return Table.of(tuple(rows), bytes(body[: ends[-1]]), row_bytes)


def _read(body: memoryview, offset: int, previous_id: int) -> tuple[Row, int]:
    """The row at ``offset``, and the offset behind it."""

    def number() -> int:
        nonlocal offset
        value, offset = read_varint(body, offset)
        return value

    if offset + 2 > len(body):
        raise WireError("the message table is truncated")
    (form,) = struct.unpack_from("<H", body, offset)
    offset += 2
    id = previous_id + 1 + (number() if form >> 15 else 0)
    dimensions = form >> 13 & 3
    if dimensions == _MANY_DIMENSIONS:
        dimensions = number()
        if dimensions > len(body) - offset:
            raise WireError(f"{dimensions} dimensions cannot lie in {len(body) - offset} bytes")
    shape = tuple(number() for _ in range(dimensions))
    support, kind = form & 7, form >> 8 & 3
    row = Row(
        id=id,
        shape=shape,
        support=support,
        parameter=form >> 3 & 31,
        sent=math.prod(shape) if support == DENSE else number(),
        rule=number() if support in (SUBSET, BLOCK) else 0,
        kind=kind,
        dtype=form >> 10 & 3,
        s=number() if kind != FLOATS else 0,
        bucket=number() if kind == SYMMETRIC else 0,
        rotation=number() if form >> 12 & 1 else None,
    )
    _check(row)
    return row, offset


def _check(row: Row) -> None:
    if len(row.shape) > _MOST_DIMENSIONS:
        raise WireError(f"a tensor of {len(row.shape)} dimensions")
    if math.prod(max(1, size) for size in row.shape) >= 1 << 62:  # an empty tensor's other sizes are multiplied too
        raise WireError(f"a tensor of shape {row.shape} is too large to be true")
    if row.support > BLOCK or (row.parameter and row.support not in _CODED):
        raise WireError(f"unknown form of indices ({row.support}, {row.parameter})")
    if row.support != DENSE and (row.sent >= row.numel and row.sent > 0):
        raise WireError(f"{row.sent} sparse values of {row.numel} elements")
    if row.support == BLOCK and row.rule >= row.numel:
        raise WireError(f"a block starts at {row.rule} of {row.numel} elements")
    if row.kind != FLOATS and not 1 <= row.level_bits <= _MAX_BITS:
        raise WireError(f"levels of {row.level_bits} bits")
    if row.kind == FLOATS and row.rotation is not None:
        raise WireError("floats are not sent rotated")
