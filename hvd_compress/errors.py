"""What can go wrong between ranks. Bad arguments raise the built-in ``ValueError`` and ``TypeError``."""

from __future__ import annotations

from collections.abc import Sequence


class WireError(ValueError):
    """Bytes that are not a message of this library: truncated, corrupted, foreign or of another version."""


class RankMismatchError(RuntimeError):
    """The ranks do not agree: other models, settings, starting points, or a rank that never came."""

    @classmethod
    def between(cls, rank: int, statement: str, others: Sequence[int], other: str) -> RankMismatchError:
        """An error that names ``rank``, ``others``, and the first line in which two statements of theirs differ.

        Args:
            rank: whose statement is the first.
            statement: lines of text.
            others: ranks that have another one.
            other: that of the first of them.
        """
        pairs = zip((statement + "\n(nothing)").split("\n"), (other + "\n(nothing)").split("\n"), strict=False)
        left, right = next(((a, b) for a, b in pairs if a != b), ("", ""))
        more = f" (nor do ranks {', '.join(map(str, others[1:]))})" if others[1:] else ""
        second = others[0]
        return cls(
            f"rank {rank} and rank {second} do not agree{more}. Rank {rank} has: {left}. Rank {second} has: {right}."
        )


class PeerError(RuntimeError):
    """Another rank failed while it prepared its message; the text is that rank's own error."""


class NonFiniteError(FloatingPointError):
    """An update holds inf or NaN. Memories and the last synchronised parameters are left as they were."""
