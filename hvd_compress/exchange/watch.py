"""No rank waits for ever: who waits too long finds out who is missing, and ends the job with their names."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain, repeat, starmap, takewhile
from operator import attrgetter, is_not, methodcaller
from types import FrameType
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from ..errors import PeerError
from .communicator import be_told_of_the_end, mpi

_LOOK_SECONDS = 0.25  # between two looks at what the others ask; each costs some microseconds
_ANSWER_SECONDS = 5.0  # in which a rank that is alive answers, whatever its program does
_STUCK_SECONDS = 10.0  # in one call, after which it is taken to wait for a rank whose program has ended
_WAIT = ("horovod.", "hvd_compress.checkpoint")  # modules whose calls wait for other ranks, unwatched
_ASK, _TELL, _GONE = range(3)

logger = logging.getLogger(__name__)


class Watch:
    """Ends the job when this rank has waited too long in an exchange to which others have not come.

    A collective operation that has begun cannot be given up, so an exception would not help. Each rank has a thread
    that answers the question where its program is. Who has waited for ``timeout`` seconds asks all others, prints who
    has not come to the exchange, and where their programs are instead, and aborts. A rank whose program has ended
    without it says so, and is not waited for that long, nor in Horovod's own calls, once all others are stuck there.
    While all are in the exchange, nobody is missing: then a network is slow, and the rank waits on. Collective.

    Args:
        communicator: of the ranks; a copy is made.
        timeout: seconds.
        what: the ranks wait for each other in, before its number.
    """

    def __init__(self, communicator: MPI.Intracomm, timeout: float, what: str = "exchange") -> None:
        self._watcher = _Watcher(communicator.Dup(), timeout, what)
        if communicator.Get_size() > 1:
            self._watcher.start()
            weakref.finalize(self, self._watcher.drop).atexit = False  # where all of them are seen to together

    def begin(self) -> None:
        """This rank has come to an exchange; again is as good as once.

        Raises:
            PeerError: another rank's program has ended, and MPI with it.
        """
        if MPI.Is_finalized():
            raise PeerError("the program of another rank has ended, and MPI with it, while this one goes on")
        self._watcher.since = time.monotonic()

    def give_up(self) -> None:
        """This rank has come to an exchange for nothing: it does not come about."""
        self._watcher.since = None

    def end(self) -> None:
        """The exchange is over, however it ended."""
        self._watcher.done += 1
        self._watcher.since = None

    def end_job(self, why: str) -> NoReturn:
        """Where others wait for this rank, and cannot be told that it fails."""
        self._watcher.end_job(why)


class _Watcher:
    """The thread's side, which lives on until the program has no more use for the exchange."""

    def __init__(self, communicator: MPI.Intracomm, timeout: float, what: str) -> None:
        # Configuration
        self._communicator = communicator
        self._rank = communicator.Get_rank()
        self._others = [rank for rank in range(communicator.Get_size()) if rank != self._rank]
        self._timeout = timeout
        self._what = what
        self.process = os.getpid()
        # State. The program writes the first two, the thread reads them.
        self.since: float | None = None  # when this rank has come to an exchange, if it is in one
        self.done = 0  # exchanges
        self._is_unused = False  # by the program, from now on
        self._stopped = threading.Event()
        self._asked: float | None = None
        self._elsewhere: dict[int, tuple[int, int]] = {}  # when it asked last: who was not where this rank was
        self._told: dict[int, dict[str, Any]] = {}
        self._gone: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}  # when, at the end of the program
        self._quiet_until = 0.0  # while another rank is asking
        self._call: tuple[FrameType, int] | None = None  # that the program is in, if it may wait for others there
        self._called = 0.0  # since when, at least
        self._outgoing: list[tuple[MPI.Request, Any]] = []
        self._thread = threading.Thread(target=self._run, name="hvd_compress watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        be_told_of_the_end()
        self._thread.start()
        _watching.add(self)
        atexit.unregister(
            _end_of_program
        )  # it comes before what was registered until now, Horovod's end for instance
        atexit.register(_end_of_program)

    def drop(self) -> None:
        """The program has no more use for the exchange.

        Called by whichever garbage collection finds that out, wherever the program is just then: in an import, or
        with a lock of its own. So it waits for nothing, and leaves the rest to the thread.
        """
        if self.since is None:
            self._is_unused = True
        else:
            # A step was begun and given up, as it was on the others most likely, some of which may drop it later: to
            # say that this rank is gone would end the job. It answers until the program ends.
            self.since = None

    def retire(self) -> None:
        """This rank comes to no more exchanges: tell the others, who may wait for it."""
        with mpi() as is_there:
            _watching.discard(self)
            if self._stopped.is_set():
                return
            self._stopped.set()
            for rank in self._others if is_there else ():
                self._send(rank, _GONE, self._place())

    def lingers(self, now: float) -> bool:
        """At the end of the program: whether others' go on, one of which may come to wait for this rank."""
        for rank in self._others:
            self._heard.setdefault(rank, now)
        left = [rank for rank in self._others if rank not in self._gone]
        if all(now - self._heard[rank] > 6 * _ANSWER_SECONDS for rank in left):  # or none is left
            return False
        if self._asked is None or now - self._asked > 4 * _LOOK_SECONDS:
            self._asked, self._told = now, {}
            for rank in left:
                self._send(rank, _ASK, self._place())
        self._receive()
        self._heard.update((rank, now) for rank in self._told)
        alive = [rank for rank in left if now - self._heard[rank] <= 6 * _ANSWER_SECONDS]
        if all(rank in self._told and self._told[rank]["stuck"] > _STUCK_SECONDS for rank in alive):
            why = f"its program has ended, and rank(s) {_list(alive)} wait for others"
            self.end_job("\n".join([why, *self._stories(alive)]))
        waiting = [rank for rank, told in self._told.items() if told["waits"] and told["done"] >= self.done]
        if waiting:
            ranks = _list(waiting)
            self.end_job(f"its program has ended, and {self._what} {self.done + 1} of rank(s) {ranks} waits for it")
        return True

    def _run(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            if self._is_unused:
                self.retire()
                return
            with mpi() as is_there:
                if self._stopped.is_set():
                    return
                if is_there:
                    self._receive()
                    self._look(time.monotonic())
                    if self._gone:
                        self._look_at_program(time.monotonic())
            # A Horovod that started MPI ends it as soon as one rank's program ends.
            if not is_there and self.since is not None:
                self._say(f"{self._what} {self.done + 1} waits for a rank whose program has ended, and MPI with it")
                os._exit(1)

    def _receive(self) -> None:
        status = MPI.Status()
        while (message := self._communicator.Improbe(status=status)) is not None:
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            message.Recv([data, MPI.BYTE])
            what, rank = _read(data.tobytes()), status.Get_source()
            if what is None:
                continue
            if status.Get_tag() == _ASK:
                self._send(rank, _TELL, self._place(_stack()))
                if rank < self._rank:
                    self._quiet_until = time.monotonic() + 2 * _ANSWER_SECONDS  # it will say it for both
            elif status.Get_tag() == _TELL:
                self._told[rank] = what
            else:
                self._gone[rank] = {**what, "at": time.monotonic()}
                self._send(rank, _TELL, self._place(_stack()))

    def _look(self, now: float) -> None:
        since, done = self.since, self.done
        if since is None:
            self._asked, self._elsewhere = None, {}
            return
        ended = [rank for rank, told in self._gone.items() if told["done"] <= done]
        if ended and now - max(since, *(self._gone[rank]["at"] for rank in ended)) > _ANSWER_SECONDS:
            self.end_job(
                f"the program of rank(s) {_list(ended)} has ended, and {self._what} {done + 1} waits for them"
            )
        if self._asked is None:
            if now - since > self._timeout and now > self._quiet_until:
                self._asked, self._told = now, {}
                for rank in self._others:
                    self._send(rank, _ASK, self._place())
            return
        if len(self._told) < len(self._others) and now - self._asked < _ANSWER_SECONDS:
            return
        # Who has ended comes no more, whatever it has done: an exchange may have failed there before it took part.
        absent = [
            rank
            for rank, told in self._told.items()
            if rank in self._gone or (told["done"] <= done and not told["waits"])
        ]
        silent = [rank for rank in self._others if rank not in self._told]
        is_stuck = (self.since, self.done) == (since, done)
        if is_stuck and (absent or silent):
            self.end_job(self._verdict(now - since, absent, silent))
        # One that has just gone on, or is about to, is at another number; not twice.
        elsewhere = {rank: (done, told["done"]) for rank, told in self._told.items() if told["done"] != done}
        if is_stuck and any(self._elsewhere.get(rank) == places for rank, places in elsewhere.items()):
            others = ", ".join(f"rank {rank} at {self._what} {its + 1}" for rank, (_, its) in elsewhere.items())
            why = f"it waits in {self._what} {done + 1} since {now - since:.0f} s, and {others}"
            self.end_job("\n".join([why, *self._stories([*elsewhere])]))
        logger.warning("all ranks have come to %s %d, and wait since %.0f s", self._what, done + 1, now - since)
        self._asked, self._elsewhere, self._quiet_until = None, elsewhere, now + self._timeout

    def _look_at_program(self, now: float) -> None:
        """A program that stays where it may wait for others waits for one that has ended, most likely."""
        frame = _frame()
        may_wait = frame is not None and frame.f_globals.get("__name__", "").startswith(_WAIT)
        call = (frame, frame.f_lasti) if frame is not None and may_wait else None
        if call != self._call:
            self._call, self._called = call, now

    def _place(self, stack: str = "") -> dict[str, Any]:
        stuck = 0.0 if self._call is None else time.monotonic() - self._called
        return {"done": self.done, "waits": self.since is not None, "stuck": stuck, "stack": stack}

    def _verdict(self, waited: float, absent: list[int], silent: list[int]) -> str:
        lines = [
            f"rank(s) {_list([*absent, *silent])} did not come to {self._what} {self.done + 1} within {waited:.0f} s "
            f"(timeout={self._timeout:g}; a larger one helps if they are only slow)"
        ]
        lines += self._stories(absent)
        if silent:
            lines += [
                f"Rank(s) {_list(silent)} do not answer: their node is lost, or they are stopped, or hang outside of "
                "Python."
            ]
        return "\n".join(lines)

    def _stories(self, ranks: list[int]) -> list[str]:
        return [f"Rank {rank} is here:\n{self._told[rank]['stack']}" for rank in sorted(ranks)]

    def end_job(self, why: str) -> NoReturn:
        self._say(why)
        self._communicator.Abort(1)
        raise SystemExit  # Abort does not return

    def _say(self, why: str) -> None:
        sys.stdout.flush()
        print(f"hvd_compress: rank {self._rank} ends the job: {why}", file=sys.stderr, flush=True)

    def _send(self, rank: int, tag: int, what: dict[str, Any]) -> None:
        self._outgoing = [(request, data) for request, data in self._outgoing if not request.Test()]
        data = np.frombuffer(json.dumps(what).encode(), np.uint8).copy()
        self._outgoing.append((self._communicator.Isend([data, MPI.BYTE], dest=rank, tag=tag), data))


def _read(text: bytes) -> dict[str, Any] | None:
    """What a rank says; None if that is nothing of ours."""
    try:
        what = json.loads(text)
        return {
            "done": int(what["done"]),
            "waits": bool(what["waits"]),
            "stuck": float(what["stuck"]),
            "stack": str(what["stack"]),
        }
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


_watching: set[_Watcher] = set()  # of this process, as are the functions that it calls at its end


def _end_of_program() -> None:
    """This rank's program ends when the others' do, as MPI_Finalize has it. Horovod would end MPI on all ranks.

    Until then it watches, for all kinds of exchanges at once, whether another rank comes to wait for it.
    """
    watchers = [watcher for watcher in _watching.copy() if watcher.process == os.getpid()]  # not a fork's parent's
    for watcher in watchers:
        watcher.retire()
    while watchers:
        with mpi() as is_there:
            watchers = [watcher for watcher in watchers if is_there and watcher.lingers(time.monotonic())]
        time.sleep(0.002)


def _frame() -> FrameType | None:
    """The innermost one of the program."""
    with _uncollected():
        return next(_frames(), None)


def _stack() -> str:
    """Where the program is."""
    where = attrgetter("f_code", "f_lineno")
    # In one call that runs no Python, so that the program stands still: Python 3.11 may crash where it runs on.
    # (faulthandler reads all at once too, and crashes where a thread of C++ is just coming to Python.)
    with _uncollected():
        calls = [*map(where, _frames())]
    summary = [traceback.FrameSummary(code.co_filename, line, code.co_name) for code, line in reversed(calls)]
    return "".join(traceback.format_list(summary)).rstrip() or "(at its end)"


def _frames() -> Iterator[FrameType]:
    """The program's, the innermost first; not this thread's."""
    innermost = map(methodcaller("get", threading.main_thread().ident), starmap(sys._current_frames, [()]))
    outwards: Iterator[Any] = accumulate(chain(innermost, repeat("f_back")), getattr)
    return takewhile(partial(is_not, None), outwards)


@contextmanager
def _uncollected() -> Iterator[None]:
    """A context without garbage collections: their callbacks, or a thread that they let run, may wait for this one.

    For a lock that Python holds while it lists frames.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
