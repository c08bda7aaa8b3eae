"""The command line: ``python -m hvd_compress``, or ``hvd-compress``. Starts no MPI, except for ``advise``."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from .advise.command import add_advise
from .operators import (
    CAT,
    QSGD,
    TBQSGD,
    TNQSGD,
    TQSGD,
    Amount,
    Composed,
    MinMax,
    OneBit,
    Operator,
    Quantizer,
    RandK,
    RandomBlock,
    Rotated,
    Sign,
    TernGrad,
    Threshold,
    TopK,
    compose,
)
from .report.command import add_report
from .wire import encode

T = TypeVar("T")

_LARGEST = 10**9  # elements


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: in place of the program's.
    """
    parser = argparse.ArgumentParser(
        prog="hvd-compress",
        description="Compressed communication for Horovod: looks at operators, at this machine, and at runs.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_operators(commands)
    add_advise(commands)
    add_report(commands)
    options = parser.parse_args(arguments)
    options.run(options)


# operators


def _add_operators(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "operators",
        help="a table of all operators: bound, bits per element, error",
        description=(
            "Compress one Gaussian tensor with each operator and print what it costs and loses.\n\n"
            "  bound  what holds for every tensor of this size. With γ: ‖x − C(x)‖² ≤ (1 − γ)‖x‖² in the mean,\n"
            "         so that error feedback converges; 1 loses nothing. With β: unbiased, and\n"
            "         ‖x − C(x)‖² ≤ β‖x‖² in the mean; from β = 1 on that is no contraction.\n"
            "  bits   of the encoded packet, headers and all, for each element; float32 has 32\n"
            "  error  ‖x − C(x)‖²/‖x‖² of this tensor: 0 loses nothing, 1 as much as sending nothing"
        ),
        epilog=(
            "examples:\n"
            "  hvd-compress operators                                  a million elements, 1 %, 4 bits\n"
            "  hvd-compress operators --numel 2359296 --ratio 0.001    a large layer of ResNet-50, 0.1 %\n"
            "  hvd-compress operators --bits 2                         how the quantizers compare at 2 bits\n\n"
            "Gradients mostly have heavier tails than a Gaussian: top-k then loses less than the table says, and\n"
            "quantizers with even steps lose more."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--numel", type=_numel, default=1_000_000, metavar="D", help="elements of the tensor (default: 1000000)"
    )
    parser.add_argument(
        "--ratio",
        type=_ratio,
        default=0.01,
        metavar="R",
        help="part that sparsifiers keep, 0 < R ≤ 1 (default: 0.01)",
    )
    parser.add_argument(
        "--bits", type=_bits, default=4, metavar="B", help="of each quantized value, 2 to 8 (default: 4)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of the tensor and of random operators (default: 0)")
    parser.set_defaults(run=_operators)


def _operators(options: argparse.Namespace) -> None:
    table = Table(title=f"{options.numel:,} Gaussian elements, {options.ratio:.3g} kept, {options.bits} bits")
    table.add_column("operator", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for row in operator_rows(options.numel, options.ratio, options.bits, options.seed):
        table.add_row(row.name, row.bound, f"{row.bits:.3f}", f"{row.error:.3g}")
    Console().print(table)


class Row(NamedTuple):
    """One operator on one tensor."""

    name: str
    bound: str
    bits: float  # of the packet, per element of the tensor
    error: float  # ‖x − C(x)‖² / ‖x‖²


def operator_rows(numel: int, ratio: float, bits: int, seed: int = 0) -> list[Row]:
    """Each operator's bound, and what it costs and loses on one Gaussian tensor of ``numel`` float32 elements.

    Args:
        numel: d ≥ 1.
        ratio: part that sparsifiers keep, 0 < ratio ≤ 1.
        bits: of quantized values, 2 to 8.
        seed: of the tensor, and of each operator's draws.
    """
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    rows = []
    for name, operator in catalogue(ratio, bits).items():
        message = operator.encode(x, generator=torch.Generator().manual_seed(seed + 1))
        error = float((x - message.decode()).double().square().sum() / x.double().square().sum())
        rows.append(Row(name, bound(operator, numel), 8 * len(encode([message]).data) / numel, error))
    return rows


def catalogue(ratio: float, bits: int) -> dict[str, Operator]:
    """Every operator, and the compositions of the Qsparse-local-SGD paper, by the name in the table.

    The threshold is the one that a Gaussian of variance 1 exceeds with probability ``ratio``.
    """
    threshold = max(statistics.NormalDist().inv_cdf(1 - ratio / 2), sys.float_info.min)
    topk = TopK(ratio=ratio)
    return {
        "TopK": topk,
        "CAT": CAT(),
        "Threshold": Threshold(threshold),
        "RandK": RandK(ratio=ratio),
        "RandomBlock": RandomBlock(ratio=ratio),
        "QSGD, buckets of 512": QSGD(bits=bits, bucket=512),
        "QSGD, l2, buckets of 512": QSGD(bits=bits, norm="l2", bucket=512),
        "MinMax": MinMax(bits=bits),
        "Rotated": Rotated(bits=bits),
        "TNQSGD": TNQSGD(bits=bits),
        "TNQSGD, power law": TNQSGD(bits=bits, model="power"),
        "TQSGD": TQSGD(bits=bits),
        "TBQSGD": TBQSGD(bits=bits),
        "TernGrad": TernGrad(),
        "OneBit": OneBit(),
        "Sign": Sign(),
        "TopK + QSGD": compose(topk, QSGD(bits=bits)),
        "TopK + QSGD, l2, scaled": compose(topk, QSGD(bits=bits, norm="l2"), scaled=True),
        "TopK + Sign": compose(topk, Sign()),
        "RandK + QSGD": compose(RandK(ratio=ratio), QSGD(bits=bits)),
    }


def bound(operator: Operator, numel: int) -> str:
    """What an operator states for every tensor of ``numel`` elements, in few words."""
    quantizer = operator.quantizer if isinstance(operator, Composed) and not operator.scaled else operator
    if isinstance(quantizer, Quantizer):
        k = numel
        if isinstance(operator, Composed) and isinstance(operator.sparsifier, Amount):
            k = operator.sparsifier.count(numel)
        beta = _stated(quantizer.variance_bound, k)
        if beta is not None and beta >= 1:
            return f"β = {beta:.3g} ≥ 1: no contraction"
        if beta is not None and quantizer is operator:
            return f"β = {beta:.3g}"
    gamma = _stated(operator.gamma, numel)
    return "none" if gamma is None else f"γ = {gamma:.3g}"


def _stated(statement: Callable[[int], float], numel: int) -> float | None:
    try:
        return statement(numel)
    except NotImplementedError:
        return None


def _numel(text: str) -> int:
    number = _number(int, text, "a whole number of elements, 1000000 for example")
    if not 1 <= number <= _LARGEST:
        raise argparse.ArgumentTypeError(f"must be 1 to {_LARGEST}, which is tried in memory; got {text}")
    return number


def _ratio(text: str) -> float:
    number = _number(float, text, "a number, 0.01 for one element in a hundred")
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], 0.01 for one element in a hundred; got {text}")
    return number


def _bits(text: str) -> int:
    number = _number(int, text, "a whole number, 2 to 8")
    if not 2 <= number <= 8:
        raise argparse.ArgumentTypeError(f"must be 2 to 8; got {text}")
    return number


def _seed(text: str) -> int:
    number = _number(int, text, "a whole number")
    if not 0 <= number < 2**63 - 1:
        raise argparse.ArgumentTypeError(f"must be 0 or more, and less than 2 ** 63 - 1; got {text}")
    return number


def _number(convert: Callable[[str], T], text: str, wanted: str) -> T:
    try:
        return convert(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {wanted}; got {text!r}") from None
