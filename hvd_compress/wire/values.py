"""The numbers in a message: floats as they are, or levels of a quantizer with what turns them into floats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels import as_divisor, hadamard, look_up, look_up_runs, random_signs

_WORTH_A_TABLE = 1 << 12  # levels: fewer are computed in the time that it takes to make one


class Values(ABC):
    """A vector as it is sent. Receivers see :meth:`decode`, which the sender computes by the same expression."""

    @property
    @abstractmethod
    def floats(self) -> Tensor:
        """What is sent in full: the values themselves, or a quantizer's few parameters. Floating point ``[m]``."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def decode(self) -> Tensor:
        """The values: ``[len(self)]``, of the dtype and on the device of :attr:`floats`."""

    @abstractmethod
    def times(self, factor: float | Tensor) -> Values:
        """The same values, all multiplied by ``factor`` (a number or a tensor of no dimensions)."""

    @abstractmethod
    def to(self, device: torch.device) -> Values:
        """The same values on ``device``."""

    @property
    def zero(self) -> tuple[Tensor, int] | None:
        """Numbers ``[n]``, and which of them says that a value is zero if :attr:`floats` are finite.

        None when no value may be left out.
        """
        return None

    def select(self, places: Tensor) -> Values:
        """Those at ``places``, int64 ``[n]``; only where :attr:`zero` is something."""
        raise NotImplementedError

    def part(self, start: int, stop: int) -> Values:
        """Values [start, stop) as values of their own.

        Raises:
            TypeError: they cannot be told without the others.
        """
        raise TypeError(
            f"{type(self).__name__} values cannot be divided among ranks: send fewer elements (top-k) or use another "
            "exchange"
        )


@dataclass(frozen=True)
class Floats(Values):
    """Numbers as they are."""

    numbers: Tensor  # float32, float64, float16 or bfloat16 [n]

    @property
    def floats(self) -> Tensor:
        """See :class:`Values`."""
        return self.numbers

    def __len__(self) -> int:
        return self.numbers.numel()

    def decode(self) -> Tensor:
        """See :class:`Values`."""
        return self.numbers

    def times(self, factor: float | Tensor) -> Floats:
        """See :class:`Values`."""
        return Floats(self.numbers * factor)

    def to(self, device: torch.device) -> Floats:
        """See :class:`Values`."""
        return Floats(self.numbers.to(device))

    @property
    def zero(self) -> tuple[Tensor, int]:
        """See :class:`Values`."""
        return self.numbers, 0

    def select(self, places: Tensor) -> Floats:
        """See :class:`Values`."""
        return Floats(self.numbers[places])

    def part(self, start: int, stop: int) -> Floats:
        """See :class:`Values`."""
        return Floats(self.numbers[start:stop])

    def select_runs(self, places: Tensor, counts: Sequence[int]) -> Floats:
        """Those at ``places``, which are of several vectors; ``counts`` of each."""
        return self.select(places)

    def split(self, counts: Sequence[int]) -> list[Floats]:
        """Parts of so many values, one after the other."""
        return [Floats(numbers) for numbers in self.numbers.split([*counts])]


@dataclass(frozen=True)
class Levels(Values):
    """Quantized values: a level each, and a few floats that say what the levels mean."""

    levels: Tensor  # uint8 or int64 [n], 0 ≤ level < 2 ** bits
    parameters: Tensor  # float32 or float64 [m]

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of each level on the wire."""

    @property
    @abstractmethod
    def highest(self) -> int:
        """The highest level that means something."""

    @abstractmethod
    def meaning(self, levels: Tensor) -> Tensor:
        """The values of ``levels`` [n], of any integer dtype: of the dtype and on the device of the parameters."""

    def decode(self) -> Tensor:
        """See :class:`Values`."""
        if len(self.levels) < max(self.highest, _WORTH_A_TABLE):
            return self.meaning(self.levels)
        return look_up(self.meaning(torch.arange(self.highest + 1, device=self.levels.device)), self.levels)

    @property
    def floats(self) -> Tensor:
        """See :class:`Values`."""
        return self.parameters

    def __len__(self) -> int:
        return self.levels.numel()

    def times(self, factor: float | Tensor) -> Levels:
        """See :class:`Values`: every meaning below is linear in its parameters."""
        return replace(self, parameters=self.parameters * factor)

    def to(self, device: torch.device) -> Levels:
        """See :class:`Values`."""
        return replace(self, levels=self.levels.to(device), parameters=self.parameters.to(device))

    def part(self, start: int, stop: int) -> Values:
        """See :class:`Values`."""
        return replace(self, levels=self.levels[start:stop])


@dataclass(frozen=True)
class Symmetric(Levels):
    """``scale · ((level − s) / s)``, s steps to each side of an exact zero.

    ``parameters`` are the scales, one for each ``bucket`` consecutive values (a single one when ``bucket`` is 0).
    """

    s: int
    bucket: int = 0

    @property
    def bits(self) -> int:
        """See :class:`Levels`."""
        return (2 * self.s).bit_length()

    @property
    def highest(self) -> int:
        """See :class:`Levels`."""
        return 2 * self.s

    def meaning(self, levels: Tensor) -> Tensor:
        """See :class:`Levels`; in buckets ``levels`` are all that there are."""
        steps = (levels.to(self.parameters.dtype) - self.s) / as_divisor(self.s, self.parameters)
        if not self.bucket:
            return self.parameters * steps  # in this order: finite, and the largest as it was
        whole = len(steps) // self.bucket
        behind = whole * self.bucket
        steps[:behind].view(whole, self.bucket).mul_(self.parameters[:whole].unsqueeze(1))
        steps[behind:].mul_(self.parameters[whole : whole + 1])
        return steps

    def decode(self) -> Tensor:
        """See :class:`Values`."""
        if self.bucket or len(self.levels) < self.highest:
            return self.meaning(self.levels)
        return look_up(self.parameters * _steps(self.s, self.parameters.dtype, self.parameters.device), self.levels)

    @property
    def zero(self) -> tuple[Tensor, int] | None:
        """See :class:`Values`. In buckets a value's place tells its scale."""
        return None if self.bucket else (self.levels, self.s)

    def select(self, places: Tensor) -> Symmetric:
        """See :class:`Values`."""
        return replace(self, levels=self.levels[places])

    def part(self, start: int, stop: int) -> Values:
        """See :class:`Values`. In buckets a value's place tells its scale."""
        return Values.part(self, start, stop) if self.bucket else super().part(start, stop)


@lru_cache
def _steps(s: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(level − s) / s`` for each level."""
    steps = torch.arange(2 * s + 1, device=device).to(dtype) - s
    return steps / as_divisor(s, steps)


@dataclass(frozen=True)
class SymmetricRuns:
    """Several vectors of :class:`Symmetric` values without buckets, one after the other: a scale for each."""

    levels: Tensor  # uint8 or int64 [n], 0 ≤ level ≤ 2 s
    scales: Tensor  # float32 or float64 [m]
    counts: Sequence[int]  # of the m vectors' values, n in all
    s: int

    @property
    def floats(self) -> Tensor:
        """See :class:`Values`."""
        return self.scales

    @property
    def bits(self) -> int:
        """See :class:`Levels`."""
        return (2 * self.s).bit_length()

    @property
    def zero(self) -> tuple[Tensor, int]:
        """See :class:`Values`."""
        return self.levels, self.s

    def select_runs(self, places: Tensor, counts: Sequence[int]) -> SymmetricRuns:
        """Those at ``places``, ascending; ``counts`` of each vector."""
        return replace(self, levels=self.levels[places], counts=counts)

    def times(self, factors: Sequence[float]) -> SymmetricRuns:
        """The same vectors, each multiplied by a factor of its own."""
        return replace(
            self, scales=self.scales * torch.tensor(factors, dtype=self.scales.dtype).to(self.scales.device)
        )

    def decode(self) -> Tensor:
        """See :class:`Values`: the same bits as the vectors' one by one."""
        steps = _steps(self.s, self.scales.dtype, self.scales.device)
        return look_up_runs(steps, self.levels, self.counts, self.scales)

    def split(self, counts: Sequence[int]) -> list[Symmetric]:
        """The vectors, which have ``counts`` values."""
        parts = zip(self.levels.split([*counts]), self.scales.split(1), strict=True)
        return [Symmetric(levels, scale, self.s) for levels, scale in parts]


@dataclass(frozen=True)
class Range(Levels):
    """``low + level · (high − low) / s`` for the two parameters (low, high)."""

    s: int

    @property
    def bits(self) -> int:
        """See :class:`Levels`."""
        return self.s.bit_length()

    @property
    def highest(self) -> int:
        """See :class:`Levels`."""
        return self.s

    def meaning(self, levels: Tensor) -> Tensor:
        """See :class:`Levels`."""
        low, high = self.parameters[0], self.parameters[1]
        return low + levels.to(self.parameters.dtype) * ((high - low) / as_divisor(self.s, low))


@dataclass(frozen=True)
class Codebook(Levels):
    """``parameters[level]``."""

    @property
    def bits(self) -> int:
        """See :class:`Levels`."""
        return max(1, (len(self.parameters) - 1).bit_length())

    @property
    def highest(self) -> int:
        """See :class:`Levels`."""
        return len(self.parameters) - 1

    def meaning(self, levels: Tensor) -> Tensor:
        """See :class:`Levels`."""
        return self.parameters[levels.to(torch.int64)]


@dataclass(frozen=True)
class Rotated(Values):
    """Values behind a random rotation: the first ``count`` elements of diag(ε) H ``inner`` / √n."""

    inner: Levels  # of a power of two
    seed: int  # of the signs ε; 0 ≤ seed < 2 ** 63
    count: int

    @property
    def floats(self) -> Tensor:
        """See :class:`Values`."""
        return self.inner.floats

    def __len__(self) -> int:
        return self.count

    def decode(self) -> Tensor:
        """See :class:`Values`."""
        signs = random_signs(len(self.inner), self.seed, self.floats.device)
        return (hadamard(self.inner.decode()) * signs)[: self.count]

    def times(self, factor: float | Tensor) -> Rotated:
        """See :class:`Values`."""
        return replace(self, inner=self.inner.times(factor))

    def to(self, device: torch.device) -> Rotated:
        """See :class:`Values`."""
        return replace(self, inner=self.inner.to(device))
