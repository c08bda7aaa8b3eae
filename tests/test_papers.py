"""The experiments on the papers' claims: that they go on and can be repeated, and that pages say what results say."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
from world import World

ROOT = Path(__file__).parent.parent
PAPERS = ROOT / "examples" / "papers"
NAMES = ("qsparse", "adaptive", "truncated")

sys.path.insert(0, str(PAPERS))  # the ranks import this module too


def experiment(name: str) -> ModuleType:
    return importlib.import_module(name)


def run_short(name: str, part: str, path: str, steps: int) -> int:
    """A few steps of a part's cases, but for those that are there already; how many were due."""
    module, shared = experiment(name), experiment("experiment")
    images = experiment("images").open_images(None, hvd.rank(), hvd.size(), tests=60)
    cases = [case | {"steps": steps} for case in module.cases(part, images.name, hvd.size(), [0], True)]
    results = shared.Results(Path(path))
    due = len(cases) - len(results.read())
    shared.run_cases(cases, images, results, module.train_case)
    return due


def read(path: Path) -> list[Any]:
    return experiment("experiment").Results(path).read()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("name", "part", "steps"),
    [("qsparse", "softmax", 16), ("adaptive", "softmax", 20), ("truncated", "resnet", 8)],
    ids=NAMES,
)
def test_short_form_of_an_experiment(world: World, tmp_path: Path, name: str, part: str, steps: int) -> None:
    path = tmp_path / "results.jsonl"
    (due, _) = world.run(run_short, name, part, str(path), steps)
    runs = read(path)
    assert len(runs) == due > 3
    for run in runs:
        sent = [point.sent for point in run.curve]
        assert run.curve[-1].step == steps
        assert sent[0] > 0
        assert sent == sorted(sent)
        assert 0 <= run.curve[-1].error <= 1
    # A killed run: its last line is half a line. The next start trains that case again, and no other.
    text = path.read_bytes()
    path.write_bytes(text[:-50])
    assert world.run(run_short, name, part, str(path), steps)[0] == 1
    again = read(path)
    assert [run.case for run in again] == [run.case for run in runs]
    assert [run.curve[:1] for run in again][:-1] == [run.curve[:1] for run in runs][:-1]
    assert again[-1].curve == runs[-1].curve  # and a case can be repeated


@pytest.mark.parametrize("name", NAMES)
def test_pages_show_the_tables_of_their_results(name: str, tmp_path: Path) -> None:
    page = ROOT / "docs" / "experiments" / f"{name}.md"
    copy = tmp_path / page.name
    copy.write_text(page.read_text())
    experiment("experiment").write_tables(copy, experiment(name).report(read(page.with_suffix(".jsonl"))))
    assert copy.read_text() == page.read_text()


def test_idx_files(tmp_path: Path) -> None:
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    header = np.array([0x803, 2, 4, 4], ">u4").tobytes()
    (tmp_path / "plain").write_bytes(header + images.tobytes())
    with gzip.open(tmp_path / "packed.gz", "wb") as file:
        file.write(header + images.tobytes())
    read_idx = experiment("images").read_idx
    for name in ("plain", "packed"):
        assert np.array_equal(read_idx(tmp_path, name, 3), images)
    with pytest.raises(ValueError, match="no IDX file"):
        read_idx(tmp_path, "plain", 1)
    (tmp_path / "short").write_bytes(header + images.tobytes()[:-1])
    with pytest.raises(ValueError, match="no IDX file"):
        read_idx(tmp_path, "short", 3)
    with pytest.raises(FileNotFoundError, match=r"nor missing\.gz"):
        read_idx(tmp_path, "missing", 3)


def test_results_are_those_of_the_cases() -> None:
    """Every case of the committed results has one line, and every seed all cases."""
    for name in NAMES:
        path = ROOT / "docs" / "experiments" / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        module = experiment(name)
        for part in module.RANKS:
            of_part = [line["case"] for line in lines if line["case"]["part"] == part]
            seeds = sorted({case["seed"] for case in of_part})
            assert seeds
            first = of_part[0]
            expected = module.cases(part, first["data"], first["ranks"], seeds, False)
            assert sorted(map(str, of_part)) == sorted(map(str, expected))
