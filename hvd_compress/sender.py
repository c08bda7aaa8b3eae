"""From tensors to messages, with memory: what all kinds of exchange have in common."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import horovod.torch as hvd
import torch
from torch import Tensor

from .errors import RankMismatchError
from .horovod_exchange import HorovodExchange
from .ledger import Ledger
from .meeting import Member, Place, agree, meet, statement
from .memory import Memory
from .operators import Operator, working_dtype
from .operators.base import Draws, apart
from .schedules import Constant, Plan
from .wire import Message, numels_of

if TYPE_CHECKING:  # importing mpi4py starts MPI, which must wait until the job is known to have ranks
    from mpi4py import MPI


_STATE_FORMAT = 2
ALIKE, AFTER = -1, -2  # in place of a rank: draws that are the same on all, before and after the exchange

_STEP_BITS = 40

Overflow = list[tuple[int, str]]  # rank and name of what holds inf or NaN


class Pending(NamedTuple):
    """A tensor on its way."""

    flat: Tensor  # its elements, whose storage the memory may take
    compressed: bool  # else it is sent whole
    remembered: bool  # whether the memory waits for the outcome


class Sender(Member):
    """Turns named tensors into messages, with memory: the half of an exchange that is the same for all kinds of it.

    Tensors are :meth:`add`-ed in any order. Subclasses send what was added and see to the memory's outcome.

    Args:
        shapes: the shape of each tensor that may come, in an order that is the same on all ranks.
        operator: compresses each tensor, or says what does in each exchange.
        memory: of each tensor; used by this sender alone.
        dense_below: tensors with fewer elements are sent whole.
        seed: of the operators' random draws. A draw depends on the seed, the rank, the exchange and the tensor
            only, so that neither the order of tensors nor a restart changes it.
        ledger: where the bytes are written down.
        agree: is told of an exchange's overflow once it is known, and says what counts. Only then are memories
            updated, so what it raises leaves them as they were.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        *,
        operator: Operator | Plan,
        memory: Memory,
        dense_below: int,
        seed: int,
        ledger: Ledger,
        agree: Callable[[Overflow], Overflow] = lambda overflow: overflow,
    ) -> None:
        # Configuration
        self._shapes = dict(shapes)
        self._ids = {name: id for id, name in enumerate(shapes)}
        self._operator = operator
        self._dense_below = dense_below
        self._seed = seed
        self._ledger = ledger
        self._agree = agree
        # State
        sizes = {name: shape.numel() for name, shape in shapes.items() if shape.numel() >= dense_below}
        self._schedule = operator.start(sizes) if isinstance(operator, Plan) else Constant(operator)
        self._energies: dict[str, Tensor] = {}  # squared norms of what was added, if the schedule asks for them
        self._memory = memory
        self._round = 0
        self._waiting: dict[str, Tensor] = {}  # flat: what will be compressed together
        self._pending: dict[str, Pending] = {}
        self._messages: dict[str, Message] = {}  # of these, until they are sent
        self._place: Place | None = None  # once the ranks have met
        self._saved_as: Place | None = None  # in the state that was loaded

    def add(self, name: str, tensor: Tensor, into: Tensor | None = None) -> None:
        """Compress ``tensor`` for the next exchange; a second one of that name replaces the first.

        Args:
            name: one of ``shapes``.
            tensor: given up: what it holds is not defined from now on, and its storage may become that of a memory or
                of a result. A view is left as it is, since its storage has another owner.
            into: of the tensor's size, working dtype and device, contiguous, holding anything: is given up in place
                of the tensor, which is then left as it is.
        """
        try:
            with self._ledger.timed("compress"):
                self._waiting.pop(name, None)
                self._messages.pop(name, None)
                if name in self._pending:
                    self._rollback({name: self._pending.pop(name)})
                flat, own = laid_out(tensor, into)
                if own is flat and self._may_wait(flat):
                    self._waiting[name] = flat
                else:
                    self._pending[name], self._messages[name] = self._compress(name, flat, own)
        except Exception as error:  # every rank must reach the exchange, which then tells the others
            self.let_fail(error)

    def state_dict(self) -> dict[str, Any]:
        """What makes the next exchange go on as if there had been no restart: memory, counters, seed, ledger.

        Raises:
            RuntimeError: tensors were added that have not been exchanged, or an exchange has failed on this rank
                alone.
        """
        if self._spoilt is not None:
            raise self._spoilt
        if self._pending or self._waiting or self._failure is not None:
            raise RuntimeError("the state cannot be taken between backward() and step(): take it after step()")
        rank, size = self._place or self._saved_as or (None, None)
        return {
            "format": _STATE_FORMAT,
            "round": self._round,
            "seed": self._seed,
            "rank": rank,
            "size": size,
            "memory": self._memory.state_dict(),
            "rows": list(self._memory.rows),
            "op": "Average",
            "schedule": self._schedule.state_dict(),
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; on an error nothing has changed, but for an exchange that had begun.

        That is given up: do it on all ranks, since it fails on those that go on with it.

        Raises:
            ValueError: the state is of another format, schedule or kind of memory, or holds memories of other tensors
                than these.
        """
        if state.get("format") != _STATE_FORMAT:
            raise ValueError(f"expected a compressor's state of format {_STATE_FORMAT}, got {state.get('format')!r}")
        for name, memory in state["memory"].items():
            if name not in self._shapes:
                raise ValueError(f"the state has a memory for {name!r}, which is not a parameter here")
            if memory.shape[-1] != self._shapes[name].numel():
                raise ValueError(
                    f"the state's memory of {name!r} has {memory.shape[-1]} elements, the parameter has "
                    f"{self._shapes[name].numel()}"
                )
        schedule = self._schedule.state_dict()
        check_memories(state, self._memory)
        if schedule and state["schedule"].keys() != schedule.keys():
            raise ValueError(f"the state was not saved with a schedule like {self._operator!r}")
        saved_as = None if state["rank"] is None else (state["rank"], state["size"])
        here = self._place
        if saved_as and here and saved_as != here:
            raise ValueError(
                f"this is rank {here[0]} of {here[1]}, the state is rank {saved_as[0]}'s of {saved_as[1]}"
            )
        self._drop()
        self._memory.load_state_dict(state["memory"])
        self._failure = self._spoilt = None
        self._schedule.load_state_dict(state["schedule"])
        self._ledger.load_state_dict(state["ledger"])
        self._round, self._seed, self._saved_as = state["round"], state["seed"], saved_as

    def stay_away(self) -> None:
        """See :meth:`hvd_compress.meeting.Member.stay_away`."""
        super().stay_away()
        self._drop()

    def reset_memory(self) -> None:
        """Forget what the memory holds. Do it on all ranks, between exchanges."""
        self._memory.reset()

    def residual(self, name: str) -> Tensor | None:
        """What this rank's memory has still to send of a tensor, flat; None for nothing.

        Raises:
            TypeError: the memory is of another kind.
        """
        return self._memory.residual(name)

    def give_back(self, name: str, rest: Tensor) -> None:
        """Keep for the next exchange what was summed, and cannot be handed out.

        Args:
            name: of a tensor.
            rest: its part of the sum over ranks, flat; the same on all ranks, of which one keeps it.
        """
        if self.rank == 0 and self._memory.takes_back and self._memory.residual(name) is not None:
            self._memory.take_back(name, 0, rest)

    def _meet(self, communicator: MPI.Intracomm, ranks: Sequence[int], expects: str, timeout: float) -> MPI.Intracomm:
        """A communicator of ``ranks`` alone, once all are there and agree. Collective; see :meth:`Reducer.open`."""
        private, self._place, sent = meet(communicator, ranks, self._statement(expects), self._saved_as, timeout)
        self._ledger.shared.mpi += sent
        return private

    def _meet_through_horovod(
        self, process_set: hvd.ProcessSet, ranks: Sequence[int], expects: str
    ) -> HorovodExchange:
        """The same where Horovod runs without MPI."""
        exchange, self._place = agree(process_set, ranks, self._statement(expects), self._saved_as)
        self._ledger.shared.horovod += exchange.sent
        return exchange

    def _statement(self, expects: str) -> str:
        return statement(self._shapes, self._operator, self._memory, self._dense_below, self._seed, expects)

    def _drop(self) -> None:
        """Forget what was added for an exchange that never came about."""
        self._rollback(self._pending)
        self._waiting, self._pending, self._messages, self._energies = {}, {}, {}, {}
        self._failure = self._spoilt

    def _take(self) -> tuple[dict[str, Pending], dict[str, Message], Exception | None]:
        """What was added since the last time, in the order that is the same on all ranks, or why it was not.

        The messages are those that have not been sent.
        """
        waiting = [*self._waiting]
        self._messages.update(zip(waiting, self._compress_together(waiting), strict=False))
        pending = {name: self._pending[name] for name in sorted(self._pending, key=self._ids.__getitem__)}
        messages = {name: self._messages[name] for name in pending if name in self._messages}
        failure, self._pending, self._messages, self._failure = self._failure, {}, {}, self._spoilt
        return pending, messages, failure

    def _energy(self) -> float:
        """The squared norm of what was compressed since the last time, if the schedule asks for it."""
        energies, self._energies = list(self._energies.values()), {}
        return _total(energies)

    def _may_wait(self, flat: Tensor) -> bool:
        """Whether a tensor is best compressed together with others: on a CPU each loop takes the caches from Python.

        On a GPU the work is begun at once, as the backward pass goes on.
        """
        is_plain = flat.is_cpu and self._memory.only_adds and self._schedule.energy_of == "nothing"
        return is_plain and flat.numel() >= self._dense_below

    def _compress_together(self, names: Sequence[str]) -> Sequence[Message]:
        """Messages of waiting tensors; of none, if there is an error, which is for the exchange to tell."""
        if not names:
            return []
        flats = [self._waiting.pop(name) for name in names]
        try:
            with self._ledger.timed("compress"):
                first, *others = (self._schedule.operator(name) for name in names)
                xs, memories = zip(*map(self._memory.compensate, names, flats), strict=True)
                if all(operator is first for operator in others) and all(m is not None for m in memories):
                    draws = [self._draws(first, name, x.device) for name, x in zip(names, xs, strict=True)]
                    messages = first.split_all(flats, memories, xs, draws)
                    _check_sizes(first, messages, xs)
                else:
                    messages = [*map(self._message, names, flats, xs, memories)]
            self._pending.update((name, Pending(flat, True, True)) for name, flat in zip(names, flats, strict=True))
        except BaseException as error:
            for name in names:
                self._pending.pop(name, None)
                self._memory.rollback(name)
            if not isinstance(error, Exception):
                raise
            self.let_fail(error)
            return []
        return messages

    def _compress(self, name: str, flat: Tensor, own: Tensor) -> tuple[Pending, Message]:
        is_small = flat.numel() < self._dense_below
        if is_small and not self._memory.covers_small:
            return Pending(own, compressed=False, remembered=False), Message.dense(flat.clone())
        if not is_small and self._schedule.energy_of == "added":
            self._energies[name] = flat.square().sum()
        try:
            if self._memory.only_adds:
                x, other = self._memory.compensate(name, own)
            else:
                x, other = self._memory.compensate(name, filled(flat, own))
                flat = x
            return Pending(own, not is_small, remembered=True), self._message(name, flat, x, other)
        except BaseException:  # Ctrl-C too
            self._memory.rollback(name)
            raise

    def _message(self, name: str, flat: Tensor, x: Tensor, other: Tensor | None) -> Message:
        """What is sent of what the memory has made of ``flat``, of which the memory has learnt then."""
        is_small = flat.numel() < self._dense_below
        if other is None:
            filled(flat, x)
        elif is_small or self._schedule.energy_of == "compressed":
            torch.add(flat, other, out=x)
            other = None
        message = Message.dense(x.clone()) if is_small else self._encode(name, flat, other, x)
        if other is None:
            self._memory.update(name, message)
        return message

    def _encode(self, name: str, flat: Tensor, other: Tensor | None, x: Tensor) -> Message:
        """The message of x; of flat + other if there is another, of which x becomes what the message leaves."""
        if self._schedule.energy_of == "compressed":
            self._energies[name] = x.square().sum()
        operator = self._schedule.operator(name)
        draws = self._draws(operator, name, x.device)
        message = apart(operator.encode(x, **draws), x) if other is None else operator.split(flat, other, x, **draws)
        _check_sizes(operator, [message], [x])
        return message

    def _draws(self, operator: Operator, name: str, device: torch.device) -> Draws:
        draws = {}
        if operator.draws:
            draws["generator"] = self._generator(name, self.rank, device)
        if operator.shared_draws:
            draws["shared"] = self._generator(name, ALIKE, device)
        return draws

    def _commit(self, pending: Mapping[str, Pending]) -> dict[str, Tensor]:
        """Returns vectors that are free for the sums."""
        free = {}
        for name, p in pending.items():
            instead = self._memory.commit(name) if p.remembered else None
            free[name] = p.flat if instead is None else instead
        return free

    def _rollback(self, pending: Mapping[str, Pending]) -> dict[str, Tensor]:
        """Returns vectors that are free for the sums."""
        for name, p in pending.items():
            if p.remembered:
                self._memory.rollback(name)
        return {name: p.flat for name, p in pending.items()}

    def _generator(self, name: str, who: int, device: torch.device) -> torch.Generator:
        key = struct.pack("<qqqq", self._seed, who, self._round, self._ids[name])
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def check_memories(state: Mapping[str, Any], memory: Memory) -> None:
    """Raise ValueError unless what a sender's state holds is of a memory like ``memory``."""
    if state["memory"] and tuple(state["rows"]) != tuple(memory.rows):
        raise ValueError(f"the state was not saved with a memory like {memory!r}: it holds {state['rows']}")


def laid_out(tensor: Tensor, into: Tensor | None) -> tuple[Tensor, Tensor]:
    """``tensor`` flat, in the working dtype, and where its elements may stay: there or elsewhere; see :func:`filled`.

    Elsewhere if ``into`` says so, or if the storage has another owner or more elements, to which its owner may write.
    Autograd's own gradients are no views.
    """
    # .data has a count of changes of its own: what is done to it later must not look like somebody else's change.
    flat, dtype = tensor.data.reshape(-1), working_dtype(tensor.dtype)
    flat = flat if flat.dtype == dtype else flat.to(dtype)
    if into is not None:
        return flat, into.view(-1)
    is_lent = tensor._is_view() and flat.data_ptr() == tensor.data_ptr()
    return flat, torch.empty_like(flat) if is_lent or flat.untyped_storage().nbytes() != flat.nbytes else flat


def filled(flat: Tensor, own: Tensor) -> Tensor:
    """``own``, which now holds what ``flat`` does."""
    return own if own is flat else own.copy_(flat)


def stamp(exchanges: int, step: int | None) -> int:
    """One number of 64 bits that ranks compare: how many exchanges there have been, and the step (None for the same).

    Both, since ranks may be at one step and yet have seen different exchanges succeed: a message may arrive damaged
    on one of them.
    """
    return (exchanges << _STEP_BITS | (exchanges if step is None else step)) & (1 << 64) - 1


def check_stamp(rank: int, theirs: int, ours: int) -> None:
    """Raise RankMismatchError unless ``rank`` has the stamp that is this rank's."""
    if theirs == ours:
        return
    (their_exchanges, their_step), (exchanges, step) = (divmod(s, 1 << _STEP_BITS) for s in (theirs, ours))
    if their_step != step:
        raise RankMismatchError(f"rank {rank} exchanges at step {their_step}, this rank at step {step}")
    raise RankMismatchError(
        f"rank {rank} has seen {their_exchanges} exchanges, this rank {exchanges}: one failed on some ranks alone, "
        "and they differ since then. Load a checkpoint on all ranks"
    )


def _check_sizes(operator: Operator, messages: Sequence[Message], xs: Sequence[Tensor]) -> None:
    for made, x in zip(numels_of(messages), xs, strict=True):
        if made != x.numel():
            raise ValueError(f"{operator!r} made a message of {made} elements from {x.numel()}")


def _total(numbers: list[Tensor]) -> float:
    """One transfer for all: on a GPU each read of a number waits for the device."""
    return float(torch.stack([n.double().to(numbers[0].device) for n in numbers]).sum()) if numbers else 0.0
