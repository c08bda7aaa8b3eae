"""Messages and their bytes. Knows tensors only as numbers, and nothing of MPI."""

from .message import Message
from .packet import HEADER_BYTES, VERSION, Encoded, Packet, decode, encode, encode_failure

__all__ = ["HEADER_BYTES", "VERSION", "Encoded", "Message", "Packet", "decode", "encode", "encode_failure"]
