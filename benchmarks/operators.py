"""What compressing a whole model's gradients by each operator costs on one core, beside copying them.

    python benchmarks/operators.py
    python benchmarks/operators.py --model bert --threads 2

Milliseconds of processor time, the median of a few repetitions: to compress (without memory), to pack what was
compressed, to open what another rank has packed, and to add it to the sum, which is done once for each rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bits import OPERATORS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tensors import MODELS

from hvd_compress import wire
from hvd_compress.kernels import native
from hvd_compress.operators import QSGD, TBQSGD, TQSGD, Operator, Rotated

MORE: dict[str, Operator] = {
    "QSGD, 4 bits, one norm": QSGD(bits=4),
    "TQSGD, 3 bits": TQSGD(bits=3),
    "TBQSGD, 3 bits": TBQSGD(bits=3),
    "rotated, 4 bits": Rotated(bits=4),
}


def main() -> None:
    """Print a row for each operator."""
    parser = argparse.ArgumentParser(description="Processor time of each operator.")
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="whose sizes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the process (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="that count (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()[0]
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).reshape(-1) for shape in MODELS[args.model]()]
    sums = [torch.zeros_like(g) for g in gradients]
    copy = milliseconds(lambda: [s.copy_(g) for s, g in zip(sums, gradients, strict=True)], args.repetitions)

    def compress(operator: Operator) -> list[wire.Message]:
        return [operator.encode(g, generator=generator) for g in gradients]

    def add(messages: list[wire.Message]) -> None:
        for message, flat in zip(messages, sums, strict=True):
            message.add_to(flat)

    elements = sum(g.numel() for g in gradients)
    rows = Table(
        title=f"{args.model}: {len(gradients)} tensors, {elements:,} elements, {args.threads} thread(s), "
        f"kernels: {native.description()}"
    )
    rows.add_column("operator")
    for heading in ("compress", "pack", "open", "add", "in all, of a copy"):
        rows.add_column(heading, justify="right")
    for name, operator in track((OPERATORS | MORE).items(), "measuring", transient=True):
        messages = compress(operator)
        packed = wire.encode(messages)
        opened = [*wire.decode(packed.data).messages]
        steps: list[Callable[[], Any]] = [
            partial(compress, operator),
            partial(wire.encode, messages),
            partial(wire.decode, packed.data, likely=packed.table),
            partial(add, opened),
        ]
        took = [milliseconds(step, args.repetitions) for step in steps]
        rows.add_row(name, *(f"{t:.1f}" for t in took), f"{sum(took) / copy:.1f}×")
    Console(force_terminal=False, width=110).print(rows)
    print(f"one copy of all gradients: {copy:.1f} ms")
    print(f"load average: {load_before:.1f} before, {os.getloadavg()[0]:.1f} after, on {os.cpu_count()} cores")


def milliseconds(work: Callable[[], Any], repetitions: int) -> float:
    """The median of the processor time that ``work`` takes, after one time that does not count."""
    took = []
    for _ in range(repetitions + 1):
        start = time.process_time()
        work()
        took.append(1e3 * (time.process_time() - start))
    return statistics.median(took[1:])


if __name__ == "__main__":
    main()
