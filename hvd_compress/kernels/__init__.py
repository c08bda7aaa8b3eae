"""Loops over all elements of a tensor that several rooms need: torch expressions, the hottest also compiled."""

from .draws import draw_seed
from .hadamard import hadamard, next_power_of_two, random_signs
from .rounding import choose_by_chance, look_up, round_by_chance
from .subset import random_subset
from .vectors import Sparse, add_at, all_finite, all_nonzero, is_finite, subtract_at, sum_at

__all__ = [
    "Sparse",
    "add_at",
    "all_finite",
    "all_nonzero",
    "choose_by_chance",
    "draw_seed",
    "hadamard",
    "is_finite",
    "look_up",
    "next_power_of_two",
    "random_signs",
    "random_subset",
    "round_by_chance",
    "subtract_at",
    "sum_at",
]
