"""How many bytes a rank really handed to its communication libraries, and how long it took."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field


@dataclass
class Traffic:
    """Bytes of one tensor, or of all."""

    mpi: int = 0  # in send buffers given to mpi4py
    horovod: int = 0  # in tensors given to Horovod: small dense ones, sparse ones, and one ticket per message
    dense: int = 0  # what plain Horovod would have been given: all elements, in the gradient's dtype, every step
    node: int = 0  # in buffers given to either for ranks of this rank's node only: sums, and what is passed on there

    def __str__(self) -> str:
        if not (self.sent or self.node):
            return "nothing sent: a single rank compresses nothing, and local SGD's ledger is optimizer.ledger"
        times = f"{self.ratio:.1f} times less than the {self.dense / 1e6:.2f} MB of Horovod alone"
        within = f", and {self.node / 1e6:.2f} MB more within the node" if self.node else ""
        return f"{self.sent / 1e6:.2f} MB sent, {times}{within}"

    def count(self, where: str, sent: int) -> None:
        """That ``sent`` bytes were handed to ``"mpi"``, to ``"horovod"``, or to either within the ``"node"``."""
        setattr(self, where, getattr(self, where) + sent)

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
    # This process's wall time in "compress" (both ways, memories too) and "exchange" (as far as it was waited for,
    # with the others' lateness). On a GPU, whose work is only started here, some shows up where results are needed.
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float), compare=False)
    _counted: float = field(default=0.0, compare=False, repr=False)  # seconds that were ever counted, of whatever

    @property
    def total(self) -> Traffic:
        """The sum over all tensors and what they share."""
        parts = [*self.tensors.values(), self.shared]
        total = Traffic()
        for part in parts:
            total.add(part)
        return total

    def timed(self, what: str) -> _Timed:
        """A context: the time that it takes is counted as that of ``what``, without what is counted within it."""
        return _Timed(self, what)

    def take(self, other: Ledger) -> None:
        """Count what ``other`` has counted, which then starts again from zero."""
        for name, traffic in other.tensors.items():
            self.tensors[name].add(traffic)
        self.shared.add(other.shared)
        self.exchanges += other.exchanges
        for what, seconds in other.seconds.items():
            self.seconds[what] += seconds
        other.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self.tensors.clear()
        self.shared = Traffic()
        self.exchanges = 0
        self.seconds.clear()

    def state_dict(self) -> dict[str, object]:
        """The bytes, as plain dictionaries and integers; times are this process's affair."""
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


class _Timed:
    """No generator, since it is entered for each tensor of each step."""

    __slots__ = ("_before", "_ledger", "_start", "_what")

    def __init__(self, ledger: Ledger, what: str) -> None:
        self._ledger = ledger
        self._what = what

    def __enter__(self) -> None:
        self._before = self._ledger._counted
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        ledger = self._ledger
        within = ledger._counted - self._before
        own = time.perf_counter() - self._start - within
        ledger.seconds[self._what] += own
        ledger._counted += own
