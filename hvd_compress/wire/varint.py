"""Unsigned LEB128 integers: seven bits in a byte, the eighth says that more follow."""

from ..errors import WireError

MAX_BYTES = 9  # 63 bits, what an int64 holds


def append_varint(buffer: bytearray, number: int) -> None:
    """Append ``number`` (0 ≤ number < 2^63) to ``buffer``."""
    while number > 0x7F:
        buffer.append(number & 0x7F | 0x80)
        number >>= 7
    buffer.append(number)


def read_varint(buffer: memoryview, offset: int) -> tuple[int, int]:
    """Return the number at ``offset`` and the offset behind it.

    Raises:
        WireError: the buffer ends inside the number, or it does not fit into 63 bits.
    """
    if offset < len(buffer) and buffer[offset] < 0x80:  # most numbers are small
        return buffer[offset], offset + 1
    number = 0
    for position, byte in enumerate(buffer[offset : offset + MAX_BYTES]):
        number |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return number, offset + position + 1
    raise WireError(f"no integer of at most {MAX_BYTES} bytes at byte {offset} of the message table")
