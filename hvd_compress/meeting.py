"""The first exchange: ranks find each other, and compare what they are about to do."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import horovod.torch as hvd
import numpy as np
import torch

from . import wire
from .errors import PeerError, RankMismatchError, WireError
from .horovod_exchange import HorovodExchange
from .memory import Memory
from .operators import Operator
from .schedules import Plan

if TYPE_CHECKING:  # importing mpi4py starts MPI, which must wait until the job is known to have ranks
    from mpi4py import MPI

    from .exchange import Watch

_TOKEN_BYTES = 8

Place = tuple[int, int]  # a rank's place among those that reduce together, and their number


class Member:
    """What all that sum over ranks tell of themselves, and to each other."""

    _memory: Memory
    _place: Place | None  # once the ranks have met
    _failure: Exception | None = None  # of the next exchange, on this rank
    _spoilt: Exception | None = None  # why all exchanges fail, until a state is loaded
    _watch: Watch | None = None  # over this rank, if others would wait for it

    @property
    def size(self) -> int:
        """Number of ranks that are summed over."""
        assert self._place is not None, "open() comes first"
        return self._place[1]

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        assert self._place is not None, "open() comes first"
        return self._place[0]

    @property
    def covers_small(self) -> bool:
        """Whether small tensors have to come here too."""
        return self._memory.covers_small

    @property
    def is_spoilt(self) -> bool:
        """Whether this rank differs from the others, until a state is loaded."""
        return self._spoilt is not None

    def let_fail(self, error: Exception) -> None:
        """Let the next exchange fail, on all ranks: here with ``error``, unless something else came first."""
        self._failure = self._failure or error

    def stay_away(self) -> None:
        """This rank has been kept from the exchange that it has begun: who waits for it is to find that out.

        What it has added is forgotten, and its memories are as they were, unless some of it has departed.
        """
        if self._watch is not None:
            self._watch.give_up()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context for what comes after the others were told that all is well.

        What fails there, but for what all ranks find wrong alike, leaves this rank half changed. It raises here, and
        in all exchanges from then on, on all ranks, until a state is loaded.
        """
        try:
            yield
        except (PeerError, RankMismatchError, WireError):
            raise
        except BaseException as error:
            self._failure = self._spoilt = RuntimeError(
                f"an earlier exchange failed on this rank alone ({type(error).__name__}: {error}), and it differs "
                "from the others since then: load a checkpoint on all ranks"
            )
            raise


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
            *_alike(memory),
            *expects,
            *tensors_of(shapes),
        ]
    )


def _alike(memory: Memory) -> list[str]:
    """What a sum depends on that each rank computes for itself, where all have to come to the same bits."""
    return [f"{torch.get_num_threads()} thread(s) in torch (OMP_NUM_THREADS)"] if memory.operators else []


def tensors_of(shapes: Mapping[str, torch.Size]) -> list[str]:
    """What statements say of the tensors."""
    return [f"tensor {name} of shape {tuple(shape)}" for name, shape in shapes.items()]


def source_of(nodes: Sequence[int] | None) -> str:
    """Where a rank knows from which ranks share a node, for statements: ``nodes=…``, or MPI."""
    return "shared memory" if nodes is None else f"nodes={tuple(nodes)}"


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
    private, sent = rendezvous(communicator, ranks, f"{_origin(saved_as, here)}\n{expects}", timeout)
    _check_origin(saved_as, here)
    abort_on_uncaught_exception(private)
    return private, here, sent


def agree(
    process_set: hvd.ProcessSet, ranks: Sequence[int], expects: str, saved_as: Place | None
) -> tuple[HorovodExchange, Place]:
    """The same by Horovod alone; the first rank names the exchange, since two models that are alike must not meet.

    ``process_set`` is of all ``ranks``; the other arguments and errors are those of :func:`meet`.
    """
    exchange = HorovodExchange(process_set)
    here = (exchange.rank, exchange.size)
    token = secrets.token_bytes(_TOKEN_BYTES)
    mine = f"{_origin(saved_as, here)}\n{expects}"
    gathered = exchange.allgatherv(np.frombuffer(token + mine.encode(), np.uint8).copy())
    statements = [data[_TOKEN_BYTES:].tobytes().decode() for data in gathered]
    differing = [place for place, other in enumerate(statements) if other != statements[0]]
    if differing:
        others = [ranks[place] for place in differing]
        raise RankMismatchError.between(ranks[0], statements[0], others, statements[differing[0]])
    _check_origin(saved_as, here)
    exchange.name += f".{gathered[0][:_TOKEN_BYTES].tobytes().hex()}"
    return exchange, here


def through_mpi(link: MPI.Intracomm | hvd.ProcessSet, exchange: str) -> MPI.Intracomm:
    """``link``, for an exchange that Horovod alone cannot do.

    Raises:
        RuntimeError: Horovod runs without MPI.
    """
    if isinstance(link, hvd.ProcessSet):
        raise RuntimeError(
            f"exchange={exchange!r} needs MPI, and Horovod runs without it here: start the job by mpirun, srun or "
            "horovodrun --mpi, or use exchange='allgather'"
        )
    return link


def _origin(saved_as: Place | None, here: Place) -> str:
    """Whose state was loaded, if it was not this rank's."""
    if saved_as is None or saved_as == here:
        return "a state of its own, or none"
    return (
        f"the state saved by rank {saved_as[0]} of {saved_as[1]}, being rank {here[0]} of {here[1]} (each rank loads "
        "its own file, and as many ranks resume as have saved, or hvd_compress.resize comes between)"
    )


def _check_origin(saved_as: Place | None, here: Place) -> None:
    if saved_as not in (None, here):  # a single rank has no other to disagree with
        raise RankMismatchError(f"this rank has {_origin(saved_as, here)}")
