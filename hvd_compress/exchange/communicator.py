"""Which communicator, and what happens to it when a rank fails."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType

from mpi4py import MPI

from ..errors import RankMismatchError

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 5.0  # for the other ranks to fail by themselves, each with its own message


def check_world(communicator: MPI.Intracomm | None, rank: int, size: int) -> MPI.Intracomm:
    """``communicator``, or MPI's world, once it is known to have the ranks that Horovod sees.

    Args:
        communicator: None for MPI's world.
        rank: Horovod's.
        size: Horovod's.

    Raises:
        RankMismatchError: it has others, or MPI does not allow calls from several threads.
    """
    communicator = MPI.COMM_WORLD if communicator is None else communicator
    if communicator.Get_size() != size:
        raise RankMismatchError(
            f"Horovod sees {size} rank(s), mpi4py sees {communicator.Get_size()}. Start the job with mpirun, srun "
            "--mpi=pmix or horovodrun --mpi (not --gloo), and let Horovod and mpi4py use one and the same MPI "
            "library. After hvd.init(comm=…) give the compressor a communicator of the same ranks: communicator=…"
        )
    if communicator.Get_rank() != rank:
        raise RankMismatchError(
            f"this process is rank {rank} for Horovod and rank {communicator.Get_rank()} for mpi4py: give the "
            "compressor a communicator in Horovod's order: communicator=…"
        )
    if size > 1 and MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise RankMismatchError(
            "MPI was started without MPI_THREAD_MULTIPLE, so Horovod's thread and this one must not both call it. "
            "Unset HOROVOD_MPI_THREADS_DISABLE and mpi4py.rc.thread_level, or use an MPI library that has it"
        )
    return communicator


@cache
def warn_of_few_cores(local_rank: int, local_size: int) -> None:
    """Log, once on each node, that waiting threads take time from those that compute, and what to do about it.

    Horovod's thread meets those of other ranks in MPI every millisecond, and Open MPI waits by spinning.

    Args:
        local_rank: Horovod's.
        local_size: Horovod's.
    """
    setting = "OMPI_MCA_mpi_yield_when_idle"
    if local_rank or setting in os.environ or MPI.get_vendor()[0] != "Open MPI" or sys.platform != "linux":
        return
    cores = len(os.sched_getaffinity(0))
    if are_few(cores, os.cpu_count() or cores, local_size):
        logger.warning(
            "%d rank(s) of this node have %s, and Open MPI spins while it waits: steps may take twice as long. Start "
            "them with mpirun --bind-to none --mca mpi_yield_when_idle 1 (with srun, %s=1), or give each two cores",
            local_size,
            f"{cores} cores" if cores > 1 else "a core each",
            setting,
        )


def are_few(cores: int, of: int, ranks: int) -> bool:
    """Whether a rank has less than two cores, one for itself and one for the thread that waits.

    Args:
        cores: that a rank may use; which ranks share them can be told only where these are all.
        of: the node's cores.
        ranks: of the node.
    """
    return cores < 2 * ranks if cores == of else cores < 2


def abort_on_uncaught_exception(communicator: MPI.Intracomm) -> None:
    """End the whole job when this rank ends with an exception, rather than leave the others waiting for it.

    The traceback is printed first. If every rank fails within a few seconds, as with a wrong argument, each
    prints its own and the job ends by itself; otherwise MPI_Abort ends the ranks that are stuck. Collective.
    """
    if communicator.Get_size() == 1:
        return
    private = communicator.Dup()  # also where the hook is there already: on other ranks it may not be
    if not isinstance(sys.excepthook, _AbortingHook):
        sys.excepthook = _AbortingHook(private)


class _AbortingHook:
    """An ``excepthook`` that calls the one before it and then sees to the other ranks."""

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self._communicator = communicator
        self._previous = sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            self._previous(kind, error, trace)
        except Exception:
            traceback.print_exception(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        if MPI.Is_finalized():  # by Horovod, which ends on all ranks when one rank's program does
            return
        everyone_failed = self._communicator.Ibarrier()
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            if MPI.Is_finalized() or everyone_failed.Test():
                return
            time.sleep(0.01)
        rank = self._communicator.Get_rank()
        print(
            f"hvd_compress: rank {rank} failed with {kind.__name__}; ending the job",
            file=sys.stderr,
            flush=True,
        )
        self._communicator.Abort(1)


_in_use = threading.RLock()  # MPI; while it is held, MPI does not end
_ended = threading.Event()


@contextmanager
def mpi() -> Iterator[bool]:
    """A context in which MPI does not end; whether it has not done so before."""
    with _in_use:
        yield not (_ended.is_set() or MPI.Is_finalized())


@cache
def be_told_of_the_end() -> None:
    """When a thread ends MPI, it waits for those who use it just now, and tells those who come later.

    Horovod's does so on all ranks as soon as the program of one has ended, while others may still look out. To ask
    whether MPI has ended, and then to use it, would be too late now and then: what MPI_Finalize does first is to drop
    what is attached to MPI_COMM_SELF (MPI 4.1, 11.2.4).
    """
    MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_at_the_end), True)


def _at_the_end(*_: object) -> None:
    with _in_use:
        _ended.set()
