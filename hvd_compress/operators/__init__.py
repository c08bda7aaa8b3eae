"""Compression operators: tensors in, messages out. Nothing here knows ranks, parameters or steps."""

from .amount import Amount
from .base import Operator, Quantizer, typical_error, working_dtype
from .cat import CAT
from .compose import Composed, compose
from .quantizers import QSGD, MinMax, OneBit, Rotated, Sign, TernGrad
from .sparsifiers import RandK, RandomBlock, Threshold
from .topk import TopK
from .truncated import TBQSGD, TNQSGD, TQSGD

__all__ = [
    "CAT",
    "QSGD",
    "TBQSGD",
    "TNQSGD",
    "TQSGD",
    "Amount",
    "Composed",
    "MinMax",
    "OneBit",
    "Operator",
    "Quantizer",
    "RandK",
    "RandomBlock",
    "Rotated",
    "Sign",
    "TernGrad",
    "Threshold",
    "TopK",
    "compose",
    "typical_error",
    "working_dtype",
]
