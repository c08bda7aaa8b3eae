"""What cpp/module.cpp exports."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

_Float = TypeVar("_Float", np.float32, np.float64)
_Floats = npt.NDArray[_Float]
_Indices = npt.NDArray[np.int64]
_Places = npt.NDArray[np.int32] | npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]

class VectorUnit:
    AVX512: VectorUnit
    AVX2: VectorUnit
    PORTABLE: VectorUnit
    name: str

def vector_units() -> list[VectorUnit]: ...
def top_k(flat: _Floats[_Float], k: int, threads: int, unit: VectorUnit) -> tuple[_Indices, _Floats[_Float]]: ...
def split_top_k32(
    flats: list[_Floats[_Float]],
    others: list[_Floats[_Float]],
    outs: list[_Floats[_Float]],
    ks: Sequence[int],
    threads: int,
    unit: VectorUnit,
) -> tuple[npt.NDArray[np.int32], _Floats[_Float]]: ...
def split_top_k64(
    flats: list[_Floats[_Float]],
    others: list[_Floats[_Float]],
    outs: list[_Floats[_Float]],
    ks: Sequence[int],
    threads: int,
    unit: VectorUnit,
) -> tuple[_Indices, _Floats[_Float]]: ...
def is_finite(flat: npt.NDArray[Any], threads: int) -> bool: ...
def none_is(vectors: list[npt.NDArray[Any]], number: float) -> bool: ...
def add_at(flat: _Floats[_Float], indices: _Places, values: _Floats[_Float], alpha: float) -> None: ...
def sum_at(
    flats: list[_Floats[_Float]],
    indices: list[_Places],
    values: list[_Floats[_Float]],
    counts: Sequence[Sequence[int]],
    divisor: float,
    threads: int,
) -> None: ...
def subtract_at(
    flats: list[_Floats[_Float]],
    indices: list[_Places],
    values: list[_Floats[_Float]],
    counts: Sequence[Sequence[int]],
    divisor: float,
) -> None: ...
def random_subset(seed: int, numel: int, count: int) -> _Indices: ...
def random_signs(seed: int, n: int, threads: int) -> npt.NDArray[np.int8]: ...
def hadamard(flat: _Floats[_Float], divisor: float) -> _Floats[_Float]: ...
def uniform32(seed: int, n: int, threads: int) -> _Floats[np.float32]: ...
def uniform64(seed: int, n: int, threads: int) -> _Floats[np.float64]: ...
def round_by_chance(
    flat: _Floats[_Float],
    offset: float,
    steps: _Floats[_Float],
    bucket: int,
    least: int,
    most: int,
    seed: int,
    threads: int,
) -> npt.NDArray[Any]: ...
def round_to_largest(
    flat: _Floats[_Float], s: int, seed: int, threads: int
) -> tuple[npt.NDArray[Any], _Floats[_Float]]: ...
def round_runs_to_largest(
    flat: _Floats[_Float], counts: Sequence[int], s: int, seeds: Sequence[int], threads: int
) -> tuple[npt.NDArray[Any], _Floats[_Float]]: ...
def choose_by_chance(flat: _Floats[_Float], table: _Floats[_Float], seed: int, threads: int) -> npt.NDArray[Any]: ...
def look_up(table: _Floats[_Float], levels: npt.NDArray[Any], threads: int) -> _Floats[_Float]: ...
def look_up_runs(
    table: _Floats[_Float], levels: npt.NDArray[Any], counts: Sequence[int], scales: _Floats[_Float]
) -> _Floats[_Float]: ...
def encode_indices(indices: _Places, table: _Indices) -> tuple[_Bytes, _Bytes, list[int]]: ...
def decode_indices32(unary: _Bytes, fixed: _Bytes, table: _Indices) -> npt.NDArray[np.int32]: ...
def decode_indices64(unary: _Bytes, fixed: _Bytes, table: _Indices) -> _Indices: ...
def pack_levels(runs: list[npt.NDArray[Any]], bits: int) -> _Bytes: ...
def unpack_levels(packed: _Bytes, bits: int, counts: Sequence[int]) -> npt.NDArray[Any]: ...
