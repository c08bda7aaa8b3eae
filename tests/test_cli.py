"""The command line: its figures against the definitions, its errors, and that it starts no MPI."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import hvd_compress.operators as operators
from hvd_compress.cli import Row, bound, catalogue, main, operator_rows
from hvd_compress.operators import CAT, QSGD, Composed, Operator, TernGrad, Threshold, TopK


def rows(numel: int = 20_000, ratio: float = 0.05, bits: int = 4, seed: int = 0) -> dict[str, Row]:
    return {row.name: row for row in operator_rows(numel, ratio, bits, seed)}


def test_figures_by_definition() -> None:
    """Bits of what has no index are known to the byte; errors of top-k are the energy of the rest."""
    table = rows()
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double()
    rest = x.square().sort().values[:19_000].sum() / x.square().sum()
    assert table["TopK"].error == pytest.approx(float(rest), rel=1e-6)
    scale = x.abs().mean()
    assert table["Sign"].error == pytest.approx(1 - float(len(x) * scale**2 / x.square().sum()), rel=1e-5)
    # The table's row: form, shape, and count and seed, or s; see docs/wire-format.md.
    assert table["Sign"].bits == 8 * (40 + 2 + 3 + 1 + 2 * 4 + 20_000 / 8) / 20_000
    seed = round(table["RandK"].bits * 20_000 / 8) - (40 + 2 + 3 + 2 + 4 * 1000)
    assert 1 <= seed <= 9
    # 1,000 of 20,000 cost 5.7 bits each at the limit; with values of 32 bits.
    assert 0.05 * (32 + 5.7) <= table["TopK"].bits <= 0.05 * (32 + 5.8) + 8 * 50 / 20_000


def test_bounds_in_words() -> None:
    table = rows()
    assert table["TopK"].bound == "γ = 0.05"
    assert table["Threshold"].bound == "none"
    assert table["OneBit"].bound.startswith("β = ")
    assert table["OneBit"].bound.endswith("≥ 1: no contraction")
    assert bound(QSGD(levels=10, norm="l2"), 50) == "β = 0.5"
    assert bound(TernGrad(), 50) == "none"
    for name, operator in catalogue(0.05, 4).items():
        if table[name].bound.startswith("γ"):
            assert table[name].error <= 1 - operator.gamma(20_000) + 1e-6


def test_every_operator_is_in_the_table() -> None:
    listed = {type(o) for o in catalogue(0.1, 4).values()}
    public = [getattr(operators, name) for name in operators.__all__]
    concrete = {c for c in public if isinstance(c, type) and issubclass(c, Operator) and c is not Operator}
    assert listed == {c for c in concrete if not getattr(c, "__abstractmethods__", None)}
    assert {CAT, TopK, Threshold, Composed} <= listed


@pytest.mark.parametrize(("numel", "ratio", "bits"), [(1, 1.0, 2), (2, 0.5, 8), (1000, 1.0, 8), (999, 1e-9, 2)])
def test_the_ends_of_the_ranges(numel: int, ratio: float, bits: int) -> None:
    assert all(row.bits > 0 and row.error >= 0 for row in operator_rows(numel, ratio, bits))


def test_same_seed_same_table() -> None:
    assert rows(seed=3) == rows(seed=3) != rows(seed=4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "COMMAND"),
        (["nonsense"], "invalid choice"),
        (["operators", "--numel", "0"], "1 to 1000000000"),
        (["operators", "--numel", "1e6"], "whole number"),
        (["operators", "--ratio", "0"], r"in (0, 1]"),
        (["operators", "--ratio", "nan"], r"in (0, 1]"),
        (["operators", "--ratio", "1%"], "one element in a hundred"),
        (["operators", "--bits", "1"], "2 to 8"),
        (["operators", "--bits", "4.5"], "2 to 8"),
    ],
)
def test_bad_values(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert text in capsys.readouterr().err


def test_the_command_starts_neither_mpi_nor_horovod() -> None:
    code = (
        "import sys, horovod.torch as hvd\n"
        "from hvd_compress.cli import main\n"
        "main(['operators', '--numel', '5000'])\n"
        "assert not hvd.is_initialized() and 'mpi4py.MPI' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "5,000 Gaussian elements" in ended.stdout
    assert all(name in ended.stdout for name in catalogue(0.01, 4))


def test_help_teaches() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "hvd_compress", "operators", "--help"], capture_output=True, text=True
    )
    assert ended.returncode == 0
    assert all(word in ended.stdout for word in ("γ", "β", "--numel", "--ratio", "--bits", "examples:"))
