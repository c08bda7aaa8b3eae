"""Every block of code in README and the documents runs.

What is done with a block follows from the language behind its fence:

- ``python``: the blocks of a document are one script, which two ranks run.
- ``sh``: so are these, in a copy of the project. :data:`CHANGED` makes commands short or harmless, :data:`NOT_RUN`
  has those that are left out, and why.
- ``text``: what commands of that document print; numbers may differ. :data:`DRAWINGS` are no output.
- ``diff``: compared with an example in ``test_documentation.py``.
- in braces: run by Sphinx, ``make docs``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from documents import DOCUMENTS, ROOT, blocks, commands
from PIL import Image
from test_report import COMPRESSED, PLAIN, write
from world import World, environment, launch, mpirun_command

LANGUAGES = r"python|sh|text|diff|\{(eval-rst|toctree)\}|\{literalinclude\} \S+"

NOT_RUN = {
    "mpirun -np 8": "needs two machines with GPUs, and ImageNet",
    "python3 scripts/gently.py mpirun -np 8": "the same; test_pipeline.py::test_ctrl_c_lets_the_ranks_save does it",
    "module load": "is a cluster's",
    "git clone": "whoever reads this has done it",
    "apt-get install": "installs Slurm",
    "pip install": "changes the environment; `make env` does the same",
    "python scripts/build_horovod.py": "builds Horovod; `make env` does it",
    "rm -rf": "removes the cache of Horovod's wheels",
    "exit": "ends the sandbox's shell",
    "python3 slurm/sandbox.py": "needs root and Slurm; all of test_cluster.py runs on this sandbox",
    "python slurm/submit.py status": "needs Slurm; test_cluster.py::test_cancel",
    "python slurm/submit.py logs": "needs Slurm; test_cluster.py::test_cancel",
    "python slurm/submit.py cancel": "needs Slurm; test_cluster.py::test_cancel",
    "python slurm/submit.py collect": "needs Slurm; test_cluster.py::test_sweep",
    "horovodrun": "needs several hosts; test_elastic.py::test_a_rank_comes_one_goes_and_one_dies has them pretended",
    "python examples/papers/qsparse.py --data": "half an hour; test_papers.py::test_short_form_of_an_experiment",
    "python examples/papers/adaptive.py --data": "ten minutes; test_papers.py::test_short_form_of_an_experiment",
    "python examples/papers/truncated.py --data": "ten minutes; test_papers.py::test_short_form_of_an_experiment",
    "mpirun -np 2 python examples/quickstart.py": "docs/quickstart.md runs it",
    "mpirun -np 2 python examples/local_steps.py": "test_examples.py::test_local_steps, on ranks that are there",
    "mpirun -np 2 python examples/custom_compressor.py": "test_examples.py::test_custom_compressor, likewise",
    "mpirun -np 2 python examples/cnn.py": "test_examples.py::test_cnn, likewise and shorter",
    "mpirun -np 2 python examples/masked_words.py": "test_examples.py::test_masked_words, likewise and shorter",
    "mpirun -np 2 python examples/every_compressor.py": "test_examples.py::test_every_compressor, shorter",
    "mpirun -np 4 python benchmarks/straggler.py": "takes minutes; test_async.py::test_the_straggler_benchmark_runs",
    "mpirun -np 4 python benchmarks/soak.py": "takes minutes; test_soak.py::test_a_short_soak",
    "sudo": "needs root and minutes; test_advise.py::test_two_machines_and_a_slow_link makes a network in this way",
    ".venv/bin/hvd-compress advise": "takes minutes; test_advise.py::test_a_short_job",
    ".venv/bin/python -m pytest": "takes a quarter of an hour; "
    "test_wire.py::test_mutated_messages_raise_or_decode_within_bounds is that test",
}
"""Beginnings of commands, and what keeps them from being run here; with the test that does so, if there is one."""

CHANGED = {
    r"^make ": "make --dry-run ",
    r"(submit\.py (sweep \S+ )?--profile \S+)": r"\1 --dry-run",
    r"/path/to/imagenet": "images",
    r"paper torchvision short": "short",
    r"--recipe \$recipe": "--recipe $recipe --arch resnet18",
}
"""What commands are made of before they run, as regular expressions."""

DRAWINGS = {"docs/how-it-works.md": "rank r, at its", "docs/install.md": "~/.cache/hvd-compress/"}
"""Beginnings of ``text`` that no command prints."""

MODEL = """
import horovod.torch as hvd, torch
from hvd_compress import Compression
model = torch.nn.Linear(50, 50)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
"""
STEPS = """
for _ in range(8):
    model(torch.ones(2, 50)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
OPTIMIZER = """
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(), compression=compression
)
"""
AROUND = {
    "README.md": (MODEL, STEPS),
    "CONTRIBUTING.md": ("import horovod.torch as hvd, pytest, torch\nfrom world import World", "adds_up()"),
    "docs/faults.md": (
        f"{MODEL}compression = Compression.topk(k=9, named_parameters=model.named_parameters()){OPTIMIZER}",
        "batches = 0\ntrain(state)",
    ),
    "docs/how-it-works.md": (MODEL, OPTIMIZER + STEPS),
    "docs/scale.md": ("", STEPS + "optimizer.synchronize()"),
}
"""What the reader of a document has before its first line of Python, and what he does after the last."""

WITH_PYTHON = [document for document in DOCUMENTS if blocks(document, "python")]
WITH_COMMANDS = [document for document in DOCUMENTS if blocks(document, "sh")]


def test_every_block_is_of_a_kind_that_runs() -> None:
    for block in (block for document in DOCUMENTS for block in blocks(document)):
        assert re.fullmatch(LANGUAGES, block.language), f"{block}: nothing would run this"
        assert block.closed, f"{block}: this fence is open"


# --------------------------------------------------------------------------------------------------------- Python


def script(document: str) -> str:
    before, after = AROUND.get(document, ("", ""))
    return "\n".join([before, *(block.text for block in blocks(document, "python")), after])


def run_script(document: str, directory: str) -> None:
    """On a rank; in a directory of its own."""
    before = os.getcwd()
    os.chdir(directory)
    try:
        exec(compile(script(document), document, "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(before)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("document", [document for document in WITH_PYTHON if document != "docs/scale.md"])
def test_python(world: World, document: str, tmp_path: Path) -> None:
    world.run(run_script, document, str(tmp_path))


def test_python_that_makes_process_sets() -> None:
    """They would stay in a world of ranks for other tests."""
    ended = launch(2, script("docs/scale.md"))
    assert ended.returncode == 0, ended.stdout
    assert "hvd_compress.auto" not in ended.stdout  # nothing chose by itself


# -------------------------------------------------------------------------------------------------------- commands


def reason(command: str) -> str | None:
    """Why a command is not run."""
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


@cache
def shell_script(document: str) -> str:
    lines = [line for block in blocks(document, "sh") for line in commands(block) if not reason(line.strip())]
    text = "\n".join(lines)
    for pattern, replacement in CHANGED.items():
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    """A copy to write into, with an ``mpirun`` for this machine, a script, three runs and four images."""
    with TemporaryDirectory(prefix="hvd-compress-documents-") as directory:
        copy = Path(directory)
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, copy)
        for name in ("benchmarks", "docs", "examples", "scripts", "slurm", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / ".venv").symlink_to(sys.prefix)
        program, _, _, *flags = mpirun_command(2)
        mpirun = copy / "bin" / "mpirun"
        mpirun.parent.mkdir()
        mpirun.write_text(f'#!/bin/sh\nexec {shlex.join([program, *flags])} "$@"\n')
        mpirun.chmod(0o755)
        (copy / "train.py").write_text("import horovod.torch as hvd\nhvd.init()\nassert hvd.size() > 1\n")
        for name, records in {"paper": COMPRESSED, "torchvision": PLAIN, "baseline": PLAIN}.items():
            write(copy / "runs" / name, records)
        for part in ("train/cat", "train/dog", "val/cat", "val/dog"):
            (copy / "images" / part).mkdir(parents=True)
            Image.new("RGB", (40, 40), "red").save(copy / "images" / part / "0.png")
        yield copy


@pytest.fixture(scope="module")
def printed(project: Path) -> Callable[[str], str]:
    """What the commands of a document print, which run once."""
    path = os.pathsep.join([str(project / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**environment(), "PATH": path, "PYTHONPATH": str(ROOT)}

    @cache
    def run(document: str) -> str:
        ended = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", shell_script(document)],
            cwd=project,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
        )
        assert ended.returncode == 0, ended.stdout
        return ended.stdout

    return run


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if shell_script(document)])
def test_commands(printed: Callable[[str], str], document: str) -> None:
    printed(document)


def shapes(text: str) -> set[str]:
    """Lines without their numbers."""
    return {re.sub(r"\d[\d.,]*", "0", line.strip()) for line in text.splitlines()}


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document, "text")])
def test_what_is_shown_is_printed(printed: Callable[[str], str], document: str) -> None:
    for block in blocks(document, "text"):
        if not block.text.startswith(DRAWINGS.get(document, "-")):
            assert shapes(block.text) <= shapes(printed(document)), block


def test_the_quickstart_learns_and_saves_what_its_page_says(printed: Callable[[str], str]) -> None:
    text = printed("docs/quickstart.md")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 10
    assert losses[-1] < 0.5 < losses[0]
    (shown,) = blocks("docs/quickstart.md", "text")
    saved, expected = (re.findall(r"([\d.]+) times less", text)[0] for text in (text, shown.text))
    assert float(saved) == pytest.approx(float(expected), rel=0.01)  # another processor may round otherwise


def test_the_table_of_bytes_is_what_its_command_prints(printed: Callable[[str], str]) -> None:
    section = (ROOT / "docs" / "performance.md").read_text().partition("\n## Bytes\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d,]+) \|", section, flags=re.MULTILINE)
    assert len(rows) > 10
    of_command = re.findall(
        r"^│ (.+?) +│ +([\d,]+) │ +([\d,]+) │", printed("docs/performance.md"), flags=re.MULTILINE
    )
    assert rows == of_command


def test_what_is_left_out_or_changed_is_there() -> None:
    lines = [line.strip() for document in DOCUMENTS for block in blocks(document, "sh") for line in commands(block)]
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in lines), start
    for pattern in CHANGED:
        assert any(re.search(pattern, line) for line in lines if not reason(line)), pattern
    for document, start in DRAWINGS.items():
        assert any(block.text.startswith(start) for block in blocks(document, "text")), document
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for file, test in re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", " ".join(NOT_RUN.values())):
        assert f"def {test}" in tests[file], f"{file}::{test}"
