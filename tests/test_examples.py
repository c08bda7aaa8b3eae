"""Examples in other ways than their page shows them, which `test_code_blocks.py` runs."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest
import torch
from documents import numbers
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


def test_a_rank_alone_is_told_why_nothing_is_sent() -> None:
    assert run_example("quickstart.py", []).endswith(
        "nothing sent: a single rank compresses nothing, and local SGD's ledger is optimizer.ledger\n"
    )


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
@pytest.mark.parametrize(("name", "least", "most"), [("dgc", 2.5, 3.5), ("ef21", 2.5, 3.5), ("none", 1, 1)])
def test_cnn_by_name(world: World, name: str, least: float, most: float) -> None:
    output, _ = world.run(run_example, "cnn.py", ["--compression", name, "--ratio", "0.3", "--epochs", "1"])
    before, after = numbers(r"loss ([\d.]+) at first", output) + numbers(r"first, ([\d.]+) at last", output)
    assert after < before
    assert all(least <= saved <= most for saved in numbers(r"([\d.]+) times less", output))


def test_the_mean_of_fewer_losses_than_five() -> None:
    output = run_example("cnn.py", ["--epochs", "1", "--batch-size", "800"])  # one step
    (before,), (after,) = numbers(r"loss ([\d.]+) at first", output), numbers(r"first, ([\d.]+) at last", output)
    assert after == before


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--batch-size", "1438", "--epochs", "1"]])
def test_cnn_without_steps(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"no steps: --epochs . of 1438 images, .* smaller batches"):
        run_example("cnn.py", arguments)


def test_masked_words_without_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_example("masked_words.py", ["--steps", "0"])
    assert "no steps: --steps must be 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--ratio", "7"], "error: ratio must be in (0, 1], got 7.0"),
        (["--data", "/nowhere"], "error: --data /nowhere: no cifar-10-batches-py there"),
    ],
)
def test_cnn_says_what_is_wrong(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_example("cnn.py", arguments)
    assert told in capsys.readouterr().err


def every_compressor_without_steps() -> None:
    for arguments in (["--epochs", "0"], ["--batch-size", "719", "--epochs", "1"]):
        with pytest.raises(SystemExit, match=r"no steps: --epochs . of 1438 images, .* smaller batches"):
            run_example("every_compressor.py", [*arguments, "--only", "topk"])


@pytest.mark.ranks(2)
def test_every_compressor_without_steps(world: World) -> None:
    world.run(every_compressor_without_steps)


def test_cnn_refuses_what_a_ratio_is_not_enough_for(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("accordion", "threshold", "cd_adam", "topc"):
        with pytest.raises(SystemExit):
            run_example("cnn.py", ["--compression", name])
        assert f"invalid choice: '{name}'" in capsys.readouterr().err
