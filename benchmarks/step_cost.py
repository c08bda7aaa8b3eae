"""What one exchange of a whole model's gradients costs, beside Horovod, raw MPI and other systems' designs.

    mpirun -np 2 python benchmarks/step_cost.py
    mpirun -np 4 python benchmarks/step_cost.py --model bert --ratio 0.001

Ours and Horovod's rows run an unmodified ``hvd.DistributedOptimizer``: all gradients are handed to it at once and
``synchronize()`` is timed, from the first compressed tensor to the last averaged one. All methods run in turn in one
process, so that a busy machine is busy for all of them: trust the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.torch.compression import Compressor
from peers import DGCSampled, GraceTopK
from rich.console import Console
from rich.table import Table
from tensors import MODELS
from torch import Tensor

from hvd_compress import Compression
from hvd_compress.kernels import native


class Stopwatch(Compressor):
    """A compressor, with the time spent in its two methods."""

    def __init__(self, compressor: Any) -> None:
        self._compressor = compressor
        self.compressing = self.decompressing = 0.0  # seconds

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """The compressor's."""
        start = time.perf_counter()
        result = self._compressor.compress(tensor)
        self.compressing += time.perf_counter() - start
        return result

    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:
        """The compressor's."""
        start = time.perf_counter()
        result = self._compressor.decompress(tensor, ctx)
        self.decompressing += time.perf_counter() - start
        return result


@dataclass
class Method:
    """A way to average gradients, and what was measured of it."""

    name: str
    step: Callable[[], None]
    gradients: list[Tensor]
    sent: Callable[[], float]  # bytes handed over since the start
    watch: Stopwatch | None = None
    seconds: list[float] = field(default_factory=list)
    compressing: list[float] = field(default_factory=list)
    steps: int = 0

    @property
    def median(self) -> float:
        """Seconds for a step."""
        return statistics.median(self.seconds)


def main() -> None:
    """Measure all methods in turn, and print a table."""
    args = parse_arguments()
    os.environ.setdefault("HOROVOD_CACHE_CAPACITY", "8192")  # several models' tensors: Horovod warns of less
    hvd.init()
    if hvd.size() < 2:
        raise SystemExit("a single rank exchanges nothing: start it with mpirun -np 2 or more")
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(hvd.rank())
    source = [torch.randn(shape, generator=generator) for shape in MODELS[args.model]()]
    load_before = os.getloadavg()[0]

    plain = through_horovod("Horovod, fp32", source, None)
    measure(plain, source)  # Horovod's and MPI's own buffers are there before ours are counted,
    small = [torch.randn(5000, generator=generator)]
    first = through_horovod("a small model", small, Compression.topk, ratio=args.ratio)
    for _ in range(2):  # and so is the code of what is imported, 6 MB for any model, which all programs share
        measure(first, small)
    methods = [through_horovod("Top_k, ours", source, Compression.topk, ratio=args.ratio)]
    extra = extra_memory(methods[0], source)
    methods += [
        through_horovod("4-bit QTop_k, ours", source, Compression.qtopk, ratio=args.ratio, bits=4),
        plain,
        through_horovod("Horovod, fp16", source, "fp16"),
        raw_allreduce(source),
    ]
    for name, peer in (("GRACE-style top-k", GraceTopK(args.ratio)), ("DGC-style top-k", DGCSampled(args.ratio))):
        methods.append(of_peer(name, peer, source))
    copies: list[float] = []
    for _ in range(args.warmup + args.repetitions):
        copies.append(timed(lambda: [g.clone() for g in source]))
        for method in methods:
            measure(method, source)
    for method in methods:
        del method.seconds[: args.warmup], method.compressing[: args.warmup]
    if hvd.rank() == 0 and args.json:
        args.json.write_text(json.dumps({m.name: m.median for m in methods}))
    if hvd.rank() == 0:
        report(methods, statistics.median(copies[args.warmup :]), extra, args, load_before)


def through_horovod(name: str, source: list[Tensor], compression: Any, **settings: Any) -> Method:
    """An unmodified hvd.DistributedOptimizer."""
    model = torch.nn.ParameterList(torch.empty_like(g) for g in source)
    for p in model:
        p.grad = torch.empty_like(p)
    # Names of its own, since Horovod tells operations apart by them.
    named = [(f"{name}.{i}", p) for i, p in enumerate(model)]
    ours = callable(compression)
    chosen: Any = compression(named_parameters=named, **settings) if ours else hvd.Compression.none
    if compression == "fp16":
        chosen = hvd.Compression.fp16
    watch = Stopwatch(chosen)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=named, compression=watch
    )
    elements = sum(g.numel() for g in source)
    method = Method(name, optimizer.synchronize, [p.grad for p in model], lambda: 0.0, watch)
    method.sent = lambda: (
        float(chosen.ledger.total.sent) if ours else elements * method.steps * (2.0 if compression == "fp16" else 4.0)
    )
    return method


def raw_allreduce(source: list[Tensor]) -> Method:
    """One MPI_Allreduce of everything, in place: what an MPI library can do at best with all bytes."""
    from mpi4py import MPI

    flat = torch.empty(sum(g.numel() for g in source))
    gradients = [part.view(g.shape) for part, g in zip(flat.split([g.numel() for g in source]), source, strict=True)]

    def step() -> None:
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, flat.numpy())
        np.multiply(flat.numpy(), 1 / hvd.size(), out=flat.numpy())

    method = Method("MPI_Allreduce, fp32", step, gradients, lambda: 0.0)
    method.sent = lambda: float(flat.nbytes * method.steps)
    return method


def of_peer(name: str, peer: Any, source: list[Tensor]) -> Method:
    """See peers.py."""
    gradients = [torch.empty_like(g) for g in source]
    return Method(name, lambda: peer(gradients), gradients, lambda: float(peer.sent))


def measure(method: Method, source: list[Tensor]) -> None:
    """One step of a method, all ranks together."""
    for gradient, value in zip(method.gradients, source, strict=True):
        gradient.copy_(value)
    before = method.watch.compressing if method.watch else 0.0
    method.seconds.append(timed(method.step))
    method.compressing.append(method.watch.compressing - before if method.watch else 0.0)
    method.steps += 1


def timed(work: Callable[[], Any]) -> float:
    """Seconds from when the last rank began to when this one ended."""
    hvd.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def extra_memory(method: Method, source: list[Tensor]) -> float:
    """Largest resident size during the method's first steps beyond what there was before, in sizes of the model."""
    measure(Method("", lambda: None, method.gradients, lambda: 0.0), source)  # so that the gradients are there
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    for _ in range(3):
        measure(method, source)
    method.seconds.clear()
    method.compressing.clear()
    return (resident("VmHWM") - before) / sum(g.nbytes for g in source)


def resident(what: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def report(methods: list[Method], copy: float, extra: float, args: argparse.Namespace, load_before: float) -> None:
    """Rank 0's table."""
    reference = next(m for m in methods if m.name == "Horovod, fp16")
    elements = sum(g.numel() for g in methods[0].gradients)
    rows = Table(
        title=f"{args.model}: {len(methods[0].gradients)} tensors, {elements:,} elements, ratio {args.ratio:g}, "
        f"{hvd.size()} ranks, {args.threads} thread(s) each, kernels: {native.description()}"
    )
    rows.add_column("method")
    for heading in ("ms", "min–max", "of fp16", "compress ms", "MB sent"):
        rows.add_column(heading, justify="right")
    for m in methods:
        compressing = f"{1e3 * statistics.median(m.compressing):.1f}" if m.watch else ""
        spread = f"{1e3 * min(m.seconds):.0f}–{1e3 * max(m.seconds):.0f}"
        rows.add_row(
            m.name,
            f"{1e3 * m.median:.1f}",
            spread,
            f"{m.median / reference.median:.2f}×",
            compressing,
            f"{m.sent() / m.steps / 1e6:.3f}",
        )
    Console(force_terminal=False, width=100).print(rows)
    ours = methods[0]
    selecting = statistics.median(ours.compressing)
    print(f"copy of all gradients: {1e3 * copy:.1f} ms; our compress takes {selecting / copy:.2f}× as long")
    for name in ("GRACE-style top-k", "DGC-style top-k"):
        peer = next(m for m in methods if m.name == name)
        print(f"{name} takes {peer.median / ours.median:.1f}× as long as ours")
    print(f"extra memory in our first steps: {extra:.2f}× the gradients' size (the error memory is 1.00×)")
    print(f"load average: {load_before:.1f} before, {os.getloadavg()[0]:.1f} after, on {os.cpu_count()} cores")
    setting = "OMPI_MCA_mpi_yield_when_idle"
    print(f"a rank may use {len(os.sched_getaffinity(0))} cores; {setting}: {os.environ.get(setting, 'not set')}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What one exchange of a whole model's gradients costs.")
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="whose sizes (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.01, help="part that is sent (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=10, help="steps that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each rank (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the medians, which figures.py draws")
    return parser.parse_args()


if __name__ == "__main__":
    main()
