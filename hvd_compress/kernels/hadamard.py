"""The fast Walsh-Hadamard transform, and the random signs that make it a random rotation.

The ``…_by_torch`` functions are the definitions; the others equal them bit for bit.
"""

import torch
from torch import Tensor

from . import native
from .draws import words


def hadamard(x: Tensor) -> Tensor:
    """H x / √n for the Walsh-Hadamard matrix H: orthonormal and its own inverse. ``x`` is left as it is.

    Args:
        x: floating point ``[n]``, n a power of two.
    """
    return native.hadamard(x) if x.is_floating_point() and native.serves(x) else hadamard_by_torch(x)


def hadamard_by_torch(x: Tensor) -> Tensor:
    """See :func:`hadamard`."""
    n = len(x)
    y = x
    half = 1
    while half < n:
        pairs = y.reshape(-1, 2, half)
        y = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).reshape(-1)
        half *= 2
    return y / n**0.5


def random_signs(n: int, seed: int, device: torch.device) -> Tensor:
    """n independent fair ±1 (int8), the same for the same seed on every device."""
    return (native.random_signs(seed, n) if native.is_here() else random_signs_by_torch(n, seed)).to(device)


def random_signs_by_torch(n: int, seed: int) -> Tensor:
    """See :func:`random_signs`: the bits of a seed's words, the lowest first."""
    bits = words(seed, -(-n // 32)).unsqueeze(1) >> torch.arange(32, device="cpu") & 1
    return (bits * 2 - 1).to(torch.int8).reshape(-1)[:n]


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` and at least 1."""
    return 1 << max(0, n - 1).bit_length()
