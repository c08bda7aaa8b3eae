"""Training that a preempted job goes on with, bit for bit: when to save, what, and when to stop."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

import horovod.torch as hvd
from ranks import device, fail, on_all_ranks, say

from hvd_compress import EXIT_REQUEUE, Checkpoints, Interruption, random_state, set_random_state


class Stateful(Protocol):
    """A model, an optimizer, a scheduler, a compressor, a ledger …"""

    def state_dict(self) -> Any:
        """All of it."""

    def load_state_dict(self, state: Any) -> Any:
        """Inverse of ``state_dict``."""


class Resumable:
    """The checkpoints of a run; without a directory, nothing is saved and signals end the program as always.

    Args:
        directory: the checkpoints'.
        parts: all that changes in training and differs from a fresh start, but for the random generators.
        settings: which a resumed run must share with the one that was saved; plain values.
        save_every: steps from one checkpoint to the next, in case that a node fails.
        ask_every: optimizer steps after which the ranks agree on whether to go on. With local steps, take their
            period: to agree makes the ranks wait for each other.
        afresh: whether to delete the checkpoints that are there; not those of this job, if it was requeued.

    Ends the program on all ranks if the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path | None,
        parts: Mapping[str, Stateful],
        settings: Mapping[str, Any],
        *,
        save_every: int,
        ask_every: int,
        afresh: bool = False,
    ) -> None:
        self._parts = parts
        self._settings = dict(settings)
        self._save_every = save_every
        self._ask_every = ask_every
        if afresh and directory is not None and not int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            on_all_ranks(lambda: _delete(directory) if hvd.rank() == 0 else None)
        if directory is not None:  # or it is found out at the first save, after hours, that it cannot be
            on_all_ranks(lambda: _make_writable(directory) if hvd.rank() == 0 else None)
        self._checkpoints = None if directory is None else Checkpoints(directory)
        self._interruption = None if directory is None else Interruption()

    def load(self) -> dict[str, Any] | None:
        """Put the parts into the state of the newest checkpoint.

        Returns:
            What :meth:`save` was told; None if there is nothing to go on from.

        Ends the program on all ranks if the checkpoint is of other settings or of another number of ranks.
        """
        if self._checkpoints is None:
            return None
        try:
            saved = self._checkpoints.load(map_location=device())
        except ValueError as error:  # raised by every rank
            fail(str(error))
        if saved is None:
            return None
        before = saved.state["settings"]
        different = [name for name, value in self._settings.items() if before.get(name) != value]
        if different:
            changes = ", ".join(f"{name} was {before.get(name)}, is {self._settings[name]}" for name in different)
            fail(
                f"{self._checkpoints.directory} holds a run with other settings: {changes}. Give another --output, "
                "or --resume never to delete it"
            )
        for name, part in self._parts.items():
            part.load_state_dict(saved.state[name])
        set_random_state(saved.state["random"])
        say(f"Going on from {self._checkpoints.directory}, checkpoint {saved.step}.")
        return saved.state["progress"]

    def after_step(self, number: int, steps: int, progress: Callable[[], Mapping[str, Any]]) -> None:
        """Save if it is time to; if the job is to be interrupted, save and end the program. All ranks call it.

        Args:
            number: the checkpoint's, higher than the last one's.
            steps: of the optimizer, in all.
            progress: tells what the loop needs to go on from here.
        """
        is_time = number % self._save_every == 0
        is_last = steps % self._ask_every == 0 and self._is_interrupted()
        if is_time or is_last:
            self.save(number, progress())
        if is_last:
            _leave(number)

    def after_epoch(self, number: int, progress: Mapping[str, Any]) -> None:
        """Save; if the job is to be interrupted, end the program. All ranks call it."""
        self.save(number, progress)
        if self._is_interrupted():
            _leave(number)

    def save(self, number: int, progress: Mapping[str, Any]) -> None:
        """As checkpoint ``number``."""
        if self._checkpoints is None:
            return
        state = {name: part.state_dict() for name, part in self._parts.items()}
        own = {"settings": self._settings, "random": random_state(), "progress": dict(progress)}
        self._checkpoints.save(number, {**state, **own})

    def _is_interrupted(self) -> bool:
        return self._interruption is not None and self._interruption.agreed()


def _leave(number: int) -> NoReturn:
    say(f"Interrupted. Saved as checkpoint {number}; the same command goes on from here.")
    hvd.barrier()
    sys.exit(EXIT_REQUEUE)


def _make_writable(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def _delete(directory: Path) -> None:
    for checkpoint in directory.glob("step-*"):
        hidden = checkpoint.rename(checkpoint.with_suffix(".partial"))  # first it stops being complete, then it goes
        shutil.rmtree(hidden)
