"""Sparsifiers that do not rank elements: by chance, or by a threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_numbers
from ..kernels import draw_seed, is_finite
from ..wire import Block, Floats, Message, Subset
from .amount import Amount
from .base import Operator, flatten
from .topk import TopK, largest


@dataclass(frozen=True)
class RandK(Amount, Operator):
    """A uniformly random k-subset, not rescaled; its indices cost no bytes, since receivers draw them again.

    Qsparse-local-SGD (arXiv 1906.02367), section 2: ``E‖x − C(x)‖² = (1 − k/d)‖x‖²`` exactly, so γ = k/d. How many:
    see :class:`Amount`.

    Args:
        shared: whether all ranks draw the same subset of a tensor.
    """

    shared: bool = False

    @property
    def shared_draws(self) -> bool:  # type: ignore[override]
        """See :class:`Operator`."""
        return self.shared

    def encode(
        self, x: Tensor, *, generator: torch.Generator | None = None, shared: torch.Generator | None = None
    ) -> Message:
        """See :meth:`Operator.encode`. Without ``shared``, all is drawn from ``generator``."""
        return _by_rule(x, self, Subset(draw_seed(shared or generator)))


@dataclass(frozen=True)
class RandomBlock(Amount, Operator):
    """k consecutive elements from a random one on, going on at the front behind the last; not rescaled.

    All ranks draw the same block, so that only values differ between their messages. DEF (arXiv 2004.05298) calls it
    unified random sparsification by blocks; every element is kept with probability k/d, so γ = k/d as for Rand_k. How
    many: see :class:`Amount`.
    """

    @property
    def shared_draws(self) -> bool:  # type: ignore[override]
        """True."""
        return True

    def encode(
        self, x: Tensor, *, generator: torch.Generator | None = None, shared: torch.Generator | None = None
    ) -> Message:
        """See :meth:`Operator.encode`. Without ``shared``, all is drawn from ``generator``."""
        return _by_rule(x, self, Block(draw_seed(shared or generator) % max(1, x.numel())))


@dataclass(frozen=True)
class Threshold(Operator):
    """All elements of magnitude ``threshold`` or more; how many there are varies from tensor to tensor.

    The hard-threshold sparsifier, Sahu et al. (arXiv 2108.00951). No γ holds for every x; unless ``at_most`` cuts,
    the error is at most ``d · threshold²``. NaN counts as infinite.

    Args:
        threshold: a positive magnitude.
        at_least: where fewer elements pass, so many are sent, the largest; smaller tensors are sent whole.
        at_most: where more elements pass, the largest so many are sent; None for no limit. Among equals the lowest
            index wins, as in :class:`TopK`.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: ``threshold`` is no number, or the others are no integers.
    """

    draws = False

    threshold: float
    at_least: int = 0
    at_most: int | None = None

    def __post_init__(self) -> None:
        check_numbers(threshold=self.threshold)
        if not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold must be a positive number, got {self.threshold!r}")
        for name, count in (("at_least", self.at_least), ("at_most", self.at_most)):
            if isinstance(count, bool) or not (isinstance(count, int) or (count is None and name == "at_most")):
                raise TypeError(f"{name} must be a number of elements, got {count!r}")
        if self.at_least < 0 or (self.at_most is not None and self.at_most < self.at_least):
            raise ValueError(f"0 ≤ at_least ≤ at_most must hold, got {self.at_least!r} and {self.at_most!r}")

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`. Nothing is drawn from ``generator``."""
        flat = flatten(x)
        indices = torch.nonzero(~(flat.abs() < self.threshold)).reshape(-1)
        if len(indices) < min(self.at_least, len(flat)):
            return TopK(k=self.at_least).encode(x)
        if self.at_most is not None and len(indices) > self.at_most:
            # Ascending, so that the lowest index is the first among equals here too.
            indices = indices[largest(flat[indices], self.at_most)[0]] if self.at_most else indices[:0]
        return Message(tuple(x.shape), indices, Floats(flat[indices]))


def _by_rule(x: Tensor, amount: Amount, rule: Subset | Block) -> Message:
    flat = flatten(x)
    k = amount.count(len(flat))
    if k == len(flat):
        return Message.dense(flat.clone().reshape(x.shape))
    indices = rule.indices(len(flat), k).to(flat.device)
    # An overflow must reach all ranks, whether or not its element was drawn.
    poison = torch.where(is_finite(flat), 0.0, torch.nan).to(flat.dtype)
    return Message(tuple(x.shape), indices, Floats(flat[indices] + poison), rule)
