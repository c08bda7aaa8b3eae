"""The indices of all messages of a packet as two bit streams: gap quotients in unary, and fields of fixed widths.

Both streams run over all messages, so that coding them takes a constant number of tensor operations, or one compiled
loop. The ``…_by_torch`` functions are the definitions; the others equal them bit for bit.

A table says how the messages' indices are coded: int64 ``[m, 4]`` on the CPU, a row for each message with the number
of its indices, the coding's parameter, whether it is Rice coded (1) or not (0), and the tensor's number of elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import WireError
from ..kernels import native
from .bits import pack_fields, pack_unary, unpack_fields, unpack_unary


def encode_indices(indices: Tensor, table: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Code the indices of all messages.

    Args:
        indices: int32 or int64, those of all messages one after the other.
        table: see above.

    Returns:
        The unary stream and the fields, uint8, and how many bits of the first each message takes.

    Raises:
        ValueError: a message's indices are not strictly ascending, or not below the tensor's size.
    """
    if native.serves(indices):
        return native.encode_indices(indices, table)
    return encode_indices_by_torch(indices, table)


def decode_indices(unary: Tensor, fixed: Tensor, table: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Inverse of :func:`encode_indices`: the indices of all messages one after the other.

    Args:
        unary: uint8, may hold anything.
        fixed: uint8, of the length that the table asks for; may hold anything.
        table: see above.
        dtype: of the result, int32 or int64.

    Raises:
        WireError: the streams are not what :func:`encode_indices` makes of such a table, or its tensors are too large
            for the dtype.
    """
    if not native.serves(unary, fixed):
        return decode_indices_by_torch(unary, fixed, table, dtype)
    try:
        return native.decode_indices(unary, fixed, table, dtype)
    except ValueError as error:
        raise WireError(f"the message does not hold what its table says: {error}") from None


def encode_indices_by_torch(indices: Tensor, table: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """See :func:`encode_indices`."""
    indices = indices.to(torch.int64)
    owner, starts = _owners(table, indices.device)
    remainder, is_rice, numel = _per_element(owner, table)

    previous = torch.cat([indices.new_full((1,), -1), indices[:-1]])[: len(indices)]
    previous[starts] = -1
    gaps = indices - previous - 1
    quotients = torch.where(is_rice, gaps >> remainder, 0)
    fields = torch.where(is_rice, gaps & ((1 << remainder) - 1), indices)

    unary = torch.zeros(len(table) + 1, dtype=torch.int64, device=indices.device)
    unary.index_add_(0, owner, torch.where(is_rice, quotients + 1, 0))
    unary[-1] = ((gaps < 0) | (indices >= numel)).sum()
    *unary_bits, wrong = unary.tolist()
    if wrong:
        raise ValueError("indices must be strictly ascending and below the tensor's size")
    unary_stream = pack_unary(quotients[is_rice], sum(unary_bits))
    return unary_stream, pack_fields(fields, remainder, int((table[:, 0] * table[:, 1]).sum())), unary_bits


def decode_indices_by_torch(unary: Tensor, fixed: Tensor, table: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """See :func:`decode_indices`."""
    if bool((table[:, 3] - 1 > torch.iinfo(dtype).max).any()):
        raise WireError(f"a tensor has more elements than {dtype} indices can tell")
    owner, starts = _owners(table, unary.device)
    remainder, is_rice, numel = _per_element(owner, table)
    expected = int((table[:, 0] * table[:, 2]).sum())
    runs = unpack_unary(unary)
    if len(runs) != expected or len(unary) != (int(runs.sum()) + expected + 7) // 8:
        raise WireError(f"the message has {len(runs)} index gaps where its table says {expected}")
    fields = unpack_fields(fixed, remainder)

    steps = torch.zeros_like(fields)
    steps[is_rice] = (runs << remainder[is_rice]) + fields[is_rice] + 1
    sums = torch.cumsum(steps, 0)
    base = torch.zeros(len(table), dtype=torch.int64, device=fields.device)
    base[owner[starts]] = sums[starts] - steps[starts]
    indices = torch.where(is_rice, sums - base[owner] - 1, fields)

    previous = torch.cat([indices.new_full((1,), -1), indices[:-1]])[: len(indices)]
    previous[starts] = -1
    if bool(((indices <= previous) | (indices >= numel)).any()):
        raise WireError("the message's indices are not strictly ascending and below the tensor's size")
    return indices.to(dtype)


def _owners(table: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each element the position of its message, and where the non-empty messages start."""
    counts = table[:, 0]
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    starts = (torch.cumsum(counts, 0) - counts)[counts > 0]
    return owner.to(device), starts.to(device)


def _per_element(owner: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coding parameter, whether Rice coded, and tensor size, for each element."""
    columns = table.to(owner.device)[owner]
    return columns[:, 1], columns[:, 2] == 1, columns[:, 3]
