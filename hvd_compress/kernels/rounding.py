"""Random rounding to levels, and back: once over memory where the compiled loops are.

The ``…_by_torch`` functions are the definitions; the others equal them bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from .draws import draw_seed, own_generator, uniform


def round_by_chance(
    flat: Tensor,
    offset: Tensor | float,
    steps: Tensor,
    bucket: int,
    least: int,
    most: int,
    generator: torch.Generator | None,
) -> Tensor:
    """How many steps each element lies above ``offset``, cut at two bounds, rounded without bias, less ``least``.

    With t the number of steps, the result is one of the two whole numbers next to t, the one farther from zero with
    the probability ``|t| − floor|t|``. What is not a number of steps (0/0, not finite) counts as zero steps.

    Args:
        flat: float32 or float64 ``[d]``.
        offset: a number, or a tensor of no dimensions, of the dtype of ``flat``.
        steps: the size of a step, ``[m]``, of the dtype of ``flat``, for ``bucket`` consecutive elements each; of
            all, if that is 0.
        bucket: see ``steps``.
        least, most: bounds, |bound| < 2^16.
        generator: draws.

    Returns:
        uint8 ``[d]``, int64 if ``most − least`` is more than 255.
    """
    generator = generator or own_generator(flat.device)
    if generator.device.type == "cpu" and native.serves(flat, steps):
        return native.round_by_chance(
            flat, float(offset), steps, bucket or max(1, len(flat)), least, most, draw_seed(generator)
        )
    return round_by_chance_by_torch(flat, offset, steps, bucket, least, most, uniform(len(flat), generator, flat))


def round_by_chance_by_torch(
    flat: Tensor, offset: Tensor | float, steps: Tensor, bucket: int, least: int, most: int, draws: Tensor
) -> Tensor:
    """See :func:`round_by_chance`."""
    step = steps.repeat_interleave(min(bucket, len(flat)))[: len(flat)] if bucket else steps
    t = ((flat - offset) / step).nan_to_num_(0.0, 0.0, 0.0).clamp_(least, most)
    magnitude = t.abs()
    floor = magnitude.floor()
    rounded = (floor + (draws < magnitude - floor)) * t.sign()
    return (rounded - least).to(_level_dtype(most - least))


def round_to_largest(flat: Tensor, s: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """:func:`round_by_chance` to s steps to each side of zero, the last of which is the largest magnitude.

    Args:
        flat: float32 or float64 ``[d]``.
        s: from 1 to 2^15 − 1.
        generator: draws.

    Returns:
        Levels from 0 to 2 s, uint8 ``[d]`` (int64 if s is 128 or more), and the largest magnitude, ``[1]``: NaN if
        there is one, 0 of no elements.
    """
    generator = generator or own_generator(flat.device)
    if generator.device.type == "cpu" and native.serves(flat):
        return native.round_to_largest(flat, s, draw_seed(generator))
    return round_to_largest_by_torch(flat, s, uniform(flat.numel(), generator, flat))


def round_to_largest_by_torch(flat: Tensor, s: int, draws: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`round_to_largest`."""
    largest = flat.abs().amax().reshape(1) if flat.numel() else flat.new_zeros(1)
    return round_by_chance_by_torch(flat, 0.0, largest / s, 0, -s, s, draws), largest


def round_runs_to_largest(
    flat: Tensor, counts: Sequence[int], s: int, generators: Sequence[torch.Generator | None]
) -> tuple[Tensor, Tensor]:
    """:func:`round_to_largest` of several runs of elements, one after the other, with a generator for each.

    Args:
        flat, s: see there.
        counts: elements of each run.
        generators: draws of each run.

    Returns:
        Levels of all runs, and the largest magnitude of each, ``[len(counts)]``.
    """
    own = [g or own_generator(flat.device) for g in generators]
    if all(g.device.type == "cpu" for g in own) and native.serves(flat):
        return native.round_runs_to_largest(flat, counts, s, [*map(draw_seed, own)])
    runs = zip(flat.split([*counts]), own, strict=True)
    levels, largest = zip(*(round_to_largest(run, s, generator) for run, generator in runs), strict=True)
    return torch.cat(levels), torch.cat(largest)


def choose_by_chance(flat: Tensor, table: Tensor, generator: torch.Generator | None) -> Tensor:
    """The place in ``table`` of one of the two entries around each element, chosen without bias.

    Elements outside count as the first or last entry.

    Args:
        flat: float32 or float64 ``[d]``.
        table: ascending, ``[n]`` with n from 2 to 2^16, of the dtype of ``flat``; all finite or all NaN.
        generator: draws.

    Returns:
        uint8 ``[d]``, int64 if n is more than 256.
    """
    generator = generator or own_generator(flat.device)
    if generator.device.type == "cpu" and native.serves(flat, table):
        return native.choose_by_chance(flat, table, draw_seed(generator))
    return choose_by_chance_by_torch(flat, table, uniform(len(flat), generator, flat))


def choose_by_chance_by_torch(flat: Tensor, table: Tensor, draws: Tensor) -> Tensor:
    """See :func:`choose_by_chance`."""
    highest = len(table) - 1
    inside = torch.maximum(torch.minimum(flat, table[-1]), table[0])
    above = torch.searchsorted(table, inside.contiguous()).clamp_(1, highest)
    low, high = table[above - 1], table[above]
    up = draws < (inside - low) / (high - low)  # 0/0, of equal entries, is not above
    return (above - 1 + up).to(_level_dtype(highest))


def look_up(table: Tensor, levels: Tensor) -> Tensor:
    """``table[levels]``.

    Args:
        table: float32 or float64 ``[n]``.
        levels: uint8 or int64 ``[d]``, 0 ≤ level < n.

    Raises:
        IndexError: a level is out of bounds (on the CPU).
    """
    return native.look_up(table, levels) if native.serves(table, levels) else look_up_by_torch(table, levels)


def look_up_by_torch(table: Tensor, levels: Tensor) -> Tensor:
    """See :func:`look_up`."""
    return table[levels.to(torch.int64)]


def look_up_runs(table: Tensor, levels: Tensor, counts: Sequence[int], scales: Tensor) -> Tensor:
    """:func:`look_up` of several runs of levels, one after the other, times a scale of each run.

    Args:
        table, levels: see there.
        counts: levels of each run.
        scales: one for each run, of the dtype of ``table``.

    Raises:
        IndexError: a level is out of bounds (on the CPU).
    """
    if native.serves(table, levels, scales):
        return native.look_up_runs(table, levels, counts, scales)
    return look_up_runs_by_torch(table, levels, counts, scales)


def look_up_runs_by_torch(table: Tensor, levels: Tensor, counts: Sequence[int], scales: Tensor) -> Tensor:
    """See :func:`look_up_runs`."""
    repeats = torch.tensor(counts, dtype=torch.int64, device=scales.device)
    return look_up_by_torch(table, levels).mul_(scales.repeat_interleave(repeats, output_size=len(levels)))


def _level_dtype(highest: int) -> torch.dtype:
    return torch.uint8 if highest < 256 else torch.int64
