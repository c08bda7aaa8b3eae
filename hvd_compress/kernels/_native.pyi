"""What cpp/module.cpp exports."""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

_Float = TypeVar("_Float", np.float32, np.float64)
_Floats = npt.NDArray[_Float]
_Indices = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]

class VectorUnit:
    AVX512: VectorUnit
    AVX2: VectorUnit
    PORTABLE: VectorUnit
    name: str

def vector_units() -> list[VectorUnit]: ...
def top_k(flat: _Floats[_Float], k: int, threads: int, unit: VectorUnit) -> tuple[_Indices, _Floats[_Float]]: ...
def add_top_k(
    flat: _Floats[_Float], other: _Floats[_Float], k: int, threads: int, unit: VectorUnit
) -> tuple[_Indices, _Floats[_Float]]: ...
def is_finite(flat: npt.NDArray[Any], threads: int) -> bool: ...
def all_nonzero(vectors: list[npt.NDArray[Any]]) -> bool: ...
def add_at(flat: _Floats[_Float], indices: _Indices, values: _Floats[_Float], alpha: float) -> None: ...
def sum_at(
    flat: _Floats[_Float],
    indices: list[_Indices],
    values: list[_Floats[_Float]],
    divisor: float,
    threads: int,
) -> None: ...
def subtract_at(
    flat: _Floats[_Float], indices: list[_Indices], values: list[_Floats[_Float]], divisor: float
) -> None: ...
def encode_indices(indices: list[_Indices], table: _Indices) -> tuple[_Bytes, _Bytes, list[int]]: ...
def decode_indices(unary: _Bytes, fixed: _Bytes, table: _Indices) -> _Indices: ...
def pack_levels(levels: npt.NDArray[Any], bits: int) -> _Bytes: ...
def unpack_levels(packed: _Bytes, bits: int, count: int) -> npt.NDArray[Any]: ...
