"""Compression operators: tensors in, messages out. Nothing here knows ranks, parameters or steps."""

from .base import Operator, working_dtype
from .topk import TopK

__all__ = ["Operator", "TopK", "working_dtype"]
