"""Every example runs on two ranks and learns."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from world import World

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, arguments: list[str]) -> str:
    """As ``python examples/<name> <arguments>``; what it prints."""
    kept, output = (sys.argv, sys.path[:], torch.get_num_threads()), io.StringIO()
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(EXAMPLES))
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv, sys.path = kept[:2]
        torch.set_num_threads(kept[2])
    return output.getvalue()


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


@pytest.mark.ranks(2)
def test_custom_compressor(world: World) -> None:
    output, silent = world.run(run_example, "custom_compressor.py", [])
    losses = numbers(r"loss ([\d.]+)", output)
    assert losses[-1] < 0.5 < losses[0]
    assert numbers(r"([\d.]+) times less", output)[0] > 20
    assert silent == ""


def test_the_custom_operator_fits_on_a_page_and_keeps_the_largest_of_each_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    names = runpy.run_path(str(EXAMPLES / "custom_compressor.py"))
    x = torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0], [-4.0, 5.0, -6.0], [7.0, 0.0, 0.0]])
    assert names["ChunkMax"](chunk=3)(x).tolist() == [[0, -3, 0], [0, 0, 0], [0, 0, -6], [7, 0, 0]]
    assert names["ChunkMax"](chunk=7)(x).reshape(-1).nonzero().reshape(-1).tolist() == [
        6,
        9,
    ]  # the last chunk is short
    source = (EXAMPLES / "custom_compressor.py").read_text()
    body = source[source.index("@dataclass") : source.index("if __name__")]
    assert len(body.strip().splitlines()) <= 30


@pytest.mark.ranks(2)
def test_local_steps(world: World) -> None:
    output, _ = world.run(run_example, "local_steps.py", ["--sync-every", "8"])
    losses = numbers(r"loss ([\d.]+)", output)
    assert losses[-1] < 0.5 < losses[0]
    assert numbers(r"([\d.]+) times less", output)[0] > 200


@pytest.mark.ranks(2)
def test_cnn(world: World) -> None:
    output, _ = world.run(run_example, "cnn.py", ["--epochs", "1", "--compression", "qtopk"])
    before, after = numbers(r"loss ([\d.]+) at first", output) + numbers(r"first, ([\d.]+) at last", output)
    assert after < 0.8 * before
    assert numbers(r"accuracy ([\d.]+)%", output)
    assert numbers(r"([\d.]+) times less", output)[0] > 30


@pytest.mark.ranks(2)
def test_masked_words(world: World) -> None:
    output, _ = world.run(run_example, "masked_words.py", ["--steps", "25", "--words", "1000"])
    before, after = numbers(r"loss ([\d.]+) at first, [\d.]+", output) + numbers(r"at first, ([\d.]+)", output)
    assert after < 0.9 * before
    assert numbers(r"logits.weight: .* ([\d.]+) times less", output)[0] > 40
    assert numbers(r"embedding.weight: .* ([\d.]+) times less", output) == [1.0]  # Horovod gathers its rows
