"""The ranks meet for the first time and compare what they are about to do."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from ..errors import PeerError, RankMismatchError
from .communicator import be_told_of_the_end, mpi

_TAG = 0x6876  # "hv": keeps clear of a program's own point-to-point messages
_SAME, _OTHER, _ABSENT, _NOT_EXPECTED = range(4)  # what the first rank finds of each
_POLL_SECONDS = 0.001
_WARN_SECONDS = 60.0

logger = logging.getLogger(__name__)


def rendezvous(
    communicator: MPI.Intracomm, ranks: Sequence[int], statement: str, timeout: float
) -> tuple[MPI.Intracomm, int]:
    """Wait until all ``ranks`` are here with the same ``statement``. Collective over ``ranks``.

    The first of them collects digests by point-to-point messages, so that a rank that never comes is named rather
    than waited for. Which ranks they are is a part of what they compare: until then, some may expect others.

    Args:
        communicator: that contains the ranks.
        ranks: of ``communicator``, ascending; this process is one of them.
        statement: lines of text that describe what this rank expects of the others.
        timeout: seconds to wait for the others.

    Returns:
        A new communicator of ``ranks`` alone, and the bytes that this rank handed to MPI.

    Raises:
        RankMismatchError: on every rank that came, with one and the same text: two ranks' statements differ
            (both ranks and the first line that differs are named), or ranks did not come in time.
        PeerError: a rank's program has ended instead.
    """
    be_told_of_the_end()
    statement = f"ranks {_listed(ranks)}\n{statement}"
    digest = np.frombuffer(hashlib.sha256(statement.encode()).digest(), np.uint8).copy()
    verdict = np.full(communicator.Get_size(), _NOT_EXPECTED, np.uint8)
    if communicator.Get_rank() == ranks[0]:
        sent = _collect(communicator, ranks, digest, verdict, timeout)
    else:
        outgoing = communicator.Isend(digest, dest=ranks[0], tag=_TAG)
        sent = digest.nbytes
        answer = communicator.Irecv(verdict, source=ranks[0], tag=_TAG)
        # The first rank answers when its own time is up; a little more than that means that it never came.
        if not _wait([answer], timeout * 1.1 + 1):
            answer.Cancel()
            raise RankMismatchError(_absence([ranks[0]], timeout))
        outgoing.Wait()
    absent, differing = (np.flatnonzero(verdict == mark).tolist() for mark in (_ABSENT, _OTHER))
    if absent:
        raise RankMismatchError(_absence(absent, timeout))
    if differing:
        here = np.flatnonzero(verdict <= _OTHER).tolist()
        first, second = _statements(communicator, here, differing[0], statement)
        raise RankMismatchError.between(here[0], first, differing, second)
    return communicator.Create_group(communicator.Get_group().Incl(ranks)), sent


def _collect(
    communicator: MPI.Intracomm, ranks: Sequence[int], digest: np.ndarray, verdict: np.ndarray, timeout: float
) -> int:
    """Fill in ``verdict`` and send it to all who came; returns the bytes sent."""
    digests = np.zeros((len(ranks), digest.nbytes), np.uint8)
    requests = [communicator.Irecv(row, source=r, tag=_TAG) for r, row in zip(ranks[1:], digests[1:], strict=True)]
    _wait(requests, timeout)
    verdict[ranks[0]] = _SAME
    for rank, request, row in zip(ranks[1:], requests, digests[1:], strict=True):
        if request.Test():
            verdict[rank] = _SAME if np.array_equal(row, digest) else _OTHER
        else:
            request.Cancel()
            verdict[rank] = _ABSENT
    present = [rank for rank in ranks[1:] if verdict[rank] != _ABSENT]
    MPI.Request.Waitall([communicator.Isend(verdict, dest=rank, tag=_TAG) for rank in present])
    return verdict.nbytes * len(present)


def _wait(requests: list[MPI.Request], timeout: float) -> bool:
    """Poll, since a blocked MPI call cannot be given up."""
    start = time.monotonic()
    warned = False
    while True:
        with mpi() as is_there:
            if not is_there:
                raise PeerError("the program of another rank has ended, and MPI with it, before its first exchange")
            if all(request.Test() for request in requests):
                return True
        waited = time.monotonic() - start
        if waited > timeout:
            return False
        if waited > _WARN_SECONDS and not warned:
            logger.warning("waiting since %.0f s for other ranks to begin their first exchange", waited)
            warned = True
        time.sleep(_POLL_SECONDS)


def _absence(absent: list[int], timeout: float) -> str:
    ranks = ", ".join(map(str, absent))
    return (
        f"rank(s) {ranks} did not begin their first exchange within {timeout:g} s. Either they failed or do other "
        "work (see their output), or they do not take part: then give process_set=… to the compressor too. Other "
        "work may be a collective operation within backward(), which these ranks have come to first, since they use "
        "other parameters. A slow start needs a larger timeout=…"
    )


def _statements(communicator: MPI.Intracomm, here: Sequence[int], differing: int, statement: str) -> tuple[str, str]:
    """What the first rank ``here`` has stated, and what ``differing`` has; ``statement`` is this rank's."""
    if communicator.Get_rank() == here[0]:
        both = statement, communicator.recv(source=differing, tag=_TAG)
        MPI.Request.Waitall([communicator.isend(both, dest=rank, tag=_TAG) for rank in here[1:]])
        return both
    if communicator.Get_rank() == differing:
        communicator.send(statement, dest=here[0], tag=_TAG)
    return communicator.recv(source=here[0], tag=_TAG)


def _listed(ranks: Sequence[int]) -> str:
    is_whole = len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1
    return f"{ranks[0]} to {ranks[-1]}" if is_whole else ", ".join(map(str, ranks))
