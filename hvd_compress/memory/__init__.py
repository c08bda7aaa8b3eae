"""What a rank keeps of what it did not send. Knows nothing of ranks, bytes or optimizers."""

from .base import Memory, Sent
from .residual import NoMemory, Residual

__all__ = ["Memory", "NoMemory", "Residual", "Sent"]
