"""The directory of a run: settings, metrics, TensorBoard, weights. The first rank writes, the others do not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import Ledger


class RunDirectory:
    """Files that are there whole or not at all, even when the job is killed while they are written.

    ============== =============================================================================================
    config.yaml    all settings, in the form of a recipe: ``--recipe RUN/config.yaml`` repeats the run
    metrics.jsonl  a line for each epoch
    tensorboard/   the same, and the steps in between
    ledger.json    bytes by tensor
    unreadable.txt names of images that could not be read, if there are any
    best.pt        weights of the best epoch, as validated; last.pt those of the last one
    checkpoint/    from which the run goes on
    ============== =============================================================================================
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._board: Any = None
        if hvd.rank() == 0:
            path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, text: str) -> None:
        """A text file."""
        if hvd.rank() == 0:
            self._replace(name, lambda draft: draft.write_text(text, encoding="utf-8"))

    def add_lines(self, name: str, lines: Iterable[str]) -> None:
        """Those that a text file does not have yet."""
        if hvd.rank() == 0:
            path = self.path / name
            before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            new = [line for line in lines if line not in before]
            if new:
                self.write(name, "".join(f"{line}\n" for line in [*before, *new]))

    def write_epoch(
        self, records: list[dict[str, Any]], ledger: Ledger, weights: Mapping[str, Any] | None, *, is_best: bool
    ) -> None:
        """What there is at the end of an epoch.

        Args:
            records: lines of the metrics file, of all epochs so far.
            ledger: of the first rank.
            weights: and what belongs to them; None to save none.
            is_best: whether no epoch before was as accurate.
        """
        if hvd.rank() != 0:
            return
        self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        self.write("ledger.json", json.dumps(ledger.state_dict()))
        for name in () if weights is None else ("best.pt", "last.pt") if is_best else ("last.pt",):
            self._replace(name, partial(torch.save, weights))

    def open_board(self, run: str, step: int) -> None:
        """Begin TensorBoard's file of a run after so many steps; what was written about later ones is hidden."""
        if hvd.rank() != 0:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        folder = "".join(letter if letter.isalnum() or letter in "=.-" else "-" for letter in run)
        self._board = SummaryWriter(str(self.path / "tensorboard" / folder), purge_step=step + 1)

    def plot(self, step: int, group: str, values: Mapping[str, Any]) -> None:
        """Add those of the values that are numbers to TensorBoard's curves."""
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{group}/{name}", value, step)

    def close_board(self) -> None:
        """See to it that all is on the disk."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        draft = self.path / f".{name}.partial"
        try:
            write(draft)
        except RuntimeError as error:  # torch's, which does not say why
            raise OSError(f"{draft} cannot be written, is the disk full? {error}") from error
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(self.path / name)
