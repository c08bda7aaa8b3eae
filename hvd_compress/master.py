"""The master model of asynchronous local SGD: what a server does with updates, and in which order.

The model is divided among the ranks by whole tensors. Each rank's server has a :class:`Shard` of it and a
:class:`Master` that decides, by its :class:`Turns`, when a rank's update is applied and when that rank is answered.
Nothing here knows MPI: packets come in and go out as bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import IntEnum
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import wire
from .errors import NonFiniteError, RankMismatchError, WireError
from .ledger import Ledger
from .wire import Floats, Message

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from .exchange.gather import Bytes


class Topic(IntEnum):
    """What a request is about."""

    UPDATE = 0  # this rank's update, at the step that is the packet's round; the answer is what has changed
    FINISH = 1  # it sends no more; the answer is what has changed, once all ranks have finished
    PAUSE = 2  # the answer is empty, once all ranks pause
    FAILURE = 3  # it has failed; there is no answer


def deal(sizes: Sequence[int], servers: int) -> list[list[int]]:
    """Which tensors each server looks after: the largest first, each to the one with the fewest elements so far.

    Args:
        sizes: elements of each tensor.
        servers: how many there are.

    Returns:
        For each server, ascending positions in ``sizes``; there may be none.
    """
    shares: list[list[int]] = [[] for _ in range(servers)]
    loads = [0] * servers
    for id in sorted(range(len(sizes)), key=lambda id: -sizes[id]):
        server = loads.index(min(loads))
        shares[server].append(id)
        loads[server] += sizes[id]
    return [sorted(share) for share in shares]


class Shard:
    """Some tensors of the master model, and for each element when it has changed.

    Args:
        tensors: initial values by id, ids ascending; copied.
        size: R, the number of ranks.
    """

    def __init__(self, tensors: Mapping[int, Tensor], size: int) -> None:
        # State. The clock counts applications of updates.
        self._values = {id: tensor.detach().cpu().clone().reshape(-1) for id, tensor in tensors.items()}
        self._changed = {id: torch.zeros(len(x), dtype=torch.int32, device="cpu") for id, x in self._values.items()}
        self._clock = 0
        self._seen = [0] * size  # the clock at each rank's last answer

    def apply(self, packets: Sequence[wire.Packet]) -> None:
        """X ← X − (1/R) Σ C, the sum over ``packets`` in their order; on an error nothing has changed.

        It is computed as :class:`hvd_compress.QsparseLocalSGD` does, operation by operation, and so to the same bits.

        Raises:
            WireError: a message does not fit the tensors here.
            NonFiniteError: the model would hold inf or NaN.
        """
        updates: dict[int, list[Message]] = {}
        for packet in packets:
            for id, message in zip(packet.ids, packet.messages, strict=True):
                if id not in self._values or message.numel != len(self._values[id]):
                    raise WireError(f"an update of {message.numel} elements of tensor {id} does not belong here")
                updates.setdefault(id, []).append(message)
        results = {id: self._updated(id, messages) for id, messages in updates.items()}
        if not all(bool(torch.isfinite(new).all()) for _, new in results.values()):
            raise NonFiniteError("an update would make the master model inf or NaN")
        self._clock += 1
        for id, (indices, new) in results.items():
            where = slice(None) if indices is None else indices
            self._values[id][where] = new
            self._changed[id][where] = self._clock

    def changes(self, rank: int, round: int) -> tuple[wire.Encoded, list[int]]:
        """What has changed since ``rank`` was told the last time, which is now, for :func:`receive`; and its ids."""
        since, self._seen[rank] = self._seen[rank], self._clock
        changed = {id: (clock > since).nonzero().reshape(-1) for id, clock in self._changed.items()}
        messages = {id: self._values_at(id, indices) for id, indices in changed.items() if len(indices)}
        ids = list(messages)
        encoded = wire.encode(list(messages.values()), ids=ids, round=round)
        large = [id for id, share in zip(ids, encoded.shares, strict=True) if share > self._values[id].nbytes]
        if any(messages[id].indices is not None for id in large):  # they cost more than they save
            messages.update({id: Message.dense(self._values[id]) for id in large})
            encoded = wire.encode(list(messages.values()), ids=ids, round=round)
        return encoded, ids

    def state_dict(self) -> dict[str, Any]:
        """Copies."""
        return {
            "values": {id: x.clone() for id, x in self._values.items()},
            "changed": {id: x.clone() for id, x in self._changed.items()},
            "clock": self._clock,
            "seen": list(self._seen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        for own, saved in ((self._values, state["values"]), (self._changed, state["changed"])):
            for id, x in own.items():
                x.copy_(saved[id])
        self._clock, self._seen = state["clock"], list(state["seen"])

    def _updated(self, id: int, messages: Sequence[Message]) -> tuple[Tensor | None, Tensor]:
        """New values of a tensor, and their indices; None for all."""
        x = self._values[id]
        supports = [m.indices for m in messages if m.indices is not None]
        if len(supports) < len(messages):
            total = torch.zeros(len(x), dtype=messages[0].dtype)
            for message in messages:
                message.add_to(total)
            return None, x - (total / len(self._seen)).to(x.dtype)
        indices, places = torch.unique(torch.cat(supports), return_inverse=True)
        total = torch.zeros(len(indices), dtype=messages[0].dtype)
        for message, place in zip(messages, places.split([len(s) for s in supports]), strict=True):
            total.index_add_(0, place, message.values.decode())
        return indices, x[indices] - (total / len(self._seen)).to(x.dtype)

    def _values_at(self, id: int, indices: Tensor) -> Message:
        x = self._values[id]
        if len(indices) == len(x):
            return Message.dense(x)
        values = x[indices]
        # A sparse message leaves zeros out, which here are news. The master is finite, so inf is free to mean zero.
        values = torch.where(values == 0, torch.copysign(torch.full_like(values, torch.inf), values), values)
        return Message((len(x),), indices, Floats(values))


def receive(message: Message, x: Tensor) -> None:
    """Bring a copy up to date, in place, with one of the messages of :meth:`Shard.changes`.

    Args:
        message: on any device.
        x: contiguous, of any shape with the right number of elements.
    """
    message, flat = message.to(x.device), x.view(-1)
    values = message.values.decode()
    if message.indices is None:
        flat.copy_(values)
    else:
        flat[message.indices] = torch.where(values.isinf(), torch.copysign(torch.zeros_like(values), values), values)


class Turns(ABC):
    """When an update is applied, and when its sender is answered."""

    def __init__(self, size: int) -> None:
        # State
        self.last = [0] * size  # the step of each rank's last update

    @abstractmethod
    def next(self, waiting: Mapping[int, int]) -> list[int]:
        """The ranks, ascending, whose updates are to be applied now, together. None if the time has not come.

        Args:
            waiting: the step of each update that waits, by rank.

        Raises:
            RankMismatchError: an update is of another step than it should be.
        """

    @abstractmethod
    def may_go_on(self, rank: int, idle: Collection[int]) -> bool:
        """Whether a rank whose update was applied is answered now.

        Args:
            rank: the one.
            idle: ranks that have finished or pause, for which nobody has to wait.
        """


class ByClock(Turns):
    """By the steps' numbers: at step t the updates of all ranks whose schedule has t. Algorithm 2 to the letter.

    An update waits for those of earlier steps and for the others of its own step, whatever the ranks' speeds.

    Args:
        schedules: for each rank the steps after which it sends an update, ascending.
    """

    def __init__(self, schedules: Sequence[Sequence[int]]) -> None:
        super().__init__(len(schedules))
        # Configuration
        self._schedules = schedules

    def next(self, waiting: Mapping[int, int]) -> list[int]:
        """See :class:`Turns`."""
        expected = {rank: self._after(rank) for rank in range(len(self._schedules))}
        for rank, step in waiting.items():
            if step != expected[rank]:
                raise RankMismatchError(
                    f"rank {rank} sends an update at step {step}, by its schedule the next is at {expected[rank]}"
                )
        tick = min((step for step in expected.values() if step is not None), default=None)
        due = [rank for rank, step in expected.items() if step is not None and step == tick]
        if any(rank not in waiting for rank in due):
            return []
        for rank in due:
            self.last[rank] = waiting[rank]
        return due

    def may_go_on(self, rank: int, idle: Collection[int]) -> bool:
        """Always: it has waited before."""
        return True

    def _after(self, rank: int) -> int | None:
        """The step of a rank's next update; None if there is none."""
        steps = self._schedules[rank]
        place = bisect(steps, self.last[rank])
        return steps[place] if place < len(steps) else None


class AsTheyCome(Turns):
    """As the updates arrive.

    Args:
        size: number of ranks.
        max_staleness: a rank that has sent its update of step t is held until all others have sent one of step
            t − ``max_staleness`` or later; None for never.
    """

    def __init__(self, size: int, max_staleness: int | None) -> None:
        super().__init__(size)
        # Configuration
        self._max_staleness = max_staleness

    def next(self, waiting: Mapping[int, int]) -> list[int]:
        """See :class:`Turns`."""
        for rank, step in waiting.items():
            self.last[rank] = step
            return [rank]
        return []

    def may_go_on(self, rank: int, idle: Collection[int]) -> bool:
        """See :class:`Turns`."""
        if self._max_staleness is None:
            return True
        slowest = min((step for other, step in enumerate(self.last) if other not in idle), default=self.last[rank])
        return self.last[rank] - slowest <= self._max_staleness


class Master:
    """One rank's server: an :class:`hvd_compress.exchange.Answerer`.

    Whatever goes wrong here, or is reported by a rank, is the answer to all who wait and to every later request.

    Args:
        shard: its part of the model.
        turns: see :class:`Turns`.
        names: of all tensors, by id.
        timeout: seconds without a word from a rank, while another waits, until that rank is taken for dead.
    """

    def __init__(self, shard: Shard, turns: Turns, names: Sequence[str], timeout: float) -> None:
        # Configuration
        self.shard = shard
        self.turns = turns
        self._names = names
        self._timeout = timeout
        # State
        size = len(turns.last)
        self.ledger = Ledger()  # of the answers
        self._heard = dict.fromkeys(range(size), monotonic())
        self._waiting: dict[int, float] = {}  # ranks that wait for an answer → since when
        self._updates: dict[int, wire.Packet] = {}  # that wait to be applied
        self._applied: list[int] = []  # ranks whose updates were applied, and who wait for the answer
        self._idle: dict[int, Topic] = {}  # ranks that have finished or pause
        self._failure: str | None = None
        self._failed: set[int] = set()  # ranks that know of it
        self._finished = False

    @property
    def waiting(self) -> Collection[int]:
        """The ranks that wait for an answer."""
        return self._waiting

    @property
    def is_done(self) -> bool:
        """Whether no more requests will come."""
        return self._finished or len(self._failed) == len(self._heard)

    def receive(self, rank: int, topic: int, request: Bytes) -> list[tuple[int, Bytes]]:
        """Take a request in, and answer whom it allows to go on."""
        self._heard[rank] = monotonic()
        try:
            packet = wire.decode(request)
        except WireError as error:
            self._waiting[rank] = monotonic()
            return self._fail(f"from rank {rank}: {error}")
        if topic == Topic.FAILURE:
            self._failed.add(rank)
            return self._fail(packet.failure or f"rank {rank} failed")
        self._waiting[rank] = monotonic()
        if self._failure is not None:
            return self._fail(self._failure)
        if topic == Topic.UPDATE:
            self._updates[rank] = packet
        else:
            self._idle[rank] = Topic(topic)
        answers: list[tuple[int, Bytes]] = []
        try:
            answers.extend(self._proceed())  # as they come: those before an error are good
        except Exception as error:
            answers += self._fail(f"{type(error).__name__}: {error}")
        return answers

    def look(self, now: float) -> list[tuple[int, Bytes]]:
        """Fail if ranks have waited too long for others that are silent."""
        if not self._waiting or now - min(self._waiting.values()) <= self._timeout:
            return []
        silent = [r for r, last in self._heard.items() if r not in self._waiting and now - last > self._timeout]
        if not silent:
            return []
        return self._fail(
            f"rank(s) {', '.join(map(str, silent))} sent nothing for {self._timeout:g} s while others wait for them: "
            "see their output; if they only take long from one exchange to the next, a larger timeout=… helps"
        )

    def _proceed(self) -> Iterator[tuple[int, Bytes]]:
        """Apply and answer whatever can be."""
        yield from self._release()
        while due := self.turns.next({rank: packet.round for rank, packet in self._updates.items()}):
            self.shard.apply([self._updates.pop(rank) for rank in due])
            self._applied += due
            yield from self._release()
        if len(self._idle) == len(self._heard):
            yield from self._part()
        if len(self._waiting) == len(self._heard):
            raise RankMismatchError(
                f"ranks {sorted(self._waiting.keys() - self._idle)} wait for updates of ranks {sorted(self._idle)}, "
                "who finish or save their state: do that on all ranks, after the same number of steps"
            )

    def _release(self) -> Iterator[tuple[int, Bytes]]:
        free = [rank for rank in self._applied if self.turns.may_go_on(rank, self._idle)]
        self._applied = [rank for rank in self._applied if rank not in free]
        for rank in free:
            yield self._answer(rank, *self.shard.changes(rank, self.turns.last[rank]))

    def _part(self) -> Iterator[tuple[int, Bytes]]:
        """All ranks have finished, or all pause."""
        topics = set(self._idle.values())
        if len(topics) > 1:
            saving = [rank for rank, topic in self._idle.items() if topic == Topic.PAUSE]
            raise RankMismatchError(f"ranks {sorted(saving)} save their state, the others finish")
        self._finished = topics == {Topic.FINISH}
        self._idle.clear()
        for rank in self._heard:
            yield self._answer(rank, *(self.shard.changes(rank, 0) if self._finished else (wire.encode([]), [])))

    def _answer(self, rank: int, answer: wire.Encoded, ids: Sequence[int]) -> tuple[int, Bytes]:
        for id, share in zip(ids, answer.shares, strict=True):
            self.ledger.tensors[self._names[id]].mpi += share
        self.ledger.shared.mpi += len(answer.data) - sum(answer.shares)
        self._leave(rank)
        return rank, answer.data

    def _leave(self, rank: int) -> None:
        del self._waiting[rank]
        self._heard[rank] = monotonic()

    def _fail(self, text: str) -> list[tuple[int, Bytes]]:
        """Tell all who wait; the first failure is the one that is told."""
        self._failure = self._failure or text
        answer = wire.encode_failure(self._failure)
        answers = [(rank, answer) for rank in self._waiting]
        for rank, data in answers:
            self.ledger.shared.mpi += data.nbytes
            self._leave(rank)
        return answers
