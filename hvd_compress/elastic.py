"""Elastic training: ranks come and go while a job runs, and what was not sent yet is not lost with them.

Use :class:`ElasticState` as ``horovod.torch.elastic.TorchState``::

    state = ElasticState(model=model, optimizer=optimizer, compression=compression, step=0)

    @hvd.elastic.run
    def train(state):
        ...
        state.commit()

and start the job with ``horovodrun --min-np … --host-discovery-script …``. Horovod's elastic training runs without
MPI, so messages go through Horovod's own allgather then.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HostsUpdatedInterrupt
from horovod.torch.elastic import TorchState
from horovod.torch.elastic.state import StateHandler, get_handler_registry, set_handler_registry
from torch import Tensor

from .gradient import GradientCompressor
from .local_sgd import STATE_KEY, QsparseLocalSGD
from .membership import Change
from .memory import ESTIMATE, MASS
from .resizing import resize


class MemoryHandler(StateHandler):
    """What :class:`ElasticState` does with a compressor, or with local SGD.

    At each commit the ranks average their memories. When ranks have come or gone, whether they have said so or died,
    each of those that go on has that average for its memory, the new ones too: the mean over ranks stays what it was
    at the commit, and no memory that left with its rank is missing.

    Args:
        value: a compressor that knows its parameters, or :class:`QsparseLocalSGD`.
    """

    def __init__(self, value: GradientCompressor | QsparseLocalSGD) -> None:
        super().__init__(value)
        # State
        self._own = copy.deepcopy(value.state_dict())  # at the last commit
        self._mean: dict[str, Any] | None = None  # the same with all ranks' memories averaged
        self._size = 0  # number of ranks then
        self._is_after_reset = False

    def save(self) -> None:
        """A commit. Collective."""
        self._own = copy.deepcopy(self.value.state_dict())
        self._mean, self._size = _mean_over_ranks(self._own), hvd.size()

    def restore(self) -> None:
        """Back to the last commit. Not collective."""
        self.value.load_state_dict(copy.deepcopy(self._own))  # torch's optimizers go on in the tensors they are given

    def reset(self) -> None:
        """The number of ranks has changed: take the average. Not collective: new ranks do not call it."""
        if self._mean is not None:
            self._take(self._mean, self._size)
        self._is_after_reset = True

    def sync(self) -> None:
        """Give new ranks what the others have. Collective.

        At the start of a job ranks keep their own, which may come from a checkpoint.
        """
        mean, size = hvd.broadcast_object((self._mean if self._is_after_reset else None, self._size), name="memory")
        if mean is None:
            self.save()
        else:
            self._take(mean, size)
        self._is_after_reset = False

    def set_value(self, value: GradientCompressor | QsparseLocalSGD) -> None:
        """Another object from now on."""
        self.value, self._own, self._mean = value, copy.deepcopy(value.state_dict()), None

    def _take(self, mean: Mapping[str, Any], size: int) -> None:
        ledger = self.value.ledger.state_dict()  # counts what this rank has sent
        self.value.leave()
        self.value.load_state_dict(resize(Change(hvd.rank(), hvd.size(), size, (0,), (size,)), [mean]))
        self.value.ledger.load_state_dict(ledger)
        self._own = self._mean = copy.deepcopy(self.value.state_dict())  # all ranks have the same now
        self._size = hvd.size()


class ElasticState(TorchState):
    """``horovod.torch.elastic.TorchState`` that also knows compressors and :class:`QsparseLocalSGD`.

    A commit costs what one uncompressed exchange does, since the ranks average their memories in it: with a ratio of
    1 %, a commit every hundred steps doubles the traffic. With local SGD it is an exchange too, if any local step was
    taken since the last one.

    Args:
        model: as for ``TorchState``.
        optimizer: as for ``TorchState``, or :class:`QsparseLocalSGD`. When ranks have come or died, all get the
            first rank's momentum; where some have only left, each keeps its own.
        kwargs: as for ``TorchState``; compressors among them.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        registry = get_handler_registry()
        set_handler_registry([(GradientCompressor, MemoryHandler), (QsparseLocalSGD, MemoryHandler), *registry])
        try:
            super().__init__(model=model, optimizer=optimizer, **kwargs)
        finally:
            set_handler_registry(registry)

    def save(self) -> None:
        """See ``State.save``. Collective."""
        for handler in self._memory_handlers():
            if isinstance(handler.value, QsparseLocalSGD):
                handler.value.synchronize()
        super().save()

    def check_host_updates(self) -> None:
        """See ``State.check_host_updates``; before ranks leave, it is a commit."""
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:  # on all ranks, and those that are to leave are still here
            self.save()
            raise

    def reset(self) -> None:
        """See ``State.reset``."""
        for handler in self._memory_handlers():
            handler.reset()
        super().reset()

    def _memory_handlers(self) -> list[MemoryHandler]:
        return [handler for handler in self._handlers.values() if isinstance(handler, MemoryHandler)]


def _mean_over_ranks(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with what differs between ranks averaged over them. Collective."""
    own = state.get(STATE_KEY)
    if own is None:
        return _mean_memory(state)
    taken = {**own, "starts": _mean("starts", own["starts"])}
    if "format" in own["average"]:  # not Horovod's
        taken["average"] = _mean_memory(own["average"])
    return {**state, STATE_KEY: taken}


def _mean_memory(state: Mapping[str, Any]) -> dict[str, Any]:
    if "rows" not in state:
        raise ValueError(
            "elastic training runs without MPI, which exchange='hierarchical' and 'auto' need: use "
            "exchange='allgather' here"
        )
    rows = state["rows"]
    averaged = [row for row, kind in enumerate(rows) if kind in (MASS, ESTIMATE)]
    memory = {name: m.clone() for name, m in state["memory"].items()}
    parts = {name: m.view(len(rows), -1)[averaged] for name, m in memory.items()}
    for name, mean in _mean("memory", parts).items():
        memory[name].view(len(rows), -1)[averaged] = mean
    return {**state, "memory": memory}


def _mean(what: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The sum, divided here: Horovod's average multiplies by a rounded 1/R.
    handles = {name: hvd.allreduce_async(t, name=f"{what}.{name}", op=hvd.Sum) for name, t in tensors.items()}
    return {name: torch.div(hvd.synchronize(handle), hvd.size()) for name, handle in handles.items()}
