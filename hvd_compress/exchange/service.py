"""Requests and answers: a thread on each rank serves all ranks while the program computes."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from mpi4py import MPI

from .gather import LIMIT, Bytes

_SHORTEST, _LONGEST = 5e-5, 2e-3  # seconds between two looks at what has arrived: long ones while nothing happens
_BEAT_SECONDS = 5.0  # between two signs of life to those who wait

_NOTHING = np.empty(0, np.uint8)

Answers = Iterable[tuple[int, Bytes]]  # pairs of a rank and what it is told


class Answerer(Protocol):
    """What a :class:`Service` does with requests. All calls come from one thread at a time."""

    def receive(self, rank: int, topic: int, request: Bytes) -> Answers:
        """A request has arrived. Returns the answers that are due now, to this rank or to others that wait."""

    def look(self, now: float) -> Answers:
        """Nothing has arrived for a while; ``now`` is in seconds, of ``time.monotonic``."""

    @property
    def waiting(self) -> Collection[int]:
        """The ranks that wait for an answer."""

    @property
    def is_done(self) -> bool:
        """Whether no more requests will come."""


@dataclass(eq=False)
class _Transfer:
    """A buffer that MPI is working on."""

    request: MPI.Request
    buffer: Bytes  # kept alive
    rank: int
    topic: int = 0


class Service:
    """Sends requests to ranks that serve, and runs this rank's own server, if it has one, in a thread.

    The thread never waits within MPI: it looks for messages and sleeps, for longer and longer while there are none,
    so that it costs the computation next to nothing (500 looks a second at most). A rank that computes, or sends
    slowly, keeps nobody else waiting. Collective.

    Args:
        communicator: of the ranks; two copies of it are made.
        answerer: this rank's; None if it does not serve.
    """

    def __init__(self, communicator: MPI.Intracomm, answerer: Answerer | None) -> None:
        # Configuration
        self._requests = communicator.Dup()
        self._answers = communicator.Dup()
        # State
        self.lock = threading.Lock()  # held while the answerer works
        self.sent = 0  # bytes of requests that this rank has handed to MPI
        self.answered = 0  # bytes of answers
        self._stopping = False
        self._outgoing: list[_Transfer] = []  # requests that may still be on their way
        self._thread: threading.Thread | None = None
        if answerer is not None:
            self._thread = threading.Thread(
                target=self._serve, args=(answerer,), name="hvd_compress server", daemon=True
            )
            self._thread.start()

    def tell(self, topic: int, requests: Mapping[int, Bytes]) -> None:
        """Send ``requests[r]`` to each rank r of them, without waiting for an answer.

        Raises:
            OverflowError: one has more than 2^31 − 1 bytes.
        """
        for request in requests.values():
            _check(request)
        self._outgoing = [t for t in self._outgoing if not t.request.Test()]
        for rank, request in requests.items():
            sending = self._requests.Isend([request, MPI.BYTE], dest=rank, tag=topic)
            self._outgoing.append(_Transfer(sending, request, rank))
            self.sent += request.nbytes

    def ask(self, topic: int, requests: Mapping[int, Bytes], timeout: float) -> dict[int, Bytes]:
        """Send ``requests[r]`` to each rank r of them, and wait for all answers.

        An answerer may wait for other ranks' requests, for as long as it likes. Meanwhile it gives signs of life.

        Args:
            topic: a number from 0 on that the answerers are told.
            requests: by rank.
            timeout: seconds after which an answerer may give up on a rank; it is the first to speak then, and taken
                for dead only if it is silent for longer.

        Returns:
            The answers by rank.

        Raises:
            TimeoutError: some ranks, which are named, are silent.
            OverflowError: a request has more than 2^31 − 1 bytes.
        """
        self.tell(topic, requests)
        answers: dict[int, Bytes] = {}
        arriving: dict[int, _Transfer] = {}
        patience = timeout + 2 * _BEAT_SECONDS
        alive = dict.fromkeys(requests, time.monotonic())
        pause = _SHORTEST
        while len(answers) < len(requests):
            while (transfer := _accept(self._answers)) is not None:
                alive[transfer.rank] = time.monotonic()
                if transfer.buffer.nbytes:
                    arriving[transfer.rank] = transfer
                else:  # a sign of life
                    transfer.request.Wait()
            arrived = [rank for rank, transfer in arriving.items() if transfer.request.Test()]
            for rank in arrived:
                answers[rank] = arriving.pop(rank).buffer
            silent = [r for r, last in alive.items() if r not in answers and time.monotonic() - last > patience]
            if silent:
                ranks = ", ".join(map(str, silent))
                raise TimeoutError(f"rank(s) {ranks} gave no sign of life for {patience:g} s: see their output")
            pause = _SHORTEST if arriving or arrived else min(2 * pause, _LONGEST)
            time.sleep(pause)
        return answers

    def close(self) -> None:
        """Give the communicators back, once the answerers are done on all ranks. Collective."""
        if self._thread is not None:
            self._thread.join()
        MPI.Request.Waitall([t.request for t in self._outgoing])
        self._requests.Free()
        self._answers.Free()

    def stop(self) -> None:
        """End the thread, whatever there is still to be served: only where the program ends."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join()

    def _serve(self, answerer: Answerer) -> None:
        try:
            self._answer_until_done(answerer)
        except BaseException:  # the others would wait for this rank's answers
            traceback.print_exc()
            self._requests.Abort(1)

    def _answer_until_done(self, answerer: Answerer) -> None:
        incoming: list[_Transfer] = []
        outgoing: list[_Transfer] = []
        pause, beat = _SHORTEST, time.monotonic()
        # A Horovod that started MPI ends it as soon as one rank's program ends.
        while not self._stopping and not MPI.Is_finalized():
            while (transfer := _accept(self._requests)) is not None:
                incoming.append(transfer)
            arrived = [t for t in incoming if t.request.Test()]
            incoming = [t for t in incoming if t not in arrived]
            outgoing = [t for t in outgoing if not t.request.Test()]
            now = time.monotonic()
            with self.lock:
                answers = [a for t in arrived for a in answerer.receive(t.rank, t.topic, t.buffer)]
                answers += answerer.look(now)
                is_done = answerer.is_done
                if now - beat > _BEAT_SECONDS:
                    beat = now
                    told = {rank for rank, _ in answers}
                    answers += [(rank, _NOTHING) for rank in answerer.waiting if rank not in told]
            for rank, answer in answers:
                _check(answer)
                sending = self._answers.Isend([answer, MPI.BYTE], dest=rank)
                outgoing.append(_Transfer(sending, answer, rank))
                self.answered += answer.nbytes
            if is_done and not outgoing:
                return
            pause = _SHORTEST if arrived or incoming or outgoing else min(2 * pause, _LONGEST)
            time.sleep(pause)


def _accept(communicator: MPI.Intracomm) -> _Transfer | None:
    """Begin to receive the next message, if one is there."""
    status = MPI.Status()
    message = communicator.Improbe(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG, status=status)
    if message is None:
        return None
    buffer = np.empty(status.Get_count(MPI.BYTE), np.uint8)
    return _Transfer(message.Irecv([buffer, MPI.BYTE]), buffer, status.Get_source(), status.Get_tag())


def _check(buffer: Bytes) -> None:
    if buffer.nbytes > LIMIT:
        raise OverflowError(
            f"a message to one rank has {buffer.nbytes} bytes, MPI carries {LIMIT}: choose a smaller ratio or k, or "
            "use more ranks"
        )
