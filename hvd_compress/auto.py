"""Chooses an exchange by measuring links, processor and messages once, before the first exchange."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor

from . import costs, wire
from .errors import RankMismatchError
from .ledger import Ledger
from .meeting import Member, Place, meet, statement, through_mpi
from .memory import Memory
from .node import node_of, speed
from .operators import Operator
from .reducer import Reduced
from .schedules import Constant, Plan
from .sender import filled, laid_out
from .side_stream import await_gpu
from .wire import Message

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI

    from .exchange import Topology, Watch
    from .hierarchical import HierarchicalReducer
    from .reducer import Reducer
    from .scattered import ScatteredReducer

    Chosen: TypeAlias = Reducer | HierarchicalReducer | ScatteredReducer

STATE_FORMAT = "auto 1"
_WINDOW = 1 << 16  # elements in which the union of all ranks' selections is counted

logger = logging.getLogger(__name__)


class AutoReducer(Member):
    """Sums by the exchange that :mod:`hvd_compress.costs` expects to be the fastest here.

    The first :meth:`reduce` measures the links between and within nodes, how long this rank's tensors take to
    compress, pack and open, how long the messages are, and how far the ranks select the same elements. All ranks
    learn all measurements, so they choose the same. The choice is logged (``hvd_compress.auto``, level INFO), and is
    part of the state, so that a resumed run keeps it.

    Args:
        make: the reducer of that name, with ``memory``.
        shapes, operator, memory, dense_below, seed, ledger: see :class:`hvd_compress.sender.Sender`.
        nodes, node_process_set: see :class:`hvd_compress.hierarchical.HierarchicalReducer`.
        reselect: see :class:`hvd_compress.scattered.ScatteredReducer`.
    """

    def __init__(
        self,
        make: Callable[[str], Chosen],
        shapes: Mapping[str, torch.Size],
        *,
        operator: Operator | Plan,
        memory: Memory,
        dense_below: int,
        seed: int,
        ledger: Ledger,
        nodes: Sequence[int] | None = None,
        node_process_set: hvd.ProcessSet | None = None,
        reselect: float | None = None,
    ) -> None:
        # Configuration
        self._make = make
        self._shapes = dict(shapes)
        self._operator = operator
        self._memory = memory
        self._dense_below = dense_below
        self._seed = seed
        self._ledger = ledger
        self._nodes = nodes
        self._node_process_set = node_process_set
        self._reselect = reselect if memory.takes_back else float("inf")
        # State
        self.choice: str | None = None  # once it is made
        self._chosen: Chosen | None = None
        self._pending: dict[str, Tensor] = {}  # of the first exchange
        self._failure: Exception | None = None
        self._place: Place | None = None
        self._watch: Watch | None = None  # while the choice is made
        self._private: MPI.Intracomm
        self._meeting: tuple[MPI.Intracomm, Sequence[int], str, float]  # what open() was told

    @property
    def is_open(self) -> bool:
        """Whether the ranks have met."""
        return self._place is not None

    def open(self, link: MPI.Intracomm | hvd.ProcessSet, ranks: Sequence[int], expects: str, timeout: float) -> None:
        """Meet the other ranks; see :meth:`hvd_compress.reducer.Reducer.open`.

        Raises:
            RankMismatchError: see there.
            RuntimeError: Horovod runs without MPI.
        """
        communicator = through_mpi(link, "auto")
        from .exchange import Watch

        by = "MPI" if self._node_process_set is None else "Horovod"
        mine = statement(
            self._shapes,
            self._operator,
            self._memory,
            self._dense_below,
            self._seed,
            f"exchange auto, nodes={self._nodes} summed by {by}, reselect={self._reselect}, chosen: {self.choice}",
            expects,
        )
        private, self._place, sent = meet(communicator, ranks, mine, None, timeout)
        self._ledger.shared.mpi += sent
        self._meeting = (communicator, ranks, expects, timeout)
        self._private = private
        self._watch = Watch(private, timeout)
        if self._chosen is not None:
            self._chosen.open(*self._meeting)

    def leave(self) -> None:
        """Not to be done, since another exchange may be chosen.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "exchange='auto' may keep memories by node and cannot go on with another number of ranks: use "
            "exchange='allgather' here"
        )

    def add(self, name: str, tensor: Tensor, into: Tensor | None = None) -> None:
        """Take in ``tensor`` for the next exchange; see :meth:`hvd_compress.sender.Sender.add`."""
        if self._chosen is not None:
            self._chosen.add(name, tensor, into)
            return
        if self._watch is not None:
            self._watch.begin()
        try:
            self._pending[name] = filled(*laid_out(tensor, into))
        except Exception as error:  # every rank must reach the exchange
            self.let_fail(error)

    def let_fail(self, error: Exception) -> None:
        """See :meth:`hvd_compress.sender.Sender.let_fail`."""
        if self._chosen is not None:
            self._chosen.let_fail(error)
        else:
            self._failure = self._failure or error

    @property
    def is_spoilt(self) -> bool:
        """See :attr:`hvd_compress.meeting.Member.is_spoilt`."""
        return self._chosen is not None and self._chosen.is_spoilt

    @contextmanager
    def alone(self) -> Iterator[None]:
        """See :meth:`hvd_compress.meeting.Member.alone`; after an exchange."""
        assert self._chosen is not None
        with self._chosen.alone():
            yield

    def stay_away(self) -> None:
        """See :meth:`hvd_compress.meeting.Member.stay_away`."""
        super().stay_away()
        self._pending = {}
        if self._chosen is not None:
            self._chosen.stay_away()

    def reduce(
        self,
        step: int | None = None,
        *,
        divisor: float = 1.0,
        overflow_elsewhere: bool = False,
        minuends: Mapping[str, Tensor] | None = None,
    ) -> Reduced:
        """Choose, if that was not done; then see :meth:`hvd_compress.reducer.Reducer.reduce`.

        A rank that fails or is interrupted as the others choose ends the job.
        """
        chosen = self._chosen or self._begin()
        return chosen.reduce(step, divisor=divisor, overflow_elsewhere=overflow_elsewhere, minuends=minuends)

    def _begin(self) -> Chosen:
        """What was chosen, with all that was added so far."""
        assert self._watch is not None, "open() comes first"
        from .exchange import labels_of

        labels = labels_of(self._nodes, self._meeting[1])
        pending, failure, self._pending, self._failure = self._pending, self._failure, {}, None
        self._watch.begin()
        try:
            with self._ledger.timed("exchange"):
                choice = self._choose(pending, labels)
        except BaseException as error:
            if self.size > 1 and not isinstance(error, RankMismatchError):  # which all ranks raise
                self._watch.end_job(f"the others choose an exchange with it, and it fails:\n{traceback.format_exc()}")
            raise
        finally:
            self._watch.end()
        chosen = self._make(choice)
        chosen.open(*self._meeting)
        for name, tensor in pending.items():
            chosen.add(name, tensor)
        if failure is not None:
            chosen.let_fail(failure)
        self.choice, self._chosen = choice, chosen
        return chosen

    def _choose(self, pending: Mapping[str, Tensor], labels: Sequence[int] | None) -> str:
        from .exchange import probe, topology

        found, sent = topology(self._private, labels)
        messages, mine = self._try(pending)
        node, agreed = node_of(self._private, found, self._meeting[1], self._node_process_set)
        like = torch.empty(0, device=next(iter(pending.values())).device if pending else None)
        links, more = probe(self._private, found, lambda: speed(node, like))
        self._ledger.shared.node += node.sent
        table = np.empty((self.size, len(mine)), np.float64)
        self._private.Allgather(np.array(mine), table)
        union, most = self._union(messages)
        self._ledger.shared.mpi += sent + agreed + more + 8 * len(mine) + most
        select, pack, opening, packet, message, elements, dense, _ = table.max(axis=0)
        limit = costs.room(self.size, len(found.nodes)) if self._reselect is None else self._reselect
        work = costs.Work(
            elements=int(elements),
            dense=dense,
            message=message,
            union=min(union, limit),
            select=select / max(elements, 1),
            pack=pack,
            open=opening,
            packet=packet,
        )
        cluster = costs.Cluster(len(found.nodes), max(map(len, found.nodes)), *(costs.Link(*link) for link in links))
        # Ranks on which the trial failed say that their messages cannot be divided: the exchange then says why.
        names = ["allgather", "hierarchical", *(["reduce_scatter"] if table[:, -1].all() else [])]
        expected = {name: costs.EXCHANGES[name](cluster, work).seconds for name in names}
        choice = min(names, key=expected.__getitem__)
        plain = costs.dense(cluster, work).seconds
        if self.rank == 0:
            logger.info(explanation(choice, expected, plain, found, cluster, work))
        return choice

    def _try(self, pending: Mapping[str, Tensor]) -> tuple[dict[str, Message], list[float]]:
        """Compress, pack and open once, without memory; seconds, sizes, and whether the messages can be divided."""
        sizes = {name: shape.numel() for name, shape in self._shapes.items() if shape.numel() >= self._dense_below}
        plan = self._operator
        schedule = plan.start(sizes) if isinstance(plan, Plan) else Constant(plan)
        elements = sum(map(len, pending.values()))
        dense = sum(flat.nbytes for flat in pending.values())
        try:
            for _ in range(2):  # the first time, programs are loaded and memory is asked for
                start = _now()
                messages = {
                    name: schedule.operator(name).encode(flat, generator=torch.Generator(flat.device).manual_seed(0))
                    if len(flat := pending[name]) >= self._dense_below
                    else Message.dense(flat)
                    for name in self._shapes
                    if name in pending
                }
                compressed = _now()
                data = wire.encode(list(messages.values())).data
                packed = _now()
                for message in wire.decode(data).messages:
                    message.decode()
                opened = _now()
                wire.decode(wire.encode([]).data)
                empty = _now() - opened
        except Exception:  # the exchange itself will meet it again, and tell all ranks
            return {}, [0.0, 0.0, 0.0, 0.0, 0.0, elements, dense, 0.0]
        seconds = [compressed - start, packed - compressed, opened - packed, empty]
        return messages, [*seconds, len(data), elements, dense, float(_divides(messages.values()))]

    def _union(self, messages: Mapping[str, Message]) -> tuple[float, int]:
        """How many elements all ranks together select, as a multiple of one rank's, and the bytes handed to MPI.

        It is counted in the first elements of the largest tensor.
        """
        from .exchange import union

        largest = max(self._shapes, key=lambda name: self._shapes[name].numel(), default=None)
        mask = np.zeros(_WINDOW, np.bool_)
        message = messages.get(largest) if largest is not None else None
        if message is not None:
            indices = torch.arange(min(message.numel, _WINDOW)) if message.indices is None else message.indices.cpu()
            mask[indices[indices < _WINDOW].numpy()] = True
        everywhere, selected, sent = union(self._private, mask)
        return (everywhere * self.size / selected if selected else 1.0), sent

    def state_dict(self) -> dict[str, Any]:
        """The choice, and the state of what was chosen."""
        if self._pending:
            raise RuntimeError("the state cannot be taken between backward() and step(): take it after step()")
        chosen = None if self._chosen is None else self._chosen.state_dict()
        return {
            "format": STATE_FORMAT,
            "choice": self.choice,
            "chosen": chosen,
            "op": "Average",
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, with the exchange that was chosen then.

        Raises:
            ValueError: the state is of another format, rank or model, or another choice was made already.
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(
                f"expected a state of format {STATE_FORMAT!r}, got {state.get('format')!r}: it was saved with "
                "another exchange=…"
            )
        if self.choice not in (None, state["choice"]):
            raise ValueError(f"the state was saved with exchange {state['choice']}, here {self.choice} was chosen")
        if state["choice"] is not None:
            chosen = self._chosen or self._make(state["choice"])
            if self.is_open and not chosen.is_open:
                raise ValueError("load the state before the first exchange, or after it")
            chosen.load_state_dict(state["chosen"])
            self.choice, self._chosen = state["choice"], chosen
        self._ledger.load_state_dict(state["ledger"])
        self._pending, self._failure = {}, None
        if self._watch is not None:
            self._watch.give_up()

    def reset_memory(self) -> None:
        """Forget what the memory holds. Do it on all ranks, between exchanges."""
        if self._chosen is not None:
            self._chosen.reset_memory()

    def give_back(self, name: str, rest: Tensor) -> None:
        """See :meth:`hvd_compress.sender.Sender.give_back`."""
        assert self._chosen is not None, "reduce() comes first"
        self._chosen.give_back(name, rest)

    def residual(self, name: str) -> Tensor | None:
        """Not to be had, since another exchange may be chosen.

        Raises:
            TypeError: always.
        """
        raise TypeError("exchange='auto' may keep memories by node: use exchange='allgather' here")


def explanation(
    choice: str,
    expected: Mapping[str, float],
    plain: float,
    found: Topology,
    cluster: costs.Cluster,
    work: costs.Work,
) -> str:
    """What was chosen, and why."""
    times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in expected.items())
    slower = min(expected.values()) > plain
    advice = "; plain Horovod is expected to be faster than all of them" if slower else ""
    links = "; ".join(
        f"{which} nodes {link.bandwidth * 8e-9:.2f} Gbit/s and {1e6 * link.latency:.0f} µs"
        for which, link in (("between", cluster.between), ("within", cluster.within))
        if link.bandwidth != float("inf")
    )
    return (
        f"exchange {choice}: expected are {times}, uncompressed {1e3 * plain:.1f} ms{advice}. Measured on {found}: "
        f"{links}; a message of {work.message / 1e6:.3f} MB about {work.elements} elements, compressed in "
        f"{1e3 * work.select * work.elements:.1f} ms, packed in {1e3 * work.pack:.1f}, opened in "
        f"{1e3 * work.open:.1f}; all ranks together select {work.union:.2f} times what one selects (at most reselect)"
    )


def _now() -> float:
    await_gpu()
    return time.perf_counter()


def _divides(messages: Any) -> bool:
    try:
        for message in messages:
            message.part(0, 0)
    except TypeError:
        return False
    return True
