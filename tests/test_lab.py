"""Exchanges between machines with network cards of their own, whose bytes the kernel counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from lab import Lab

from hvd_compress import costs

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "exchange_step.py"


def measured(nodes: int, ranks: int) -> dict[str, Any]:
    with Lab(nodes, "1gbit") as lab:
        output = lab.run(ranks, [sys.executable, str(SCRIPT), "--elements", "1500000", "--steps", "2"])
    result = json.loads(output.strip().splitlines()[-1])
    assert (result["nodes"], result["ranks"]) == (nodes, nodes * ranks)  # MPI sees what shares a machine
    return result


@pytest.fixture(scope="module")
def layouts() -> dict[tuple[int, int], dict[str, Any]]:
    return {layout: measured(*layout) for layout in [(4, 2), (2, 4), (4, 1), (2, 1)]}


@pytest.mark.lab
def test_hierarchical_saves_what_the_node_sums(layouts: dict[tuple[int, int], dict[str, Any]]) -> None:
    for nodes, ranks in [(4, 2), (2, 4)]:
        sent = layouts[nodes, ranks]["bytes per node"]
        assert sent["allgather"] > 0.9 * ranks * sent["hierarchical"] > 0


@pytest.mark.lab
def test_reduce_scatter_does_not_grow_with_the_ranks(layouts: dict[tuple[int, int], dict[str, Any]]) -> None:
    sent = {of: layouts[of]["bytes per node"]["reduce_scatter"] / of[1] for of in layouts}
    for growing in ([(2, 1), (4, 1), (4, 2)], [(2, 1), (2, 4)]):
        mean = sum(sent[of] for of in growing) / len(growing)
        assert all(0.8 * mean < sent[of] < 1.2 * mean for of in growing), sent


@pytest.mark.lab
def test_the_kernel_counts_what_the_model_says(layouts: dict[tuple[int, int], dict[str, Any]]) -> None:
    link = costs.Link(0, 1)
    for (nodes, ranks), result in layouts.items():
        message = result["bytes handed over per rank"]["allgather"]
        work = costs.Work(result["elements"], 4 * result["elements"], message, result["union"])
        for name, function in costs.EXCHANGES.items():
            predicted = function(costs.Cluster(nodes, ranks, link, link), work).between
            assert result["bytes per node"][name] == pytest.approx(predicted, rel=0.15), (nodes, ranks, name)
