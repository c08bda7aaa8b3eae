"""Checkpoints that survive preemption: one file for each rank, all of one step or none at all.

Compressed training has state that differs between ranks (memories, between exchanges also the parameters), so rank 0
cannot save for the others. A checkpoint is a directory with a file from every rank; it gets its final name when all
files are on the disk, and what has no final name does not count::

    checkpoints = Checkpoints("runs/first/checkpoint")
    interruption = Interruption()
    saved = checkpoints.load()
    if saved is not None:
        model.load_state_dict(saved.state["model"])
        ...
    for step in range(saved.step if saved else 0, steps):
        ...
        if interruption.agreed():  # all ranks, at the same step
            checkpoints.save(step + 1, {"model": model.state_dict(), ..., "random": random_state()})
            sys.exit(EXIT_REQUEUE)
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import popen_fork, resource_tracker
from numbers import Integral
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import horovod.torch as hvd
import numpy as np
import torch

from .checks import check_numbers
from .interrupts import interrupted_at_its_end
from .membership import Change, members

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI

logger = logging.getLogger(__name__)

EXIT_REQUEUE = os.EX_TEMPFAIL
"""With this status (75) a script says that it has saved its state and wants to be started again."""

_FORMAT = 1
_COMPLETE = re.compile(r"step-(\d+)")
_PARTIAL = ".partial"

T = TypeVar("T")

Resize = Callable[[Change, Sequence[Any]], Any]
"""What makes one rank's state from those of the old ranks that it follows."""


@dataclass(frozen=True)
class Checkpoint:
    """What :meth:`Checkpoints.load` found."""

    step: int
    state: dict[str, Any]  # this rank's
    ranks: int  # that have saved it


class Checkpoints:
    """The checkpoints of one training run, in a directory that all ranks see.

    Args:
        directory: on a file system that all nodes share; it is made at the first :meth:`save`.
        keep: how many of the newest are kept, at least 1. While one is written there is one more.
        communicator: mpi4py's, of all of Horovod's ranks in their order; None for MPI's world.

    Raises:
        ValueError: ``keep`` is less than 1.
        RankMismatchError: mpi4py and Horovod do not see the same ranks.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 2, communicator: MPI.Intracomm | None = None
    ) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be a number of checkpoints ≥ 1, got {keep!r}")
        self.directory = Path(directory)
        self.keep = keep
        self._communicator = _private(communicator)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write this rank's ``state``; it counts once all ranks have written theirs. Collective.

        A kill at any moment leaves the checkpoints from before whole: files are written and synced in a directory
        with another name, which is renamed when all are there. If the newest is of this step, it is left as it is.

        Args:
            step: 0 or more, the same on all ranks, and not less than the newest that is there.
            state: what ``torch.load(weights_only=True)`` accepts: tensors, numbers, strings, lists, dictionaries.

        Raises:
            TypeError: some rank's ``step`` is no int; every rank raises.
            ValueError: the ranks are at different steps, or ``step`` is negative, or the directory has a checkpoint
                of a later one, another run's for instance; or some rank's ``state`` holds what could not be loaded.
            OSError: it could not be written on some rank; every rank raises, and the checkpoints from before stand.
            KeyboardInterrupt: at the end, if Ctrl-C came meanwhile.
        """
        with interrupted_at_its_end():
            self._save(step, state)

    def _save(self, step: int, state: Mapping[str, Any]) -> None:
        # Of a state that came in the step's place only its type travels, so that all ranks raise.
        is_number = isinstance(cast(object, step), Integral) and type(step) is not bool
        steps = self._communicator.allgather(step if is_number else type(step).__name__)
        for told in steps:
            if isinstance(told, str):
                raise TypeError(f"step must be an int ≥ 0, got a {told}: save(step, state)")
        if min(steps) != max(steps) or step < 0:
            raise ValueError(f"all ranks must save the same step ≥ 0, they are at {sorted({*steps})}")
        newest = self._on_first_rank(lambda: max(self._steps(), default=-1))
        if step == newest:
            return
        if step < newest:
            raise ValueError(
                f"{self.directory} has a checkpoint of step {newest} already, from which load() would go on, not "
                f"from step {step}: load it before training, delete it, or give another directory"
            )
        step = int(step)  # numpy's, for instance, could not be loaded
        partial = self._path(step).with_suffix(_PARTIAL)
        self._on_first_rank(lambda: self._make_room(partial))
        self._on_all(lambda: self._write(partial / _file(self._rank), step, state))
        self._on_all(lambda: _check_loads(partial / _file(self._rank)), ValueError)
        self._on_first_rank(lambda: self._complete(partial, self._path(step)))

    def load(self, *, map_location: torch.device | str = "cpu", resize: Resize | None = None) -> Checkpoint | None:
        """This rank's part of the newest complete checkpoint; None if there is none. Collective.

        Args:
            map_location: the device of its tensors.
            resize: makes this rank's state, where another number of ranks has saved, from those of the ranks whose
                place it takes: :func:`hvd_compress.resize`. It is not called where the number is the same.

        Raises:
            ValueError: it is another format's, or another number of ranks' and there is no ``resize``, or that
                cannot; every rank raises.
            OSError: a file is missing, or could not be read on some rank; every rank raises.
        """
        with interrupted_at_its_end():
            return self._load(map_location, resize)

    def _load(self, map_location: torch.device | str, resize: Resize | None) -> Checkpoint | None:
        step = self._on_first_rank(lambda: max(self._steps(), default=None))
        if step is None:
            return None
        path = self._path(step)
        saved_by = self._on_first_rank(lambda: _saved_by(path, self._size))
        if saved_by != self._size and resize is None:
            raise ValueError(
                f"{path} was saved by {saved_by} ranks, this job has {self._size}, and memories belong to ranks. "
                f"Start with {saved_by} ranks, or in another directory, or call load(resize=hvd_compress.resize), "
                "which divides the memories among these ranks"
            )
        change = Change.of(self._rank, self._size, saved_by)
        contents = self._on_all(lambda: [_read(path / _file(rank), map_location) for rank in change.predecessors])
        self._on_all(lambda: _check(path, contents, saved_by), ValueError)
        if saved_by == self._size:
            return Checkpoint(step, contents[0]["state"], saved_by)
        assert resize is not None
        state = self._on_all(
            lambda: resize(change, [content["state"] for content in contents]),
            ValueError,
            f"{path} cannot go on with {self._size} ranks: ",
        )
        return Checkpoint(step, dict(state), saved_by)

    @property
    def _rank(self) -> int:
        return self._communicator.Get_rank()

    @property
    def _size(self) -> int:
        return self._communicator.Get_size()

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:010d}"

    def _steps(self) -> list[int]:
        """Of the complete ones."""
        entries = self.directory.iterdir() if self.directory.is_dir() else ()
        return [int(match[1]) for entry in entries if (match := _COMPLETE.fullmatch(entry.name))]

    def _make_room(self, partial: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left_over in self.directory.glob(f"step-*{_PARTIAL}"):  # by a job that was killed
            _delete(left_over)
        partial.mkdir()

    def _write(self, file: Path, step: int, state: Mapping[str, Any]) -> None:
        content = {"format": _FORMAT, "step": step, "rank": self._rank, "size": self._size, "state": dict(state)}
        try:
            with file.open("wb") as opened:
                torch.save(content, opened)
                opened.flush()
                os.fsync(opened.fileno())
        except Exception as error:
            # Of a full disk torch says what it had expected where in the file, after Python has said why.
            why = next((e for e in (error, error.__context__) if isinstance(e, OSError)), error)
            raise OSError(f"{file} cannot be written ({type(why).__name__}: {why})") from error

    def _complete(self, partial: Path, final: Path) -> None:
        missing = [rank for rank in range(self._size) if not (partial / _file(rank)).is_file()]
        if missing:
            raise OSError(f"{partial} lacks what rank {missing[0]} wrote: it must be on a file system of all nodes")
        _sync(partial)
        partial.rename(final)
        _sync(self.directory)
        for old in sorted(self._steps())[: -self.keep]:
            _delete(self._path(old))

    def _on_first_rank(self, action: Callable[[], T]) -> T:
        """Its result, or its OSError, on all ranks: file systems may show each rank something else."""
        result, error = _attempt(action) if self._rank == 0 else (None, None)
        result, problem = self._communicator.bcast((result, _told(error)))
        _raise_if_any([problem], error)
        return result

    def _on_all(self, action: Callable[[], T], kind: type[Exception] = OSError, what: str = "") -> T:
        """Its result on this rank, or an error on all of them."""
        result, error = _attempt(action)
        _raise_if_any(self._communicator.allgather(_told(error)), error, kind, what)
        return cast("T", result)


class Interruption:
    """Turns signals into a decision that all ranks take at the same step.

    Slurm announces the end of a job's time and a preemption by a signal. It reaches each rank at another moment, some
    ranks perhaps not at all, and a rank in the middle of a step must finish it, since the others wait for it.

    From here on the signals no longer end this process. But for SIGINT they are also blocked, which processes that it
    starts later inherit, such as DataLoader's: Slurm signals every process of a job, and would end them before the
    step is done. So a ``subprocess.Popen.terminate()`` does not end those, ``kill()`` does; multiprocessing's
    ``terminate()`` kills from here on, and its daemons are killed when the program ends, if they are still there.

    A second SIGINT (Ctrl-C) raises KeyboardInterrupt as always. A terminal sends the first one to the started
    processes, too, and DataLoader's end with it unless their ``worker_init_fn`` has them ignore it.

    Args:
        signals: SIGTERM is what a preemption sends, SIGUSR2 what submitit asks Slurm for.
        timeout: seconds that a rank waits in :meth:`agreed` for the others, before it ends the job with the names of
            those who are missing.
        communicator: mpi4py's, of all of Horovod's ranks in their order; None for MPI's world.

    Raises:
        TypeError, ValueError: ``timeout`` is not a positive number.
        RankMismatchError: mpi4py and Horovod do not see the same ranks.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT),
        *,
        timeout: float = 600.0,
        communicator: MPI.Intracomm | None = None,
    ) -> None:
        check_numbers(timeout=timeout)
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
        self._communicator = _private(communicator)
        from .exchange import Watch

        self._watch = Watch(self._communicator, timeout, "Interruption.agreed() no.")
        self._requested = False
        self._earlier: list[Interruption] = []  # which are to hear of the signals, too
        self._blocked = {*signals} - {signal.SIGINT}
        # Threads that exist already may still receive them, so a handler is needed too.
        for number in signals:
            before = getattr(signal.signal(number, self._handle), "__self__", None)
            if isinstance(before, Interruption) and before not in self._earlier:
                self._earlier.append(before)
        # Its start unblocks SIGTERM, and would come later else, with the first process of "spawn" or "forkserver".
        resource_tracker.ensure_running()
        # A blocked SIGTERM ends none of multiprocessing's, whose pools and exit would wait for ever.
        popen_fork.Popen.terminate = popen_fork.Popen.kill  # type: ignore[method-assign]
        atexit.unregister(_kill_daemons)
        atexit.register(_kill_daemons)
        signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)

    @property
    def requested(self) -> bool:
        """Whether this rank has been told to stop."""
        if signal.sigpending() & self._blocked:
            self._requested = True  # another thread may take the signal, and is then not heard of for a moment
        return self._requested

    def agreed(self) -> bool:
        """Whether any rank has been told to stop: the same answer on all ranks. Collective.

        One MPI allreduce of a number, which also makes each rank wait for the slowest; with local steps, call it
        where the ranks exchange anyway.
        """
        self._watch.begin()
        try:
            votes, total = np.array([self.requested], np.int64), np.zeros(1, np.int64)
            request = self._communicator.Iallreduce(votes, total)
            while not request.Test():  # not blocked in MPI, where nothing would see that a rank does not come
                time.sleep(0.001)
            return bool(total[0])
        finally:
            self._watch.end()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._requested:
            raise KeyboardInterrupt
        self._requested = True
        for one in self._earlier:
            one._handle(number, frame)


def _kill_daemons() -> None:
    """What multiprocessing is about to do, with DataLoader watching."""
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    if daemons:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler takes it for an accident
    for child in daemons:
        child.kill()


def random_state() -> dict[str, Any]:
    """The state of the global generators of torch (CPU and this rank's GPU), numpy and Python."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on with the random numbers where :func:`random_state` was taken."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


def _private(communicator: MPI.Intracomm | None) -> MPI.Intracomm:
    """Nothing that goes on elsewhere may meet these messages; who raises ends the job, rather than be waited for."""
    from .exchange import abort_on_uncaught_exception

    private = members(hvd.global_process_set, communicator)[0].Dup()
    abort_on_uncaught_exception(private)
    return private


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _read(file: Path, map_location: torch.device | str) -> dict[str, Any]:
    try:
        if _has_checksums():
            damaged = zipfile.ZipFile(file).testzip()  # torch.load does not look
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise OSError(f"{file} cannot be read ({error}); to go on from an older one, delete its directory") from error


def _has_checksums() -> bool:
    """Whether torch writes them: a program may have it leave them out."""
    return bool(getattr(torch.serialization, "get_crc32_options", lambda: True)())


def _check_loads(file: Path) -> None:
    """Raise ValueError if what is saved is more than tensors and plain values, a numpy number for instance."""
    try:
        torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)  # which reads no tensor
    except Exception as error:
        raise ValueError(
            f"{file} could not be loaded again: a state holds tensors, numbers, strings, lists and dictionaries; "
            f"float(…) makes a number of numpy's one of Python's ({error})"
        ) from error


def _saved_by(path: Path, size_here: int) -> int:
    """How many ranks have. If that is another number than here, their files must all be there."""
    files = sorted(path.glob("rank-*.pt"))
    if not files:
        raise OSError(f"{path} holds no rank's file; to go on from an older one, delete it")
    if len(files) == size_here:
        return size_here
    try:
        size: int = torch.load(str(files[0]), map_location="cpu", weights_only=True, mmap=True)["size"]
    except Exception:  # whose file that is finds out what is wrong with it
        return len(files)
    missing = [_file(rank) for rank in range(size) if not (path / _file(rank)).is_file()]
    if missing:
        raise OSError(
            f"{path} was saved by {size} ranks and lacks {missing[0]}; to go on from an older one, delete it"
        )
    return size


def _check(path: Path, contents: Sequence[Mapping[str, Any]], saved_by: int) -> None:
    """Raise ValueError unless these are what so many ranks have saved, in this version's format."""
    for content in contents:
        if content.get("format") != _FORMAT or content["size"] != saved_by:
            raise ValueError(
                f"{path} has format {content.get('format')!r} of {content.get('size')} ranks, this version reads "
                f"{_FORMAT}, of the {saved_by} ranks whose files are there"
            )


def _attempt(action: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """What it returns, or what went wrong. Ctrl-C too: the others wait to be told."""
    try:
        return action(), None
    except BaseException as error:
        return None, error


def _told(error: BaseException | None) -> str | None:
    """As text that can travel."""
    return None if error is None else f"{type(error).__name__}: {error}"


def _raise_if_any(
    problems: Sequence[str | None], own: BaseException | None, kind: type[Exception] = OSError, what: str = ""
) -> None:
    """Raise what stopped this rank, or what kept any rank from it."""
    if own is not None and not isinstance(own, Exception):
        raise own
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise kind(f"{what}rank {rank}: {problem}")


def _delete(checkpoint: Path) -> None:
    """If it can be deleted: no other one depends on that. What is left over is tried again at the next save."""
    try:
        hidden = checkpoint.rename(checkpoint.with_suffix(_PARTIAL))  # first it stops being complete, then it goes
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", checkpoint, error)


def _sync(directory: Path) -> None:
    """Make renamed and new entries last."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
