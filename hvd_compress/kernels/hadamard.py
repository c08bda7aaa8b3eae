"""The fast Walsh-Hadamard transform, and the random signs that make it a random rotation."""

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """H x / √n for the Walsh-Hadamard matrix H: orthonormal and its own inverse. ``x`` is left as it is.

    Args:
        x: floating point ``[n]``, n a power of two.
    """
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
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8) * 2 - 1).to(device)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` and at least 1."""
    return 1 << max(0, n - 1).bit_length()
