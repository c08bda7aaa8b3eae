"""What is measured on the ranks at hand: a step's computing, the link, and each way to use it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor

from .. import wire
from ..compression import Compression
from ..gradient import GradientCompressor
from ..ledger import Ledger
from ..operators import Operator
from ..pieces import in_buckets
from ..reducer import Reducer
from ..side_stream import await_gpu
from ..wire import Message
from .predict import BACKWARD, Candidate, Measurements

ROUNDS = 5
LONG_ENOUGH = 1.0  # seconds: a larger allreduce would only take longer
SIZES = [2**20 * 4**power for power in range(5)]  # bytes: 1 MiB to 256 MiB; links let small bursts pass


class Workload:
    """Training steps of an image classifier, with random images."""

    def __init__(self, model: torch.nn.Module, batch_size: int, image_size: int) -> None:
        self._model = model.to(_device())
        self._optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self._images = torch.randn(batch_size, 3, image_size, image_size, device=_device())
        self._labels = torch.zeros(batch_size, dtype=torch.int64, device=_device())

    def step(self) -> None:
        """One of them."""
        self._optimizer.zero_grad()
        outputs = self._model(self._images)
        torch.nn.functional.cross_entropy(getattr(outputs, "logits", outputs), self._labels).backward()
        self._optimizer.step()

    def distribute(self) -> None:
        """From now on, average gradients by plain Horovod."""
        named = list(self._model.named_parameters())
        self._optimizer = hvd.DistributedOptimizer(self._optimizer, named_parameters=named)


def measure(name: str, shapes: Mapping[str, torch.Size], work: Workload | float, ratio: float) -> Measurements:
    """Collective over all ranks of the job, at least two.

    Args:
        name: of the model.
        shapes: of its parameters.
        work: a step's; or the seconds that one takes without communication.
        ratio: part of each tensor that sparsifiers keep.
    """
    elements = sum(shape.numel() for shape in shapes.values())
    compute = work if isinstance(work, float) else _seconds_of(work.step)
    latency, bandwidth = _allreduce(4 * elements)
    overlap = 1.0 if isinstance(work, float) else _overlap(work, compute, latency + 4 * elements / bandwidth)
    gradients = _gradients(shapes)
    whole = 4 * elements
    halve = _seconds_of(lambda: [g.half().float() for g in gradients.values()])
    candidates = [
        Candidate("Horovod, fp32", "hvd.Compression.none", whole, 0.0, 0.0, latency + whole / bandwidth, dense=True),
        Candidate(
            "Horovod, fp16",
            "hvd.Compression.fp16",
            whole // 2,
            halve,
            0.0,
            latency + whole / 2 / bandwidth,
            dense=True,
        ),
    ]
    for title, how, compression in compressors(ratio):
        candidates.append(_compressed(title, how, compression, gradients))
    return Measurements(
        model=name,
        tensors=len(shapes),
        elements=elements,
        compute=compute,
        ranks=hvd.size(),
        nodes=hvd.cross_size(),
        ranks_per_node=hvd.local_size() if hvd.cross_size() > 1 else 1,
        bandwidth=bandwidth,
        latency=latency,
        overlap=overlap,
        candidates=tuple(candidates),
    )


def compressors(ratio: float) -> list[tuple[str, str, GradientCompressor]]:
    """Those that are tried, the ones that change gradients least first: with their names, and as one writes them."""
    amount = f"ratio={ratio:g}"
    return [
        (f"top-k {100 * ratio:g} %", f"Compression.topk({amount})", Compression.topk(ratio=ratio)),
        (f"4-bit top-k {100 * ratio:g} %", f"Compression.qtopk({amount})", Compression.qtopk(ratio=ratio)),
        (f"sign top-k {100 * ratio:g} %", f"Compression.signtopk({amount})", Compression.signtopk(ratio=ratio)),
        ("QSGD, 4 bits", "Compression.qsgd(bits=4)", Compression.qsgd(bits=4)),
    ]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _gradients(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(hvd.rank())
    return {name: torch.randn(shape, generator=generator).to(_device()) for name, shape in shapes.items()}


def _seconds_of(action: Callable[[], Any]) -> float:
    """Of the slowest rank, since a step waits for it; the least of some trials, since other programs disturb them."""
    action()
    taken = []
    for _ in range(3):
        hvd.barrier()
        start = time.perf_counter()
        action()
        await_gpu()
        taken.append(time.perf_counter() - start)
    return _slowest(min(taken))


def _overlap(work: Workload, compute: float, exchange: float) -> float:
    """What part of an allreduce the backward pass hides, of what it could; 1 where that is little, so not tried."""
    if exchange > 4 * compute:
        return 1.0
    work.distribute()
    exposed = max(0.0, _seconds_of(work.step) - compute)
    return min(1.0, max(0.0, exchange - exposed) / min(exchange, BACKWARD * compute))


def _slowest(seconds: float) -> float:
    return max(hvd.allgather_object(seconds, name="advise"))


def _allreduce(largest: int) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes per second of Horovod's allreduce, from its two largest trials."""
    taken: list[tuple[int, float]] = []
    tiny = torch.zeros(1, device=_device())
    latency = _slowest(min(_timed(tiny) for _ in range(10)))
    for size in [*[size for size in SIZES if size < largest], min(largest, SIZES[-1])]:
        tensor = torch.zeros(size // 4, device=_device())
        seconds = _slowest(min(_timed(tensor) for _ in range(3)))
        taken.append((size, seconds))
        if seconds > LONG_ENOUGH:
            break
    size, seconds = taken[-1]
    bandwidth = size / max(seconds - latency, 1e-9)
    if len(taken) > 1 and seconds > taken[-2][1]:  # without what a link lets pass at first
        bandwidth = min(bandwidth, (size - taken[-2][0]) / (seconds - taken[-2][1]))
    return latency, bandwidth


def _timed(tensor: Tensor) -> float:
    hvd.barrier()
    start = time.perf_counter()
    hvd.allreduce_(tensor, name="advise.allreduce", op=hvd.Sum)
    await_gpu()
    return time.perf_counter() - start


def _compressed(name: str, how: str, compression: GradientCompressor, gradients: Mapping[str, Tensor]) -> Candidate:
    decompress = _decompress(compression, gradients)
    both, message = _reduce(compression, gradients)
    return Candidate(
        name,
        how,
        message=message,
        compress=max(0.0, both - hvd.size() * decompress),
        decompress=decompress,
        exchange=_allgather(message),
    )


def _reduce(compression: GradientCompressor, gradients: Mapping[str, Tensor]) -> tuple[float, int]:
    """Seconds of compressing and of decompressing all ranks' messages, as in training; and bytes of a message."""
    from mpi4py import MPI

    settings, ledger = compression.settings, Ledger()
    shapes = {name: g.shape for name, g in gradients.items()}
    reducer = Reducer(
        shapes,
        operator=settings.operator,
        memory=settings.memory(),
        dense_below=settings.dense_below,
        buckets=list(in_buckets(shapes, settings.bucket_cap_mb)),
        seed=settings.seed,
        ledger=ledger,
    )
    reducer.open(MPI.COMM_WORLD, range(hvd.size()), "hvd-compress advise", settings.timeout)
    taken = []
    for _ in range(ROUNDS):
        tensors = {name: g.clone() for name, g in gradients.items()}  # they are given up
        await_gpu()
        hvd.barrier()
        ledger.reset()
        for name, tensor in tensors.items():
            reducer.add(name, tensor)
        reducer.reduce()
        await_gpu()
        taken.append(ledger.seconds["compress"])
    return _slowest(min(taken)), max(hvd.allgather_object(ledger.total.sent, name="advise"))


def _decompress(compression: GradientCompressor, gradients: Mapping[str, Tensor]) -> float:
    """Seconds of unpacking one rank's message and adding it up."""
    settings = compression.settings
    operator = settings.operator
    assert isinstance(operator, Operator), "no plan is among those that are tried"
    flat = {name: g.reshape(-1) for name, g in gradients.items()}
    messages = [operator.encode(g) if len(g) >= settings.dense_below else Message.dense(g) for g in flat.values()]
    data = wire.encode(messages).data
    sums = [torch.zeros_like(g) for g in flat.values()]

    def receive() -> None:
        for message, total in zip(wire.decode(data, _device()).messages, sums, strict=True):
            message.add_to(total)

    return _seconds_of(receive)


def _allgather(message: int) -> float:
    """Seconds until every rank has every rank's message: the median, since a link may let some pass at once."""
    from mpi4py import MPI

    from ..exchange import Exchange

    exchange = Exchange(MPI.COMM_WORLD.Dup())
    buffer = np.zeros(message, np.uint8)
    taken = []
    for _ in range(ROUNDS):
        hvd.barrier()
        start = time.perf_counter()
        exchange.allgatherv(buffer)
        taken.append(time.perf_counter() - start)
    return _slowest(statistics.median(taken))
