"""Bits in bytes, least significant bit first, as torch expressions that run where their input lies.

Positions are computed with a cumulative sum and bits are added into 32-bit words (fields never overlap, so
adding is or-ing). There is no loop over elements and integer addition commutes, so the bytes are the same
on every device. Levels, of which there may be one for each element of a tensor, have a compiled loop as well.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import native

MAX_WIDTH = 31
"""Widest field in bits: a field and its shift must fit into the 63 bits of a non-negative int64."""


def pack_fields(fields: Tensor, widths: Tensor, total_bits: int) -> Tensor:
    """Lay unsigned ``fields`` one after the other, field i in ``widths[i]`` bits.

    Args:
        fields: int64 ``[n]``, ``0 <= fields[i] < 2 ** widths[i]``.
        widths: int64 ``[n]``, each at most :data:`MAX_WIDTH`.
        total_bits: ``widths.sum()``, which the caller knows without asking the device.

    Returns:
        uint8 ``[ceil(total_bits / 8)]``; the unused bits of the last byte are zero.
    """
    starts = torch.cumsum(widths, 0) - widths
    word, shift = starts >> 5, starts & 31
    shifted = fields << shift
    words = torch.zeros(total_bits // 32 + 2, dtype=torch.int64, device=fields.device)
    words.index_add_(0, word, shifted & 0xFFFFFFFF)
    words.index_add_(0, word + 1, shifted >> 32)
    return _words_to_bytes(words, total_bits)


def unpack_fields(packed: Tensor, widths: Tensor) -> Tensor:
    """Inverse of :func:`pack_fields`: int64 ``[n]``. ``packed`` must hold ``widths.sum()`` bits."""
    starts = torch.cumsum(widths, 0) - widths
    word, shift = starts >> 5, starts & 31
    words = _bytes_to_words(packed)
    window = words[word] | (words[word + 1] << 32)
    return (window >> shift) & ((1 << widths) - 1)


def pack_levels(runs: Sequence[Tensor], bits: int) -> Tensor:
    """Like :func:`pack_fields` with one width for all, which eight levels at a time make quicker.

    Args:
        runs: uint8 or int64 ``[n]`` each, one or more of one dtype, ``0 <= level < 2 ** bits``.
        bits: 1 to 16.

    Returns:
        uint8: of each run ``ceil(n * bits / 8)`` bytes.
    """
    if native.serves(*runs):
        return native.pack_levels(runs, bits)
    return torch.cat([pack_levels_by_torch(levels, bits) for levels in runs])


def pack_levels_by_torch(levels: Tensor, bits: int) -> Tensor:
    """:func:`pack_levels` of one run."""
    total_bits = len(levels) * bits
    if bits > 7:  # eight of them do not fit into one word
        return pack_fields(levels.to(torch.int64), torch.full_like(levels, bits, dtype=torch.int64), total_bits)
    groups = torch.zeros((len(levels) + 7) // 8 * 8, dtype=torch.int64, device=levels.device)
    groups[: len(levels)] = levels
    shifts = torch.arange(8, device=levels.device) * bits
    words = (groups.reshape(-1, 8) << shifts).sum(1)
    return words.view(torch.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[: (total_bits + 7) // 8].contiguous()


def unpack_levels(packed: Tensor, bits: int, counts: Sequence[int]) -> Tensor:
    """Inverse of :func:`pack_levels`: the levels of all runs, uint8, or int64 where a level has more than 8 bits.

    Args:
        packed: has exactly the bytes that so many levels take.
        bits: see there.
        counts: levels of each run.
    """
    if native.serves(packed):
        return native.unpack_levels(packed, bits, counts)
    runs = packed.split([(count * bits + 7) // 8 for count in counts])
    return torch.cat([unpack_levels_by_torch(run, bits, count) for run, count in zip(runs, counts, strict=True)])


def unpack_levels_by_torch(packed: Tensor, bits: int, count: int) -> Tensor:
    """:func:`unpack_levels` of one run."""
    if bits > 7:
        fields = unpack_fields(packed, torch.full((count,), bits, dtype=torch.int64, device=packed.device))
        return fields.to(torch.uint8) if bits == 8 else fields
    groups = packed.new_zeros(((count + 7) // 8, 8))
    rows = packed.new_zeros(len(groups) * bits)
    rows[: len(packed)] = packed
    groups[:, :bits] = rows.reshape(-1, bits)
    shifts = torch.arange(8, device=packed.device) * bits
    levels = (groups.view(torch.int64) >> shifts) & ((1 << bits) - 1)
    return levels.to(torch.uint8).reshape(-1)[:count]


def pack_unary(runs: Tensor, total_bits: int) -> Tensor:
    """Write each ``runs[i]`` as that many 0 bits and one 1 bit.

    Args:
        runs: int64 ``[n]``, non-negative.
        total_bits: ``runs.sum() + n``.

    Returns:
        uint8 ``[ceil(total_bits / 8)]``.
    """
    ones = torch.cumsum(runs + 1, 0) - 1
    words = torch.zeros(total_bits // 32 + 1, dtype=torch.int64, device=runs.device)
    words.index_add_(0, ones >> 5, torch.ones_like(ones) << (ones & 31))
    return _words_to_bytes(words, total_bits)


def unpack_unary(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_unary`: int64 run lengths, one for each 1 bit that is found."""
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    ones = torch.nonzero(((packed[:, None] >> bit) & 1).reshape(-1)).reshape(-1)
    return torch.diff(ones, prepend=ones.new_full((1,), -1)) - 1


def _words_to_bytes(words: Tensor, total_bits: int) -> Tensor:
    octets = words.view(torch.uint8).reshape(-1, 8)[:, :4]  # the low half of each little-endian int64
    return octets.reshape(-1)[: (total_bits + 7) // 8].contiguous()


def _bytes_to_words(packed: Tensor) -> Tensor:
    padded = packed.new_zeros((packed.numel() // 4 + 3) * 4)  # a field may start in the last word and look past it
    padded[: packed.numel()] = packed
    return padded.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
