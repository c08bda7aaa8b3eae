"""How many elements a sparsifier keeps."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_numbers


@dataclass(frozen=True)
class Amount:
    """Give one of the two.

    Args:
        k: how many elements of each tensor are kept; smaller tensors are kept whole.
        ratio: which part of each tensor is kept, 0 < ratio ≤ 1: ``round(ratio * d)`` elements, at least one.

    Raises:
        ValueError: neither or both are given, or one is out of its range.
        TypeError: ``k`` is not an integer, or ``ratio`` is not a number.
    """

    k: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if (self.k is None) == (self.ratio is None):
            raise ValueError("give exactly one of k=… (elements per tensor) and ratio=… (part of a tensor)")
        if self.k is not None:
            if isinstance(self.k, bool) or not isinstance(self.k, int):
                raise TypeError(f"k must be an integer, got {self.k!r}; for a part of the tensor use ratio=…")
            if self.k < 1:
                raise ValueError(f"k must be at least 1, got {self.k}")
        if self.ratio is not None:
            check_numbers(ratio=self.ratio)
            if not 0 < self.ratio <= 1:
                raise ValueError(f"ratio must be in (0, 1], got {self.ratio}; 0.01 keeps one element in a hundred")

    def count(self, numel: int) -> int:
        """How many of ``numel`` elements are kept."""
        if self.ratio is None:
            assert self.k is not None
            return min(self.k, numel)
        return min(max(1, round(self.ratio * numel)), numel)

    def gamma(self, numel: int) -> float:
        """k/d: the γ of choosing k of d elements by size (worst case) or by chance (every x)."""
        return self.count(numel) / numel if numel else 1.0
