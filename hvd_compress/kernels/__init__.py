"""Loops over all elements of a tensor that several rooms need, as torch expressions."""

from .hadamard import hadamard, next_power_of_two, random_signs
from .subset import random_subset

__all__ = ["hadamard", "next_power_of_two", "random_signs", "random_subset"]
