"""The master model as one rank sees it: updates go there, and what has changed comes back."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import horovod.torch as hvd
import numpy as np
from torch import Tensor

from . import wire
from .errors import NonFiniteError, PeerError, WireError
from .kernels import all_finite
from .master import AsTheyCome, ByClock, Master, Shard, Topic, Turns, deal, receive
from .sender import Sender

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI

    from .exchange import Service
    from .exchange.gather import Bytes


_ELEMENTS = 1 << 18  # that are worth one more server, with whom every rank has to exchange packets


@dataclass(frozen=True)
class Pace:
    """How the ranks keep up with each other."""

    schedule: Sequence[int] | None  # steps after which this rank sends an update, if there is a clock
    max_staleness: int | None  # steps, if there is none
    timeout: float  # seconds; see Master
    servers: int | None  # ranks that serve; None for as many as are worth it


class RemoteModel(Sender):
    """Sends this rank's updates to the servers, of which it runs one itself. Its arguments are those of Sender."""

    # State
    _service: Service | None = None
    _master: Master | None = None
    _communicator: MPI.Intracomm | None = None
    _over: str | None = None  # why the run cannot go on
    _timeout = 0.0
    may_end = False
    """Whether the program may end without :meth:`finish`: all that this rank has done is in a state of all ranks."""

    @property
    def is_open(self) -> bool:
        """Whether the ranks have met, and have not parted."""
        return self._service is not None

    def open(
        self,
        communicator: MPI.Intracomm,
        ranks: Sequence[int],
        expects: str,
        timeout: float,
        *,
        pace: Pace,
        anchors: Mapping[str, Tensor],
        saved: Mapping[str, Any] | None,
    ) -> None:
        """Meet the other ranks, and start this rank's server. Collective.

        Args:
            communicator, ranks, expects, timeout: see :meth:`hvd_compress.reducer.Reducer.open`.
            pace: see :class:`Pace`.
            anchors: the model, the same on all ranks unless there is a saved state.
            saved: what :meth:`pause` has returned on this rank, if a run goes on.

        Raises:
            RankMismatchError: on every rank, when ranks differ or do not come.
        """
        from .exchange import Exchange, Service

        private = self._meet(communicator, ranks, expects, timeout)
        turns: Turns
        if pace.schedule is None:
            turns = AsTheyCome(self.size, pace.max_staleness)
        else:
            gathering = Exchange(private)
            schedules = gathering.allgatherv(np.array(pace.schedule, np.int64).view(np.uint8))
            self._ledger.shared.mpi += gathering.sent
            turns = ByClock([schedule.copy().view(np.int64).tolist() for schedule in schedules])
        sizes = [shape.numel() for shape in self._shapes.values()]
        servers = max(1, sum(sizes) // _ELEMENTS) if pace.servers is None else pace.servers
        shares = deal(sizes, min(servers, self.size))
        self._shares = {rank: share for rank, share in enumerate(shares) if share}
        names = list(self._shapes)
        if self.rank in self._shares:
            shard = Shard({id: anchors[names[id]] for id in self._shares[self.rank]}, self.size)
            if saved is not None:
                shard.load_state_dict(saved["shard"])
                turns.last = list(saved["last"])
            self._master = Master(shard, turns, names, pace.timeout)
        self._communicator = private
        self._timeout = pace.timeout
        self._service = Service(private, self._master)
        atexit.register(self._end_of_program)

    def _may_wait(self, flat: Tensor) -> bool:
        """No: what interrupts the compression must come before the exchange has begun."""
        return False

    def exchange(self, step: int, anchors: Mapping[str, Tensor]) -> None:
        """Send what was added, and bring ``anchors`` up to date, in place, with what the servers answer.

        Raises:
            NonFiniteError: what was added holds inf or NaN. The memory is as it was, the servers were sent an empty
                update, and ``anchors`` are up to date.
            PeerError: another rank, or a server, has failed; the run cannot go on.
            Exception: whatever :meth:`add` or packing raised on this rank; it has failed for the others.
        """
        pending, messages, failure = self._take()
        energy = self._energy()
        try:
            if failure is not None:
                raise failure
            overflow = []
            if not all_finite([m.values.floats for m in messages.values()]):  # one question, mostly
                overflow = [name for name, message in messages.items() if not bool(message.is_finite())]
            self._ask(Topic.UPDATE, self._packets({} if overflow else messages, step), anchors)
        except BaseException as error:
            self._rollback(pending)
            self.fail(error)
            raise
        self._ledger.exchanges += 1
        self._round += 1
        kept = sum(len(messages[name].values) for name, p in pending.items() if p.compressed)
        self._schedule.advance(energy, kept)  # of this rank alone: the others' are not known
        if overflow:
            self._rollback(pending)
            raise NonFiniteError(
                f"parameters became inf or NaN on this rank (rank {self.rank}): {', '.join(overflow[:5])}. Its local "
                "steps since its last exchange are dropped and it has the current model; the other ranks saw an "
                "empty update. A smaller learning rate, a longer warm-up or gradient clipping may help"
            )
        self._commit(pending)

    def pause(self) -> dict[str, Any]:
        """This rank's server's state, at a moment when no update is on its way. Collective.

        Raises:
            PeerError: another rank, or a server, has failed; the run cannot go on.
        """
        assert self._service is not None, "open() comes first"
        self._meet_servers(Topic.PAUSE, {})
        state: dict[str, Any] = {}
        if self._master is not None:
            with self._service.lock:
                state = {"shard": self._master.shard.state_dict(), "last": list(self._master.turns.last)}
        self._meet_servers(Topic.PAUSE, {})  # until here no rank has sent an update
        self.may_end = True
        return state

    def finish(self, anchors: Mapping[str, Tensor]) -> None:
        """Wait until all ranks finish, bring ``anchors`` up to date, and end the servers. Collective.

        Raises:
            PeerError: another rank, or a server, has failed.
        """
        assert self._service is not None, "open() comes first"
        assert self._communicator is not None
        self._meet_servers(Topic.FINISH, anchors)
        self._service.close()
        self._communicator.Free()
        self.collect()
        self._service = self._master = self._communicator = None
        atexit.unregister(self._end_of_program)

    def fail(self, error: BaseException) -> None:
        """Tell all servers that this rank has failed, so that they tell the others. Once is enough."""
        if self._service is None or self._over is not None:
            return
        own = f"rank {self.rank} failed: {type(error).__name__}: {error}"
        self._over = str(error) if isinstance(error, PeerError) else own
        notice = wire.encode_failure(self._over)
        self._service.tell(Topic.FAILURE, dict.fromkeys(self._shares, notice))
        self._ledger.shared.mpi += len(self._shares) * notice.nbytes

    def collect(self) -> None:
        """Bring the ledger up to date with what this rank's server has answered."""
        if self._service is not None and self._master is not None:
            with self._service.lock:
                self._ledger.take(self._master.ledger)

    def _packets(self, messages: Mapping[str, wire.Message], step: int) -> dict[int, Bytes]:
        """One packet for each server."""
        names = list(self._shapes)
        packets = {}
        for rank, share in self._shares.items():
            chosen = [names[id] for id in share if names[id] in messages]
            ids = [self._ids[name] for name in chosen]
            encoded = wire.encode([messages[name] for name in chosen], ids=ids, round=step)
            for name, bytes_ in zip(chosen, encoded.shares, strict=True):
                self._ledger.tensors[name].mpi += bytes_
            self._ledger.shared.mpi += len(encoded.data) - sum(encoded.shares)
            packets[rank] = encoded.data
        return packets

    def _meet_servers(self, topic: Topic, anchors: Mapping[str, Tensor]) -> None:
        request = wire.encode([]).data
        self._ledger.shared.mpi += len(self._shares) * request.nbytes
        try:
            self._ask(topic, dict.fromkeys(self._shares, request), anchors)
        except BaseException as error:
            self.fail(error)
            raise

    def _ask(self, topic: Topic, requests: Mapping[int, Bytes], anchors: Mapping[str, Tensor]) -> None:
        assert self._service is not None, "open() comes first"
        if self._over is not None:
            raise PeerError(self._over)
        try:
            answers = self._service.ask(topic, requests, self._timeout)
        except TimeoutError as error:
            raise PeerError(str(error)) from None
        packets = []
        for rank, answer in answers.items():
            try:
                packets.append(wire.decode(answer))
            except WireError as error:
                raise WireError(f"from rank {rank}: {error}") from None
        failure = next((packet.failure for packet in packets if packet.failure is not None), None)
        if failure is not None:
            raise PeerError(failure)
        if not anchors:
            return
        names = list(self._shapes)
        for rank, packet in zip(answers, packets, strict=True):  # all of them, before one changes the model
            for id, numel in zip(packet.ids, packet.numels, strict=True):
                if id not in self._shares[rank] or numel != anchors[names[id]].numel():
                    raise WireError(f"from rank {rank}: {numel} elements of tensor {id}, which it does not serve so")
        for packet in packets:
            for id, message in zip(packet.ids, packet.messages, strict=True):
                receive(message, anchors[names[id]])

    def _end_of_program(self) -> None:
        """MPI must not end under a running thread, nor this rank while others wait for it."""
        from mpi4py import MPI

        assert self._service is not None
        assert self._communicator is not None
        if self._over is None and not hasattr(sys, "last_value"):  # which is set after an uncaught exception
            try:
                self._part()
            except Exception as error:
                self.fail(error)
                sys.excepthook(type(error), error, None)
                if not MPI.Is_finalized():  # if all ranks have forgotten it: the exit status must tell
                    self._communicator.Abort(1)
            else:
                return
        self._service.stop()

    def _part(self) -> None:
        """End the servers where all ranks have saved their states, to go on in another job."""
        assert self._service is not None
        if not self.may_end:
            raise RuntimeError(
                "the program ended without AsyncQsparseLocalSGD.finish(), so this rank has not the master model, "
                "and the others wait: call finish() on all ranks after the last step, or use the optimizer in a "
                "with statement. After state_dict() all ranks may end without it"
            )
        self._meet_servers(Topic.FINISH, {})
        self._service.close()
        if self.size == hvd.size():  # Horovod may end MPI on all ranks as soon as one of them goes
            hvd.barrier()
