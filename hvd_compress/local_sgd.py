"""Qsparse-local-SGD: local steps, then one compressed exchange of what they changed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor
from torch import Tensor

from .errors import NonFiniteError, RankMismatchError
from .gradient import GradientCompressor
from .ledger import Ledger
from .membership import check_named_parameters, members
from .reducer import Reducer

_STATE_KEY = "qsparse_local_sgd"


class QsparseLocalSGD(torch.optim.Optimizer):
    """Synchronous Qsparse-local-SGD around any torch optimizer (arXiv 1906.02367, Algorithm 1).

    Each rank takes ``sync_every`` steps of the wrapped optimizer on its own. Then the ranks exchange, compressed and
    with error memory, by how much their parameters have moved since the last synchronisation, and all continue from
    the old parameters less the average of that::

        p = m + x_sync − x_local,   send C(p),   m ← p − C(p),   x_sync ← x_sync − (1/R) Σ C(p),   x_local ← x_sync

    Momentum, weight decay and the like act in the local steps only and are never averaged. The memory is in the
    units of the parameters, so a change of the learning rate leaves it right.

    The ranks must start from the same parameters (``hvd.broadcast_parameters``); the first exchange verifies it.
    Batch-norm statistics are buffers, not parameters: as in the paper, each rank keeps its own.

    Args:
        optimizer: any torch optimizer; this one's ``param_groups`` and ``state`` are shared with it.
        named_parameters: ``model.named_parameters()``, all of the optimizer's parameters among them.
        compression: ``Compression.topk(…)`` and its like; ``Compression.none`` and ``fp16`` average through
            Horovod's allreduce.
        sync_every: H, the number of steps from one exchange to the next. 4 and 8 are the paper's; 1 exchanges after
            each step. Or a function that is told how many steps were taken and says whether to exchange now: see
            :func:`post_local` and :func:`sync_at`. After the last step call :meth:`synchronize`.
        process_set: Horovod's; None for all ranks.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        compression: type[Compressor] | GradientCompressor = hvd.Compression.none,
        sync_every: int | Callable[[int], bool] = 1,
        process_set: hvd.ProcessSet | None = None,
    ) -> None:
        # The base class's own __init__ would build param_groups anew: they are the wrapped optimizer's.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
        if not callable(sync_every):
            _check_period(sync_every)
        # Configuration
        self.optimizer = optimizer
        self.sync_every = sync_every
        self._parameters = _parameters_of(optimizer, check_named_parameters(named_parameters))
        self._average = _averager(compression, process_set, self._parameters)
        # State
        self._anchors: dict[str, Tensor] | None = None  # x_sync; taken at the first step, when x_0 is final
        self._local_steps = 0  # since the last exchange
        self._steps = 0  # in all

    @property
    def ledger(self) -> Ledger:
        """The bytes this rank has sent."""
        return self._average.ledger

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.defaults

    def __repr__(self) -> str:
        return f"QsparseLocalSGD({self._average!r}, sync_every={self.sync_every}, optimizer={self.optimizer!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible: the other ranks would not know.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("make a new QsparseLocalSGD after changing the model, on all ranks")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One local step, and an exchange if it is the ``sync_every``-th since the last one.

        With ``torch.amp.GradScaler``, a step that overflows on this rank changes nothing here but counts.

        Raises:
            NonFiniteError, PeerError, RankMismatchError, WireError: see :meth:`synchronize`.
        """
        if self._anchors is None:
            self._anchors = {name: p.detach().clone() for name, p in self._parameters.items()}
        loss = self._local_step(closure)
        self._local_steps += 1
        self._steps += 1
        for name, p in self._parameters.items():
            self.ledger.tensors[name].dense += p.nbytes
        is_due = self.sync_every(self._steps) if callable(self.sync_every) else self._local_steps == self.sync_every
        if is_due:
            self.synchronize()
        return loss

    # torch.amp.GradScaler would not call step() after an overflow on this rank; the ranks would then lose count of
    # their steps and wait for each other. With this mark it always calls, and leaves its two findings on the object.
    _step_supports_amp_scaling = True

    def _local_step(self, closure: Callable[[], float] | None) -> float | None:
        if bool(getattr(self, "found_inf", False)):
            return None
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            for p in self._parameters.values():
                if p.grad is not None:
                    p.grad.div_(scale.to(p.grad.device))
        return self.optimizer.step(closure)

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchange now, if a local step was taken since the last time. Collective.

        Call it on all ranks after the last step and before a checkpoint or an evaluation that should see one and
        the same model everywhere; each call in mid-round is an additional exchange.

        Raises:
            NonFiniteError: a rank's parameters moved to inf or NaN. Every rank raises; parameters are back at the
                last synchronised ones and the memories are as they were.
            PeerError, RankMismatchError, WireError: the exchange failed, on every rank.
        """
        if self._anchors is None or self._local_steps == 0:
            return
        moved = {name: anchor - self._parameters[name].detach() for name, anchor in self._anchors.items()}
        try:
            averages = self._average(moved, self._anchors, self._steps)
        except NonFiniteError:
            for name, p in self._parameters.items():
                p.copy_(self._anchors[name])
            self._local_steps = 0
            raise
        # New tensors, so that a state that was taken earlier stays as it was.
        self._anchors = {name: anchor - averages[name] for name, anchor in self._anchors.items()}
        for name, p in self._parameters.items():
            p.copy_(self._anchors[name])
        self._local_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and under one more key the memory, the anchors and the counters.

        Each rank saves its own: memories and, between exchanges, parameters differ.
        """
        own = {
            "sync_every": None if callable(self.sync_every) else self.sync_every,
            "local_steps": self._local_steps,
            "steps": self._steps,
            "anchors": self._anchors,
            "average": self._average.state_dict(),
        }
        return {**self.optimizer.state_dict(), _STATE_KEY: own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on, bit for bit, where :meth:`state_dict` was taken; the model's own state is loaded by the caller.

        Raises:
            ValueError: it is not a state of this class, or of another model, rank, number of ranks or
                ``sync_every``; nothing of the exchange's state has changed then.
        """
        state = dict(state_dict)
        if _STATE_KEY not in state:
            raise ValueError(
                "this is a plain optimizer's state: load it into the wrapped optimizer (….optimizer.load_state_dict)"
            )
        own = state.pop(_STATE_KEY)
        if not callable(self.sync_every) and own["sync_every"] not in (None, self.sync_every):
            raise ValueError(f"the state was saved with sync_every={own['sync_every']}, this is {self.sync_every}")
        anchors = own["anchors"]
        if anchors is not None:
            wrong = {
                name for name, p in self._parameters.items() if name in anchors and p.shape != anchors[name].shape
            }
            wrong |= anchors.keys() ^ self._parameters.keys()
            if wrong:
                raise ValueError(f"the state is of another model; these do not match: {', '.join(sorted(wrong))}")
            anchors = {name: anchors[name].to(p.device, copy=True) for name, p in self._parameters.items()}
        self._average.load_state_dict(own["average"])
        self.optimizer.load_state_dict(state)
        self._anchors, self._local_steps, self._steps = anchors, own["local_steps"], own["steps"]


class _CompressedAverage:
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
        self._reducer = Reducer(
            {name: p.shape for name, p in parameters.items()},
            operator=settings.operator,
            memory=settings.memory(),
            dense_below=settings.dense_below,
            seed=settings.seed,
            ledger=self.ledger,
        )

    def __repr__(self) -> str:
        return repr(self._settings.operator)

    def __call__(self, moved: Mapping[str, Tensor], anchors: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        if not self._reducer.is_open:
            communicator, ranks = members(self._process_set, self._settings.communicator)
            self._reducer.open(communicator, ranks, f"local SGD from {_checksum(anchors)}", self._settings.timeout)
        for name, tensor in moved.items():
            self._reducer.add(name, tensor)
        reduced = self._reducer.reduce(step)
        if reduced.overflow:
            where = ", ".join(f"{name} on rank {rank}" for rank, name in reduced.overflow[:5])
            raise NonFiniteError(
                f"parameters became inf or NaN: {where}. They are back at the last synchronised values; a smaller "
                "learning rate, a longer warm-up or gradient clipping may help"
            )
        size = self._reducer.size
        return {n: reduced.sums[n].div_(size).view(t.shape).to(t.dtype) for n, t in moved.items()}

    def state_dict(self) -> dict[str, Any]:
        return self._reducer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reducer.load_state_dict(state)


class _HorovodAverage:
    """The average over ranks by Horovod's allreduce: nothing is left out, so there is no memory."""

    def __init__(self, compression: type[Compressor], process_set: hvd.ProcessSet | None) -> None:
        self.ledger = Ledger()
        self._compression = compression
        self._process_set = process_set or hvd.global_process_set

    def __repr__(self) -> str:
        return f"Compression.{'fp16' if self._compression is hvd.Compression.fp16 else 'none'}"

    def __call__(self, moved: Mapping[str, Tensor], anchors: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        self._check(step)
        compressed, contexts = zip(*(self._compression.compress(t.contiguous()) for t in moved.values()), strict=True)
        for name, tensor in zip(moved, compressed, strict=True):
            self.ledger.tensors[name].horovod += tensor.nbytes
        self.ledger.exchanges += 1
        averages = hvd.grouped_allreduce(list(compressed), name="qsparse_local_sgd", process_set=self._process_set)
        return {
            name: self._compression.decompress(average, context)
            for name, average, context in zip(moved, averages, contexts, strict=True)
        }

    def _check(self, step: int) -> None:
        """Every rank raises if ranks are at different steps: then their steps have a variance."""
        moments = torch.tensor([step, step * step], dtype=torch.float64)
        self.ledger.shared.horovod += moments.nbytes
        total = hvd.allreduce(moments, name="qsparse_local_sgd.step", op=hvd.Sum, process_set=self._process_set)
        size = self._process_set.size() or 1
        if total[0] ** 2 != size * total[1]:
            raise RankMismatchError(
                f"ranks exchange at different steps; this rank at step {step}: compare sync_every"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "memory" in state:
            raise ValueError("the state was saved with a compressor and its memory: use the same compression=…")
        self.ledger.load_state_dict(state["ledger"])


def _averager(
    compression: Any,
    process_set: hvd.ProcessSet | None,
    parameters: Mapping[str, torch.nn.Parameter],
) -> _CompressedAverage | _HorovodAverage:
    if isinstance(compression, GradientCompressor):
        return _CompressedAverage(compression, process_set, parameters)
    if compression is hvd.Compression.none or compression is hvd.Compression.fp16:
        return _HorovodAverage(compression, process_set)
    raise TypeError(f"compression must be Compression.none, .fp16 or made by Compression.…, got {compression!r}")


def post_local(first: int, then: int) -> Callable[[int], bool]:
    """``sync_every`` for post-local SGD (arXiv 1808.07217): after each of the ``first`` steps, then every ``then``.

    Raises:
        ValueError: ``then`` is less than 1.
    """
    _check_period(then)
    return lambda step: step <= first or (step - first) % then == 0


def sync_at(steps: Iterable[int]) -> Callable[[int], bool]:
    """``sync_every`` from a list of sync indices, the I_T of the paper: exchange after these steps, counted from 1.

    Raises:
        ValueError: one of them is less than 1.
    """
    indices = frozenset(steps)
    if min(indices, default=1) < 1:
        raise ValueError(f"sync indices count steps from 1, got {min(indices)}")
    return indices.__contains__


def _check_period(steps: object) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"sync_every must be a number of steps ≥ 1, or a function of the step, got {steps!r}")


def _parameters_of(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.nn.Parameter]:
    """The optimizer's parameters by name, in the order of the names."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    chosen = {name: p for name, p in named.items() if id(p) in own}
    if len(chosen) != len(own):
        raise ValueError(f"{len(own) - len(chosen)} of the optimizer's parameters are not in named_parameters")
    return chosen


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Tells the ranks' starting points apart."""
    checksum = 0
    for tensor in tensors.values():
        checksum = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data, checksum)
    return f"parameters with checksum {checksum:08x} (equal after hvd.broadcast_parameters)"
