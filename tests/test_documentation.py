"""What the documents show runs, and their links lead somewhere."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from world import World, launch

import hvd_compress
from hvd_compress import Compression, GradientCompressor
from hvd_compress.compression import COMPRESSORS
from hvd_compress.operators import Operator

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = ("choosing", "first-run", "local-steps", "resuming")
"""Tutorials whose Python is one script for several ranks."""


def code_blocks(path: Path, language: str) -> list[str]:
    """What stands between fences, by the word behind the first one."""
    blocks, block, tag = [], [], None
    for line in path.read_text().splitlines(keepends=True):
        if not line.startswith("```"):
            block.append(line)
        elif tag is None:
            tag, block = line.strip("`\n"), []
        else:
            blocks += ["".join(block)] if tag == language else []
            tag = None
    assert tag is None, f"a fence in {path} is open"
    return blocks


@pytest.mark.parametrize("document", ["README.md", "docs/quickstart.md"])
def test_the_diffs_are_the_quickstart(document: str) -> None:
    """Each line of the diff stands in the example, in this order; and without the added lines it is plain Horovod."""
    (diff,) = code_blocks(ROOT / document, "diff")
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert len(added) <= 5
    script = (ROOT / "examples" / "quickstart.py").read_text()
    position = 0
    for line in (line[1:].strip() for line in diff.splitlines()):
        position = script.index(line, position)
    plain = script
    for line in added:
        plain = plain.replace(line.strip(), "", 1)
    assert "ompression" not in plain.replace("compress its gradients", "")


def test_the_quickstart_runs_and_learns() -> None:
    ended = launch(2, [str(ROOT / "examples" / "quickstart.py")])
    assert ended.returncode == 0, ended.stdout
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", ended.stdout)]
    assert len(losses) == 10
    assert losses[-1] < 0.5 < losses[0]
    saving = re.search(r"([\d.]+) times less", ended.stdout)
    assert saving, ended.stdout
    (shown,) = code_blocks(ROOT / "docs" / "quickstart.md", "text")
    of_the_document = re.search(r"([\d.]+) times less", shown)
    assert of_the_document
    assert float(saving[1]) == pytest.approx(float(of_the_document[1]), rel=0.03)  # the weights are random


def test_every_compressor_is_in_the_example_that_compares_them_and_trains() -> None:
    ended = launch(2, [str(ROOT / "examples" / "every_compressor.py"), "--epochs", "1"], timeout=400)
    assert ended.returncode == 0, ended.stdout
    rows = dict(re.findall(r"^│ (\w+) .*?│.*?│ +([\d.]+)% │", ended.stdout, flags=re.MULTILINE))
    assert rows.keys() == {"none", "fp16", *COMPRESSORS}
    assert all(float(accuracy) > 25 for accuracy in rows.values()), ended.stdout  # by chance it would be 10


def test_the_operator_in_the_documents_works() -> None:
    (block,) = code_blocks(ROOT / "docs" / "how-it-works.md", "python")
    names = {"model": torch.nn.Linear(50, 50)}
    exec(block, names)
    compression = names["compression"]
    assert isinstance(compression, GradientCompressor)
    x = torch.arange(6.0).reshape(2, 3)
    operator = compression.settings.operator
    assert isinstance(operator, Operator)
    assert operator(x).tolist() == [[0.0, 0.0, 2.0], [0.0, 4.0, 0.0]]
    assert len(block.splitlines()) <= 30


def test_the_local_sgd_block_runs() -> None:
    (block,) = code_blocks(ROOT / "README.md", "python")
    exec(block, {"torch": torch, "model": torch.nn.Linear(3, 3)})


def run_page(page: str, directory: str) -> list[str]:
    """A tutorial's Python, from top to bottom, as one script; the names that it has made."""
    before, names = os.getcwd(), {"__name__": "__main__"}
    os.chdir(directory)
    try:
        for block in code_blocks(ROOT / "docs" / "tutorials" / f"{page}.md", "python"):
            exec(block, names)
    finally:
        os.chdir(before)
    return sorted(names)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("page", PAGES)
def test_the_tutorials_run(world: World, page: str, tmp_path: Path) -> None:
    names, _ = world.run(run_page, page, str(tmp_path))
    assert len(names) > 5


def test_the_blocks_in_the_document_of_faults_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hvd.init()
    resuming, elastic = code_blocks(ROOT / "docs" / "faults.md", "python")
    model = torch.nn.Linear(50, 50)
    named = list(model.named_parameters())
    names = {
        "model": model,
        "optimizer": hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=named),
        "compression": Compression.topk(ratio=0.1, named_parameters=named),
    }
    exec(resuming, names)
    assert names["saved"] is None  # there is none
    exec(elastic, names)
    assert callable(names["train"])


def test_the_reference_has_everything() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    assert [name for name in hvd_compress.__all__ if f"hvd_compress.{name}\n" not in text] == []


def test_no_python_in_a_document_is_left_out() -> None:
    """Whoever writes a block of Python has to see to it that a test runs it."""
    have = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS if code_blocks(path, "python")}
    run_by_name = {f"docs/tutorials/{page}.md" for page in PAGES}
    run_by_their_own_tests = {"README.md", "docs/faults.md", "docs/how-it-works.md", "docs/scale.md", "docs/slurm.md"}
    shown_only = {"CONTRIBUTING.md"}  # a test, in the form in which tests are written here
    assert have <= run_by_name | run_by_their_own_tests | shown_only


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_what_there_is(document: Path) -> None:
    """Scripts, their options and targets of make, in every block without a language."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for block in code_blocks(document, ""):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["make"]:
                assert set(words[1:2]) <= set(targets), line
            script = None
            for word in words:
                if re.fullmatch(r"(examples|slurm|scripts|benchmarks)/[\w/]+\.py", word):
                    script = ROOT / word
                    assert script.exists(), line
                elif word == "--":  # what follows is another program's
                    script = None
                elif script and re.match(r"--[a-z]", word) and word != "--mpi":
                    sources = "".join(path.read_text() for path in script.parent.glob("*.py"))
                    assert f'"{word.split("=")[0]}"' in sources, f"{document.name}: {word} in {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert heading in anchors, f"{document.name} links to {target}"


def test_every_compressor_is_in_the_table() -> None:
    text = (ROOT / "docs" / "operators.md").read_text()
    assert all(f"`Compression.{name}" in text for name in COMPRESSORS)


def test_tests_that_documents_name_exist() -> None:
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    named = [pair for path in DOCUMENTS for pair in re.findall(r"`(test_\w+\.py)::(test_\w+)`", path.read_text())]
    assert len(named) > 50
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in tests[file]]
    assert not missing


def test_names_in_the_readme_exist() -> None:
    for name in re.findall(r"`Compression\.(\w+)", (ROOT / "README.md").read_text()):
        assert hasattr(Compression, name)


def test_the_training_loop_in_the_slurm_document_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, and called again: as if it had not been."""
    (block,) = code_blocks(ROOT / "docs" / "slurm.md", "python")
    names: dict[str, Any] = {}
    exec(block, names)
    hvd.init()

    def run(directory: str, interrupted_after: int | None) -> torch.Tensor:
        (tmp_path / directory).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / directory)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def batches_from(start: int) -> Iterator[torch.Tensor]:
            for step in range(start, 10):
                if step == interrupted_after:
                    os.kill(os.getpid(), signal.SIGUSR2)
                yield torch.randn(4, 3)

        names["train"](model, optimizer, batches_from, 10)
        return model.weight.detach()

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    try:
        expected = run("at-once", None)
        with pytest.raises(SystemExit) as ended:
            run("twice", 6)
        assert ended.value.code == 75
        while signal.sigpending():
            signal.sigtimedwait([signal.SIGUSR2], 0)
        assert torch.equal(run("twice", None), expected)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR2])
