"""The compiled loops, if they could be built: the only module that imports them.

Each has a torch expression elsewhere that defines it, bit for bit. Who has tensors that :func:`serves` accepts calls
the loop, who has others evaluates the expression.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .vectors import Sparse

try:
    import hvd_compress.kernels._native as _native
except ImportError as error:
    _available = False
    logging.getLogger(__name__).warning(
        "the compiled kernels are missing (%s): results are the same, but selecting and coding take several times as "
        "long. With a C++ compiler and pybind11, install hvd_compress again: make env, or pip install "
        "--no-build-isolation -e .",
        error,
    )
else:
    _available = True
    _UNIT = _native.vector_units()[0]

_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)


def description() -> str:
    """Which loops run here, for people: ``"compiled, AVX512"``, ``"compiled, AVX2"`` and the like, or ``"torch"``."""
    return f"compiled, {_UNIT.name}" if _available else "torch"


def is_here() -> bool:
    """Whether the loops could be built."""
    return _available


def serves(*tensors: Tensor) -> bool:
    """Whether the loops are there and can read ``tensors``: contiguous, on the CPU, and of a dtype they have."""
    if not _available:
        return False
    for t in tensors:  # asked several times for each tensor of a model
        if not t.is_cpu or t.dtype not in _DTYPES or not t.is_contiguous() or t.requires_grad:
            return False
    return True


# The lengths and dtypes of arrays are checked in module.cpp: TypeError for a dtype or a layout that a loop does not
# have, ValueError and IndexError for lengths and indices.


def top_k(flat: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``operators.topk.top_k``, and the values at these indices."""
    indices, values = _native.top_k(flat.numpy(), k, torch.get_num_threads(), _UNIT)
    return torch.from_numpy(indices), torch.from_numpy(values)


def split_top_k(
    flats: Sequence[Tensor], others: Sequence[Tensor], outs: Sequence[Tensor], ks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The same of each ``torch.add(flat, other, out=out)``, off which it is then taken; ``out`` may be ``flat``.

    Indices and values of all vectors come one after the other. Indices are int32 if they suffice.
    """
    is_short = all(flat.numel() < 1 << 31 for flat in flats)
    split = _native.split_top_k32 if is_short else _native.split_top_k64
    x, y, to = ([t.numpy() for t in tensors] for tensors in (flats, others, outs))
    indices, values = split(x, y, to, ks, torch.get_num_threads(), _UNIT)
    return torch.from_numpy(indices), torch.from_numpy(values)


def is_finite(flat: Tensor) -> bool:
    """:func:`.vectors.is_finite`."""
    return _native.is_finite(flat.numpy(), torch.get_num_threads())


def none_is(vectors: Sequence[Tensor], number: float) -> bool:
    """:func:`.vectors.none_is`, for vectors of one dtype."""
    return _native.none_is([v.numpy() for v in vectors], number)


def add_at(flat: Tensor, indices: Tensor, values: Tensor, alpha: float) -> None:
    """:func:`.vectors.add_at`."""
    _native.add_at(flat.numpy(), indices.numpy(), values.numpy(), alpha)


def sum_at(flats: Sequence[Tensor], ranks: Sequence[Sparse], divisor: float) -> None:
    """:func:`.vectors.sum_at`."""
    _native.sum_at(*_arrays(flats, ranks), divisor, torch.get_num_threads())


def subtract_at(flats: Sequence[Tensor], ranks: Sequence[Sparse], divisor: float) -> None:
    """:func:`.vectors.subtract_at`."""
    _native.subtract_at(*_arrays(flats, ranks), divisor)


def _arrays(flats: Sequence[Tensor], ranks: Sequence[Sparse]) -> tuple[Any, Any, Any, Any]:
    columns = [r.indices.numpy() for r in ranks], [r.values.numpy() for r in ranks], [r.counts for r in ranks]
    return [flat.numpy() for flat in flats], *columns


def random_subset(seed: int, numel: int, count: int) -> Tensor:
    """:func:`.subset.random_subset`, of less than a quarter of the indices."""
    return torch.from_numpy(_native.random_subset(seed, numel, count))


def random_signs(seed: int, n: int) -> Tensor:
    """:func:`.hadamard.random_signs`."""
    return torch.from_numpy(_native.random_signs(seed, n, torch.get_num_threads()))


def hadamard(flat: Tensor) -> Tensor:
    """:func:`.hadamard.hadamard`."""
    return torch.from_numpy(_native.hadamard(flat.numpy(), len(flat) ** 0.5))


def uniform(seed: int, n: int, dtype: torch.dtype) -> Tensor:
    """:func:`.draws.uniform_of`."""
    draw = _native.uniform32 if dtype == torch.float32 else _native.uniform64
    return torch.from_numpy(draw(seed, n, torch.get_num_threads()))


def round_by_chance(
    flat: Tensor, offset: float, steps: Tensor, bucket: int, least: int, most: int, seed: int
) -> Tensor:
    """:func:`.rounding.round_by_chance` with the draws of a seed; ``bucket`` is 1 or more."""
    threads = torch.get_num_threads()
    levels = _native.round_by_chance(flat.numpy(), offset, steps.numpy(), bucket, least, most, seed, threads)
    return torch.from_numpy(levels)


def round_to_largest(flat: Tensor, s: int, seed: int) -> tuple[Tensor, Tensor]:
    """:func:`.rounding.round_to_largest` with the draws of a seed."""
    levels, scale = _native.round_to_largest(flat.numpy(), s, seed, torch.get_num_threads())
    return torch.from_numpy(levels), torch.from_numpy(scale)


def round_runs_to_largest(flat: Tensor, counts: Sequence[int], s: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """:func:`.rounding.round_runs_to_largest` with the draws of a seed for each run."""
    levels, scales = _native.round_runs_to_largest(flat.numpy(), counts, s, seeds, torch.get_num_threads())
    return torch.from_numpy(levels), torch.from_numpy(scales)


def choose_by_chance(flat: Tensor, table: Tensor, seed: int) -> Tensor:
    """:func:`.rounding.choose_by_chance` with the draws of a seed."""
    return torch.from_numpy(_native.choose_by_chance(flat.numpy(), table.numpy(), seed, torch.get_num_threads()))


def look_up(table: Tensor, levels: Tensor) -> Tensor:
    """:func:`.rounding.look_up`."""
    return torch.from_numpy(_native.look_up(table.numpy(), levels.numpy(), torch.get_num_threads()))


def look_up_runs(table: Tensor, levels: Tensor, counts: Sequence[int], scales: Tensor) -> Tensor:
    """:func:`.rounding.look_up_runs`."""
    return torch.from_numpy(_native.look_up_runs(table.numpy(), levels.numpy(), counts, scales.numpy()))


def encode_indices(indices: Tensor, table: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """``wire.indices.encode_indices``."""
    unary, fixed, unary_bits = _native.encode_indices(indices.numpy(), table.numpy())
    return torch.from_numpy(unary), torch.from_numpy(fixed), unary_bits


def decode_indices(unary: Tensor, fixed: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """``wire.indices.decode_indices``, but for a ValueError in place of a WireError."""
    decode = _native.decode_indices32 if dtype == torch.int32 else _native.decode_indices64
    return torch.from_numpy(decode(unary.numpy(), fixed.numpy(), table.numpy()))


def pack_levels(runs: Sequence[Tensor], bits: int) -> Tensor:
    """``wire.bits.pack_levels``, for runs of one dtype."""
    return torch.from_numpy(_native.pack_levels([levels.numpy() for levels in runs], bits))


def unpack_levels(packed: Tensor, bits: int, counts: Sequence[int]) -> Tensor:
    """``wire.bits.unpack_levels``."""
    return torch.from_numpy(_native.unpack_levels(packed.numpy(), bits, counts))
