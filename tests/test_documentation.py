"""What documents say of scripts, options, tests, names and other documents is so."""

from __future__ import annotations

import itertools
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from documents import DOCUMENTS, ROOT, blocks, commands
from models import signals_as_they_were

import hvd_compress
from hvd_compress import Compression, GradientCompressor
from hvd_compress.compression import COMPRESSORS
from hvd_compress.operators import Operator


@pytest.mark.parametrize("document", ["README.md", "docs/quickstart.md"])
def test_the_diffs_are_the_quickstart(document: str) -> None:
    """Each line of the diff stands in the example, in this order; and without the added lines it is plain Horovod."""
    (diff,) = blocks(document, "diff")
    added = [line[1:] for line in diff.text.splitlines() if line.startswith("+")]
    assert len(added) == 4
    script = (ROOT / "examples" / "quickstart.py").read_text()
    position = 0
    for line in (line[1:].strip() for line in diff.text.splitlines()):
        position = script.index(line, position)
    plain = script
    for line in added:
        plain = plain.replace(line.strip(), "", 1)
    assert "ompression" not in plain.replace("compress its gradients", "")


def test_the_operator_in_the_documents_works() -> None:
    (block,) = blocks("docs/how-it-works.md", "python")
    names = {"model": torch.nn.Linear(50, 50)}
    exec(block.text, names)
    compression = names["compression"]
    assert isinstance(compression, GradientCompressor)
    x = torch.arange(6.0).reshape(2, 3)
    operator = compression.settings.operator
    assert isinstance(operator, Operator)
    assert operator(x).tolist() == [[0.0, 0.0, 2.0], [0.0, 4.0, 0.0]]
    assert len(block.text.splitlines()) <= 30


def test_the_reference_has_everything() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    assert [name for name in hvd_compress.__all__ if f"hvd_compress.{name}\n" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_name_what_there_is(document: str) -> None:
    """Scripts and their options, of commands that do not run here, too."""
    for block in blocks(document, "sh"):
        for line in commands(block):
            words, script = line.split(), None
            for word in words:
                if re.fullmatch(r"(examples|slurm|scripts|benchmarks)/[\w/]+\.py", word):
                    script = ROOT / word
                    assert script.exists(), line
                elif word == "--":  # what follows is another program's
                    script = None
                elif script and re.match(r"--[a-z]", word) and word != "--mpi":
                    sources = "".join(path.read_text() for path in script.parent.glob("*.py"))
                    assert f'"{word.split("=")[0]}"' in sources, f"{block}: {word} in {line}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document: str) -> None:
    file = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        path = file.parent / name if name else file
        assert path.exists(), f"{document} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert heading in anchors, f"{document} links to {target}"


def test_every_compressor_is_in_the_table() -> None:
    text = (ROOT / "docs" / "operators.md").read_text()
    assert all(f"`Compression.{name}" in text for name in COMPRESSORS)


@pytest.mark.parametrize("document", ["docs/operators.md", "docs/scale.md"])
def test_the_page_of_papers_has_each_paper(document: str) -> None:
    of_papers = (ROOT / "docs" / "papers.md").read_text()
    named = set(re.findall(r"\b\d{4}\.\d{5}\b", (ROOT / document).read_text()))
    assert named
    assert [paper for paper in sorted(named) if paper not in of_papers] == []


def test_the_reference_says_what_is_imported_from_the_package_itself() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    assert "Everything under the first four headings is imported from `hvd_compress` itself." in text
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    for number, section in enumerate(sections):
        names = re.findall(r":: hvd_compress\.(.+)$", section, flags=re.MULTILINE)
        assert all((name in hvd_compress.__all__) == (number < 4) for name in names), section


def test_tests_that_documents_name_exist() -> None:
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    pattern = r"`(test_\w+\.py)::(test_\w+)`"
    named = [pair for document in DOCUMENTS for pair in re.findall(pattern, (ROOT / document).read_text())]
    assert len(named) > 50
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in tests[file]]
    assert not missing


def test_names_in_the_readme_exist() -> None:
    for name in re.findall(r"`Compression\.(\w+)", (ROOT / "README.md").read_text()):
        assert hasattr(Compression, name)


def test_the_training_loop_in_the_slurm_document_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, at its last step too, and called again: as if it had not been."""
    (block,) = blocks("docs/slurm.md", "python")
    names: dict[str, Any] = {}
    exec(block.text, names)
    hvd.init()

    def run(directory: str, interrupted_after: int | None, seen: list[int] | None = None) -> torch.Tensor:
        (tmp_path / directory).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / directory)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def batches_from(start: int) -> Iterator[torch.Tensor]:
            for step in itertools.count(start):  # as of a loader that begins again after its last batch
                assert step < 10, "trained past its end"
                if seen is not None:
                    seen.append(step)
                if step == interrupted_after:
                    # Another thread could hear of it some steps later.
                    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
                yield torch.randn(4, 3)

        names["train"](model, optimizer, batches_from, 10)
        return model.weight.detach()

    with signals_as_they_were():
        expected = run("at-once", None)
        for directory, number in (("twice", 6), ("at-the-end", 9)):
            with pytest.raises(SystemExit) as ended:
                run(directory, number)
            assert ended.value.code == 75
            while signal.sigpending():
                signal.sigtimedwait([signal.SIGUSR2], 0)
            batches: list[int] = []
            assert torch.equal(run(directory, None, batches), expected)
            assert batches == list(range(number + 1, 10))
