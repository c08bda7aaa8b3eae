"""A quantizer behind a sparsifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Sparse, subtract_at
from ..wire import Floats, Fused, Message
from .amount import Amount
from .base import Draws, Operator, Quantizer
from .quantizers import QSGD, Sign


def compose(sparsifier: Operator, quantizer: Quantizer, *, scaled: bool = False) -> Composed:
    """``Q(Comp_k(x))``: the kept elements, quantized. Qsparse-local-SGD (arXiv 1906.02367), section 2.

    Args:
        sparsifier: :class:`TopK`, :class:`RandK` or any other that sends floats.
        quantizer: of the kept elements; β below is its variance bound for them.
        scaled: divide by 1 + β, as in Lemma 2 (and as the paper's code does): a contraction for every β, though it
            shrinks more than is needed where the bound is far from the truth. Without, Lemma 1 needs β < 1.

    Raises:
        TypeError: not a sparsifier and a quantizer.
        ValueError: scaled, and a quantizer without a variance bound; or not scaled, and an l2-norm QSGD with β ≥ 1,
            which may add more noise than there is signal (raised here if k is known, else at the first tensor that
            is too large).
    """
    is_sparsifier = isinstance(sparsifier, Operator) and not isinstance(sparsifier, Quantizer | Composed)
    if not isinstance(quantizer, Quantizer) or not is_sparsifier:
        raise TypeError(f"compose takes a sparsifier and a quantizer, got {sparsifier!r} and {quantizer!r}")
    composed = Composed(sparsifier, quantizer, scaled)
    if scaled:
        try:
            quantizer.variance_bound(1)
        except NotImplementedError as error:
            raise ValueError(f"scaled=True needs a variance bound: {error}; use scaled=False") from None
    if isinstance(sparsifier, Amount) and sparsifier.k is not None:
        composed.check(sparsifier.k)
    return composed


@dataclass(frozen=True)
class Composed(Operator):
    """See :func:`compose`."""

    sparsifier: Operator
    quantizer: Quantizer
    scaled: bool = False

    @property
    def shared_draws(self) -> bool:  # type: ignore[override]
        """As the sparsifier's."""
        return self.sparsifier.shared_draws

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """Whether one of the two does."""
        return self.sparsifier.draws or self.quantizer.draws

    def check(self, k: int) -> None:
        """See :func:`compose`.

        Raises:
            ValueError: the composition is no contraction for k kept elements.
        """
        if self.scaled or not isinstance(self.quantizer, QSGD) or self.quantizer.norm != "l2":
            return
        beta = self.quantizer.variance_bound(k)
        if beta >= 1:
            raise ValueError(
                f"l2-norm QSGD with s = {self.quantizer.s} on {k} elements has β = {beta:.4g} ≥ 1, so that it is no "
                "contraction (Lemma 1): use scaled=True, norm='max', a smaller bucket=… (fewer elements to a norm), "
                "or more bits"
            )

    def gamma(self, numel: int) -> float:
        """Lemma 1 ``(1 − β) k/d``, Lemma 2 ``k/(d(1 + β))``, Lemma 3 for :class:`Sign`, β for k elements."""
        if numel == 0:
            return 1.0
        k = self.sparsifier.count(numel) if isinstance(self.sparsifier, Amount) else numel
        kept = self.sparsifier.gamma(numel)
        if isinstance(self.quantizer, Sign):
            m = self.quantizer.m
            return 1 / numel if m == 1 else k ** (2 / m - 1) / numel
        if self.scaled:
            return kept / (1 + self.quantizer.variance_bound(k))
        return kept * self.quantizer.gamma(k)

    def encode(
        self, x: Tensor, *, generator: torch.Generator | None = None, shared: torch.Generator | None = None
    ) -> Message:
        """See :meth:`Operator.encode`. What is shared chooses elements; each rank rounds by draws of its own."""
        also = {"shared": shared} if self.shared_draws else {}
        return self._quantize(self.sparsifier.encode(x, generator=generator, **also), generator)

    def split(self, x: Tensor, other: Tensor, out: Tensor, **draws: torch.Generator | None) -> Message:
        """See :meth:`Operator.split`: what the sparsifier leaves, and the quantizer of the kept elements."""
        kept = self.sparsifier.split(x, other, out, **draws)
        return self._split_kept(kept, out, draws)

    def split_all(
        self, xs: Sequence[Tensor], others: Sequence[Tensor], outs: Sequence[Tensor], draws: Sequence[Draws]
    ) -> Sequence[Message]:
        """See :meth:`Operator.split_all`: one call each, if both can."""
        kept = self.sparsifier.split_all(xs, others, outs, draws)
        if isinstance(kept, Fused) and isinstance(kept.values, Floats):
            for k in kept.counts:
                self.check(k)
            floats, generators = kept.values.numbers, [its.get("generator") for its in draws]
            values = self.quantizer.encode_runs(floats, kept.counts, generators)
            if values is not None:
                if self.scaled:
                    values = values.times([1 / (1 + self.quantizer.variance_bound(k)) for k in kept.counts])
                subtract_at(outs, [Sparse(kept.indices, values.decode() - floats, kept.counts)])
                return Fused(kept.shapes, kept.counts, kept.indices, values)
        return [*map(self._split_kept, kept, outs, draws)]

    def _split_kept(self, kept: Message, out: Tensor, draws: Draws) -> Message:
        """The message of what the sparsifier keeps, once ``out`` is what it leaves."""
        message = self._quantize(kept, draws.get("generator"))
        left = kept.values.decode() - message.values.decode()
        Message(kept.shape, kept.indices, Floats(left)).add_to(out)
        return message

    def _quantize(self, kept: Message, generator: torch.Generator | None) -> Message:
        k = len(kept.values)
        self.check(k)
        values = self.quantizer.encode(kept.values.decode(), generator=generator).values
        if self.scaled:
            values = values.times(1 / (1 + self.quantizer.variance_bound(k)))
        return Message(kept.shape, kept.indices, values, kept.rule)
