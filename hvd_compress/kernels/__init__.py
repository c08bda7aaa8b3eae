"""Loops over all elements of a tensor that several rooms need: torch expressions, the hottest also compiled."""

from .hadamard import hadamard, next_power_of_two, random_signs
from .subset import random_subset
from .vectors import add_at, all_finite, all_nonzero, is_finite, subtract_at, sum_at

__all__ = [
    "add_at",
    "all_finite",
    "all_nonzero",
    "hadamard",
    "is_finite",
    "next_power_of_two",
    "random_signs",
    "random_subset",
    "subtract_at",
    "sum_at",
]
