"""Uniformly random subsets."""

import torch
from torch import Tensor

from . import native
from .draws import uniform_by_torch

_SPARSEST = 128  # elements for each that is chosen, which then takes 16 bytes: a peer may make such numbers up


def random_subset(numel: int, count: int, seed: int) -> Tensor:
    """``count`` of ``numel`` indices, each subset as likely as any other; ascending int64 on the CPU.

    The same for the same arguments everywhere, so that a receiver can draw what the sender drew.
    """
    if 4 * count > numel:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(numel, generator=generator, device="cpu")[:count].sort().values
    # The first `count` different ones of a sequence of draws: every subset is equally likely, by symmetry.
    if native.is_here() and numel <= _SPARSEST * max(count, 256):  # the loop has a bit for each element
        return native.random_subset(seed, numel, count)
    return first_different(numel, count, seed)


def first_different(numel: int, count: int, seed: int) -> Tensor:
    """The definition of what the compiled loop does; ``count`` is at most a quarter of ``numel``."""
    many = count + count // 4 + 8
    while True:
        draws = (uniform_by_torch(seed, many, torch.float64) * numel).to(torch.int64).clamp_(max=numel - 1)
        values, order = torch.sort(draws, stable=True)
        first = torch.cat([values.new_ones(1, dtype=torch.bool), values[1:] != values[:-1]])
        different = order[first].sort().values  # positions of first occurrences
        if len(different) >= count:
            return draws[different[:count]].sort().values
        many += many // 4
