"""What several kinds of settings have to be."""

from __future__ import annotations

from numbers import Real


def check_numbers(**settings: object) -> None:
    """Raise TypeError with the name of one that is no number, which a comparison would not tell."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
