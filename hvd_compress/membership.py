"""Who and what takes part: Horovod's process sets in terms of MPI, and parameters by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import horovod.torch as hvd
import torch
from horovod.common import process_sets as hvd_process_sets
from torch import Tensor

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI


def members(
    process_set: hvd.ProcessSet | None, communicator: MPI.Intracomm | None
) -> tuple[MPI.Intracomm, list[int]]:
    """A communicator, and the ranks of it that reduce together.

    Args:
        process_set: Horovod's; None for all ranks, which is refused when the job has other process sets, since
            Horovod does not tell a compressor which one it works for.
        communicator: of all of Horovod's ranks in their order; None for MPI's world.

    Raises:
        RuntimeError: Horovod is not initialised.
        ValueError: the process set is ambiguous, unknown to Horovod, or does not have this rank.
        RankMismatchError: mpi4py and Horovod do not see the same ranks.
    """
    from .exchange import check_world, warn_of_few_cores

    ranks = list(_taking_part(process_set).ranks or ())
    world = check_world(communicator, hvd.rank(), hvd.size())
    if len(ranks) > 1:
        warn_of_few_cores(hvd.local_rank(), hvd.local_size())
    return world, ranks


def link(
    process_set: hvd.ProcessSet | None, communicator: MPI.Intracomm | None
) -> tuple[MPI.Intracomm | hvd.ProcessSet, list[int]]:
    """What the ranks that reduce together exchange messages by, and these ranks.

    It is what :func:`members` returns, or the process set itself where Horovod runs without MPI. The arguments and
    errors are those of :func:`members`.
    """
    if communicator is None and hvd.is_initialized() and not hvd.mpi_enabled():
        taking_part = _taking_part(process_set)
        return taking_part, list(taking_part.ranks or ())
    return members(process_set, communicator)


def _taking_part(process_set: hvd.ProcessSet | None) -> hvd.ProcessSet:
    if not hvd.is_initialized():
        raise RuntimeError("call hvd.init() before the first step")
    if process_set is None:
        known = _process_sets()
        if len(known) > 1:
            raise ValueError(
                f"this job has {len(known)} process sets: say which one the compressor works for, as for the "
                "optimizer: process_set=… (hvd.global_process_set for all ranks)"
            )
        process_set = hvd.global_process_set
    if process_set.process_set_id is None or process_set.ranks is None:
        raise ValueError(f"{process_set} is not registered with Horovod: see hvd.init(process_sets=…)")
    if hvd.rank() not in process_set.ranks:
        raise ValueError(f"rank {hvd.rank()} is not in {process_set}, so it must not use this compressor")
    return process_set


def check_horovod_takes(device: torch.device) -> None:
    """Raise RuntimeError if Horovod was built for CPUs alone: it lets a tensor on a GPU wait for ever."""
    if device.type == "cuda" and not (hvd.cuda_built() or hvd.rocm_built()):
        raise RuntimeError(
            f"gradients are on {device}, and this Horovod was built for CPUs alone, which no gradient or ticket on a "
            "GPU gets through: build it with python scripts/build_horovod.py --install --nccl (docs/install.md)"
        )


def node_process_set(nodes: Sequence[int] | None = None, communicator: MPI.Intracomm | None = None) -> hvd.ProcessSet:
    """The process set of the ranks on this rank's node. Collective over all ranks; call it once.

    Args:
        nodes: a number for each rank's node, equal for those on one node; None to ask MPI.
        communicator: see :func:`members`.

    Raises:
        ValueError: ``nodes`` does not speak of all ranks, or Horovod allows no new process sets: start it with
            ``hvd.init(process_sets="dynamic")``.
        RuntimeError, RankMismatchError: see :func:`members`.
    """
    communicator, ranks = members(hvd.global_process_set, communicator)
    from .exchange import labels_of, topology

    found, _ = topology(communicator, labels_of(nodes, ranks))
    if len(found.nodes) == 1:
        return hvd.global_process_set
    sets = [hvd.add_process_set(list(together)) for together in found.nodes]
    return sets[found.place(hvd.rank())[0]]


def _process_sets() -> dict[int, list[int]]:
    # Horovod 0.28.1 has no public list of process sets.
    return hvd_process_sets._basics._get_process_set_ids_and_ranks()


def check_process_set(name: str, process_set: hvd.ProcessSet | None) -> None:
    """Raise TypeError unless it is one, or None."""
    if process_set is not None and not isinstance(process_set, hvd.ProcessSet):
        raise TypeError(f"{name} must be hvd.ProcessSet([…]), which Horovod knows, or None, got {process_set!r}")


def check_named_parameters(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
) -> dict[str, torch.nn.Parameter]:
    """``named_parameters`` as a dictionary.

    Raises:
        TypeError: not pairs of a name and a tensor.
        ValueError: none at all, or a name occurs twice.
    """
    pairs = list(named_parameters) if isinstance(named_parameters, Iterable) else [named_parameters]
    if not all(_is_named(pair) for pair in pairs):
        raise TypeError("named_parameters must be pairs of a name and a parameter: model.named_parameters()")
    names = [name for name, _ in pairs]
    if not names:
        raise ValueError(
            "named_parameters is empty; a generator can be used only once, so call model.named_parameters() anew"
        )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"parameter names must be unique, these are not: {', '.join(twice)}")
    return dict(pairs)


def _is_named(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)


@dataclass(frozen=True)
class Change:
    """One rank's part in a change of the number of ranks.

    Old and new ranks lie side by side on two lines of the same length; a new one follows those that it overlaps.
    """

    rank: int
    size: int  # of the new world
    before: int  # number of ranks of the old world
    predecessors: tuple[int, ...]  # ranks of the old world
    weights: tuple[int, ...]  # of the predecessors; their sum is ``before``

    @classmethod
    def of(cls, rank: int, size: int, before: int) -> Change:
        """That of the rank ``rank`` of ``size``, after a world of ``before`` ranks."""
        overlaps = {
            old: min((rank + 1) * before, (old + 1) * size) - max(rank * before, old * size) for old in range(before)
        }
        taken = {old: overlap for old, overlap in overlaps.items() if overlap > 0}
        return cls(rank, size, before, tuple(taken), tuple(taken.values()))

    @property
    def nearest(self) -> int:
        """The place in ``predecessors`` of the one with the largest weight, the first of them."""
        return self.weights.index(max(self.weights))
