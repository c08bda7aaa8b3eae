"""The average over ranks of what parameters have moved by: compressed, or through Horovod's allreduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor
from torch import Tensor

from .errors import NonFiniteError, PeerError, RankMismatchError
from .exchanges import reducer
from .gradient import GradientCompressor
from .horovod_exchange import for_horovod
from .kernels import all_finite, is_finite
from .ledger import Ledger
from .meeting import Member, agree, tensors_of
from .membership import link
from .reducer import Reduced


class CompressedAverage:
    """The average over ranks by compressed messages with error memory."""

    def __init__(
        self,
        compression: GradientCompressor,
        process_set: hvd.ProcessSet | None,
        parameters: Mapping[str, torch.nn.Parameter],
    ) -> None:
        settings = compression.settings
        if process_set is not None and settings.process_set not in (None, process_set):
            raise ValueError("compression and QsparseLocalSGD were given different process sets")
        self.ledger = Ledger()
        self._settings = settings
        self._process_set = process_set or settings.process_set
        self._parameters = parameters
        self._reducer = reducer(settings, parameters, self.ledger)

    def __repr__(self) -> str:
        return repr(self._settings.operator)

    @property
    def is_open(self) -> bool:
        """Whether the ranks have met."""
        return self._reducer.is_open

    def open(self, expects: str) -> None:
        """Meet the other ranks; see :meth:`hvd_compress.reducer.Reducer.open`."""
        by, ranks = link(self._process_set, self._settings.communicator)
        self._reducer.open(by, ranks, expects, self._settings.timeout)

    def leave(self) -> None:
        """Forget the other ranks; see :meth:`hvd_compress.reducer.Reducer.leave`."""
        self._reducer.leave()

    def __call__(self, moved: Callable[[str], Tensor], step: int) -> dict[str, Tensor]:
        """The mean over ranks of what ``moved`` says of each parameter, in a tensor that is given up.

        Raises:
            NonFiniteError: inf or NaN on some rank; every rank raises.
            PeerError, RankMismatchError, WireError: see :meth:`hvd_compress.reducer.Reducer.reduce`.
            Exception: whatever ``moved`` raised.
        """
        sums = self._reduce(moved, step, None).sums
        return {n: sums[n].view(p.shape) for n, p in self._parameters.items()}

    def subtract(self, moved: Callable[[str], Tensor], step: int, anchors: Mapping[str, Tensor]) -> None:
        """Subtract it from ``anchors``, contiguous and by name, in place.

        After an error that all ranks raise they are as they were. If memory runs out on this rank alone, some are
        not; then exchanges fail until a state is loaded.
        """
        self._reduce(moved, step, {name: anchor.view(-1) for name, anchor in anchors.items()})

    def _reduce(self, moved: Callable[[str], Tensor], step: int, minuends: Mapping[str, Tensor] | None) -> Reduced:
        try:
            self._add(moved)
            reduced = self._reducer.reduce(step, divisor=self._reducer.size, minuends=minuends)
        except BaseException:
            self._reducer.stay_away()
            raise
        if reduced.overflow:
            raise _not_finite([f"{name} on rank {rank}" for rank, name in reduced.overflow])
        return reduced

    def _add(self, moved: Callable[[str], Tensor]) -> None:
        try:
            for name in reversed([*self._parameters]):  # as buckets depart: the first travel while the rest is made
                self._reducer.add(name, moved(name))
        except Exception as error:
            self._reducer.let_fail(error)  # the others wait for this rank

    @property
    def is_spoilt(self) -> bool:
        """See :attr:`hvd_compress.meeting.Member.is_spoilt`."""
        return self._reducer.is_spoilt

    def alone(self) -> AbstractContextManager[None]:
        """A context for what comes after the exchange; see :meth:`hvd_compress.meeting.Member.alone`."""
        return self._reducer.alone()

    def residual(self, name: str) -> Tensor | None:
        """What this rank has still to send, flat; None for nothing."""
        return self._reducer.residual(name)

    def reset_memory(self) -> None:
        """Forget it."""
        self._reducer.reset_memory()

    def state_dict(self) -> dict[str, Any]:
        """This rank's."""
        return self._reducer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._reducer.load_state_dict(state)


class HorovodAverage(Member):
    """The average over ranks by Horovod's allreduce.

    There is no memory: what float16 rounds away is lost, all of a change below 3e-8.
    """

    def __init__(
        self,
        compression: type[Compressor],
        process_set: hvd.ProcessSet | None,
        parameters: Mapping[str, torch.nn.Parameter],
    ) -> None:
        self.ledger = Ledger()
        self._parameters = parameters
        self._compression = compression
        self._process_set = process_set or hvd.global_process_set
        # State
        self.is_open = False  # whether the ranks have compared what they expect
        self._rounds = 0  # averages since then

    def __repr__(self) -> str:
        return f"Compression.{'fp16' if self._compression is hvd.Compression.fp16 else 'none'}"

    def open(self, expects: str) -> None:
        """Compare with the other ranks. By itself Horovod compares shapes and types of what it sums, and no more.

        Raises:
            RankMismatchError: on every rank, when ranks differ.
        """
        shapes = {name: p.shape for name, p in self._parameters.items()}
        mine = "\n".join([f"average by Horovod with {self!r}", expects, *tensors_of(shapes)])
        exchange, _ = agree(self._process_set, self._process_set.ranks or (), mine, None)
        self.ledger.shared.horovod += exchange.sent
        self.is_open, self._rounds = True, 0

    def leave(self) -> None:
        """Forget the other ranks: the next exchange compares anew."""
        self.is_open = False

    def __call__(self, moved: Callable[[str], Tensor], step: int) -> dict[str, Tensor]:
        """See :meth:`CompressedAverage.__call__`.

        Raises:
            NonFiniteError: inf or NaN on some rank, or a sum that overflows; every rank raises.
            RankMismatchError: ranks are at different steps; every rank raises.
            PeerError: another rank has failed.
            Exception: whatever ``moved`` raised.
        """
        moves: dict[str, Tensor] = {}
        compressed, contexts = [], []
        try:
            for name, p in self._parameters.items():
                moves[name] = moved(name)
                tensor, context = self._compression.compress(for_horovod(moves[name].to(p.dtype)))
                compressed.append(tensor)
                contexts.append(context)
        except Exception as error:
            self.let_fail(error)  # the others wait for this rank
        self._check(step)
        for name, tensor in zip(moves, compressed, strict=True):
            self.ledger.tensors[name].horovod += tensor.nbytes
        self.ledger.exchanges += 1
        with self.ledger.timed("exchange"):
            averages = hvd.grouped_allreduce(compressed, name="qsparse_local_sgd", process_set=self._process_set)
        self._rounds += 1
        with self.alone():
            result = {
                name: self._compression.decompress(average, context).to(moves[name].dtype)
                for name, average, context in zip(moves, averages, contexts, strict=True)
            }
            wrong: list[str] = []
            if not all_finite(list(result.values())):
                wrong = [name for name, average in result.items() if not bool(is_finite(average))]
        if wrong:  # the same on all ranks
            raise _not_finite(wrong)
        return result

    def subtract(self, moved: Callable[[str], Tensor], step: int, anchors: Mapping[str, Tensor]) -> None:
        """See :meth:`CompressedAverage.subtract`."""
        averages = self(moved, step)
        with self.alone():
            for name, average in averages.items():
                anchors[name].sub_(average)

    def _check(self, step: int) -> None:
        """Every rank raises if one has failed, or if the first and the last of their steps differ, or of averages."""
        failure, self._failure = self._failure, self._spoilt
        counts, failing = [step, -step, self._rounds, -self._rounds], 0 if failure is None else -1 - hvd.rank()
        mine = torch.tensor([*counts, failing], device="cpu")
        self.ledger.shared.horovod += mine.nbytes
        exchanged = hvd.allreduce(mine, name="qsparse_local_sgd.step", op=hvd.Min, process_set=self._process_set)
        first, last, fewest, most, failed = exchanged.tolist()
        if failure is not None:
            raise failure
        if failed < 0:
            raise PeerError(f"rank {-1 - failed} failed before the average: it raises what has gone wrong")
        if first + last != 0:
            raise RankMismatchError(
                f"ranks exchange at different steps; this rank at step {step}: compare sync_every"
            )
        if fewest + most != 0:
            raise RankMismatchError(
                f"ranks have seen {fewest} to {-most} averages: one failed on some of them alone, and they differ "
                "since then. Load a checkpoint on all ranks"
            )

    def residual(self, name: str) -> Tensor | None:
        """None: all is sent."""
        return None

    def reset_memory(self) -> None:
        """There is none."""

    def state_dict(self) -> dict[str, Any]:
        """The ledger, and a counter.

        Raises:
            RuntimeError: an exchange has failed on this rank alone.
        """
        if self._spoilt is not None:
            raise self._spoilt
        return {"ledger": self.ledger.state_dict(), "rounds": self._rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            ValueError: the state has a memory, which would be lost.
        """
        if "format" in state:  # any compressor's
            raise ValueError("the state was saved with a compressor and its memory: use the same compression=…")
        self.ledger.load_state_dict(state["ledger"])
        self._failure = self._spoilt = None
        self._rounds = state.get("rounds", 0)


def _not_finite(where: list[str]) -> NonFiniteError:
    return NonFiniteError(
        f"parameters became inf or NaN: {', '.join(where[:5])}. They are back at the last synchronised values; a "
        "smaller learning rate, a longer warm-up or gradient clipping may help"
    )


def averager(
    compression: Any,
    process_set: hvd.ProcessSet | None,
    parameters: Mapping[str, torch.nn.Parameter],
) -> CompressedAverage | HorovodAverage:
    """What averages with ``compression``.

    Raises:
        TypeError: it is neither Horovod's own nor made by :class:`hvd_compress.Compression`.
        ValueError: it was made for another process set.
    """
    if isinstance(compression, GradientCompressor):
        return CompressedAverage(compression, process_set, parameters)
    if compression is hvd.Compression.none or compression is hvd.Compression.fp16:
        return HorovodAverage(compression, process_set, parameters)
    raise TypeError(f"compression must be Compression.none, .fp16 or made by Compression.…, got {compression!r}")
