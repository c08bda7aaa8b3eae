"""The compressed sum over ranks: where operator, memory, wire and exchange become one."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import wire
from .errors import PeerError, RankMismatchError, WireError
from .ledger import Ledger
from .memory import Memory
from .operators import Operator, working_dtype
from .schedules import Constant, Plan
from .wire import Message

if TYPE_CHECKING:  # importing mpi4py starts MPI, which must wait until the job is known to have ranks
    from mpi4py import MPI

    from .exchange import Exchange

_STATE_FORMAT = 1
_ALIKE, _AFTER = -1, -2  # in place of a rank: draws that are the same on all, before and after the exchange

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reduced:
    """The outcome of one exchange."""

    sums: dict[str, Tensor]  # name → flat sum over ranks, in the working dtype, on the tensor's device, own storage
    overflow: list[
        tuple[int, str]
    ]  # (rank, name) of messages with inf or NaN; no memory was updated if there are any


@dataclass(frozen=True)
class _Pending:
    """A tensor on its way."""

    message: Message
    remembered: bool  # whether the memory waits for the outcome


class Sender:
    """Turns named tensors into messages, with memory: the half of an exchange that is the same for all kinds of it.

    Tensors are :meth:`add`-ed in any order. Subclasses send what was added and see to the memory's outcome.

    Args:
        shapes: the shape of each tensor that may come, in an order that is the same on all ranks.
        operator: compresses each tensor, or says what does in each exchange.
        memory: of each tensor; used by this reducer alone.
        dense_below: tensors with fewer elements are sent whole.
        seed: of the operators' random draws. A draw depends on the seed, the rank, the exchange and the tensor
            only, so that neither the order of tensors nor a restart changes it.
        ledger: where the bytes are written down.
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
    ) -> None:
        # Configuration
        self._shapes = dict(shapes)
        self._ids = {name: id for id, name in enumerate(shapes)}
        self._operator = operator
        self._dense_below = dense_below
        self._seed = seed
        self._ledger = ledger
        # State
        sizes = {name: shape.numel() for name, shape in shapes.items() if shape.numel() >= dense_below}
        self._schedule = operator.start(sizes) if isinstance(operator, Plan) else Constant(operator)
        self._energies: dict[str, Tensor] = {}  # squared norms of what was added, if the schedule asks for them
        self._memory = memory
        self._round = 0
        self._pending: dict[str, _Pending] = {}
        self._failure: Exception | None = None
        self._place: tuple[int, int] | None = None  # this rank's, and number of ranks, once they have met
        self._saved_as: tuple[int, int] | None = None  # the same in the state that was loaded

    @property
    def size(self) -> int:
        """Number of ranks that are summed over."""
        assert self._place is not None, "open() comes first"
        return self._place[1]

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        assert self._place is not None, "open() comes first"
        return self._place[0]

    @property
    def covers_small(self) -> bool:
        """Whether small tensors have to come here too."""
        return self._memory.covers_small

    def add(self, name: str, tensor: Tensor) -> None:
        """Compress ``tensor`` for the next exchange; a second one of that name replaces the first.

        The tensor is given up: until the exchange is over, what it holds is not defined.
        """
        try:
            self._rollback({name: self._pending.pop(name)} if name in self._pending else {})
            self._pending[name] = self._compress(name, tensor)
        except Exception as error:  # every rank must reach the exchange, which then tells the others
            self._failure = self._failure or error

    def state_dict(self) -> dict[str, Any]:
        """What makes the next exchange go on as if there had been no restart: memory, counters, seed, ledger.

        Raises:
            RuntimeError: tensors were added that have not been exchanged.
        """
        if self._pending:
            raise RuntimeError("the state cannot be taken between backward() and step(): take it after step()")
        rank, size = self._place or (None, None)
        return {
            "format": _STATE_FORMAT,
            "round": self._round,
            "seed": self._seed,
            "rank": rank,
            "size": size,
            "memory": self._memory.state_dict(),
            "schedule": self._schedule.state_dict(),
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; on an error nothing has changed.

        Raises:
            ValueError: the state is of another format, or holds memories of other tensors than these.
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
        saved_as = None if state["rank"] is None else (state["rank"], state["size"])
        here = self._place
        if saved_as and here and saved_as != here:
            raise ValueError(
                f"this is rank {here[0]} of {here[1]}, the state is rank {saved_as[0]}'s of {saved_as[1]}"
            )
        self._memory.load_state_dict(state["memory"])
        self._schedule.load_state_dict(state["schedule"])
        self._ledger.load_state_dict(state["ledger"])
        self._round, self._seed, self._saved_as = state["round"], state["seed"], saved_as

    def reset_memory(self) -> None:
        """Forget what the memory holds. Do it on all ranks, between exchanges."""
        self._memory.reset()

    def residual(self, name: str) -> Tensor | None:
        """What this rank's memory has still to send of a tensor, flat; None for nothing.

        Raises:
            TypeError: the memory is of another kind.
        """
        return self._memory.residual(name)

    def _meet(self, communicator: MPI.Intracomm, ranks: Sequence[int], expects: str, timeout: float) -> MPI.Intracomm:
        """A communicator of ``ranks`` alone, once all are there and agree. Collective; see :meth:`Reducer.open`."""
        from .exchange import abort_on_uncaught_exception, rendezvous

        here = (ranks.index(communicator.Get_rank()), len(ranks))
        origin = "a state of its own, or none"
        if self._saved_as not in (None, here):
            saver = f"rank {self._saved_as[0]} of {self._saved_as[1]}"
            origin = (
                f"the state saved by {saver}, being rank {here[0]} of {here[1]} "
                "(each rank loads its own file, and as many ranks resume as have saved)"
            )
        private, sent = rendezvous(communicator, ranks, self._statement(origin, expects), timeout)
        if self._saved_as not in (None, here):  # a single rank has no other to disagree with
            raise RankMismatchError(f"this rank has {origin}")
        abort_on_uncaught_exception(private)
        self._place = here
        self._ledger.shared.mpi += sent
        return private

    def _statement(self, *expects: str) -> str:
        shapes = [f"tensor {name} of shape {tuple(shape)}" for name, shape in self._shapes.items()]
        return "\n".join(
            [
                f"message format {wire.VERSION}",
                f"operator {self._operator!r}",
                f"memory {self._memory!r}",
                f"dense_below={self._dense_below}",
                f"seed={self._seed}",
                *expects,
                *shapes,
            ]
        )

    def _take(self) -> tuple[dict[str, _Pending], Exception | None]:
        """What was added since the last time, in the order that is the same on all ranks, or why it was not."""
        pending = {name: self._pending[name] for name in sorted(self._pending, key=self._ids.__getitem__)}
        failure, self._pending, self._failure = self._failure, {}, None
        return pending, failure

    def _energy(self) -> float:
        """The squared norm of what was compressed since the last time, if the schedule asks for it."""
        energies, self._energies = list(self._energies.values()), {}
        return _total(energies)

    def _compress(self, name: str, tensor: Tensor) -> _Pending:
        flat = tensor.detach().to(working_dtype(tensor.dtype)).reshape(-1)
        is_small = len(flat) < self._dense_below
        if is_small and not self._memory.covers_small:
            return _Pending(Message.dense(flat.clone()), remembered=False)
        compensated = self._memory.compensate(name, flat)
        try:
            return _Pending(self._encode(name, compensated, is_small), remembered=True)
        except Exception:
            self._memory.rollback(name)
            raise

    def _encode(self, name: str, compensated: Tensor, is_small: bool) -> Message:
        if is_small:
            return Message.dense(compensated.clone())
        if self._schedule.needs_energy:
            self._energies[name] = compensated.square().sum()
        operator = self._schedule.operator(name)
        generator = self._generator(name, _ALIKE if operator.shared_draws else self.rank, compensated.device)
        message = operator.encode(compensated, generator=generator)
        if message.numel != len(compensated):
            raise ValueError(f"{operator!r} made a message of {message.numel} elements from {len(compensated)}")
        return message

    def _commit(self, pending: Mapping[str, _Pending]) -> None:
        for name, p in pending.items():
            if p.remembered:
                self._memory.commit(name, p.message)

    def _rollback(self, pending: Mapping[str, _Pending]) -> None:
        for name, p in pending.items():
            if p.remembered:
                self._memory.rollback(name)

    def _generator(self, name: str, who: int, device: torch.device) -> torch.Generator:
        key = struct.pack("<qqqq", self._seed, who, self._round, self._ids[name])
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Reducer(Sender):
    """Sums named tensors over ranks by compressed messages; the result is bit-identical on every rank.

    Tensors are :meth:`add`-ed in any order, which may differ between ranks, and exchanged by one :meth:`reduce`.
    Whatever fails on one rank, in an operator for instance, raises on all of them, and no memory changes. Its
    arguments are those of :class:`Sender`.
    """

    # State
    _exchange: Exchange | None = None

    @property
    def is_open(self) -> bool:
        """Whether the ranks have met."""
        return self._exchange is not None

    def open(self, communicator: MPI.Intracomm, ranks: Sequence[int], expects: str, timeout: float) -> None:
        """Meet the other ``ranks`` of ``communicator``. Collective over them.

        Args:
            communicator: contains the ranks.
            ranks: ascending, this one among them.
            expects: lines that must be the same on all ranks, besides what this reducer knows itself.
            timeout: seconds to wait for the other ranks.

        Raises:
            RankMismatchError: on every rank, when ranks differ or do not come, or when a rank has loaded the state of
                another rank or of another number of ranks.
        """
        from .exchange import Exchange

        expects = f"{self._round} exchanges so far\n{expects}"
        self._exchange = Exchange(self._meet(communicator, ranks, expects, timeout))

    def reduce(self, step: int | None = None) -> Reduced:
        """Exchange what was added, on this and all other ranks. Collective.

        Args:
            step: a number that must be the same on all ranks; that of the exchange if None.

        Raises:
            PeerError: another rank failed.
            RankMismatchError: the ranks added different tensors, or are not at the same step.
            WireError: a message arrived damaged.
            Exception: whatever :meth:`add` or packing raised on this rank.
        """
        step = self._round if step is None else step
        pending, failure = self._take()
        try:
            packets = self._swap_packets(pending, failure, step)
            overflow = _overflow(packets, list(pending))
        except BaseException:
            self._rollback(pending)
            raise
        if overflow:
            self._rollback(pending)
        else:
            self._commit(pending)
        sums = {}
        for place, (name, p) in enumerate(pending.items()):
            total = _sum([packet.messages[place] for packet in packets], p)
            sums[name] = self._receive(name, total) if p.remembered and not overflow else total
        return Reduced(sums, overflow)

    def _receive(self, name: str, total: Tensor) -> Tensor:
        return self._memory.receive(name, total, self.size, lambda: self._generator(name, _AFTER, total.device))

    def _swap_packets(
        self, pending: Mapping[str, _Pending], failure: Exception | None, step: int
    ) -> list[wire.Packet]:
        """Send this rank's messages, or why there are none, and receive everyone's."""
        assert self._exchange is not None, "open() comes first"
        energy = self._energy()
        sent_before = self._exchange.sent
        shares: list[int] = []
        if failure is None:
            try:
                ids = [self._ids[name] for name in pending]
                encoded = wire.encode([p.message for p in pending.values()], ids=ids, round=step, energy=energy)
                buffer, shares = encoded.data, encoded.shares
            except Exception as error:
                failure = error
        if failure is not None:
            buffer = wire.encode_failure(f"{type(failure).__name__}: {failure}", round=step)
        received = self._exchange.allgatherv(buffer)

        for name, share in zip(pending, shares, strict=failure is None):
            self._ledger.tensors[name].mpi += share
        self._ledger.shared.mpi += self._exchange.sent - sent_before - sum(shares)
        self._ledger.exchanges += 1
        if failure is not None:
            raise failure
        device = next(iter(pending.values())).message.device if pending else torch.device("cpu")
        packets = self._open_packets(received, list(pending), step, device)
        self._round += 1
        # In rank order, as the sums: all ranks must come to the same conclusion.
        self._schedule.advance(sum(packet.energy for packet in packets) / len(packets))
        return packets

    def _open_packets(
        self, received: Sequence[Any], names: list[str], step: int, device: torch.device
    ) -> list[wire.Packet]:
        packets = []
        for rank, data in enumerate(received):
            try:
                packets.append(wire.decode(data, device))
            except WireError as error:
                raise WireError(f"from rank {rank}: {error}") from None
        failed = [f"rank {rank} failed: {p.failure}" for rank, p in enumerate(packets) if p.failure is not None]
        if failed:
            raise PeerError("; ".join(failed))
        ids = [self._ids[name] for name in names]
        for rank, packet in enumerate(packets):
            if packet.round != step:
                raise RankMismatchError(f"rank {rank} exchanges at step {packet.round}, this rank at step {step}")
            if packet.ids != ids:
                different = {*packet.ids} ^ {*ids}
                which = ", ".join(name for name, id in self._ids.items() if id in different)
                raise RankMismatchError(f"rank {rank} and this rank do not send the same tensors: {which}")
            for name, message in zip(names, packet.messages, strict=True):
                if message.numel != self._shapes[name].numel():
                    raise WireError(f"rank {rank} sent {message.numel} elements of {name!r}")
        return packets


def _total(numbers: list[Tensor]) -> float:
    """One transfer for all: on a GPU each read of a number waits for the device."""
    return float(torch.stack([n.double().to(numbers[0].device) for n in numbers]).sum()) if numbers else 0.0


def _overflow(packets: list[wire.Packet], names: list[str]) -> list[tuple[int, str]]:
    """Which ranks' messages about which tensors hold inf or NaN."""
    messages = [(rank, name, m) for rank, p in enumerate(packets) for name, m in zip(names, p.messages, strict=True)]
    if not messages:
        return []
    finite = torch.stack([m.is_finite() for _, _, m in messages]).tolist()
    return [(rank, name) for (rank, name, _), good in zip(messages, finite, strict=True) if not good]


def _sum(messages: list[Message], pending: _Pending) -> Tensor:
    """In rank order, since floating point addition is not associative and all ranks must get the same bits."""
    own = pending.message
    flat = torch.zeros(own.numel, dtype=own.dtype, device=own.device)
    for message in messages:
        message.to(flat.device).add_to(flat)
    return flat
