"""Qsparse-local-SGD: local steps, then one compressed exchange of what they changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor
from torch import Tensor

from .averages import averager
from .checks import check_numbers
from .errors import NonFiniteError
from .gradient import GradientCompressor
from .interrupts import interrupted_at_its_end
from .ledger import Ledger
from .membership import check_process_set
from .wrapped import Wrapped, checksum, load_together, model_of, moved

STATE_KEY = "qsparse_local_sgd"


class QsparseLocalSGD(Wrapped):
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
        optimizer: any torch optimizer; this one's ``param_groups`` and ``state`` are shared with it. Horovod's only
            if it averages inside nodes, for two levels (docs/scale.md).
        named_parameters: ``model.named_parameters()``, all of the optimizer's parameters among them.
        compression: ``Compression.topk(…)`` and its like; ``Compression.none`` and ``fp16`` average through
            Horovod's allreduce.
        sync_every: H, the number of steps from one exchange to the next. 4 and 8 are the paper's; 1 exchanges after
            each step. Or a function that is told how many steps were taken and says whether to exchange now: see
            :func:`post_local` and :func:`sync_at`. After the last step call :meth:`synchronize`.
        outer: makes the optimizer of x_sync, to which the average is the gradient; called with copies of the
            parameters. DiLoCo (arXiv 2311.08105) and SparseLoCo take
            ``lambda x: torch.optim.SGD(x, lr=0.7, momentum=0.9, nesterov=True)``. It is :attr:`outer`. None for the
            paper's: the average is subtracted as it is.
        look_ahead: λ of DEF (arXiv 2004.05298), "detach coefficient": local steps start at x_sync − λ m instead of
            x_sync, nearer to where the model will be once the memory has been sent. 0.3 is that paper's, 1 is
            step-ahead error feedback (SAEF). Evaluate within :meth:`evaluation`, then. With
            ``sync_every=1`` around SGD this is DEF.
        forget_at_drop: wipe the memory at an exchange where the learning rate is at most this part of what it was at
            the last one. The paper's algorithm never does; its authors' code does, so 0.5 would follow it. None for
            never.
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
        outer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        look_ahead: float = 0.0,
        forget_at_drop: float | None = None,
        process_set: hvd.ProcessSet | None = None,
    ) -> None:
        super().__init__(optimizer, named_parameters)
        if not callable(sync_every):
            check_period(sync_every)
        check_numbers(look_ahead=look_ahead)
        if not 0 <= look_ahead <= 1:
            raise ValueError(f"look_ahead must be in [0, 1], got {look_ahead!r}")
        if forget_at_drop is not None:
            check_numbers(forget_at_drop=forget_at_drop)
            if not 0 < forget_at_drop < 1:
                raise ValueError(f"forget_at_drop must be between 0 and 1, or None, got {forget_at_drop!r}")
        check_process_set("process_set", process_set)
        # Configuration
        self.sync_every = sync_every
        self._look_ahead = look_ahead
        self._forget_at_drop = forget_at_drop
        self._average = averager(compression, process_set, self._parameters)
        self._refuse_averaged(getattr(compression, "settings", None), process_set)
        if look_ahead and compression not in (hvd.Compression.none, hvd.Compression.fp16):
            self._average.residual("")  # complains of a memory that is no residual
        # State
        self._anchors = model_of(self._parameters)  # x_sync
        self._starts = dict(self._anchors)  # the same tensors, unless looked ahead
        self.outer = None if outer is None else _outer(outer, list(self._anchors.values()))
        self._local_steps = 0  # since the last exchange
        self._steps = 0  # in all
        self._lr: float | None = None  # largest of the groups', at the last exchange
        self._is_evaluating = False

    @property
    def ledger(self) -> Ledger:
        """The bytes this rank has sent."""
        return self._average.ledger

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}({self._average!r}, sync_every={self.sync_every}, optimizer={self.optimizer!r})"

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One local step, and an exchange if it is the ``sync_every``-th since the last one.

        With ``torch.amp.GradScaler``, a step that overflows on this rank changes nothing here but counts.

        Raises:
            RuntimeError: the wrapped optimizer was given parameters that this one does not know.
            NonFiniteError, PeerError, RankMismatchError, WireError: see :meth:`synchronize`.
        """
        self._check_is_not_evaluating()
        with self._one_step():
            if self._steps == 0:
                self._begin()
            self._settle()
            loss = self._local_step(closure)
            self._local_steps += 1
            self._steps += 1
            for name, p in self._parameters.items():
                self.ledger.tensors[name].dense += p.nbytes
            if self._is_due():
                self.synchronize()
            return loss

    def synchronize(self) -> None:
        """Exchange now, if a local step was taken since the last time. Collective.

        Call it on all ranks after the last step and before a checkpoint or an evaluation that should see one and
        the same model everywhere; each call in mid-round is an additional exchange. With ``look_ahead`` the
        parameters are ahead of that model even then: evaluate, and save the final one, within :meth:`evaluation`.

        Raises:
            NonFiniteError: a rank's parameters moved to inf or NaN. Every rank raises; parameters are back where
                the round began and the memories are as they were. The inner optimizer's own state is not: to go on,
                clear it (``optimizer.optimizer.state.clear()``) or load a checkpoint.
            PeerError, RankMismatchError, WireError: the exchange failed, on every rank. The local steps stand and go
                into the next exchange; with a number for ``sync_every``, that is after the next step.
            RuntimeError: within :meth:`evaluation`, in mid-round.
            KeyboardInterrupt: at the end, if Ctrl-C came meanwhile.
        """
        if self._local_steps:
            self._check_is_not_evaluating()
        # What is allocated in inference mode could not be changed later.
        with torch.inference_mode(False), torch.no_grad(), interrupted_at_its_end():
            self._settle()
            if self._local_steps:
                self._exchange()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A context in which the parameters are x_sync, the model that all ranks agree on; then all is as before.

        Without look-ahead, x_sync is what the parameters are after :meth:`synchronize` anyway.
        """
        self._settle()
        local = {name: p.detach().clone() for name, p in self._parameters.items()}
        outside, self._is_evaluating = self._is_evaluating, True
        try:
            if self._steps:
                self._set_parameters(self._anchors)
            yield
        finally:
            self._set_parameters(local)
            self._is_evaluating = outside

    def reset_memory(self) -> None:
        """Forget what was not sent so far. Do it on all ranks."""
        self._average.reset_memory()

    def leave(self) -> None:
        """Forget the other ranks: their number is about to change."""
        self._average.leave()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and under one more key the memory, x_sync and the counters.

        Each rank saves its own: memories and, between exchanges, parameters differ.

        Raises:
            RuntimeError: an exchange has failed on this rank alone; or within :meth:`evaluation` in mid-round, when
                the model's own state is not that of this one.
        """
        self._settle()
        if self._is_evaluating and self._local_steps:
            raise RuntimeError(
                f"{self._local_steps} local steps are not in the model within evaluation(), and would be lost: save "
                "outside of it, or call synchronize() before it"
            )
        own = {
            "sync_every": None if callable(self.sync_every) else self.sync_every,
            "local_steps": self._local_steps,
            "steps": self._steps,
            "lr": self._lr,
            "anchors": {name: anchor.clone() for name, anchor in self._anchors.items()} if self._steps else None,
            "starts": {name: start for name, start in self._starts.items() if start is not self._anchors[name]},
            "outer": None if self.outer is None else self.outer.state_dict(),
            "average": self._average.state_dict(),
        }
        return {**self.optimizer.state_dict(), STATE_KEY: own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on, bit for bit, where :meth:`state_dict` was taken; the caller has loaded the model's own state.

        What :func:`hvd_compress.resize` has made of other ranks' states is loaded like this, too.

        Raises:
            ValueError: it is not a state of this class, or of another model, optimizer, rank, number of ranks or
                ``sync_every``; nothing has changed then.
        """
        state = dict(state_dict)
        if STATE_KEY not in state:
            raise ValueError(
                "this is a plain optimizer's state: load it into the wrapped optimizer (….optimizer.load_state_dict)"
            )
        own = state.pop(STATE_KEY)
        if not callable(self.sync_every) and own["sync_every"] not in (None, self.sync_every):
            raise ValueError(f"the state was saved with sync_every={own['sync_every']}, this is {self.sync_every}")
        saved = own["anchors"]
        if saved is not None:
            wrong = {n for n, anchor in self._anchors.items() if n in saved and anchor.shape != saved[n].shape}
            wrong |= saved.keys() ^ self._anchors.keys()
            if wrong:
                raise ValueError(f"the state is of another model; these do not match: {', '.join(sorted(wrong))}")
        if (own["outer"] is None) != (self.outer is None):
            raise ValueError(f"the state was saved with{'out' if own['outer'] is None else ''} an outer optimizer")
        states = [(self.optimizer, state), *([] if self.outer is None else [(self.outer, own["outer"])])]
        load_together(states, lambda: self._average.load_state_dict(own["average"]))
        for name, anchor in self._anchors.items() if saved is not None else ():
            anchor.copy_(saved[name])
        starts = {name: start.to(self._anchors[name].device, copy=True) for name, start in own["starts"].items()}
        # With a look-ahead the two part at the first exchange: see _begin().
        rest = {name: anchor.clone() if self._look_ahead else anchor for name, anchor in self._anchors.items()}
        self._starts = {**rest, **starts}
        self._local_steps, self._steps, self._lr = own["local_steps"], own["steps"], own["lr"]
        self._is_stale = self._steps > 0 and not self._local_steps  # other ranks' parameters may have been loaded
        self._settle()

    def _check_is_not_evaluating(self) -> None:
        if self._is_evaluating:
            raise RuntimeError(
                "within evaluation() the parameters are not where the local steps have led: call step() and "
                "synchronize() outside of it"
            )

    def _is_due(self) -> bool:
        if callable(self.sync_every):
            return self.sync_every(self._steps)
        # More than that after an exchange that failed, or if it was made smaller in mid-round.
        return self._local_steps >= self.sync_every

    def _begin(self) -> None:
        """Take x_0, which is final only now."""
        for name, p in self._parameters.items():
            self._anchors[name].copy_(p.detach())
        if self._look_ahead:  # then the two part at the first exchange, and a lead may be told from both
            self._starts = {name: anchor.clone() for name, anchor in self._anchors.items()}

    def _exchange(self) -> None:
        lr, forgotten = self._lr, self._forget_if_due()
        try:
            if not self._average.is_open:
                self._average.open(self._statement())
            self._move_anchors()
        except BaseException as error:
            self._lr = lr
            if forgotten is not None and not self._average.is_spoilt:
                self._average.load_state_dict(_with_memories(self._average.state_dict(), forgotten))
            if isinstance(error, NonFiniteError):
                self._local_steps, self._is_stale = 0, True
                self._settle()
            raise
        with self._average.alone():
            starts = dict(self._anchors)
            for name, anchor in self._anchors.items():
                lead = self._lead(name)
                if lead is not None:
                    starts[name] = anchor - lead.to(anchor)
        self._starts, self._local_steps, self._is_stale = starts, 0, True
        self._settle()

    def _move_anchors(self) -> None:
        """Exchange, and take x_sync one step on."""
        if self.outer is None:
            self._average.subtract(self._moved, self._steps, self._anchors)
            return
        averages = self._average(self._moved, self._steps)
        with self._average.alone():
            for name, average in averages.items():
                self._anchors[name].grad = average
            self.outer.step()
            self.outer.zero_grad(set_to_none=True)

    def _moved(self, name: str) -> Tensor:
        """By how much the local steps have moved a parameter, downwards."""
        return moved(self._starts[name], self._parameters[name])

    def _lead(self, name: str) -> Tensor | None:
        """By how much the next local steps of a parameter start ahead of x_sync; None for nothing.

        It is asked after the exchange, while the parameters are still where the last local steps have led.
        """
        residual = self._average.residual(name) if self._look_ahead else None
        return None if residual is None else (self._look_ahead * residual).view_as(self._anchors[name])

    def _forget_if_due(self) -> dict[str, Any] | None:
        """Returns the average's state with the memory that was forgotten, in case that the exchange fails.

        Only that is put back then: the ranks may differ in what they forget, and count exchanges alike.
        """
        forgotten = None
        lr = max(float(group.get("lr", 0.0)) for group in self.param_groups)
        is_due = self._forget_at_drop is not None and self._lr is not None and lr <= self._forget_at_drop * self._lr
        if is_due and not self._average.is_spoilt:  # of which the exchange is to tell
            forgotten = self._average.state_dict()
            self.reset_memory()
        self._lr = lr
        return forgotten

    def _statement(self) -> str:
        return "\n".join(
            [
                f"{type(self).__name__} with look_ahead={self._look_ahead}, forget_at_drop={self._forget_at_drop}",
                f"outer optimizer {' '.join(repr(self.outer).split())}",
                f"start with checksum {checksum(self._anchors)} (equal after hvd.broadcast_parameters)",
            ]
        )


def _outer(make: Callable[[list[Tensor]], torch.optim.Optimizer], anchors: list[Tensor]) -> torch.optim.Optimizer:
    made = make(anchors) if callable(make) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            "outer must be a function that makes an optimizer of the parameters that it is called with, lambda x: "
            f"torch.optim.SGD(x, lr=0.7) for instance, got {make!r}"
        )
    if {id(p) for group in made.param_groups for p in group["params"]} != {*map(id, anchors)}:
        raise ValueError(f"outer must make an optimizer of all the parameters that it is called with, got {made!r}")
    return made


def post_local(first: int, then: int) -> Callable[[int], bool]:
    """``sync_every`` for post-local SGD (arXiv 1808.07217): after each of the ``first`` steps, then every ``then``.

    Raises:
        ValueError: ``first`` is less than 0, or ``then`` less than 1.
    """
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ValueError(f"first must be a number of steps ≥ 0, got {first!r}")
    check_period(then)
    return lambda step: step <= first or (step - first) % then == 0


def sync_at(steps: Iterable[int]) -> Callable[[int], bool]:
    """``sync_every`` from a list of sync indices, the I_T of the paper: exchange after these steps, counted from 1.

    Raises:
        ValueError: one of them is less than 1.
        TypeError: one of them is no integer.
    """
    indices = frozenset(steps if isinstance(steps, Iterable) else [None])
    if any(isinstance(step, bool) or not isinstance(step, int) for step in indices):
        raise TypeError(f"sync_at takes a list of step numbers, got {steps!r}")
    if min(indices, default=1) < 1:
        raise ValueError(f"sync indices count steps from 1, got {min(indices)}")
    return indices.__contains__


def check_period(steps: object) -> None:
    """Raise ValueError unless ``steps`` is a whole number from 1 on."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(
            "sync_every must be a number of steps ≥ 1, or a function of the step, as sync_at([4, 8]) makes one of a "
            f"list; got {steps!r}"
        )


def _with_memories(state: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A state of an average with the memory of an earlier one; some exchanges wrap the state of another."""
    mixed = dict(state)
    for key in mixed.keys() & before.keys() & {"memory"}:
        mixed[key] = before[key]
    for key in mixed.keys() & before.keys() & {"inner", "chosen"}:
        if mixed[key] is not None and before[key] is not None:
            mixed[key] = _with_memories(mixed[key], before[key])
    return mixed
