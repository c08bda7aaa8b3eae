"""Compressed communication for Horovod: sparse messages that really travel sparse, and local SGD."""

from .async_local_sgd import AsyncQsparseLocalSGD, random_gaps
from .cd_adam import CDAdam
from .checkpoint import EXIT_REQUEUE, Checkpoint, Checkpoints, Interruption, random_state, set_random_state
from .compression import Compression
from .dqgan import DQGAN
from .errors import NonFiniteError, PeerError, RankMismatchError, WireError
from .gradient import GradientCompressor
from .ledger import Ledger, Traffic
from .local_sgd import QsparseLocalSGD, post_local, sync_at
from .membership import node_process_set
from .resizing import resize

__version__ = "0.1.0"

__all__ = [
    "DQGAN",
    "EXIT_REQUEUE",
    "AsyncQsparseLocalSGD",
    "CDAdam",
    "Checkpoint",
    "Checkpoints",
    "Compression",
    "GradientCompressor",
    "Interruption",
    "Ledger",
    "NonFiniteError",
    "PeerError",
    "QsparseLocalSGD",
    "RankMismatchError",
    "Traffic",
    "WireError",
    "node_process_set",
    "post_local",
    "random_gaps",
    "random_state",
    "resize",
    "set_random_state",
    "sync_at",
]
