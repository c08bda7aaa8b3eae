"""What other systems do per step, as torch expressions after their published descriptions, for comparison.

These are not those systems: they have their algorithm, their message format and their number of passes, on the same
Horovod, so that the comparison is of designs. Each method takes the gradients of all parameters and leaves their
average over ranks in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import horovod.torch as hvd
import torch
from torch import Tensor


class GraceTopK:
    """Top-k with error feedback after GRACE (Xu et al., 2021): 4-byte values, 8-byte indices, per tensor."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._residuals: dict[int, Tensor] = {}
        self.sent = 0  # bytes

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """One step."""
        handles = []
        for i, gradient in enumerate(gradients):
            flat = gradient.reshape(-1)
            compensated = flat + self._residuals[i] if i in self._residuals else flat.clone()
            k = max(1, int(flat.numel() * self._ratio))
            indices = torch.topk(compensated.abs(), k, sorted=False).indices
            values = compensated[indices]
            sent = torch.zeros_like(flat)
            sent[indices] = values
            self._residuals[i] = compensated - sent
            self.sent += values.nbytes + indices.nbytes
            handles.append((_gather(values, f"grace.v.{i}"), _gather(indices, f"grace.i.{i}")))
        _add_up(gradients, handles)


class DGCSampled:
    """Deep Gradient Compression's sampled threshold (Lin et al., 2018): momentum correction and masking, per tensor.

    The threshold comes from 1 % of the elements, at a stride; where it lets more than 1.3 k pass, the exact top-k
    among those is taken.
    """

    def __init__(self, ratio: float, momentum: float = 0.9) -> None:
        self._ratio = ratio
        self._momentum = momentum
        self._velocities: dict[int, Tensor] = {}
        self._accumulated: dict[int, Tensor] = {}
        self.sent = 0  # bytes

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """One step."""
        handles = []
        for i, gradient in enumerate(gradients):
            flat = gradient.reshape(-1)
            velocity = self._velocities.setdefault(i, torch.zeros_like(flat))
            accumulated = self._accumulated.setdefault(i, torch.zeros_like(flat))
            velocity.mul_(self._momentum).add_(flat)
            accumulated.add_(velocity)
            indices = self._select(accumulated)
            values = accumulated[indices]
            accumulated.index_fill_(0, indices, 0)
            velocity.index_fill_(0, indices, 0)
            self.sent += values.nbytes + indices.nbytes
            handles.append((_gather(values, f"dgc.v.{i}"), _gather(indices, f"dgc.i.{i}")))
        _add_up(gradients, handles)

    def _select(self, flat: Tensor) -> Tensor:
        magnitude = flat.abs()
        k = max(1, int(flat.numel() * self._ratio))
        sample = magnitude if flat.numel() < 10_000 else magnitude[:: 99 | 1]
        threshold = torch.topk(sample, max(1, int(sample.numel() * self._ratio)), sorted=False).values.min()
        indices = torch.nonzero(magnitude >= threshold).reshape(-1)
        if len(indices) > 1.3 * k:
            indices = indices[torch.topk(magnitude[indices], k, sorted=False).indices]
        return indices[: max(k, 1)]


def _gather(tensor: Tensor, name: str) -> int:
    return hvd.allgather_async(tensor, name=name)


def _add_up(gradients: Sequence[Tensor], handles: list[tuple[int, int]]) -> None:
    for gradient, (values, indices) in zip(gradients, handles, strict=True):
        flat = gradient.reshape(-1)
        flat.zero_()
        flat.index_add_(0, hvd.synchronize(indices), hvd.synchronize(values), alpha=1 / hvd.size())
