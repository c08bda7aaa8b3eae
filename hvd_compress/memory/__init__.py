"""What a rank keeps from one exchange to the next. Knows nothing of ranks, bytes or optimizers."""

from .base import COMMON, ESTIMATE, MASS, TOTAL, Memory, Sent
from .dgc import DGC
from .ef21 import EF21, TwoSided
from .residual import NoMemory, Residual

__all__ = [
    "COMMON",
    "DGC",
    "EF21",
    "ESTIMATE",
    "MASS",
    "TOTAL",
    "Memory",
    "NoMemory",
    "Residual",
    "Sent",
    "TwoSided",
]
