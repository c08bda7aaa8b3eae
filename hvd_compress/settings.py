"""What a compressor is told once, on the gradient path and under local SGD alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import horovod.torch as hvd
import torch

from .checks import check_numbers
from .membership import check_process_set
from .memory import DGC, EF21, Memory, NoMemory, Residual
from .operators import Composed, Operator, Quantizer, typical_error
from .schedules import Plan

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI


EXCHANGES = ("allgather", "hierarchical", "reduce_scatter", "auto")
"""What ``exchange=`` may be."""

MEMORIES: dict[str, Callable[[], Memory]] = {"none": NoMemory, "residual": Residual, "dgc": DGC, "ef21": EF21}
"""What ``memory=`` may be called."""

_FEW, _MANY = 1 << 14, 1 << 22  # elements that errors are measured on: some milliseconds, and up to 0.2 s


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
    reselect: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator | Plan):
            raise TypeError(
                "operator must be an Operator or a Plan of hvd_compress, as TopK(ratio=0.01) is (names are for "
                f"Compression.by_name), got {self.operator!r}"
            )
        check_numbers(bucket_cap_mb=self.bucket_cap_mb, timeout=self.timeout)
        if self.reselect is not None:
            check_numbers(reselect=self.reselect)
        check_process_set("process_set", self.process_set)
        check_process_set("node_process_set", self.node_process_set)
        if self.communicator is not None and not hasattr(self.communicator, "Create_group"):
            raise TypeError(f"communicator must be mpi4py's, or None for MPI's world, got {self.communicator!r}")
        if self.grad_scaler is not None and not hasattr(self.grad_scaler, "get_scale"):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler or None, got {self.grad_scaler!r}")
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
        if self.nodes is not None and not _are_integers(self.nodes):
            raise TypeError(f"nodes must be an integer for each rank, got {self.nodes!r}")
        if self.reselect is not None and not self.reselect > 0:
            raise ValueError(f"reselect must be positive, or None, got {self.reselect!r}")
        memory = self.memory() if callable(self.memory) else self.memory  # which refuses settings of its own
        if not isinstance(memory, Memory) or memory is self.memory:
            raise TypeError(
                f"memory must be one of {', '.join(map(repr, MEMORIES))}, or a function that makes a memory "
                f"(Residual, not Residual()), got {self.memory!r}"
            )
        self._check_feedback(memory)

    @property
    def has_one_worker(self) -> bool:
        """Whether messages travel between nodes, and there is only one. Horovod must be initialised."""
        is_one_node = hvd.local_size() == hvd.size() if self.nodes is None else len({*self.nodes}) == 1
        return self.exchange == "hierarchical" and is_one_node

    def check_sizes(self, sizes: Iterable[int]) -> None:
        """Judge errors that are fed back for the largest tensor that is compressed too: many grow with the tensor.

        Args:
            sizes: elements of each tensor.

        Raises:
            ValueError: an operator is so coarse there that a memory would feed its errors back until they explode.
        """
        largest = max((n for n in sizes if n >= self.dense_below), default=0)
        if largest > _FEW:
            self._check_feedback(self.memory(), min(largest, _MANY))

    def _check_feedback(self, memory: Memory, numel: int = _FEW) -> None:
        fed_back = {repr(of): of for of in ((self.operator,) if memory.feeds_back else ()) + memory.operators}
        for operator in fed_back.values():
            error = typical_error(operator, numel) if isinstance(operator, Quantizer | Composed) else 0.0
            if error >= 1:
                raise ValueError(
                    f"{operator!r} errs by {error:.3g} times the energy of {numel} elements that it is given, and "
                    f"{memory!r} gives that back to it, so that it would explode: use more bits, norm='max', "
                    "a smaller bucket=…, scaled=True behind a sparsifier, or memory='none'"
                )


def _are_integers(nodes: object) -> bool:
    return isinstance(nodes, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in nodes)
