"""The soak benchmark, in short."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from world import World

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def soaks(steps: int) -> str:
    spec = importlib.util.spec_from_file_location("soak", BENCHMARKS / "soak.py")
    assert spec
    assert spec.loader
    soak = sys.modules["soak"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    seen = soak.soak(steps, seed=1, overflow=0.05)
    assert seen.steps == steps
    assert 0 < seen.skipped < steps / 2
    assert seen.dropped > 0
    assert seen.unused > 0
    assert 2 * seen.least < seen.most
    return seen.wrong


@pytest.mark.ranks(4)
def test_a_short_soak(world: World) -> None:
    assert world.run(soaks, 80) == [""] * 4
