"""What an operator is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from ..wire import Message, SymmetricRuns

Draws: TypeAlias = Mapping[str, torch.Generator | None]
"""What :meth:`Operator.encode` takes besides a tensor."""


class Operator(ABC):
    """A compression operator C: R^d → R^d, deterministic or random.

    Subclasses are small frozen configurations without state. A new operator implements :meth:`encode`, and
    :meth:`gamma` if it is a contraction; nothing else in the library needs to change. Ranks compare their operators'
    ``repr``, so one with settings is best a frozen dataclass.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    shared_draws: ClassVar[bool] = False
    """Whether :meth:`encode` also takes ``shared=…``, a generator that is the same on all ranks for a tensor."""

    draws: ClassVar[bool] = True
    """Whether :meth:`encode` needs a generator; making one takes longer than compressing a small tensor."""

    @abstractmethod
    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """Compress ``x``, which is left as it is.

        Args:
            x: float32 or float64, any shape, any device, contiguous or not; 16-bit floats are taken as float32.
            generator: source of random draws, on any device; None for a new one with a seed of its own. The global
                generator is never used.

        Returns:
            The message to send. When ``x`` holds inf or NaN, so do the message's values: that is how every rank
            learns of an overflow on one of them.
        """

    def split(self, x: Tensor, other: Tensor, out: Tensor, **draws: torch.Generator | None) -> Message:
        """:meth:`encode` of x + other; ``out`` becomes what the message leaves of that sum: x + other − C(x + other).

        Some operators do it in one pass over memory: a subclass of one of these that changes :meth:`encode` must
        change this too.

        Args:
            x: float32 or float64 ``[d]``, contiguous.
            other: of the same shape, dtype and device.
            out: likewise; ``x`` itself, or else it overlaps neither.
            draws: what :meth:`encode` takes besides.

        Returns:
            The message, whose indices may be int32.
        """
        message = apart(self.encode(torch.add(x, other, out=out), **draws), out)
        message.add_to(out, alpha=-1)
        return message

    def split_all(
        self, xs: Sequence[Tensor], others: Sequence[Tensor], outs: Sequence[Tensor], draws: Sequence[Draws]
    ) -> Sequence[Message]:
        """:meth:`split` of several vectors. Some operators do it in one call."""
        vectors = zip(xs, others, outs, draws, strict=True)
        return [self.split(x, other, out, **its) for x, other, out, its in vectors]

    def __call__(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """C(x) as a receiver sees it: the shape and device of ``x``, float32 (float64 for float64)."""
        return self.encode(x, generator=generator).decode()

    def gamma(self, numel: int) -> float:
        """The γ in ``E‖x − C(x)‖² ≤ (1 − γ)‖x‖²`` for every x of ``numel`` elements.

        Qsparse-local-SGD (arXiv 1906.02367), Definition 3. In (0, 1]; 1 means lossless.

        Raises:
            NotImplementedError: the operator has no such bound.
        """
        raise NotImplementedError(f"{self} states no contraction coefficient")


class Quantizer(Operator):
    """An operator that sends every element, in few bits, and so can follow a sparsifier in a composition."""

    def encode_runs(
        self, flat: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator | None]
    ) -> SymmetricRuns | None:
        """The values of :meth:`encode` of several vectors, one after the other in ``flat``; None if not in one call.

        A subclass of one that does this, and that changes :meth:`encode`, must change this too.

        Args:
            flat: float32 or float64 ``[n]``, contiguous.
            counts: elements of each vector, n in all.
            generators: of each one's draws.
        """
        return None

    def variance_bound(self, numel: int) -> float:
        """The β in ``E‖C(x) − x‖² ≤ β‖x‖²`` of an unbiased quantizer, for every x of ``numel`` elements.

        Qsparse-local-SGD (arXiv 1906.02367), Definition 1.

        Raises:
            NotImplementedError: the quantizer is biased, or no bound holds for every x.
        """
        raise NotImplementedError(f"{self} states no variance bound")

    def gamma(self, numel: int) -> float:
        """1 − β, if that is positive."""
        beta = self.variance_bound(numel)
        if beta >= 1:
            raise NotImplementedError(f"{self} is no contraction for {numel} elements: β = {beta:.4g} ≥ 1")
        return 1 - beta


def apart(message: Message, x: Tensor) -> Message:
    """``message``, with numbers of its own if it has those of ``x``, which is about to change."""
    if message.values.floats.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        return message
    return replace(message, values=message.values.times(1))


def typical_error(operator: Operator, numel: int = 1 << 14) -> float:
    """‖x − C(x)‖² / ‖x‖² of one x with independent Gaussian elements, the same in each call.

    With error feedback the memory's energy is multiplied by about so much at each exchange: from 1 on it explodes,
    whatever the worst case's bound is.
    """
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0), device="cpu")
    received = operator(x, generator=torch.Generator().manual_seed(1))
    return float((x - received).double().square().sum() / x.double().square().sum())


def flatten(x: Tensor) -> Tensor:
    """``x`` as a vector of its working dtype: a view where possible, so not to be changed."""
    flat, dtype = x.detach(), working_dtype(x.dtype)
    flat = flat if flat.dtype == dtype else flat.to(dtype)
    return flat if flat.dim() == 1 else flat.reshape(-1)


def told(extremes: Tensor, summed: int = 1) -> Tensor:
    """``(low, high)`` of a :class:`~hvd_compress.wire.Range`, as receivers are to be told.

    Where they would get inf from finite extremes, adding up ``summed`` of the values, they get NaN from NaN.
    """
    # All that is summed may be near one extreme, however near the two are to each other.
    largest = extremes.abs().amax() * 2 * summed if summed > 1 else extremes[1] - extremes[0]
    return torch.where(torch.isfinite(largest), extremes, torch.nan)


def check_steps(levels: int | None, bits: int | None, largest: int, steps_of: Callable[[int], int]) -> int:
    """The number of steps from exactly one of ``levels=`` and ``bits=``.

    Raises:
        ValueError: neither or both are given, or one is out of its range.
        TypeError: one is not an integer.
    """
    if (levels is None) == (bits is None):
        raise ValueError("give exactly one of levels=… and bits=…")
    for name, value in (("levels", levels), ("bits", bits)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if levels is not None:
        if not 1 <= levels <= largest:
            raise ValueError(f"levels must be from 1 to {largest}, got {levels}")
        return levels
    some = range(1, largest.bit_length() + 2)
    if bits is not None and bits in some and 1 <= steps_of(bits) <= largest:
        return steps_of(bits)
    possible = [b for b in some if 1 <= steps_of(b) <= largest]
    raise ValueError(f"bits must be from {possible[0]} to {possible[-1]}, got {bits}")


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Operators and memories compute in this: float64 for float64, float32 for the narrower floats.

    Raises:
        TypeError: ``dtype`` is not a floating point type.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"only floating point tensors can be compressed, got {dtype}")
    return torch.float64 if dtype == torch.float64 else torch.float32
