"""What can go wrong between ranks. Bad arguments raise the built-in ``ValueError`` and ``TypeError``."""


class WireError(ValueError):
    """Bytes that are not a message of this library: truncated, corrupted, foreign or of another version."""


class RankMismatchError(RuntimeError):
    """The ranks do not agree: other models, settings, starting points, or a rank that never came."""


class PeerError(RuntimeError):
    """Another rank failed while it prepared its message; the text is that rank's own error."""


class NonFiniteError(FloatingPointError):
    """An update holds inf or NaN. Memories and the last synchronised parameters are left as they were."""
