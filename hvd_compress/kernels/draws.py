"""Random draws. On the CPU they depend on a seed and their place only, so that a compiled loop makes them on its way.

They are Philox4x32-10's (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four words of 32 bits
for each counter 0, 1, 2, …, the seed being the key. On a GPU they are torch's own.
"""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

from . import native

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_COUNTERS = 4  # the step of a GPU generator's offset


def own_generator(device: torch.device) -> torch.Generator:
    """A generator seeded by the operating system."""
    generator = torch.Generator(device)
    generator.seed()
    return generator


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed for other draws, 0 ≤ seed < 2^62."""
    generator = generator or own_generator(torch.device("cpu"))
    if generator.device.type == "cpu":
        return int(torch.randint(0, 1 << 62, (), generator=generator, device="cpu"))
    # What a GPU draws would have to be waited for. Its generator's state is here: a seed, and how far the draws are.
    offset = generator.get_offset()
    generator.set_offset(offset + _COUNTERS)
    digest = hashlib.blake2b(struct.pack("<QQ", generator.initial_seed() % (1 << 64), offset), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def uniform(n: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """n draws from [0, 1), on the device and of the dtype of ``like``: multiples of 2^−24 (float32), 2^−53 (float64).

    Args:
        generator: says the seed of draws on the CPU, or makes those on a GPU.
    """
    if generator.device.type != "cpu":
        return torch.rand(n, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
    return uniform_of(draw_seed(generator), n, like.dtype).to(like.device)


def uniform_of(seed: int, n: int, dtype: torch.dtype) -> Tensor:
    """The draws of a seed: float32 or float64 ``[n]`` on the CPU."""
    return native.uniform(seed, n, dtype) if native.is_here() else uniform_by_torch(seed, n, dtype)


def uniform_by_torch(seed: int, n: int, dtype: torch.dtype) -> Tensor:
    """See :func:`uniform_of`."""
    if dtype == torch.float32:
        return (words(seed, n) >> 8).to(dtype) * 2.0**-24
    high, low = words(seed, 2 * n).reshape(n, 2).unbind(1)
    return ((high >> 5).to(dtype) * 2.0**26 + (low >> 6).to(dtype)) * 2.0**-53


def words(seed: int, count: int) -> Tensor:
    """The first ``count`` words, int64 ``[count]`` from 0 to 2^32 − 1."""
    counter = torch.arange(-(-count // 4), device="cpu")
    a, b, c, d = counter & _WORD, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)
    low, high = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c  # what overflows wraps around: no bit is wrong
        a, b = (second >> 32 & _WORD) ^ b ^ low, second & _WORD
        c, d = (first >> 32 & _WORD) ^ d ^ high, first & _WORD
        low, high = low + _KEY_STEPS[0] & _WORD, high + _KEY_STEPS[1] & _WORD
    return torch.stack([a, b, c, d], 1).reshape(-1)[:count]
