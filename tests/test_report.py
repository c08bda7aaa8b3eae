"""Reports of runs: the figures against the definitions, and a page that needs nothing but itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hvd_compress.cli import main
from hvd_compress.report import Run, RunError, label, read, summarise
from hvd_compress.report.runs import bits, default_target, duration, find


def epoch(run: str, number: int, accuracy: float | None, megabytes: float, **more: Any) -> dict[str, Any]:
    return {"run": run, "epoch": number, "accuracy": accuracy, "megabytes_sent": megabytes, **more}


COMPRESSED = [
    epoch("topk", number, accuracy, 2.0 * number, seconds=30.0 * number, val_loss=1 / number, ranks=2, **speed)
    for number, accuracy in ((1, 0.2), (2, 0.6), (3, 0.7), (4, 0.65))
    for speed in (
        {"images_per_second": 100.0 * number, "seconds_input": 1.0, "seconds_compute": 6.0, "seconds_compress": 2.0}
        | {"seconds_exchange": 1.0},
    )
]
PLAIN = [
    epoch("plain Horovod, fp32", number, accuracy, 100.0 * number, seconds=60.0 * number, train_loss=2 / number)
    for number, accuracy in ((1, 0.1), (2, 0.3), (3, 0.6), (4, 0.8))
]


def write(directory: Path, records: list[dict[str, Any]], end: str = "\n") -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + end)
    return directory


def by_label(**runs: list[dict[str, Any]]) -> Mapping[str, Run]:
    return {name: Run.of(records) for name, records in runs.items()}


def test_bits_time_and_savings_to_a_target() -> None:
    topk, plain = summarise(by_label(topk=COMPRESSED, plain=PLAIN), 0.6, "plain")
    assert (topk.target_epoch, topk.target_bits, topk.target_seconds) == (2, 8 * 4e6, 60.0)
    assert (plain.target_epoch, plain.target_bits, plain.target_seconds) == (3, 8 * 300e6, 180.0)
    assert (topk.saving, topk.faster) == (75.0, 3.0)
    assert (plain.saving, plain.faster) == (1.0, 1.0)
    assert (topk.best, topk.last, topk.megabytes, topk.ranks) == (0.7, 0.65, 8.0, 2)
    assert topk.images_per_second == 250.0
    assert topk.shares == {"input": 0.1, "compute": 0.6, "compress": 0.2, "exchange": 0.1}
    assert (plain.images_per_second, plain.shares, plain.ranks) == (None, {}, None)


def test_a_target_that_was_not_reached() -> None:
    topk, plain = summarise(by_label(topk=COMPRESSED, plain=PLAIN), 0.75, "topk")
    assert (topk.target_epoch, topk.target_bits, topk.saving) == (None, None, None)
    assert (plain.target_epoch, plain.saving) == (4, None)
    assert default_target(by_label(topk=COMPRESSED, plain=PLAIN).values()) == 0.7


def test_one_rank_sends_nothing() -> None:
    (alone,) = summarise(by_label(alone=[epoch("alone", 1, 0.5, 0.0)]), 0.5, "alone")
    assert (alone.target_bits, alone.saving, alone.seconds) == (0.0, None, None)


def test_labels_and_names() -> None:
    runs = label(
        [
            Run.of([epoch("topk", 1, 0.5, 1)], "runs/a"),
            Run.of([epoch("topk", 1, 0.5, 1)], "runs/b"),
            Run.of([epoch("plain", 1, 0.5, 1)], "runs/b"),
            Run.of([epoch("topk", 1, 0.5, 1)], "other/b"),
        ]
    )
    assert list(runs) == ["a: topk", "b: topk", "plain", "other/b: topk"]
    assert find("runs/a", runs) == "a: topk"
    assert find("plain", runs) == "plain"
    with pytest.raises(RunError, match="could be any of"):
        find("topk", runs)
    with pytest.raises(RunError, match="did you mean 'plain'"):
        find("plane", runs)


def test_reading(tmp_path: Path) -> None:
    """Several runs in one file; a line that is being written is left out."""
    both = write(tmp_path / "both", COMPRESSED + PLAIN, end='\n{"run": "plain Horovod, fp32", "epo')
    assert [(run.name, len(run.epochs)) for run in read(both)] == [("topk", 4), ("plain Horovod, fp32", 4)]
    assert read(both / "metrics.jsonl") == read(both)
    assert read(both)[0].column("loss") == [1, 1 / 2, 1 / 3, 1 / 4]
    assert read(both)[1].column("minutes") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no epochs yet"),
        ('{"run": "a", "epoch": 1, "accuracy": 0.5}\n', "line 1: lacks megabytes_sent"),
        ("what\n", "is no metrics file"),
        ("[1]\n", "is no metrics file"),
        (json.dumps(epoch("a", 1, float("nan"), 1.0)) + "\n", "metrics.jsonl: a has no accuracy yet"),
    ],
)
def test_damaged_files(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(RunError, match=expected):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("accuracy", 76.1, "must be from 0 to 1, 0.75 for 75 %, or null if it was not measured; got 76.1"),
        ("accuracy", -0.1, "must be from 0 to 1"),
        ("accuracy", float("inf"), "must be from 0 to 1"),
        ("accuracy", "0.5", "must be from 0 to 1"),
        ("accuracy", True, "must be from 0 to 1"),
        ("epoch", "x", "must be a number, got 'x'"),
        ("epoch", None, "must be a number, got None"),
        ("megabytes_sent", None, "must be a number, got None"),
        ("megabytes_sent", float("nan"), "must be a number, got nan"),
        ("seconds", "1 min", "must be a number or null, got '1 min'"),
        ("seconds_input", [1], "must be a number or null"),
    ],
)
def test_lines_with_something_else_than_a_number(key: str, value: Any, expected: str, tmp_path: Path) -> None:
    run = write(tmp_path / "run", [COMPRESSED[0], {**COMPRESSED[1], key: value}])
    with pytest.raises(RunError, match=f"metrics.jsonl, line 2: {key} {expected}"):
        read(run)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_what_was_not_measured_counts_as_absent(missing: float | None, tmp_path: Path) -> None:
    """Validation in every second epoch only."""
    gaps: Any = {"seconds": missing, "val_loss": missing, "images_per_second": missing, "seconds_input": missing}
    records = [
        epoch("a", 1, missing, 1.0, **gaps, train_loss=4.0),
        epoch("a", 2, 0.6, 2.0, seconds=60.0, val_loss=2.0, images_per_second=50.0, seconds_input=1.0),
        epoch("a", 3, missing, 3.0, **gaps, ratio_to_fp32=missing),
    ]
    (run,) = read(write(tmp_path / "run", records))
    (found,) = summarise({"a": run}, 0.6, None)
    assert (found.best, found.last, found.epochs, found.megabytes) == (0.6, 0.6, 3, 3.0)
    assert (found.target_epoch, found.target_bits, found.target_seconds) == (2, 8 * 2e6, 60.0)
    assert (found.seconds, found.ratio_to_fp32, found.images_per_second) == (None, None, 50.0)
    assert found.shares["input"] == 1.0
    assert [n == n for n in run.column("minutes")] == [n == n for n in run.column("accuracy")] == [False, True, False]
    assert [n == n for n in run.column("loss")] == [False, True, False]
    main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report")])
    assert "nan" not in re.sub(r'"data:[^"]*"', "", (tmp_path / "report" / "report.html").read_text()).lower()


def test_units() -> None:
    assert [bits(n) for n in (None, 0, 999, 1234, 32e6, 999.96e6, 2.4e9, 1.2345e13)] == [
        *("–", "0 bit", "999 bit", "1.23 kbit", "32 Mbit", "1000 Mbit", "2.4 Gbit", "12.3 Tbit"),
    ]
    assert [duration(s) for s in (None, 1.4, 119, 121, 7300)] == ["–", "1 s", "119 s", "2 min", "2 h 02 min"]


class Page(HTMLParser):
    """What a page refers to, and whether its tags fit."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.opened: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write(tmp_path / "<one>", COMPRESSED), write(tmp_path / "two", PLAIN)
    (one / "config.yaml").write_text("lr: 0.1 # <b>\n")
    main(["report", str(one), str(two), "--target", "0.6", "--output", str(tmp_path / "report")])
    said = capsys.readouterr().out
    assert "75.0 times fewer than plain Horovod, fp32" in said.replace("\n", " ")
    text = (tmp_path / "report" / "report.html").read_text()
    page = Page(text)
    assert page.opened == []
    assert len(page.sources) == 8
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", text), "it needs nothing from elsewhere"
    for expected in ("32 Mbit", "2.4 Gbit", "75.0×", "10% / 60% / 20% / 10%", "lr: 0.1 # &lt;b&gt;", "&lt;one&gt;"):
        assert expected in text
    pictures = sorted(path.name for path in (tmp_path / "report").glob("*.png"))
    assert len(pictures) == 8
    for name in pictures:
        with Image.open(tmp_path / "report" / name) as picture:
            assert min(picture.size) > 300


def test_many_runs_are_shown_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"topk, k={10 * n}, with a name that says it all" for n in range(1, 12)]
    for n, name in enumerate(names):
        write(tmp_path / str(n), [{**record, "run": name} for record in COMPRESSED])
    main(["report", *(str(tmp_path / str(n)) for n in range(len(names))), "--output", str(tmp_path / "report")])
    said = capsys.readouterr().out
    assert "…" not in said
    assert all(len(line) <= 80 for line in said.splitlines() if "│" in line)
    assert said.count("70.00%") == len(names)  # the highest accuracy of each


def test_runs_that_have_nothing_yet_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``runs/*`` has such as well: one before its first epoch, and what is no run."""
    write(tmp_path / "run", COMPRESSED)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    (tmp_path / "slurm").mkdir()
    paths = [str(tmp_path / name) for name in ("new", "run", "slurm")]
    main(["report", *paths, "--output", str(tmp_path / "report")])
    said = capsys.readouterr()
    assert "new/metrics.jsonl has no epochs yet" in said.err
    assert f"left out: {tmp_path / 'slurm'} is no run" in said.err
    assert "topk" in said.out
    with pytest.raises(SystemExit):
        main(["report", paths[0], "--output", str(tmp_path / "report")])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "nowhere is no run"),
        (["{run}", "--target", "75"], "must be in (0, 1]"),
        (["{run}", "--baseline", "topp"], "did you mean 'topk'"),
    ],
)
def test_mistakes(arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", COMPRESSED)
    with pytest.raises(SystemExit) as ended:
        main(["report", *(a.replace("{run}", str(run)) for a in arguments), "--output", str(tmp_path / "report")])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err
