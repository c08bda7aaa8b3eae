"""Every block of code in README and the documents runs.

What is done with a block follows from the language behind its fence:

- ``python``: the blocks of a document are one script, which two ranks run.
- ``sh``: so are these, in a copy of the project; those for Slurm on a cluster. :data:`CHANGED` makes commands short
  or harmless, :data:`NOT_RUN` has those that are left out, and why.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from documents import DOCUMENTS, ROOT, Block, blocks, commands
from PIL import Image
from test_report import COMPRESSED, PLAIN, write
from world import World, environment, launch, mpirun_command

LANGUAGES = r"python|sh|text|diff|\{(eval-rst|toctree)\}|\{literalinclude\} \S+"

NOT_RUN = {
    "module load": "is a cluster's",
    "git clone": "whoever reads this has done it, and may have no git",
    "apt-get install": "installs Slurm",
    "pip install": "changes the environment; `make env` does the same",
    "python scripts/build_horovod.py": "builds Horovod; `make env` does it",
    "python examples/papers/qsparse.py --data": "half an hour; test_papers.py::test_short_form_of_an_experiment",
    "python examples/papers/adaptive.py --data": "ten minutes; test_papers.py::test_short_form_of_an_experiment",
    "python examples/papers/truncated.py --data": "ten minutes; test_papers.py::test_short_form_of_an_experiment",
    "mpirun -np 2 python examples/quickstart.py": "docs/quickstart.md runs it",
    "mpirun -np 2 python examples/cnn.py": "test_examples.py::test_cnn, on ranks that are there and shorter",
    "mpirun -np 2 python examples/every_compressor.py": "test_examples.py::test_every_compressor, likewise",
    "sudo": "needs root and minutes; test_advise.py::test_two_machines_and_a_slow_link makes a network in this way",
}
"""Beginnings of commands, and what keeps them from being run here; with the test that does so, if there is one."""

TINY = "--arch resnet18 --epochs 1 --limit-train-batches 1 --batch-size 2 --image-size 32 --eval-size 32 --workers 0"
"""Options of the ImageNet example that make it short."""

CHANGED = {
    r"^make ": "make --dry-run ",
    r"mpirun -np 8 (?:-H \S+ )?(.+ --data) .*": rf"mpirun -np 2 \1 images --output runs/tried {TINY}",
    r"/path/to/imagenet": "images",
    r"advise --mpirun .+ -H node1,node2\"": 'advise --mpirun "mpirun -np 2" --model resnet50',
    r"paper torchvision short": "short",
    r"--recipe \$recipe": "--recipe $recipe --arch resnet18",
    r"masked_words\.py.*": r"\g<0> --steps 10 --words 1000",
    r"-np 4 python benchmarks/soak\.py": "-np 2 python benchmarks/soak.py --steps 20",
    r"-np 4 python benchmarks/straggler\.py": "-np 2 python benchmarks/straggler.py --steps 8 --seconds 0.01",
    r"--model resnet50 --batch-size 64": "--model squeezenet1_1 --batch-size 2 --image-size 64",
    r"--hypothesis-profile=fuzz": r"\g<0> --collect-only",
    r"horovodrun -np 4": "horovodrun --network-interface lo -np 2",  # a single host
}
"""What commands are made of before they run, as regular expressions."""

ON_SLURM = [
    "python3 slurm/sandbox.py",
    "python slurm/submit.py status",
    "python slurm/submit.py logs",
    "python slurm/submit.py cancel",
    "python slurm/submit.py collect",
    "exit",
]
"""Beginnings of commands that only :func:`test_commands_on_slurm` runs."""

CHANGED_THERE = {
    r"--profile gpu": r"\g<0> --dry-run",
    r"cp slurm/clusters/gpu.yaml": "sed 's/ranks_per_node: 2/ranks_per_node: 1/' slurm/clusters/sandbox.yaml >",
    r"imagenet_resnet50\.py .*": rf"\g<0> {TINY}",
    r"examples/sweep\.yaml": "<(echo 'seed: [0, 1]')",
    r"logs 1234": "logs 2",
    r"^(python slurm/submit\.py) cancel 1234": r"\1 --profile mine -- train.py; \1 cancel 3",
    r"exec -- bash": r"\g<0> -eux",
    r"^exit": "python slurm/submit.py status; exit",
}
"""More changes for it, since Slurm's numbers begin with 1. And elsewhere:"""

CHANGED_ELSEWHERE = {r"(submit\.py (sweep \S+ )?--profile \S+)": r"\1 --dry-run"}

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


def starts(command: str, beginnings: Iterable[str]) -> bool:
    return any(command.strip().startswith(beginning) for beginning in beginnings)


def to_run(parts: list[Block], left_out: Iterable[str], changed: Mapping[str, str]) -> str:
    """The commands of blocks as they are run."""
    text = "\n".join(line for block in parts for line in commands(block) if not starts(line, left_out))
    for pattern, replacement in {**CHANGED, **changed}.items():
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


@cache
def shell_script(document: str) -> str:
    return to_run(blocks(document, "sh"), [*NOT_RUN, *ON_SLURM], CHANGED_ELSEWHERE)


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    """A copy to write into, with an ``mpirun`` for this machine, a script, three runs, 16 images and one host."""
    with TemporaryDirectory(prefix="hvd-compress-documents-") as directory:
        copy = Path(directory)
        for path in ROOT.iterdir():
            if path.is_file() and path.name != ".git":  # of a worktree: git would work on the original
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
            for number in range(4):
                Image.new("RGB", (40, 40), "red").save(copy / "images" / part / f"{number}.png")
        (copy / "home" / ".cache" / "hvd-compress").mkdir(parents=True)
        (copy / "hosts.sh").write_text("#!/bin/sh\necho localhost:2\n")
        (copy / "hosts.sh").chmod(0o755)
        yield copy


def bash(project: Path, *arguments: str, typed: str = "", **variables: str) -> str:
    """What it prints in the copy, with a home of its own."""
    path = os.pathsep.join([str(project / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(project / "home")}
    ended = subprocess.run(
        ["bash", "-euxo", "pipefail", *arguments],
        cwd=project,
        env={**environment(), **own, **variables},
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.fixture(scope="module")
def printed(project: Path) -> Callable[[str], str]:
    """What the commands of a document print, which run once."""
    return cache(lambda document: bash(project, "-c", shell_script(document)))


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if shell_script(document)])
def test_commands(printed: Callable[[str], str], document: str) -> None:
    printed(document)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("document", "followed", "states"),
    [
        ("README.md", {"1": "2"}, {"1": "COMPLETED", "2_0": "COMPLETED", "2_1": "COMPLETED"}),
        (
            "docs/slurm.md",
            {"1": "2", "2": "4"},
            {"1": "COMPLETED", "2": "COMPLETED", "3": "CANCELLED", "4_0": "COMPLETED", "4_1": "COMPLETED"},
        ),
    ],
)
def test_commands_on_slurm(
    project: Path, tmp_path: Path, document: str, followed: dict[str, str], states: dict[str, str]
) -> None:
    """Typed: one block makes a cluster and has a shell on it, which gets the commands of all others.

    Args:
        followed: jobs whose logs are printed, and how many ranks the logs say.
        states: of all jobs, at the end.
    """
    fresh = shutil.copytree(project, tmp_path / "fresh", symlinks=True, ignore=shutil.ignore_patterns("runs"))
    (making,) = (block for block in blocks(document, "sh") if "sandbox.py start" in block.text)
    others = "".join(block.text for block in blocks(document, "sh") if block != making)
    all_of_it = making._replace(text=re.sub(r".*exec -- bash.*\n", lambda shell: shell[0] + others, making.text))
    with TemporaryDirectory(prefix="hvd-compress-") as directory:
        try:
            left_out = [*NOT_RUN, "mpirun"]  # which would read what is typed after it, and runs elsewhere
            text = bash(fresh, typed=to_run([all_of_it], left_out, CHANGED_THERE), TMPDIR=directory)
        finally:
            bash(fresh, "-c", "python3 slurm/sandbox.py stop", TMPDIR=directory)
    *_, status = text.split("submit.py status\n")
    assert dict(re.findall(r"^│ (\d\S*) +│ \S+ +│ (\w+)", status, flags=re.MULTILINE)) == states, text
    assert dict(re.findall(r"^Job (\d), (\d) ranks, restarted 0 times$", text, flags=re.MULTILINE)) == followed, text
    assert "Finished runs" in text
    assert "Picture: runs/sweep/accuracy-vs-megabytes.png" in text


def test_uninstalling_leaves_no_cache(project: Path, printed: Callable[[str], str]) -> None:
    printed("docs/install.md")
    assert [*(project / "home" / ".cache").glob("hvd-compress")] == []


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
    for start in [*NOT_RUN, *ON_SLURM]:
        assert any(starts(line, [start]) for line in lines), start
    for pattern in {**CHANGED, **CHANGED_THERE, **CHANGED_ELSEWHERE}:
        assert any(re.search(pattern, line) for line in lines if not starts(line, NOT_RUN)), pattern
    for document, start in DRAWINGS.items():
        assert any(block.text.startswith(start) for block in blocks(document, "text")), document
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for file, test in re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", " ".join(NOT_RUN.values())):
        assert f"def {test}" in tests[file], f"{file}::{test}"
