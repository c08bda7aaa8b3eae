"""A number of elements that a number of exchanges may send, and its division among exchanges and tensors."""

from __future__ import annotations

from collections.abc import Mapping

from ..checks import check_numbers


class Budget:
    """K elements for T exchanges, of which each gets at least k_min.

    Args:
        sizes: of the tensors, in elements.
        ratio: K as an average: part of all elements that an exchange sends, but at least one of each tensor.
        exchanges: T; after them a new budget begins.
        smallest: k_min as a part of the average, but at least one element of each tensor.

    Raises:
        ValueError: an argument out of its range.
        TypeError: one that is no number.
    """

    def __init__(self, sizes: Mapping[str, int], ratio: float, exchanges: int, smallest: float) -> None:
        check_budget(ratio, exchanges, smallest)
        # Configuration
        self.k_max = sum(sizes.values())
        self.exchanges = exchanges
        average = max(round(ratio * self.k_max), len(sizes))
        self.total = average * exchanges  # K
        self.k_min = max(round(smallest * average), len(sizes))
        # State
        self.done = 0  # exchanges of the current budget
        self.spent = 0

    @property
    def left(self) -> int:
        """Elements that are not spent; at least k_min for each exchange that is left."""
        return self.total - self.spent

    @property
    def exchanges_left(self) -> int:
        """The coming one among them."""
        return self.exchanges - self.done

    @property
    def average(self) -> float:
        """k̄: what is left, for each exchange that is left."""
        return self.left / self.exchanges_left

    def spend(self, k: int) -> None:
        """An exchange has sent ``k`` elements."""
        self.spent += k
        self.done += 1
        if self.done == self.exchanges:
            self.done = self.spent = 0

    def resume(self, done: int, spent: int) -> None:
        """Go on after ``done`` exchanges that have sent ``spent`` elements, or anew if there is no room for them.

        They may be of another budget: an epoch has fewer exchanges on more ranks.
        """
        self.done, self.spent = done, spent
        if done >= self.exchanges or self.left < self.k_min * self.exchanges_left:
            self.done = self.spent = 0


def check_budget(ratio: float, exchanges: int, smallest: float) -> None:
    """Refuse what makes no :class:`Budget`.

    Raises:
        ValueError: an argument out of its range.
        TypeError: one that is no number.
    """
    check_numbers(ratio=ratio, smallest=smallest)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio!r}")
    if isinstance(exchanges, bool) or not isinstance(exchanges, int) or exchanges < 1:
        raise ValueError(f"exchanges must be a number ≥ 1, got {exchanges!r}")
    if not 0 <= smallest <= 1:
        raise ValueError(f"smallest must be in [0, 1], got {smallest!r}")


def affordable(wished: float, *, left: int, exchanges_left: int, k_min: int, k_max: int) -> int:
    """``wished``, rounded and cut to what a budget allows.

    Args:
        wished: elements for the coming exchange.
        left: elements of the budget that are not spent; at least ``k_min · exchanges_left``.
        exchanges_left: this one among them.
        k_min: for this exchange and every later one.
        k_max: number of elements there are.
    """
    return max(k_min, min(round(min(wished, k_max)), left - k_min * (exchanges_left - 1)))


def divide(k: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """``k`` elements divided among tensors in proportion to their sizes, at least one each: exactly k in total.

    Args:
        k: at least the number of tensors, at most the sum of their sizes.
        sizes: positive.
    """
    more = apportion(k - len(sizes), {name: size - 1 for name, size in sizes.items()})
    return {name: 1 + m for name, m in more.items()}


def apportion(k: int, rooms: Mapping[str, int]) -> dict[str, int]:
    """``k`` elements divided in proportion to ``rooms``, none getting more than its room: exactly k in total.

    Args:
        k: at most the sum of the rooms.
        rooms: not negative.
    """
    total = sum(rooms.values())
    shares, behind = {}, 0
    for name, room in rooms.items():
        before = k * behind // total if total else 0
        behind += room
        shares[name] = (k * behind // total if total else 0) - before
    return shares
