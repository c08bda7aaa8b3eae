"""Messages and their bytes. Knows tensors only as numbers, and nothing of MPI."""

from .message import Block, Fused, Message, Subset, add_up, device_of, numels_of, subtract
from .packet import HEADER_BYTES, VERSION, Encoded, Packet, decode, encode, encode_failure
from .table import Table
from .values import Codebook, Floats, Levels, Range, Rotated, Symmetric, SymmetricRuns, Values

__all__ = [
    "HEADER_BYTES",
    "VERSION",
    "Block",
    "Codebook",
    "Encoded",
    "Floats",
    "Fused",
    "Levels",
    "Message",
    "Packet",
    "Range",
    "Rotated",
    "Subset",
    "Symmetric",
    "SymmetricRuns",
    "Table",
    "Values",
    "add_up",
    "decode",
    "device_of",
    "encode",
    "encode_failure",
    "numels_of",
    "subtract",
]
