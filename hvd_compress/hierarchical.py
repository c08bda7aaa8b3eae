"""The compressed sum over nodes: dense inside a node, compressed between nodes.

Each of the first ranks of a node owns a part of all elements, a *shard*. In one exchange

1. the ranks of a node agree that they have the same to send,
2. each shard is summed over the node at its owner, in full,
3. owners of the same shard on all nodes exchange compressed messages, with memory, as the flat exchange does,
4. the ranks of a node agree on the outcome, memories are updated, and the owners hand out the result.

So the algorithms' worker is the node, whose vector is the mean over its ranks (weighted, where nodes have different
numbers of ranks, so that the mean over nodes is the mean over ranks). Compressing by shards is piecewise compression,
whose γ is the smallest piece's (arXiv 1906.02367, section 2, corollary on piecewise compression).
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import horovod.torch as hvd
import torch
from torch import Tensor

from .errors import PeerError, RankMismatchError
from .ledger import Ledger
from .meeting import Member, Place, meet, source_of, statement, through_mpi
from .memory import Memory
from .node import MpiNode, Node, Parts, node_of
from .operators import Operator
from .pieces import Piece, cut, even_ends
from .reducer import Reduced, Reducer
from .schedules import Plan
from .sender import Overflow, check_memories, filled, laid_out

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI

    from .exchange import Exchange, Topology, Watch

STATE_FORMAT = "hierarchical 1"
_START, _OUTCOME = range(2)  # what the ranks of a node tell each other in an exchange

logger = logging.getLogger(__name__)


class HierarchicalReducer(Member):
    """Sums named tensors over ranks as :class:`hvd_compress.reducer.Reducer` does, compressing between nodes only.

    With one rank on each node it is that one, bit for bit. Where nodes have different numbers of ranks there are as
    many shards as the smallest has ranks; further ranks of other nodes own none. The result is the same, to the bit,
    on every rank.

    A message is about one shard's piece of a tensor: an operator that keeps k elements keeps k of each piece. At most
    as many tensors as there are shards less one are cut.

    Args:
        shapes, operator, memory, dense_below, seed, ledger: see :class:`hvd_compress.sender.Sender`. The memory is
            this rank's shard's.
        buckets: see :class:`hvd_compress.reducer.Reducer`.
        nodes: a number for each rank's node (Horovod's rank is the place in it); None to ask MPI.
        node_process_set: Horovod's, of the ranks on this rank's node, if Horovod is to sum inside nodes; None for
            MPI, through host memory.
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
        buckets: Sequence[Sequence[str]],
        nodes: Sequence[int] | None = None,
        node_process_set: hvd.ProcessSet | None = None,
    ) -> None:
        # Configuration
        self._sizes = {name: shape.numel() for name, shape in shapes.items()}
        self._shapes = dict(shapes)
        self._ids = {name: id for id, name in enumerate(shapes)}
        self._operator = operator
        self._memory = memory
        self._dense_below = dense_below
        self._seed = seed
        self._ledger = ledger
        self._buckets = buckets
        self._nodes = None if nodes is None else tuple(nodes)
        self._node_process_set = node_process_set
        # State
        self._round = 0
        self._pending: dict[str, Tensor] = {}  # flat, in the working dtype
        self._place: Place | None = None
        self._watch: Watch | None = None
        self._loaded: dict[str, Any] | None = None  # a state that waits for the shards to be known
        # Whether the ranks of the node know that this exchange fails, or that nothing has failed before its end
        self._told = self._agreed = False
        # Once the ranks have met
        self._topology: Topology
        self._shards: list[list[Piece]]
        self._called: list[int]  # Horovod's numbers of this node's ranks
        self._node: Node
        self._status: Exchange  # within the node
        self._inner: Reducer | None = None  # of this rank's shard, if it has one
        self._owned: list[Piece] = []  # the shard

    @property
    def is_spoilt(self) -> bool:
        """See :attr:`hvd_compress.meeting.Member.is_spoilt`."""
        return super().is_spoilt or (self._inner is not None and self._inner.is_spoilt)

    @property
    def is_open(self) -> bool:
        """Whether the ranks have met."""
        return self._place is not None

    def open(self, link: MPI.Intracomm | hvd.ProcessSet, ranks: Sequence[int], expects: str, timeout: float) -> None:
        """Meet the other ``ranks`` and find out who shares a node; see :meth:`hvd_compress.reducer.Reducer.open`.

        Raises:
            RankMismatchError: see there; also when the state that was loaded is of other shards or another schedule
                than these, or a rank's ``node_process_set`` is not of its node's ranks.
            RuntimeError: Horovod runs without MPI.
            ValueError: ``nodes`` does not speak of all ranks.
        """
        communicator = through_mpi(link, "hierarchical")
        from .exchange import Exchange, Watch, labels_of, topology

        labels = labels_of(self._nodes, ranks)
        summed_by = "MPI" if self._node_process_set is None else "Horovod"
        found_by = source_of(self._nodes)
        expects = (
            f"exchange hierarchical by {found_by}, summed by {summed_by}\n{self._round} exchanges so far\n{expects}"
        )
        mine = statement(self._shapes, self._operator, self._memory, self._dense_below, self._seed, expects)
        saved_as = None if self._loaded is None else self._loaded["place"]
        private, place, sent = meet(communicator, ranks, mine, saved_as, timeout)
        self._ledger.shared.mpi += sent
        self._topology, sent = topology(private, labels)
        self._ledger.shared.mpi += sent
        self._shards = cut(self._sizes, even_ends(sum(self._sizes.values()), self._topology.shards))
        node, local = self._topology.place(place[0])
        shard = self._shards[local] if local < self._topology.shards else []
        inner, unfit = None, self._unfit(node, local)
        if local < self._topology.shards and unfit is None:
            try:
                inner = self._make_inner(shard, local)
            except ValueError as error:
                unfit = str(error)
        self._check_loaded(private, unfit)
        group, together = private.Get_group(), self._topology.nodes[node]
        self._node, sent = node_of(private, self._topology, ranks, self._node_process_set)
        self._ledger.shared.mpi += sent
        self._status = Exchange(private.Create_group(group.Incl(together)), [node] * len(together))
        self._called = [ranks[place] for place in together]
        if inner is not None:  # meet the owners of the same shard on the other nodes
            owners = [others[local] for others in self._topology.nodes]
            across = private.Create_group(group.Incl(owners))
            inner.join(across, range(across.Get_size()), expects, timeout, [ranks[place] for place in owners])
            self._inner, self._owned = inner, shard
        self._loaded, self._place, self._watch = None, place, Watch(private, timeout)

    def leave(self) -> None:
        """Not to be done: a node's memory could not go on with other ranks.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "exchange='hierarchical' keeps memories by node and cannot go on with another number of ranks: use "
            "exchange='allgather' here"
        )

    def _make_inner(self, owned: Sequence[Piece], shard: int) -> Reducer:
        """What sums a shard over nodes, with the memory that was loaded, if it was.

        Raises:
            ValueError: that is another kind of memory's, or of another schedule.
        """
        shapes = {piece.name: torch.Size([len(piece)]) for piece in owned}
        inner = Reducer(
            shapes,
            operator=self._operator,
            memory=self._memory,
            dense_below=self._dense_below,
            buckets=[[name for name in names if name in shapes] for names in self._buckets],
            seed=(self._seed + shard + 2**63) % 2**64 - 2**63,  # so that shards draw independently; 64 bits
            ledger=self._ledger,
            agree=self._agree,
        )
        if self._loaded is not None:
            inner.load_state_dict({**self._loaded["inner"], "ledger": self._ledger.state_dict()})
        return inner

    def _unfit(self, node: int, local: int) -> str | None:
        """Why the state that was loaded, if there is one, is not of this rank's place on its node."""
        if self._loaded is None or self._loaded["layout"] == self._layout(node, local):
            return None
        return (
            f"it was saved with other numbers of ranks on the nodes; here are {self._topology}: resume with as many "
            "on each, or without the state"
        )

    def _check_loaded(self, private: MPI.Intracomm, unfit: str | None) -> None:
        """Every rank raises, if the state that any has loaded does not fit."""
        import numpy as np

        anywhere = np.zeros(private.Get_size(), np.bool_)
        private.Allgather(np.array([unfit is not None]), anywhere)
        self._ledger.shared.mpi += 1
        if anywhere.any():
            reason = next(told for told in private.allgather(unfit) if told is not None)
            raise RankMismatchError(
                f"the state of rank(s) {np.flatnonzero(anywhere).tolist()} does not fit: {reason}"
            )

    def _layout(self, node: int, local: int) -> list[int]:
        return [node, len(self._topology.nodes), local, self._topology.shards]

    def add(self, name: str, tensor: Tensor, into: Tensor | None = None) -> None:
        """Take in ``tensor`` for the next exchange; see :meth:`hvd_compress.reducer.Reducer.add`."""
        if self._watch is not None:
            self._watch.begin()
        try:
            self._pending[name] = filled(*laid_out(tensor, into))
        except Exception as error:  # every rank must reach the exchange, which then tells the others
            self.let_fail(error)

    def stay_away(self) -> None:
        """See :meth:`hvd_compress.meeting.Member.stay_away`."""
        super().stay_away()
        self._pending, self._failure = {}, self._spoilt
        if self._inner is not None:
            self._inner.stay_away()

    def reduce(
        self,
        step: int | None = None,
        *,
        divisor: float = 1.0,
        overflow_elsewhere: bool = False,
        minuends: Mapping[str, Tensor] | None = None,
    ) -> Reduced:
        """Exchange what was added; see :meth:`hvd_compress.reducer.Reducer.reduce`.

        An overflow is blamed on the rank that owns the shard on the node where it was met, whichever of the node's
        ranks it came from. A rank that fails where others of its node wait for it, and cannot be told, ends the job.
        """
        assert self._watch is not None, "open() comes first"
        self._watch.begin()
        sent_before = self._node.sent + self._status.sent
        try:
            with self._ledger.timed("exchange"):
                reduced = self._reduce(self._round if step is None else step, divisor, overflow_elsewhere)
                with self.alone():
                    return reduced.subtracted_from(minuends)
        except BaseException:
            if self._node.size > 1 and not self._told:
                self._watch.end_job(f"the others of its node wait for it, and it fails:\n{traceback.format_exc()}")
            raise
        finally:
            self._ledger.shared.node += self._node.sent + self._status.sent - sent_before
            self._watch.end()

    def _reduce(self, step: int, divisor: float, overflow_elsewhere: bool) -> Reduced:
        pending = {name: self._pending[name] for name in sorted(self._pending, key=self._ids.__getitem__)}
        parts = self._parts(pending)
        failure, self._pending, self._failure = self._failure, {}, self._spoilt
        self._told = self._agreed = False
        try:
            sums = self._make_room(pending, parts)
        except Exception as error:
            failure = failure or error
        failure, overflow_elsewhere = self._agree_to_start(pending, step, failure, overflow_elsewhere)
        if failure is None:
            for dtype, its in parts.items():
                self._node.sum_at_owners(its, [flat for flat in sums.values() if flat.dtype == dtype])
            try:
                self._add_to_shard(sums)
            except Exception as error:
                failure = error
        try:
            sums, overflow = self._sum_over_nodes(pending, failure, step, divisor, overflow_elsewhere)
        except Exception as error:
            if not self._told and not self._agreed:
                self._tell(error)
            raise
        self._round += 1
        for its in self._parts(sums).values():
            self._node.share(its)
        self._told = True
        return Reduced(sums, overflow)

    def _make_room(self, tensors: Mapping[str, Tensor], parts: Mapping[torch.dtype, Parts]) -> dict[str, Tensor]:
        """For the sums over the node of what this rank owns, and all that they are made with."""
        if tensors and self._round == self._node.rank == 0:
            self._advise(next(iter(tensors.values())).device)
        for its in parts.values():
            self._node.prepare(its)
        owned = [piece for piece in self._owned if piece.name in tensors]
        return {piece.name: self._room(tensors[piece.name][piece.start : piece.stop]) for piece in owned}

    def _add_to_shard(self, sums: dict[str, Tensor]) -> None:
        """Give the sums over the node to the shard's exchange."""
        for name, flat in reversed(sums.items()):  # as buckets depart
            assert self._inner is not None
            if self._inner.size != self.size:
                flat.mul_(self._inner.size / self.size)
            self._inner.add(name, flat)

    def _sum_over_nodes(
        self,
        pending: dict[str, Tensor],
        failure: Exception | None,
        step: int,
        divisor: float,
        overflow_elsewhere: bool,
    ) -> tuple[dict[str, Tensor], Overflow]:
        """The sums over all ranks, divided, of what this rank owns; room for them elsewhere."""
        if self._inner is None:
            self._ledger.exchanges += 1
            if failure is not None:
                raise failure
            return pending, self._agree([])
        if failure is not None:
            self._inner.let_fail(failure)
        divisor *= self._inner.size / self.size
        reduced = self._inner.reduce(step, divisor=divisor, overflow_elsewhere=overflow_elsewhere)
        sums = dict(pending)
        for name, start, stop in ((p.name, p.start, p.stop) for p in self._owned if p.name in pending):
            if stop - start == self._sizes[name]:
                sums[name] = reduced.sums[name]
            else:
                sums[name][start:stop] = reduced.sums[name]
        return sums, reduced.overflow

    def _room(self, piece: Tensor) -> Tensor:
        """For the sum over the node, whose storage the memory may take."""
        return piece.detach() if self._node.size == 1 else torch.empty_like(piece)  # detached it is no view

    def _parts(self, tensors: Mapping[str, Tensor]) -> dict[torch.dtype, list[list[Tensor]]]:
        """The pieces of ``tensors`` that each owner has, by dtype."""
        return {
            dtype: [
                [
                    tensors[p.name][p.start : p.stop]
                    for p in shard
                    if p.name in tensors and tensors[p.name].dtype == dtype
                ]
                for shard in self._shards
            ]
            for dtype in sorted({flat.dtype for flat in tensors.values()}, key=str)
        }

    def _advise(self, device: torch.device) -> None:
        if device.type == "cuda" and isinstance(self._node, MpiNode) and self._node.size > 1 and hvd.nccl_built():
            logger.warning(
                "gradients on GPUs are summed inside the node through host memory; to let Horovod use NCCL: "
                "hvd.init(process_sets='dynamic') and Compression.…(node_process_set=hvd_compress.node_process_set())"
            )

    # What the ranks of a node tell each other

    def _agree_to_start(
        self, pending: Mapping[str, Tensor], step: int, failure: Exception | None, overflow_elsewhere: bool
    ) -> tuple[Exception | None, bool]:
        """Why the node cannot send, if so, and whether one of its ranks has met an overflow elsewhere."""
        # With their dtypes: MPI would write more bytes than there is room for.
        mine = [[self._ids[name], str(flat.dtype)] for name, flat in pending.items()]
        text = None if failure is None else _text(failure)
        told = self._exchange({"step": step, "sent": mine, "overflow": overflow_elsewhere, "failure": text}, _START)
        failure = failure or self._peer_error(told)
        for rank, its in zip(self._called, told, strict=True):
            if failure is None and its["step"] != step:
                failure = RankMismatchError(f"rank {rank} exchanges at step {its['step']}, this rank at step {step}")
        sets = [{(id, dtype) for id, dtype in its["sent"]} for its in told]
        different = sets[0].union(*sets) - sets[0].intersection(*sets)
        if failure is None and different:
            ids = {id for id, _ in different}
            which = ", ".join(name for name, id in self._ids.items() if id in ids)
            failure = RankMismatchError(f"the ranks do not send the same tensors: {which}")
        return failure, any(its["overflow"] for its in told)

    def _agree(self, overflow: Overflow) -> Overflow:
        """The overflow of all of the node's shards; raises what another one has met."""
        with self._ledger.timed("exchange"):
            told = self._exchange({"overflow": overflow, "failure": None}, _OUTCOME)
        if (error := self._peer_error(told)) is not None:
            self._told = True
            raise error
        self._agreed = True
        return sorted({(rank, name) for its in told for rank, name in its["overflow"]})

    def _tell(self, error: Exception) -> None:
        """Answer those who are in :meth:`_agree`."""
        self._exchange({"overflow": [], "failure": _text(error)}, _OUTCOME)
        self._told = True

    def _peer_error(self, told: list[dict[str, Any]]) -> PeerError | None:
        failed = [(rank, its["failure"]) for rank, its in zip(self._called, told, strict=True)]
        texts = [f"rank {rank} failed: {text}" for rank, text in failed if text is not None]
        return PeerError("; ".join(texts)) if texts else None

    def _exchange(self, mine: dict[str, Any], place: int) -> list[dict[str, Any]]:
        """What each of the node's ranks says, in their order."""
        if self._node.size == 1:
            return [mine]
        import numpy as np

        received = self._status.allgatherv(np.frombuffer(json.dumps(mine).encode(), np.uint8), place)
        return [json.loads(data.tobytes()) for data in received]

    # State

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`hvd_compress.sender.Sender.state_dict`. The memory is that of this rank's shard.

        Raises:
            RuntimeError: see there.
        """
        if self._spoilt is not None:
            raise self._spoilt
        if self._pending:
            raise RuntimeError("the state cannot be taken between backward() and step(): take it after step()")
        if self._loaded is not None:
            return dict(self._loaded)
        return {
            "format": STATE_FORMAT,
            "round": self._round,
            "seed": self._seed,
            "place": self._place,
            "layout": self._place and self._layout(*self._topology.place(self.rank)),
            "op": "Average",
            "inner": None if self._inner is None else self._inner.state_dict(),
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; on an error nothing has changed.

        Raises:
            ValueError: the state is of another exchange or format, of other tensors, or of another rank.
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(
                f"expected a state of format {STATE_FORMAT!r}, got {state.get('format')!r}: it was saved with "
                "another exchange=…, or by another version"
            )
        strange = [] if state["inner"] is None else [n for n in state["inner"]["memory"] if n not in self._sizes]
        if strange:
            raise ValueError(f"the state has a memory for {strange[0]!r}, which is not a parameter here")
        if self.is_open and state["place"] is not None:
            here = self._layout(*self._topology.place(self.rank))
            if (tuple(state["place"]), state["layout"]) != (self._place, here):
                raise ValueError("the state is another rank's, or of other numbers of ranks on the nodes")
        if self.is_open and state["place"] is None:
            raise ValueError("the state was saved before the first exchange: load it before that, too")
        if state["inner"] is not None:
            check_memories(state["inner"], self._memory)
        if self._inner is not None:
            self._inner.load_state_dict(state["inner"])
        elif not self.is_open:
            self._loaded = None if state["place"] is None else {**state, "place": tuple(state["place"])}
        self._ledger.load_state_dict(state["ledger"])
        self._round, self._seed = state["round"], state["seed"]
        self._pending, self._failure, self._spoilt = {}, None, None
        if self._watch is not None:
            self._watch.give_up()

    def reset_memory(self) -> None:
        """Forget what the memory holds. Do it on all ranks, between exchanges."""
        self._memory.reset()
        if self._loaded is not None and self._loaded["inner"] is not None:
            self._loaded = {**self._loaded, "inner": {**self._loaded["inner"], "memory": {}}}

    def give_back(self, name: str, rest: Tensor) -> None:
        """See :meth:`hvd_compress.sender.Sender.give_back`; of each shard, its owner on the first node keeps it."""
        for piece in self._owned:
            if piece.name == name:
                assert self._inner is not None
                self._inner.give_back(name, rest[piece.start : piece.start + len(piece)])

    def residual(self, name: str) -> Tensor | None:
        """Not to be had: a node's memory of a tensor may lie with several of its ranks.

        Raises:
            TypeError: always.
        """
        raise TypeError("exchange='hierarchical' keeps memories by node, not by rank: use exchange='allgather' here")


def _text(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"
