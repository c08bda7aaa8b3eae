"""Uniformly random subsets."""

import torch
from torch import Tensor


def random_subset(numel: int, count: int, seed: int) -> Tensor:
    """``count`` of ``numel`` indices, each subset as likely as any other; ascending int64 on the CPU.

    The same for the same arguments everywhere, so that a receiver can draw what the sender drew.
    """
    generator = torch.Generator().manual_seed(seed)
    if 4 * count > numel:
        return torch.randperm(numel, generator=generator)[:count].sort().values
    # The first `count` different ones of a sequence of draws: every subset is equally likely, by symmetry.
    draws = torch.empty(0, dtype=torch.int64)
    while True:
        more = torch.randint(0, numel, (count + count // 4 + 8,), generator=generator)
        draws = torch.cat([draws, more])
        values, order = torch.sort(draws, stable=True)
        first = torch.cat([values.new_ones(1, dtype=torch.bool), values[1:] != values[:-1]])
        different = order[first].sort().values  # positions of first occurrences
        if len(different) >= count:
            return draws[different[:count]].sort().values
