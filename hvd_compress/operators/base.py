"""What an operator is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..wire import Message


class Operator(ABC):
    """A compression operator C: R^d → R^d, deterministic or random.

    Subclasses are small frozen configurations without state. A new operator implements :meth:`encode`, and
    :meth:`gamma` if it is a contraction; nothing else in the library needs to change.
    """

    @abstractmethod
    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """Compress ``x``, which is left as it is.

        Args:
            x: float32 or float64, any shape, any device, contiguous or not; 16-bit floats are taken as float32.
            generator: source of random draws; the global generator is never used.

        Returns:
            The message to send. When ``x`` holds inf or NaN, so do the message's values: that is how every rank
            learns of an overflow on one of them.
        """

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


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Operators and memories compute in this: float64 for float64, float32 for the narrower floats.

    Raises:
        TypeError: ``dtype`` is not a floating point type.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"only floating point tensors can be compressed, got {dtype}")
    return torch.float64 if dtype == torch.float64 else torch.float32
