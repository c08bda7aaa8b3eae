"""How many bytes a rank really handed to its communication libraries."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field


@dataclass
class Traffic:
    """Bytes of one tensor, or of all."""

    mpi: int = 0  # in send buffers given to mpi4py
    horovod: int = 0  # in tensors given to Horovod: small dense ones, sparse ones, and one ticket per message
    dense: int = 0  # what plain Horovod would have been given: all elements, in the gradient's dtype, every step
    node: int = 0  # in send buffers given to mpi4py for ranks of this rank's node only; not in ``mpi``

    def __str__(self) -> str:
        times = f"{self.ratio:.1f} times less than the {self.dense / 1e6:.2f} MB of Horovod alone"
        within = f", and {self.node / 1e6:.2f} MB more within the node" if self.node else ""
        return f"{self.sent / 1e6:.2f} MB sent, {times}{within}"

    def add(self, other: Traffic) -> None:
        """Count what ``other`` has counted."""
        self.mpi += other.mpi
        self.horovod += other.horovod
        self.dense += other.dense
        self.node += other.node

    @property
    def sent(self) -> int:
        """All bytes that left this rank's hands, other than those that are known to stay within the node."""
        return self.mpi + self.horovod

    @property
    def ratio(self) -> float:
        """How many times less was sent than plain Horovod would have been given."""
        return self.dense / self.sent if self.sent else float("nan")


@dataclass
class Ledger:
    """Counts per tensor, since the start or the last :meth:`reset`.

    A buffer is counted once, as it is handed over; how often the library below copies it on its way to the other
    ranks is that library's affair (with an allgatherv, each of R ranks receives what the R − 1 others sent). A single
    rank's gradients are never handed to a compressor by Horovod; local SGD counts what one rank gives to MPI.
    """

    tensors: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))  # by parameter name
    shared: Traffic = field(default_factory=Traffic)  # headers, length exchanges, the first handshake
    exchanges: int = 0  # of compressed messages, or of all parameters under local SGD

    @property
    def total(self) -> Traffic:
        """The sum over all tensors and what they share."""
        parts = [*self.tensors.values(), self.shared]
        total = Traffic()
        for part in parts:
            total.add(part)
        return total

    def take(self, other: Ledger) -> None:
        """Count what ``other`` has counted, which then starts again from zero."""
        for name, traffic in other.tensors.items():
            self.tensors[name].add(traffic)
        self.shared.add(other.shared)
        self.exchanges += other.exchanges
        other.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self.tensors.clear()
        self.shared = Traffic()
        self.exchanges = 0

    def state_dict(self) -> dict[str, object]:
        """Plain dictionaries and integers."""
        return {
            "tensors": {name: asdict(traffic) for name, traffic in self.tensors.items()},
            "shared": asdict(self.shared),
            "exchanges": self.exchanges,
        }

    def load_state_dict(self, state: dict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.reset()
        self.tensors.update((name, Traffic(**counts)) for name, counts in state["tensors"].items())
        self.shared = Traffic(**state["shared"])
        self.exchanges = state["exchanges"]
