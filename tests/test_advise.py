"""Advice on whether to compress: the forecast by hand. `test_code_blocks.py` has it measure, on a slow link too."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from hvd_compress.advise import Candidate, Measurements, advise
from hvd_compress.advise.command import conclusion, explain, maker
from hvd_compress.advise.predict import spans, step_seconds
from hvd_compress.cli import main

FP32 = Candidate("Horovod, fp32", "none", 100, 0.0, 0.0, 10.5, dense=True)
FP16 = Candidate("Horovod, fp16", "fp16", 50, 1.0, 0.0, 5.5, dense=True)
TOPK = Candidate("top-k", "topk", 5, 0.25, 0.125, 0.5)
FOUND = Measurements(
    "model",
    3,
    25,
    3.0,
    ranks=2,
    nodes=2,
    ranks_per_node=1,
    bandwidth=10.0,
    latency=0.5,
    overlap=1.0,
    candidates=(FP32, FP16, TOPK),
)


def test_step_on_the_ranks_that_were_measured() -> None:
    """What was measured, less what the backward pass hides of Horovod's."""
    assert step_seconds(FP32, FOUND, 2) == 3 + 10.5 - 2
    assert step_seconds(FP16, FOUND, 2) == 3 + 1 + 5.5 - 2
    half = replace(FOUND, overlap=0.5)
    assert step_seconds(FP32, half, 2) == 3 + 10.5 - 1
    assert step_seconds(replace(FP32, exchange=10.0, message=0), half, 2) == 3 + 10 - 1
    assert step_seconds(TOPK, FOUND, 2) == 3 + 0.25 + 2 * 0.125 + 0.5
    assert step_seconds(TOPK, FOUND, 2, sync_every=4) == 3 + 1 / 4
    assert all(step_seconds(c, FOUND, 1) == 3 for c in FOUND.candidates), "one rank sends nothing"


def test_step_on_more_ranks() -> None:
    """A ring moves 2 (R − 1)/R of the bytes in 2 (R − 1) rounds; messages go from each to each."""
    assert step_seconds(FP32, FOUND, 4) == pytest.approx(3 + 3 * 0.5 + 10 * (3 / 4) / (1 / 2) - 2)
    assert step_seconds(TOPK, FOUND, 4) == 3 + 0.25 + 4 * 0.125 + 3 * 0.5
    many = step_seconds(replace(FP32, exchange=10.0), FOUND, 10_000)
    assert many == pytest.approx(3 + 2 * 10 - 2, rel=1e-3), "at most twice the gradients"


def test_a_slow_link_pays_until_messages_add_up() -> None:
    advice = advise(FOUND)
    assert advice[0].nodes == 2
    assert advice[0].pays
    (first, last), *rest = spans(advice)
    assert not rest
    assert first == 2
    for one in advice:
        assert one.horovod_seconds == min(step_seconds(c, FOUND, one.nodes) for c in (FP32, FP16))
        assert one.pays == (step_seconds(TOPK, FOUND, one.nodes) <= 0.9 * one.horovod_seconds)
    assert last < advice[-1].nodes
    text = conclusion(FOUND)
    assert text.startswith(f"compress, from 2 nodes on to {last}: topk takes a step from 7.50 s")
    assert f"Beyond {last} nodes" in text
    assert "sync_every=4" in text, "1 s more than 3 s of computing is a tenth of it after 4 steps"


def test_traffic_that_hides_does_not_pay() -> None:
    fast = replace(
        FOUND, candidates=(replace(FP32, exchange=0.6), replace(FP16, exchange=0.55), TOPK), bandwidth=1000.0
    )
    assert spans(advise(fast)) == []
    assert conclusion(fast).startswith("do not compress: Horovod's traffic hides behind the backward pass")


def test_compressing_that_takes_longer_than_it_saves_does_not_pay() -> None:
    slow = replace(FOUND, candidates=(FP32, FP16, replace(TOPK, compress=20.0)))
    assert spans(advise(slow)) == []
    assert "it costs more than it saves" in conclusion(slow)
    little = replace(FOUND, candidates=(FP32, FP16, replace(TOPK, compress=1.75, decompress=1.0)))
    assert "it saves too little (a step of 7.25 s against 7.50 s with Horovod, fp16)" in conclusion(little)


def test_it_may_pay_from_more_nodes_on_only() -> None:
    """Twice the bytes with many ranks, where two ranks' traffic hides."""
    near = replace(
        FOUND, compute=12.0, candidates=(replace(FP32, exchange=8.5), replace(TOPK, decompress=0.0, exchange=0.001))
    )
    near = replace(near, bandwidth=12.5, latency=0.5)
    ((first, _),) = spans(advise(near))
    assert first > 2
    assert conclusion(near).startswith(f"compress, from {first} nodes on")


def test_of_those_that_are_as_fast_the_mildest() -> None:
    harsh = replace(TOPK, name="sign", exchange=0.49)
    assert advise(replace(FOUND, candidates=(FP32, TOPK, harsh)))[0].best == "top-k"
    assert advise(replace(FOUND, candidates=(FP32, TOPK, replace(harsh, exchange=0.1))))[0].best == "sign"


def test_it_says_where_it_was_measured() -> None:
    for found, expected in (
        (FOUND, "Measured between 2 ranks on 2 nodes, 1 on each"),
        (replace(FOUND, nodes=1), "Measured between 2 ranks, all of them on this machine: each is taken for a node"),
        (replace(FOUND, ranks=4, ranks_per_node=2), "Measured between 4 ranks on 2 nodes, 2 on each"),
    ):
        text = io.StringIO()
        explain(found, Console(file=text, width=110))
        assert text.getvalue().startswith(expected + "\n")


def test_ranks_that_share_a_node() -> None:
    shared = replace(FOUND, ranks=4, ranks_per_node=2)
    assert advise(shared, [8])[0].horovod_seconds == min(step_seconds(c, shared, 16) for c in (FP32, FP16))


def test_unknown_models() -> None:
    with pytest.raises(ValueError, match="did you mean 'resnet50'"):
        maker("resnet5O")
    assert callable(maker("torch.nn:Identity"))
    with pytest.raises(AttributeError):
        maker("torch.nn:Nothing")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--json", "nowhere/found.json"], "no file can be written there"),
        (["--json", "."], "no file can be written there"),
        (["--model", "torch.nn:Linear"], "missing 2 required positional arguments"),
    ],
)
def test_mistakes_come_before_the_measurement(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["advise", "--model", "squeezenet1_1", "--step-seconds", "0.05", *arguments])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err
