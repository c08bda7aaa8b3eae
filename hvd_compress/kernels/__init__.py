"""Loops over all elements of a tensor that several rooms need: torch expressions, the hottest also compiled."""

from .draws import draw_seed
from .hadamard import hadamard, next_power_of_two, random_signs
from .rounding import (
    choose_by_chance,
    look_up,
    look_up_runs,
    round_by_chance,
    round_runs_to_largest,
    round_to_largest,
)
from .subset import random_subset
from .vectors import Sparse, add_at, all_finite, as_divisor, is_finite, none_is, subtract_at, sum_at

__all__ = [
    "Sparse",
    "add_at",
    "all_finite",
    "as_divisor",
    "choose_by_chance",
    "draw_seed",
    "hadamard",
    "is_finite",
    "look_up",
    "look_up_runs",
    "next_power_of_two",
    "none_is",
    "random_signs",
    "random_subset",
    "round_by_chance",
    "round_runs_to_largest",
    "round_to_largest",
    "subtract_at",
    "sum_at",
]
