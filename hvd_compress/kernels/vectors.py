"""Vectors in place: once over memory where the compiled loops are, several times by the torch expressions below.

The ``…_by_torch`` functions are the definitions; the others equal them bit for bit (a NaN's payload aside).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import native


class Sparse(NamedTuple):
    """Vectors of which some elements are given, one vector after the other."""

    indices: Tensor  # int32 or int64 [n]; within a vector they ascend strictly from 0 to below its length
    values: Tensor  # [n]: the elements
    counts: Sequence[int]  # how many there are of each vector; they add up to n


def is_finite(tensor: Tensor) -> Tensor:
    """Whether no element is inf or NaN: bool of no dimensions, on the tensor's device."""
    if tensor.is_floating_point() and native.serves(tensor):
        return _YES if native.is_finite(tensor) else _NO
    return is_finite_by_torch(tensor)


_YES, _NO = torch.tensor([True, False], device="cpu").unbind()  # made once: that takes longer than many an answer


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element of any of ``tensors`` is inf or NaN. On a GPU it waits for the device, once."""
    if all(t.is_floating_point() and native.serves(t) for t in tensors):
        return all(native.is_finite(t) for t in tensors)
    return bool(torch.stack([is_finite(t).to(tensors[0].device) for t in tensors]).all())


def is_finite_by_torch(tensor: Tensor) -> Tensor:
    """See :func:`is_finite`."""
    return torch.isfinite(tensor).all()


def none_is(vectors: Sequence[Tensor], number: float) -> bool:
    """Whether no element of any of ``vectors``, one or more of one dtype and device, is equal to ``number``.

    On a GPU it waits for the device, once.
    """
    if native.serves(*vectors):
        return native.none_is(vectors, number)
    return bool(torch.cat([v != number for v in vectors]).all())


def as_divisor(number: float, like: Tensor) -> Tensor:
    """What a tensor like ``like`` is to be divided by: CUDA multiplies by the reciprocal of a plain number."""
    return torch.full((), number, dtype=like.dtype, device=like.device)


def add_at(flat: Tensor, indices: Tensor, values: Tensor, alpha: float = 1.0) -> None:
    """``flat[indices[i]] += alpha * values[i]`` for all i, in order and in place.

    Args:
        flat: float32 or float64 ``[d]``.
        indices: int32 or int64 ``[k]``, 0 ≤ index < d.
        values: ``[k]``, of the dtype of ``flat``.
        alpha: the product is rounded before it is added.

    Raises:
        IndexError: an index is out of bounds (on the CPU).
    """
    if native.serves(flat, indices, values):
        native.add_at(flat, indices, values, alpha)
    else:
        add_at_by_torch(flat, indices, values, alpha)


def add_at_by_torch(flat: Tensor, indices: Tensor, values: Tensor, alpha: float = 1.0) -> None:
    """See :func:`add_at`."""
    flat.index_add_(0, indices, values, alpha=alpha)


def sum_at(flats: Sequence[Tensor], ranks: Sequence[Sparse], divisor: float = 1.0) -> None:
    """Each of ``flats`` becomes a sum of sparse vectors, one of each rank, in order of ranks, over ``divisor``.

    Args:
        flats: float32 or float64 ``[d]`` each, all of one dtype and on one device; may hold anything before.
        ranks: of each rank, vectors of the lengths, dtype and device of ``flats``.
        divisor: of the sums, each of which is rounded once more by it.

    Raises:
        ValueError, IndexError: counts do not add up; indices do not ascend, or are out of bounds (on the CPU).
    """
    if native.serves(*flats, *(t for rank in ranks for t in rank[:2])):
        native.sum_at(flats, ranks, divisor)
    else:
        sum_at_by_torch(flats, ranks, divisor)


def sum_at_by_torch(flats: Sequence[Tensor], ranks: Sequence[Sparse], divisor: float = 1.0) -> None:
    """See :func:`sum_at`."""
    parts = [[t.split([*rank.counts]) for t in rank[:2]] for rank in ranks]
    for which, flat in enumerate(flats):
        flat.zero_()
        for indices, values in parts:
            flat.index_add_(0, indices[which], values[which])
        flat.div_(as_divisor(divisor, flat))


def subtract_at(flats: Sequence[Tensor], ranks: Sequence[Sparse], divisor: float = 1.0) -> None:
    """``flats`` less what :func:`sum_at` would make of the other arguments, in place.

    Raises:
        ValueError, IndexError: as :func:`sum_at`.
    """
    if native.serves(*flats, *(t for rank in ranks for t in rank[:2])):
        native.subtract_at(flats, ranks, divisor)
    else:
        subtract_at_by_torch(flats, ranks, divisor)


def subtract_at_by_torch(flats: Sequence[Tensor], ranks: Sequence[Sparse], divisor: float = 1.0) -> None:
    """See :func:`subtract_at`."""
    sums = [torch.empty_like(flat) for flat in flats]
    sum_at_by_torch(sums, ranks, divisor)
    for flat, total in zip(flats, sums, strict=True):
        flat.sub_(total)
