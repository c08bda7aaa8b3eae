"""Top_k: keep the k elements of largest magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import lt

import torch
from torch import Tensor

from ..kernels import native
from ..wire import Floats, Fused, Message
from .amount import Amount
from .base import Draws, Operator, flatten


@dataclass(frozen=True)
class TopK(Amount, Operator):
    """The k elements of largest magnitude, exactly; among equals the lowest index wins. NaN counts as infinite.

    Qsparse-local-SGD (arXiv 1906.02367), section 2: a contraction with γ = k/d, attained by
    vectors whose elements have one and the same magnitude.

    How many: see :class:`Amount`.
    """

    draws = False

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`. Nothing is drawn from ``generator``."""
        flat = flatten(x)
        k = self.count(flat.numel())
        if k == flat.numel():
            # A copy, since a message must not change when the caller goes on with x.
            return Message.dense(flat.clone().reshape(x.shape))
        indices, values = largest(flat, k)
        return Message(tuple(x.shape), indices, Floats(values))

    def split(self, x: Tensor, other: Tensor, out: Tensor, **draws: torch.Generator | None) -> Message:
        """See :meth:`Operator.split`."""
        k = self.count(x.numel())
        if k == x.numel() or not native.serves(x, other, out):
            return super().split(x, other, out)
        indices, values = native.split_top_k([x], [other], [out], [k])
        return Message(tuple(x.shape), indices, Floats(values))

    def split_all(
        self, xs: Sequence[Tensor], others: Sequence[Tensor], outs: Sequence[Tensor], draws: Sequence[Draws]
    ) -> Sequence[Message]:
        """See :meth:`Operator.split_all`: one call for all, whose messages lie one after the other."""
        sizes = [x.numel() for x in xs]
        ks = [self.count(size) for size in sizes]
        is_one_loop = type(self).split is TopK.split and len({x.dtype for x in xs}) == 1 and all(map(lt, ks, sizes))
        if not is_one_loop or not native.serves(*xs, *others, *outs):
            return super().split_all(xs, others, outs, draws)
        indices, values = native.split_top_k(xs, others, outs, ks)
        return Fused([(size,) for size in sizes], ks, indices, Floats(values))


def largest(flat: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What :func:`top_k` says, in the way that suits the device, and the elements at these indices."""
    if native.serves(flat):
        return native.top_k(flat, k)
    indices = top_k_by_sorting(flat, k) if flat.is_cuda else top_k(flat, k)
    return indices, flat[indices]


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
