"""What a compressor is told once, on the gradient path and under local SGD alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import horovod.torch as hvd
import torch

from .memory import Memory
from .operators import Composed, Operator, Quantizer, typical_error
from .schedules import Plan

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI


EXCHANGES = ("allgather", "hierarchical", "reduce_scatter", "auto")
"""What ``exchange=`` may be."""


@dataclass(frozen=True)
class Settings:
    """How tensors are compressed, and between whom. See :class:`hvd_compress.Compression` for the meanings."""

    operator: Operator | Plan
    memory: Callable[[], Memory]
    dense_below: int = 1000
    bucket_cap_mb: float = 25.0
    seed: int = 0
    timeout: float = 600.0
    process_set: hvd.ProcessSet | None = None
    communicator: MPI.Intracomm | None = None
    grad_scaler: torch.amp.GradScaler | None = None
    exchange: str = "allgather"
    nodes: Sequence[int] | None = None
    node_process_set: hvd.ProcessSet | None = None
    reselect: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator | Plan):
            raise TypeError(f"operator must be an Operator or a Plan of hvd_compress, got {self.operator!r}")
        if isinstance(self.dense_below, bool) or not isinstance(self.dense_below, int) or self.dense_below < 0:
            raise ValueError(f"dense_below must be a number of elements ≥ 0, got {self.dense_below!r}")
        if not self.bucket_cap_mb > 0:
            raise ValueError(f"bucket_cap_mb must be a positive number of megabytes, got {self.bucket_cap_mb!r}")
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer of 64 bits, sign included, got {self.seed!r}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout!r}")
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(map(repr, EXCHANGES))}, got {self.exchange!r}")
        if self.nodes is not None and any(isinstance(n, bool) or not isinstance(n, int) for n in self.nodes):
            raise TypeError(f"nodes must be an integer for each rank, got {self.nodes!r}")
        if self.node_process_set is not None and not isinstance(self.node_process_set, hvd.ProcessSet):
            raise TypeError(f"node_process_set must be one of Horovod's, got {self.node_process_set!r}")
        if not self.reselect > 0:
            raise ValueError(f"reselect must be positive, got {self.reselect!r}")
        self._check_feedback(self.memory())  # which refuses settings of its own

    def _check_feedback(self, memory: Memory) -> None:
        if not isinstance(self.operator, Quantizer | Composed):
            return
        error = typical_error(self.operator) if memory.feeds_back else 0.0
        if error >= 1:
            raise ValueError(
                f"{self.operator!r} errs by {error:.3g} times the energy of what it is given, and {memory!r} gives "
                "that back to it, so that it would explode: use more bits, norm='max', a smaller bucket=…, "
                "scaled=True behind a sparsifier, or memory='none'"
            )
