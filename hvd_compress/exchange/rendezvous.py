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
_SAME, _OTHER, _ABSENT = 0, 1, 2
_POLL_SECONDS = 0.001
_WARN_SECONDS = 60.0

logger = logging.getLogger(__name__)


def rendezvous(
    communicator: MPI.Intracomm, ranks: Sequence[int], statement: str, timeout: float
) -> tuple[MPI.Intracomm, int]:
    """Wait until all ``ranks`` are here with the same ``statement``. Collective over ``ranks``.

    The first of them collects digests by point-to-point messages, so that a rank that never comes is named rather
    than waited for.

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
    digest = np.frombuffer(hashlib.sha256(statement.encode()).digest(), np.uint8).copy()
    verdict = np.zeros(len(ranks), np.uint8)
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
    absent = [rank for rank, mark in zip(ranks, verdict, strict=True) if mark == _ABSENT]
    if absent:
        raise RankMismatchError(_absence(absent, timeout))
    private = communicator.Create_group(communicator.Get_group().Incl(ranks))
    differing = np.flatnonzero(verdict == _OTHER).tolist()
    if differing:
        first, second = (_broadcast(private, statement, root) for root in (0, differing[0]))
        raise RankMismatchError.between(ranks[0], first, [ranks[place] for place in differing], second)
    return private, sent


def _collect(
    communicator: MPI.Intracomm, ranks: Sequence[int], digest: np.ndarray, verdict: np.ndarray, timeout: float
) -> int:
    """Fill in ``verdict`` and send it to all who came; returns the bytes sent."""
    digests = np.zeros((len(ranks), digest.nbytes), np.uint8)
    requests = [communicator.Irecv(row, source=r, tag=_TAG) for r, row in zip(ranks[1:], digests[1:], strict=True)]
    _wait(requests, timeout)
    for place, request in enumerate(requests, start=1):
        if not request.Test():
            request.Cancel()
            verdict[place] = _ABSENT
        elif not np.array_equal(digests[place], digest):
            verdict[place] = _OTHER
    present = [rank for rank, mark in zip(ranks, verdict, strict=True) if mark != _ABSENT][1:]
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


def _broadcast(communicator: MPI.Intracomm, text: str, root: int) -> str:
    data = np.frombuffer(text.encode(), np.uint8).copy()
    length = np.array([len(data)], np.int64)
    communicator.Bcast(length, root)
    if communicator.Get_rank() != root:
        data = np.empty(int(length[0]), np.uint8)
    communicator.Bcast(data, root)
    return data.tobytes().decode()
