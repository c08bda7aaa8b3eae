"""Quantizers: every element is sent, in few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_numbers
from ..kernels import (
    as_divisor,
    draw_seed,
    hadamard,
    next_power_of_two,
    random_signs,
    round_by_chance,
    round_runs_to_largest,
    round_to_largest,
)
from ..wire import Message, Range, Symmetric, SymmetricRuns
from ..wire import Rotated as RotatedValues
from .base import Quantizer, check_steps, flatten, told


@dataclass(frozen=True)
class QSGD(Quantizer):
    """Magnitudes rounded without bias to s steps of a norm, with their sign.

    ``r = s|x_i| / norm``; the level is ``floor(r)``, or one more with probability ``r − floor(r)``; receivers see
    ``norm · sign(x_i) · level / s``. QSGD (arXiv 1610.02132), section 3; Qsparse-local-SGD (arXiv 1906.02367),
    section 2. Its variance is exactly ``(norm/s)² Σ f_i (1 − f_i)`` with ``f = r − floor(r)``.

    Args:
        levels: s, steps to each side of zero; or
        bits: of each element on the wire, s = 2^(bits − 1) − 1.
        norm: ``"max"``, the largest magnitude, has 18 to 56 times less noise on the gradients measured than the
            original's ``"l2"``, which sends most of many elements to zero, and is there for fidelity to the paper.
        bucket: so many consecutive elements share a norm; 0 for one norm for all.

    Raises:
        ValueError, TypeError: neither or both of levels and bits, or one out of its range; an unknown norm.
    """

    levels: int | None = None
    bits: int | None = None
    norm: Literal["max", "l2"] = "max"
    bucket: int = 0

    def __post_init__(self) -> None:
        check_steps(self.levels, self.bits, 2**15 - 1, lambda b: 2 ** (b - 1) - 1)
        if self.norm not in ("max", "l2"):
            raise ValueError(f"norm must be 'max' or 'l2', got {self.norm!r}")
        if isinstance(self.bucket, bool) or not isinstance(self.bucket, int) or self.bucket < 0:
            raise ValueError(f"bucket must be a number of elements, or 0 for all, got {self.bucket!r}")

    @cached_property
    def s(self) -> int:
        """Steps to each side of zero."""
        return check_steps(self.levels, self.bits, 2**15 - 1, lambda b: 2 ** (b - 1) - 1)

    def variance_bound(self, numel: int) -> float:
        """β for the worst x. For l2: ``min(n/s², √n/s)``, n elements to a norm.

        For max (derived here): with one element at the norm and the other n − 1 at ``f·norm/s``, the ratio of
        variance to energy is ``(n−1) f(1−f) / (s² + (n−1) f²)``. Its maximum over f is ``(√(1+t) − 1)/2``, at
        ``f = 1/(1 + √(1+t))``, with ``t = (n−1)/s²``.
        """
        n = min(numel, self.bucket) if self.bucket else numel
        if self.norm == "l2":
            return min(n / self.s**2, math.sqrt(n) / self.s)
        t = max(n - 1, 0) / self.s**2
        return t / (2 * (1 + math.sqrt(1 + t)))  # the same, without a difference of what is nearly equal

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`."""
        flat, s = flatten(x), self.s
        # In a row of zeros, 0/0 counts as zero; what is not finite is told by the scale.
        if self.norm == "max" and not self.bucket:
            levels, scale = round_to_largest(flat, s, generator)
        else:
            rows = _rows(flat, self.bucket)
            scale = rows.abs().amax(1) if self.norm == "max" else _norm(rows, 2, dim=1)
            levels = round_by_chance(flat, 0.0, scale / as_divisor(s, scale), self.bucket, -s, s, generator)
        return Message(tuple(x.shape), None, Symmetric(levels, scale, s, self.bucket))

    def encode_runs(
        self, flat: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator | None]
    ) -> SymmetricRuns | None:
        """See :meth:`Quantizer.encode_runs`: with the largest magnitude as norm of each vector."""
        if self.norm != "max" or self.bucket or type(self).encode is not QSGD.encode:
            return None
        levels, scales = round_runs_to_largest(flat, counts, self.s, generators)
        return SymmetricRuns(levels, scales, counts, self.s)


@dataclass(frozen=True)
class TernGrad(Quantizer):
    """``max|x| · sign(x_i)`` with probability ``|x_i| / max|x|``, else zero, after clipping.

    TernGrad (arXiv 1705.07878). Unbiased for the clipped tensor, with variance ``s‖x‖₁ − ‖x‖²``, s its largest
    magnitude.

    Args:
        clip: magnitudes are cut at so many standard deviations; None for no clipping. The paper's is 2.5.

    Raises:
        ValueError: ``clip`` is not positive.
        TypeError: it is no number.
    """

    clip: float | None = 2.5

    def __post_init__(self) -> None:
        if self.clip is not None:
            check_numbers(clip=self.clip)
            if not self.clip > 0:
                raise ValueError(f"clip must be a positive number of standard deviations or None, got {self.clip!r}")

    def variance_bound(self, numel: int) -> float:
        """As QSGD's with one step of the largest magnitude, if nothing is clipped."""
        if self.clip is not None:
            raise NotImplementedError("with clipping TernGrad is biased: clip=None has a variance bound")
        return QSGD(levels=1).variance_bound(numel)

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`."""
        flat = flatten(x)
        if self.clip is not None and len(flat) > 1:
            spread = flat.std(correction=0)
            # No spread, no outliers: equal elements, whose spread is not quite zero, must not be cut to nothing.
            is_none = spread <= 8 * torch.finfo(flat.dtype).eps * flat.abs().amax()
            limit = torch.where(is_none, torch.inf, self.clip * spread)
            flat = torch.where(torch.isnan(limit), torch.nan, flat.clamp(-limit, limit))
        return QSGD(levels=1).encode(flat.reshape(x.shape), generator=generator)


@dataclass(frozen=True)
class EvenSteps(Quantizer):
    """What has s evenly spaced steps.

    Args:
        levels: s, the number of steps; or
        bits: of each element on the wire, s = 2^bits − 1.

    Raises:
        ValueError, TypeError: neither or both, or one out of its range.
    """

    levels: int | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.levels, self.bits, 2**16 - 1, lambda b: 2**b - 1)

    @cached_property
    def s(self) -> int:
        """Number of steps."""
        return check_steps(self.levels, self.bits, 2**16 - 1, lambda b: 2**b - 1)


@dataclass(frozen=True)
class MinMax(EvenSteps):
    """Elements rounded without bias to s + 1 evenly spaced levels from the smallest to the largest element.

    Stochastic s-level quantization, Suresh et al. (arXiv 1611.00429). Its variance is exactly ``D² Σ f_i (1 − f_i)``,
    ``D = (max − min)/s``, f the fractional part of ``(x_i − min)/D``. How many steps: see :class:`EvenSteps`.
    """

    def variance_bound(self, numel: int) -> float:
        """``d/(2s²)``: ``(max − min)² ≤ 2‖x‖²``, and ``f(1 − f) ≤ 1/4``."""
        return numel / (2 * self.s**2)

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`."""
        flat = flatten(x)
        return Message(tuple(x.shape), None, _to_range(flat, _extremes(flat), self.s, generator))


@dataclass(frozen=True)
class Rotated(EvenSteps):
    """A random rotation, then :class:`MinMax`: no element stays much larger than the others.

    ``z = H diag(ε) x / √n`` with the Walsh-Hadamard matrix H (x padded with zeros to a power of two) and random signs
    ε, whose seed is sent; receivers rotate back. Suresh et al. (arXiv 1611.00429), section 3; Qsparse-local-SGD
    (arXiv 1906.02367), section 2. How many steps: see :class:`EvenSteps`.
    """

    def variance_bound(self, numel: int) -> float:
        """``2 log₂(2d)/s²``, for d padded to a power of two; the expectation is over the signs too."""
        return 2 * math.log2(2 * next_power_of_two(numel)) / self.s**2

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`."""
        flat = flatten(x)
        rotated, seed = _rotate(flat, generator)
        values = _to_range(rotated, _extremes(rotated), self.s, generator, len(rotated))
        return Message(tuple(x.shape), None, RotatedValues(values, seed, len(flat)))


@dataclass(frozen=True)
class OneBit(Quantizer):
    """One bit for each element: the sign of the rotated vector after adding uniform noise.

    FO-SGD (arXiv 2405.11095): ``q = sign(u + τ)``, u the rotated vector as in :class:`Rotated`, τ uniform on
    [−λ, λ]; receivers see the back-rotated ``λ q``, of which they leave out what n, a power of two, is more than d.
    Where all ``|u_j| ≤ λ`` it is unbiased, with error exactly ``(d/n)(n λ² − ‖x‖²)``: H gives each of the n elements
    an equal share of the error of u.

    Args:
        scale: λ, a positive number; None for ``‖x‖ √(2 ln(2n/failure)/n)`` (derived here), with which no element is
            beyond λ, but with probability ``failure``.
        failure: see ``scale``.

    Raises:
        ValueError: one of them is out of its range.
        TypeError: one of them is no number.
    """

    scale: float | None = None
    failure: float = 0.01

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_numbers(scale=self.scale)
            if not 0 < self.scale < math.inf:
                raise ValueError(f"scale must be a positive number or None, got {self.scale!r}")
        check_numbers(failure=self.failure)
        if not 0 < self.failure < 1:
            raise ValueError(f"failure must be a probability in (0, 1), got {self.failure!r}")

    def variance_bound(self, numel: int) -> float:
        """``2 ln(2n/failure) − 1`` for the default scale, if no element is beyond it."""
        if self.scale is not None:
            raise NotImplementedError("with a fixed scale the error does not shrink with x")
        return 2 * math.log(2 * next_power_of_two(numel) / self.failure) - 1

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`."""
        flat = flatten(x)
        rotated, seed = _rotate(flat, generator)
        n = len(rotated)
        if self.scale is None:
            limit = _norm(rotated, 2) * math.sqrt(2 * math.log(2 * n / self.failure) / n)
        else:
            limit = torch.where(torch.isfinite(rotated).all(), self.scale, torch.nan).to(flat.dtype)
        values = _to_range(rotated, torch.stack([-limit, limit]), 1, generator, n)
        return Message(tuple(x.shape), None, RotatedValues(values, seed, len(flat)))


@dataclass(frozen=True)
class Sign(Quantizer):
    """``(‖x‖_m / d) · sign(x_i)``, deterministic; sign(0) is +1.

    With m = 1 the scale is the mean magnitude: of all multiples of the sign the one nearest to x. EF-SGD
    (arXiv 1901.09847); behind a sparsifier it is SignComp_k of Qsparse-local-SGD (arXiv 1906.02367), Lemma 3.

    Args:
        m: 1, 2, … or ``math.inf``: which norm.

    Raises:
        ValueError: ``m`` is not one of these.
        TypeError: it is no number.
    """

    draws = False

    m: float = 1

    def __post_init__(self) -> None:
        check_numbers(m=self.m)
        if not (self.m >= 1 and (math.isinf(self.m) or self.m == int(self.m))):
            raise ValueError(f"m must be 1, 2, … or math.inf, got {self.m!r}")

    def gamma(self, numel: int) -> float:
        """``d^(2/m − 1)/d`` (Lemma 3 with k = d); for m = 1, 1/d, which one element other than zero attains."""
        if numel == 0:
            return 1.0
        return 1 / numel if self.m == 1 else numel ** (2 / self.m - 1) / numel

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`. Nothing is drawn from ``generator``."""
        flat = flatten(x)
        scale = _norm(flat, self.m) / max(1, len(flat))
        levels = (flat >= 0).to(torch.uint8)
        return Message(tuple(x.shape), None, Range(levels, told(torch.stack([-scale, scale])), 1))


def _norm(x: Tensor, m: float, dim: int | None = None) -> Tensor:
    """‖x‖_m in the dtype of x. Not by torch's in float32, which for a million elements is off by percents."""
    if not x.numel():
        return x.new_zeros(())
    if m == 1 and dim is None:
        return x.abs().sum()  # pairwise
    if m <= 2 and x.dtype != torch.float64:
        return torch.linalg.vector_norm(x, ord=m, dim=dim, dtype=torch.float64).to(x.dtype)
    # Higher powers of what is not near 1 leave a float64's range; of its own elements, squares do.
    largest = x.abs().amax(() if dim is None else dim, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    norm = unit * torch.linalg.vector_norm(x / unit, ord=m, dim=dim, keepdim=True, dtype=torch.float64)
    return norm.squeeze(dim or 0).to(x.dtype)


def _rows(flat: Tensor, bucket: int) -> Tensor:
    """One row for each norm; the last is filled up with zeros."""
    if not bucket:
        return flat.reshape(1, -1) if len(flat) else flat.new_zeros(1, 1)
    rows = flat.new_zeros(max(1, -(-len(flat) // bucket)) * bucket)
    rows[: len(flat)] = flat
    return rows.reshape(-1, bucket)


def _to_range(flat: Tensor, extremes: Tensor, s: int, generator: torch.Generator | None, summed: int = 1) -> Range:
    """``flat`` rounded without bias to s steps between two extremes, and cut there; ``summed``: see :func:`told`."""
    width = extremes[1] - extremes[0]
    extremes = told(extremes, summed)
    levels = round_by_chance(flat, extremes[0], (width / as_divisor(s, width)).reshape(1), 0, 0, s, generator)
    return Range(levels, extremes, s)


def _extremes(flat: Tensor) -> Tensor:
    return torch.stack([flat.min(), flat.max()]) if len(flat) else flat.new_zeros(2)


def _rotate(flat: Tensor, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """The rotated vector, padded to a power of two, and the seed of its signs."""
    seed = draw_seed(generator)
    padded = flat.new_zeros(next_power_of_two(len(flat)))
    padded[: len(flat)] = flat
    return hadamard(padded * random_signs(len(padded), seed, flat.device)), seed
