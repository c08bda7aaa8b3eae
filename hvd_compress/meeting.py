"""The first exchange: ranks find each other, and compare what they are about to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from . import wire
from .errors import RankMismatchError
from .memory import Memory
from .operators import Operator
from .schedules import Plan

if TYPE_CHECKING:  # importing mpi4py starts MPI, which must wait until the job is known to have ranks
    from mpi4py import MPI

Place = tuple[int, int]  # a rank's place among those that reduce together, and their number


def statement(
    shapes: Mapping[str, torch.Size],
    operator: Operator | Plan,
    memory: Memory,
    dense_below: int,
    seed: int,
    *expects: str,
) -> str:
    """Lines that must be the same on all ranks: the settings, then ``expects``, then the tensors."""
    return "\n".join(
        [
            f"message format {wire.VERSION}",
            f"operator {operator!r}",
            f"memory {memory!r}",
            f"dense_below={dense_below}",
            f"seed={seed}",
            *expects,
            *(f"tensor {name} of shape {tuple(shape)}" for name, shape in shapes.items()),
        ]
    )


def meet(
    communicator: MPI.Intracomm, ranks: Sequence[int], expects: str, saved_as: Place | None, timeout: float
) -> tuple[MPI.Intracomm, Place, int]:
    """Wait for all ``ranks``, and compare. Collective over them.

    Args:
        communicator: contains the ranks.
        ranks: ascending, this one among them.
        expects: lines that must be the same on all of them; see :func:`statement`.
        saved_as: whose state this rank has loaded, if any.
        timeout: seconds to wait.

    Returns:
        A communicator of ``ranks`` alone, this rank's place in it, and the bytes that were handed to MPI.

    Raises:
        RankMismatchError: on every rank, when ranks differ or do not come, or when a rank has loaded the state of
            another rank or of another number of ranks.
    """
    from .exchange import abort_on_uncaught_exception, rendezvous

    here = (ranks.index(communicator.Get_rank()), len(ranks))
    origin = "a state of its own, or none"
    if saved_as not in (None, here):
        saver = f"rank {saved_as[0]} of {saved_as[1]}"
        origin = (
            f"the state saved by {saver}, being rank {here[0]} of {here[1]} "
            "(each rank loads its own file, and as many ranks resume as have saved)"
        )
    private, sent = rendezvous(communicator, ranks, f"{origin}\n{expects}", timeout)
    if saved_as not in (None, here):  # a single rank has no other to disagree with
        raise RankMismatchError(f"this rank has {origin}")
    abort_on_uncaught_exception(private)
    return private, here, sent
