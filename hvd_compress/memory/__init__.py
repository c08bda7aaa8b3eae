"""What a rank keeps from one exchange to the next. Knows nothing of ranks, bytes or optimizers."""

from .base import Memory, Sent
from .dgc import DGC
from .ef21 import EF21, TwoSided
from .residual import NoMemory, Residual

__all__ = ["DGC", "EF21", "Memory", "NoMemory", "Residual", "Sent", "TwoSided"]
