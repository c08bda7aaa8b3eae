"""Dense sums among the ranks of one node: by MPI through host memory, or by Horovod, on GPUs with NCCL."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor

from .errors import RankMismatchError

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI

    from .exchange import Topology

_MEASURED = 1 << 20  # elements

Parts = Sequence[Sequence[Tensor]]  # for each of the first ranks, the vectors that it owns


class Node(ABC):
    """Sums vectors over ranks that share a node, each at its owner, and hands results back.

    The first ranks each own some of the vectors. However long these are, buffers in between are small, and have fewer
    elements than a C int counts. They are kept from one time to the next.

    Args:
        rank: this one's number in the node.
        size: number of ranks.
        staged: elements that are on their way at a time, for all owners together.
    """

    library: str
    """What the bytes are handed to: ``"mpi"`` or ``"horovod"``."""

    def __init__(self, rank: int, size: int, staged: int) -> None:
        self.rank = rank
        self.size = size
        self._staged = staged
        # State
        self.sent = 0  # bytes of all send buffers handed over so far
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def prepare(self, parts: Parts) -> None:
        """Make the buffers for :meth:`sum_at_owners` and :meth:`share`. Not collective.

        So memory runs out here, if it does, where no other rank waits for this one.
        """
        for _, ranges, like in self._rounds(parts):
            self._prepare(like, [stop - start for start, stop in ranges])
            return  # the first round has most

    def sum_at_owners(self, parts: Parts, sums: Sequence[Tensor]) -> None:
        """``sums`` become the sums over ranks of ``parts[self.rank]``. Collective.

        Args:
            parts: one-dimensional, float32 or float64, of the same lengths and one dtype and device on all ranks.
            sums: as long as this rank's part, empty if it has none. On a single rank they are its part itself.
        """
        for number, ranges, like in self._rounds(parts):
            lengths = [stop - start for start, stop in ranges]
            rows = self._outgoing(like, self.size * max(lengths)).view(self.size, max(lengths))
            for owner, (start, stop) in enumerate(ranges):
                _read(parts[owner], start, stop, rows[owner])
            total = self._sum(rows, lengths, f"sum.{number}")
            if self.rank < len(parts):
                _write(sums, *ranges[self.rank], total)

    def share(self, parts: Parts) -> None:
        """``parts[owner]`` becomes what it is on its owner, in place. Collective; see :meth:`sum_at_owners`."""
        for number, ranges, like in self._rounds(parts):
            lengths = [stop - start for start, stop in ranges] + [0] * (self.size - len(parts))
            mine = self._outgoing(like, lengths[self.rank])
            if len(mine):
                _read(parts[self.rank], *ranges[self.rank], mine)
            gathered = self._gather(mine, lengths, f"share.{number}").split(lengths)
            for owner, (start, stop) in enumerate(ranges):
                if owner != self.rank:
                    _write(parts[owner], start, stop, gathered[owner])

    def _rounds(self, parts: Parts) -> Iterator[tuple[int, list[tuple[int, int]], Tensor]]:
        """For each owner the elements that go in this round, the same on all ranks, and one of the vectors."""
        like = next((v for vectors in parts for v in vectors), None)
        if self.size == 1 or like is None:
            return
        lengths = [sum(map(len, vectors)) for vectors in parts]
        step = max(1, self._staged // len(parts))
        for number, start in enumerate(range(0, max(lengths), step)):
            yield number, [(min(start, n), min(start + step, n)) for n in lengths], like

    def _prepare(self, like: Tensor, lengths: Sequence[int]) -> None:
        self._outgoing(like, self.size * max(lengths))

    def _buffer(self, what: str, elements: int, like: Tensor) -> Tensor:
        """A vector of ``like``'s dtype and device, holding anything."""
        kept = self._buffers.get((what, like.dtype))
        if kept is None or len(kept) < elements:
            kept = self._buffers[what, like.dtype] = like.new_empty(elements)
        return kept[:elements]

    @abstractmethod
    def _outgoing(self, like: Tensor, elements: int) -> Tensor:
        """Room for what is handed over."""

    @abstractmethod
    def _sum(self, rows: Tensor, lengths: Sequence[int], what: str) -> Tensor:
        """The sum over ranks of this rank's row, of which so many elements matter; anything if it owns none."""

    @abstractmethod
    def _gather(self, mine: Tensor, lengths: Sequence[int], what: str) -> Tensor:
        """All ranks' ``mine``, so long as ``lengths`` says, one after the other."""


class MpiNode(Node):
    """Sums in rank order, in host memory, so that results do not depend on which algorithm a library would choose.

    Args:
        communicator: of the node's ranks, which nobody else uses.
        staged: see :class:`Node`.
    """

    library = "mpi"

    def __init__(self, communicator: MPI.Intracomm, staged: int = 1 << 22) -> None:
        super().__init__(communicator.Get_rank(), communicator.Get_size(), staged)
        self._communicator = communicator

    def _prepare(self, like: Tensor, lengths: Sequence[int]) -> None:
        super()._prepare(like, lengths)
        mine = lengths[self.rank] if self.rank < len(lengths) else 0
        self._incoming(like.dtype, max(self.size * mine, sum(lengths)))

    def _outgoing(self, like: Tensor, elements: int) -> Tensor:
        return self._buffer("outgoing", elements, torch.empty(0, dtype=like.dtype, device="cpu"))

    def _incoming(self, dtype: torch.dtype, elements: int) -> Tensor:
        return self._buffer("incoming", elements, torch.empty(0, dtype=dtype, device="cpu"))

    def _sum(self, rows: Tensor, lengths: Sequence[int], what: str) -> Tensor:
        counts = [*lengths, *[0] * (self.size - len(lengths))]
        mine = counts[self.rank]
        counts[self.rank] = 0
        received = self._incoming(rows.dtype, self.size * mine).view(self.size, mine)
        expected = [0 if rank == self.rank else mine for rank in range(self.size)]
        self._communicator.Alltoallv(
            [rows.view(-1).numpy(), (counts, [owner * rows.shape[1] for owner in range(self.size)])],
            [received.view(-1).numpy(), (expected, [rank * mine for rank in range(self.size)])],
        )
        self.sent += sum(counts) * rows.element_size()
        received[self.rank] = rows[self.rank, :mine]
        for row in received[1:]:
            received[0] += row
        return received[0]

    def _gather(self, mine: Tensor, lengths: Sequence[int], what: str) -> Tensor:
        gathered = self._incoming(mine.dtype, sum(lengths))
        starts = [0, *np.cumsum(lengths)[:-1].tolist()]
        self._communicator.Allgatherv(mine.numpy(), [gathered.numpy(), (lengths, starts)])
        self.sent += mine.nbytes
        return gathered


class HorovodNode(Node):
    """Sums by Horovod's reducescatter and hands back by its allgather, where the vectors are.

    On GPUs that is NCCL, if Horovod was built with it. A sum's order is the library's. Horovod matches operations by
    name, so others may go on beside it, gradients of the same process set among them.

    Args:
        process_set: Horovod's, of the node's ranks.
        name: that Horovod tells these operations from others by; the same on all ranks.
        staged: see :class:`Node`.
    """

    library = "horovod"

    def __init__(self, process_set: hvd.ProcessSet, name: str, staged: int = 1 << 24) -> None:
        super().__init__(process_set.rank(), process_set.size(), staged)
        self._process_set = process_set
        self._name = name

    def _outgoing(self, like: Tensor, elements: int) -> Tensor:
        return self._buffer("outgoing", elements, like)

    def _sum(self, rows: Tensor, lengths: Sequence[int], what: str) -> Tensor:
        name = f"{self._name}.{rows.dtype}.{what}"
        self.sent += rows.nbytes
        handle = hvd.reducescatter_async(rows, name=name, op=hvd.Sum, process_set=self._process_set)
        return hvd.synchronize(handle)[0]

    def _gather(self, mine: Tensor, lengths: Sequence[int], what: str) -> Tensor:
        name = f"{self._name}.{mine.dtype}.{what}"
        self.sent += mine.nbytes
        return hvd.synchronize(hvd.allgather_async(mine, name=name, process_set=self._process_set))


def node_of(
    communicator: MPI.Intracomm, found: Topology, ranks: Sequence[int], process_set: hvd.ProcessSet | None
) -> tuple[Node, int]:
    """This rank's node. Collective.

    Args:
        communicator: of all ranks.
        found: which of them share a node.
        ranks: Horovod's numbers of the communicator's ranks.
        process_set: of this rank's node, to let Horovod sum; None for MPI. On all ranks, or on none.

    Returns:
        The node, and the bytes that were handed to MPI.

    Raises:
        RankMismatchError: some rank's ``process_set`` is not of its node's ranks; on every rank.
    """
    number, _ = found.place(communicator.Get_rank())
    within = communicator.Create_group(communicator.Get_group().Incl(found.nodes[number]))
    if process_set is None:
        return MpiNode(within), 0
    called = [ranks[place] for place in found.nodes[number]]
    differs = process_set.process_set_id is None or process_set.ranks != called
    anywhere = np.zeros(communicator.Get_size(), np.bool_)
    communicator.Allgather(np.array([differs]), anywhere)
    if anywhere.any():
        strange = [rank for rank, other in zip(ranks, anywhere, strict=True) if other]
        raise RankMismatchError(
            f"node_process_set= of rank(s) {strange} is not of the ranks that share their node; those of the first "
            f"node are {[ranks[place] for place in found.nodes[0]]}: take what hvd_compress.node_process_set() "
            "returns after hvd.init(process_sets='dynamic'), and give both the same nodes=, if any"
        )
    token = np.array([secrets.randbits(63)], np.int64)  # two models that are alike must not meet
    within.Bcast(token, root=0)
    within.Free()
    return HorovodNode(process_set, f"hvd_compress.node.{int(token[0]):x}"), 1 + token.nbytes


def speed(node: Node, like: Tensor) -> tuple[float, float]:
    """Seconds for an empty message, and the bytes that a rank hands over per second, in sums as of ``like``.

    Collective; on a single rank it is infinitely fast.
    """
    if node.size == 1:
        return 0.0, float("inf")
    small, large = (
        [[like.new_zeros(max(1, elements // node.size))] for _ in range(node.size)] for elements in (1, _MEASURED)
    )
    node.sum_at_owners(large, large[node.rank])  # makes buffers, and connections
    seconds, sent = [], []
    for vectors in (small, large):
        node.share(small)  # until all are here
        start, before = time.perf_counter(), node.sent
        node.sum_at_owners(vectors, vectors[node.rank])
        node.share(vectors)
        seconds.append(time.perf_counter() - start)
        sent.append(node.sent - before)
    return seconds[0] / (4 * (node.size - 1)), sent[1] / max(seconds[1] - seconds[0], 1e-9)


def _overlaps(vectors: Sequence[Tensor], start: int, stop: int) -> Iterator[tuple[Tensor, int]]:
    """Pieces of the vectors that cover [start, stop) of their concatenation, and where each begins from start on."""
    offset = 0
    for vector in vectors:
        low, high = max(start, offset), min(stop, offset + len(vector))
        if low < high:
            yield vector[low - offset : high - offset], low - start
        offset += len(vector)


def _read(vectors: Sequence[Tensor], start: int, stop: int, into: Tensor) -> None:
    for piece, place in _overlaps(vectors, start, stop):
        into[place : place + len(piece)].copy_(piece)


def _write(vectors: Sequence[Tensor], start: int, stop: int, source: Tensor) -> None:
    for piece, place in _overlaps(vectors, start, stop):
        piece.copy_(source[place : place + len(piece)])
