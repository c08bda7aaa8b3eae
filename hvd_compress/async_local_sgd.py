"""Asynchronous Qsparse-local-SGD: each rank exchanges with the master model in its own time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal

import horovod.torch as hvd
import torch

from .checks import check_numbers
from .gradient import GradientCompressor
from .interrupts import interrupted_at_its_end
from .ledger import Ledger
from .local_sgd import check_period
from .membership import check_process_set, members
from .memory import DGC
from .remote import Pace, RemoteModel
from .wrapped import Wrapped, checksum, load_together, model_of, moved

ASYNC_STATE_KEY = "async_qsparse_local_sgd"


class AsyncQsparseLocalSGD(Wrapped):
    """Asynchronous Qsparse-local-SGD around any torch optimizer (arXiv 1906.02367, Algorithm 2).

    Each rank r takes local steps with the wrapped optimizer, and after those of its own schedule sends, compressed
    and with error memory, by how much its parameters have moved. The master model X takes each update with weight
    1/R, R being the number of ranks, and only the rank that sent it receives the current model::

        p = m_r + x_r − x_local,   send C(p),   m_r ← p − C(p),   X ← X − (1/R) C(p),   x_r ← X,   x_local ← X

    No rank waits while another one computes. The master model is divided by whole tensors among ranks that serve:
    there a thread takes in the updates and answers with the values that have changed since the sender's last
    exchange, so that x_r is bit for bit the master model. What is said of momentum, units, equal starts and
    batch-norm of :class:`QsparseLocalSGD` holds here too. Ranks may take different numbers of steps, but each at
    least one, since they meet in their first. Call :meth:`finish` on all ranks after the last step, or train within a
    ``with`` statement, which does::

        with AsyncQsparseLocalSGD(sgd, named_parameters=…, compression=Compression.topk(k=1000), sync_every=8) as opt:
            train(model, opt)

    Args:
        optimizer: any torch optimizer; this one's ``param_groups`` and ``state`` are shared with it.
        named_parameters: ``model.named_parameters()``, all of the optimizer's parameters among them.
        compression: ``Compression.topk(…)`` and its like, with the memory ``"residual"`` or ``"none"``; those that
            need the messages of all ranks (EF21, CD-Adam) cannot work here. ``ratio=1.0`` sends everything.
        sync_every: H, the number of this rank's steps from one exchange to the next. Or a function that is told how
            many steps this rank has taken and says whether to exchange now: :func:`random_gaps`, :func:`sync_at`,
            :func:`post_local`. It may differ from rank to rank. There is always an exchange after the last step.
        mode: ``"free-running"``: updates are applied as they arrive. ``"logical"``: in the order of the steps'
            numbers, whatever the ranks' speeds, so that a run can be repeated bit for bit. A rank then waits for
            other ranks' updates of earlier steps; for experiments and tests rather than for speed.
        total_steps: T, the number of steps that this rank takes. Needed, and the same on all ranks, in logical mode.
        max_staleness: in free-running mode, a rank that exchanges after t steps goes on only once all others have
            exchanged after t − ``max_staleness`` steps or more, counted from the start or the last :meth:`finish`.
            None for no bound, so that no rank ever waits.
        servers: how many ranks, from rank 0 on, look after a part of the model; one for each 262,144 elements if
            None, but no more than there are ranks or tensors.
        timeout: seconds without a word from a rank, while another waits for it, until the others give up: more than
            the longest time from one exchange to the next, evaluations and checkpoints among it.
        process_set: Horovod's; None for all ranks.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        compression: GradientCompressor,
        sync_every: int | Callable[[int], bool] = 1,
        mode: Literal["free-running", "logical"] = "free-running",
        total_steps: int | None = None,
        max_staleness: int | None = None,
        servers: int | None = None,
        timeout: float = 1800.0,
        process_set: hvd.ProcessSet | None = None,
    ) -> None:
        super().__init__(optimizer, named_parameters)
        if not isinstance(compression, GradientCompressor):
            raise TypeError(
                f"compression must be made by Compression.…, got {compression!r}; Compression.topk(ratio=1.0) sends "
                "everything"
            )
        settings = compression.settings
        memory = settings.memory()
        if memory.receives:
            raise TypeError(f"{memory!r} needs the messages of all ranks at once: use QsparseLocalSGD")
        if isinstance(memory, DGC):
            raise TypeError(f"{memory!r} is momentum for gradients: give it to the wrapped optimizer")
        if settings.exchange != "allgather":
            raise ValueError(
                f"exchange={settings.exchange!r} is for ranks that exchange together; here each one sends to servers"
            )
        if not callable(sync_every):
            check_period(sync_every)
        if mode not in ("free-running", "logical"):
            raise ValueError(f"mode must be 'free-running' or 'logical', got {mode!r}")
        if total_steps is not None and (not isinstance(total_steps, int) or total_steps < 1):
            raise ValueError(f"total_steps must be a number ≥ 1, got {total_steps!r}")
        if mode == "logical" and total_steps is None:
            raise ValueError("mode='logical' needs total_steps=…: the servers must know every rank's last exchange")
        check_numbers(timeout=timeout, max_staleness=max_staleness or 0)
        if max_staleness is not None and (mode == "logical" or not max_staleness >= 0):
            raise ValueError(f"max_staleness must be ≥ 0, and is for mode='free-running', got {max_staleness!r}")
        if servers is not None and (not isinstance(servers, int) or servers < 1):
            raise ValueError(f"servers must be a number ≥ 1, got {servers!r}")
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
        check_process_set("process_set", process_set)
        self._refuse_averaged(settings, process_set)
        if process_set is not None and settings.process_set not in (None, process_set):
            raise ValueError("compression and AsyncQsparseLocalSGD were given different process sets")
        settings.check_sizes(p.numel() for p in self._parameters.values())
        # Configuration
        self.sync_every = sync_every
        self._mode = mode
        self._total_steps = total_steps
        self._max_staleness = max_staleness
        self._servers = servers
        self._timeout = timeout
        self._settings = settings
        self._process_set = process_set or settings.process_set
        # State
        self._ledger = Ledger()
        self._model = RemoteModel(
            {name: p.shape for name, p in self._parameters.items()},
            operator=settings.operator,
            memory=memory,
            dense_below=settings.dense_below,
            seed=settings.seed,
            ledger=self._ledger,
        )
        self._anchors = self._starts = model_of(self._parameters)  # x_r
        self._steps = 0
        self._began = 0  # steps before the last start or finish()
        self._last_sync = 0
        self._saved: dict[str, Any] | None = None  # the server's state that was loaded

    @property
    def ledger(self) -> Ledger:
        """The bytes this rank has sent: its updates, and its server's answers."""
        self._model.collect()
        return self._ledger

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}({self._settings.operator!r}, sync_every={self.sync_every}, optimizer={self.optimizer!r})"

    def __enter__(self) -> AsyncQsparseLocalSGD:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._model.fail(error)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One local step, and an exchange with the master model if the schedule says so. The first is collective.

        With ``torch.amp.GradScaler``, a step that overflows on this rank changes nothing here but counts.

        Raises:
            RuntimeError: ``total_steps`` were taken before, or the wrapped optimizer was given parameters that this
                one does not know.
            NonFiniteError: this rank's parameters moved to inf or NaN since its last exchange. These steps are
                dropped, it has the current model, and its memory is as it was; the other ranks go on. The inner
                optimizer's own state is not: to go on, clear it (``optimizer.optimizer.state.clear()``).
            PeerError: another rank, or a server, has failed; the run cannot go on.
            RankMismatchError: at the first step, when ranks differ.
        """
        with self._one_step():
            if self._steps == self._total_steps:
                raise RuntimeError(f"total_steps={self._total_steps} were taken: call finish()")
            if not self._model.is_open:
                self._begin()
            self._model.may_end = False
            self._settle()
            loss = self._local_step(closure)
            self._steps += 1
            for name, p in self._parameters.items():
                self._ledger.tensors[name].dense += p.nbytes
            if self._is_due(self._steps):
                self._exchange()
            return loss

    def finish(self) -> None:
        """Exchange, if a local step was taken since the last time, and wait for all ranks. Collective.

        All ranks then hold the master model. A further :meth:`step` begins anew with it, on all ranks.

        Each rank must have taken a step, since the start or the last :meth:`finish`, or none of them. Ranks meet in
        their first step; on one that took none, because it has fewer batches, for instance, this returns at once,
        and the others' first step fails, after the compressor's ``timeout``: this rank "did not begin".

        Raises:
            RuntimeError: ``total_steps`` were not taken yet, in logical mode.
            NonFiniteError, PeerError: see :meth:`step`.
        """
        if not self._model.is_open:
            return
        if self._mode == "logical" and self._steps != self._total_steps:
            error = RuntimeError(f"finish() after {self._steps} of total_steps={self._total_steps} steps")
            self._model.fail(error)
            raise error
        self._settle()
        if self._last_sync != self._steps:
            self._exchange()
        self._model.finish(self._anchors)
        self._saved, self._began = None, self._steps
        self._set_parameters(self._anchors)

    def reset_memory(self) -> None:
        """Forget what this rank has not sent so far."""
        self._model.reset_memory()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and under one more key the rest, this rank's server's among it.

        Collective from the first step to :meth:`finish`: no update must be on its way. Each rank saves its own; in
        free-running mode ranks may have taken different numbers of steps. After it, before the next step, all ranks
        may end without :meth:`finish`, to go on in another job.

        Raises:
            PeerError: another rank, or a server, has failed.
        """
        self._settle()
        server = self._model.pause() if self._model.is_open else self._saved
        self._model.collect()
        own = {
            "mode": self._mode,
            "servers": self._servers,
            "steps": self._steps,
            "began": self._began,
            "last_sync": self._last_sync,
            "anchors": {name: anchor.clone() for name, anchor in self._anchors.items()} if self._steps else None,
            "sender": self._model.state_dict(),
            "server": server,
        }
        return {**self.optimizer.state_dict(), ASYNC_STATE_KEY: own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, bit for bit in logical mode; the caller loads the model's state.

        Raises:
            RuntimeError: this optimizer has begun already.
            ValueError: it is not a state of this class, or of another model, optimizer or mode; nothing has changed
                then.
        """
        if self._model.is_open:
            raise RuntimeError("load the state before the first step, into a new optimizer")
        state = dict(state_dict)
        if ASYNC_STATE_KEY not in state:
            raise ValueError(
                "this is not a state of AsyncQsparseLocalSGD; a plain optimizer's is loaded into the wrapped "
                "optimizer (….optimizer.load_state_dict)"
            )
        own = state.pop(ASYNC_STATE_KEY)
        if own["mode"] != self._mode:
            raise ValueError(f"the state was saved with mode={own['mode']!r}, this is {self._mode!r}")
        if own.get("servers", self._servers) != self._servers:
            raise ValueError(f"the state was saved with servers={own['servers']!r}, this is {self._servers!r}")
        saved = own["anchors"] or {}
        wrong = {n for n, anchor in self._anchors.items() if n in saved and anchor.shape != saved[n].shape}
        wrong |= saved.keys() ^ self._anchors.keys() if saved else set()
        if wrong:
            raise ValueError(f"the state is of another model; these do not match: {', '.join(sorted(wrong))}")
        load_together([(self.optimizer, state)], lambda: self._model.load_state_dict(own["sender"]))
        for name, values in saved.items():
            self._anchors[name].copy_(values)
        self._steps, self._last_sync, self._saved = own["steps"], own["last_sync"], own["server"]
        self._began = own.get("began", 0)

    def _is_due(self, step: int) -> bool:
        if step == self._total_steps:
            return True
        return self.sync_every(step) if callable(self.sync_every) else step % self.sync_every == 0

    def _begin(self) -> None:
        if self._saved is None:  # the parameters are final only now
            for name, p in self._parameters.items():
                self._anchors[name].copy_(p.detach())
        communicator, ranks = members(self._process_set, self._settings.communicator)
        schedule = None
        if self._mode == "logical":
            assert self._total_steps is not None
            schedule = [step for step in range(self._steps + 1, self._total_steps + 1) if self._is_due(step)]
        self._model.open(
            communicator,
            ranks,
            self._statement(),
            self._settings.timeout,
            pace=Pace(schedule, self._max_staleness, self._timeout, self._servers),
            anchors=self._anchors,
            saved=self._saved,
        )

    def _exchange(self) -> None:
        # What is allocated in inference mode could not be changed later.
        with torch.inference_mode(False), torch.no_grad(), interrupted_at_its_end():
            self._add()
            self._last_sync, self._is_stale = self._steps, True
            try:
                self._model.exchange(self._steps - self._began, self._anchors)
            finally:
                self._settle()

    def _add(self) -> None:
        try:
            for name, anchor in self._anchors.items():
                self._model.add(name, moved(anchor, self._parameters[name]))
        except Exception as error:
            self._model.let_fail(error)  # the others may wait for this rank
        except BaseException:
            self._model.stay_away()
            raise

    def _statement(self) -> str:
        lines = [f"{type(self).__name__} with mode={self._mode!r}, max_staleness={self._max_staleness}"]
        lines += [f"servers={self._servers}"]
        if self._mode == "logical":
            lines += [f"total_steps={self._total_steps}"]
        if self._saved is None:
            lines += [f"start with checksum {checksum(self._anchors)} (equal after hvd.broadcast_parameters)"]
        else:
            lines += ["a state in mid-run"]
        return "\n".join(lines)


def random_gaps(largest: int, seed: int = 0, rank: int | None = None) -> Callable[[int], bool]:
    """``sync_every`` with gaps drawn uniformly from 1 to ``largest``: H in the paper's asynchronous experiments.

    Args:
        largest: H, steps.
        seed: of the draws.
        rank: that each rank draws its own gaps by; Horovod's rank if None.

    Raises:
        ValueError: ``largest`` is less than 1.
    """
    check_period(largest)
    return _RandomGaps(largest, seed, rank)


class _RandomGaps:
    def __init__(self, largest: int, seed: int, rank: int | None) -> None:
        # Configuration
        self._largest = largest
        self._seed = seed
        self._rank = rank
        # State: draws so far, a function of the configuration
        self._generator: random.Random | None = None
        self._steps: set[int] = set()
        self._last = 0

    def __repr__(self) -> str:
        return f"random_gaps({self._largest}, seed={self._seed})"

    def __call__(self, step: int) -> bool:
        if self._generator is None:  # hvd.init() may come after the schedule
            rank = hvd.rank() if self._rank is None else self._rank
            self._generator = random.Random(f"{self._seed} {rank}")
        while self._last < step:
            self._last += 1 + int(self._generator.random() * self._largest)
            self._steps.add(self._last)
        return step in self._steps
