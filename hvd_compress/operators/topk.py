"""Top_k: keep the k elements of largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..wire import Message
from .base import Operator, working_dtype


@dataclass(frozen=True)
class TopK(Operator):
    """The k elements of largest magnitude, exactly; among equals the lowest index wins. NaN counts as infinite.

    Qsparse-local-SGD (arXiv 1906.02367), section 2: a contraction with γ = k/d.

    Give one of the two:

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
            raise ValueError("top-k needs exactly one of k=… (elements per tensor) and ratio=… (part of a tensor)")
        if self.k is not None:
            if isinstance(self.k, bool) or not isinstance(self.k, int):
                raise TypeError(f"k must be an integer, got {self.k!r}; for a part of the tensor use ratio=…")
            if self.k < 1:
                raise ValueError(f"k must be at least 1, got {self.k}")
        if self.ratio is not None:
            if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float):
                raise TypeError(f"ratio must be a number, got {self.ratio!r}")
            if not 0 < self.ratio <= 1:
                raise ValueError(f"ratio must be in (0, 1], got {self.ratio}; 0.01 keeps one element in a hundred")

    def count(self, numel: int) -> int:
        """How many of ``numel`` elements are kept."""
        if self.ratio is None:
            assert self.k is not None
            return min(self.k, numel)
        return min(max(1, round(self.ratio * numel)), numel)

    def gamma(self, numel: int) -> float:
        """k/d, attained by vectors whose elements have one and the same magnitude."""
        return self.count(numel) / numel if numel else 1.0

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`. Nothing is drawn from ``generator``."""
        flat = x.detach().to(working_dtype(x.dtype)).reshape(-1)
        k = self.count(len(flat))
        if k == len(flat):
            # A copy, since a message must not change when the caller goes on with x.
            return Message(tuple(x.shape), None, flat.clone())
        indices = top_k_by_sorting(flat, k) if flat.is_cuda else top_k(flat, k)
        return Message(tuple(x.shape), indices, flat[indices])


def top_k(flat: Tensor, k: int) -> Tensor:
    """Ascending indices (int64 ``[k]``) of the k largest magnitudes of ``flat`` ``[d]``, ties to the lowest index.

    Three cheap passes over memory: a sample suggests a threshold, and the exact selection runs among the few
    elements that pass it. Should fewer than k pass, all elements are candidates.
    """
    magnitude = flat.abs()
    candidates = torch.nonzero(~(magnitude < _likely_threshold(magnitude, k))).reshape(-1)  # NaN passes
    if len(candidates) < k:
        candidates = torch.arange(len(flat), device=flat.device)
    among = magnitude[candidates].nan_to_num_(nan=torch.inf, posinf=torch.inf)
    kth = torch.topk(among, k, sorted=False).values.min()
    above, equal = among > kth, among == kth
    return candidates[above | (equal & (torch.cumsum(equal, 0) <= k - above.sum()))]


def top_k_by_sorting(flat: Tensor, k: int) -> Tensor:
    """The same as :func:`top_k`, bit for bit, without asking the device how many elements pass a test."""
    magnitude = flat.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    return torch.sort(magnitude, descending=True, stable=True).indices[:k].sort().values


_SAMPLE = 1 << 14  # elements
_SLACK = 4  # standard deviations of the sample's count


def _likely_threshold(magnitude: Tensor, k: int) -> Tensor:
    """A magnitude that k elements or a few more most likely reach, from an evenly spaced sample."""
    stride = len(magnitude) // _SAMPLE
    if stride < 2:
        return magnitude.new_zeros(())
    sample = magnitude[:: stride | 1]  # odd, so that rows of a matrix do not repeat one column
    expected = len(sample) * k / len(magnitude)
    rank = min(len(sample), int(expected + _SLACK * expected**0.5) + _SLACK)
    return torch.topk(sample, rank, sorted=False).values.min()
