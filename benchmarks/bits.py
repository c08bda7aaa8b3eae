"""How many bytes each compressor's packet has, beside the least that its content can take.

    python benchmarks/bits.py
    python benchmarks/bits.py --model bert --values laplace

A packet of a whole model's gradients is encoded, with its header and table. The limit is that of the information in
it: for chosen elements the logarithm of the number of such choices, ``log2 C(d, k)``; for levels the entropy of how
often each one occurs in the tensor; for floats their own bits. A choice that receivers draw themselves is free.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from tensors import MODELS
from torch import Tensor

from hvd_compress import wire
from hvd_compress.operators import QSGD, TNQSGD, MinMax, OneBit, Operator, RandK, Sign, TernGrad, TopK, compose
from hvd_compress.wire import Message
from hvd_compress.wire.values import Levels, Rotated

OPERATORS: dict[str, Operator] = {
    "top-k 0.1 %": TopK(ratio=0.001),
    "top-k 1 %": TopK(ratio=0.01),
    "top-k 10 %": TopK(ratio=0.1),
    "top-k, k = 1000": TopK(k=1000),
    "QTop_k 1 %, 4 bits, max norm": compose(TopK(ratio=0.01), QSGD(bits=4, norm="max")),
    "QTop_k 1 %, 4 bits, l2 norm, scaled": compose(TopK(ratio=0.01), QSGD(bits=4, norm="l2"), scaled=True),
    "SignTop_k 1 %": compose(TopK(ratio=0.01), Sign()),
    "rand-k 1 %": RandK(ratio=0.01),
    "QSGD, 4 bits": QSGD(bits=4, bucket=512),
    "sign": Sign(),
    "TernGrad": TernGrad(),
    "TNQSGD, 3 bits": TNQSGD(bits=3),
    "min-max, 4 bits": MinMax(bits=4),
    "one bit, rotated": OneBit(),
}
VALUES: dict[str, Callable[[torch.Generator, tuple[int, ...]], Tensor]] = {
    "gauss": lambda g, shape: torch.randn(shape, generator=g),
    "laplace": lambda g, shape: (
        torch.empty(shape).exponential_(generator=g) * (2 * torch.randint(2, shape, generator=g) - 1)
    ),
}


def limit_bits(message: Message) -> float:
    """The least number of bits for what a message holds."""
    bits = 0.0
    if message.indices is not None and message.rule is None:
        bits += log2_choices(message.numel, len(message.indices))
    values = message.values.inner if isinstance(message.values, Rotated) else message.values
    bits += 8 * values.floats.numel() * values.floats.element_size()
    if isinstance(values, Levels):
        frequency = torch.bincount(values.levels.to(torch.int64)).double()
        share = frequency[frequency > 0] / max(1, len(values.levels))
        bits -= len(values.levels) * float((share * share.log2()).sum())
    return bits


def log2_choices(d: int, k: int) -> float:
    """log2 of d over k."""
    return (math.lgamma(d + 1) - math.lgamma(k + 1) - math.lgamma(d - k + 1)) / math.log(2)


def main() -> None:
    """Print a row for each operator."""
    parser = argparse.ArgumentParser(description="Bytes of each compressor's packet beside their limit.")
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="whose sizes (default: %(default)s)")
    parser.add_argument("--values", choices=VALUES, default="gauss", help="of gradients (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the values (default: %(default)s)")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    gradients = [VALUES[args.values](generator, shape) for shape in MODELS[args.model]()]
    elements = sum(g.numel() for g in gradients)
    rows = Table(title=f"{args.model}: {len(gradients)} tensors, {elements:,} elements, {args.values}")
    rows.add_column("operator")
    for heading in ("bytes", "limit", "over the limit", "bits per element", "less than fp32"):
        rows.add_column(heading, justify="right")
    for name, operator in OPERATORS.items():
        messages = [operator.encode(g, generator=generator) for g in gradients]
        packet = wire.decode(wire.encode(messages).data)  # without the zeros, which are not sent
        sent = len(wire.encode(messages).data)
        limit = sum(map(limit_bits, packet.messages)) / 8
        rows.add_row(
            name,
            f"{sent:,}",
            f"{limit:,.0f}",
            f"{sent / limit - 1:.2%}",
            f"{8 * sent / elements:.4f}",
            f"{4 * elements / sent:.1f}×",
        )
    Console(force_terminal=False, width=120).print(rows)


if __name__ == "__main__":
    main()
