"""Every block of code in README and the documents runs.

What is done with a block follows from the language behind its fence:

- ``python``: the blocks of a document are one script, which two ranks run.
- ``sh``: so are these, in a copy of the project; those for Slurm on a cluster. :data:`CHANGED` makes commands short
  or harmless, :data:`NEEDS` says what not every machine has.
- ``text``: what commands of that document print; numbers may differ. :data:`DRAWINGS` are no output.
- ``diff``: compared with an example in ``test_documentation.py``.
- in braces: run by Sphinx, ``make docs``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import build_horovod
import numpy as np
import pytest
import torch
from documents import DOCUMENTS, ROOT, Block, blocks, commands, numbers, run_script
from lab import missing as missing_lab
from PIL import Image
from test_report import COMPRESSED, PLAIN, write
from world import World, launch, mpirun_command

from hvd_compress.compression import COMPRESSORS

LANGUAGES = r"python|sh|text|diff|\{(eval-rst|toctree)\}|\{literalinclude\} \S+"
WHEELS = build_horovod.cache_root() / "wheels"


def no_repository() -> str | None:
    """As git sees it from a home without settings."""
    if not shutil.which("git"):
        return "there is no git"
    command = ["git", "ls-remote", f"file://{ROOT}", "HEAD"]
    tried = subprocess.run(command, env={**os.environ, "HOME": os.devnull}, capture_output=True, text=True)
    return tried.stderr if tried.returncode else None


def no_debian() -> str | None:
    try:
        here = platform.freedesktop_os_release()
    except OSError:
        here = {}
    if (here.get("ID"), here.get("VERSION_ID")) != ("debian", "12"):
        return "this is not Debian 12"
    listed = subprocess.run(["apt-cache", "show", "slurmctld"], capture_output=True)
    return "apt-get has no lists of packages: apt-get update" if listed.returncode else None


def no_wheel() -> str | None:
    try:
        setup = build_horovod.inspect(build_horovod.parse_arguments([]))
    except build_horovod.BuildError as error:
        return error.cause
    fitting = (WHEELS / setup.key).glob("*.whl")
    return None if any(fitting) else "it would compile Horovod for minutes: `make env` caches a wheel"


NEEDS = {
    "git clone": no_repository,
    "apt-get install": no_debian,
    "python scripts/build_horovod.py": no_wheel,
    "sudo": missing_lab,
}
"""Beginnings of commands, and why this machine cannot run them, if so."""


@cache
def cannot_run() -> dict[str, str]:
    return {start: reason for start, missing in NEEDS.items() if (reason := missing())}


TINY = "--arch resnet18 --epochs 1 --limit-train-batches 1 --batch-size 2 --image-size 32 --eval-size 32 --workers 0"
"""Options of the ImageNet example that make it short."""

CHANGED = {
    r"^make ": "make --dry-run ",
    r"^git clone <this repository> (.*)": rf"(git clone --depth 1 {shlex.quote(f'file://{ROOT}')} \1)",
    r"^(apt-get install .*)\$(\(.+\))": r"packages=$\2; \1 --simulate $packages",  # ends where \2 fails
    r"^pip install": "pip install --dry-run --no-build-isolation",
    r"build_horovod\.py --install$": "build_horovod.py",  # tries the wheel elsewhere
    r"^(.*build_horovod\.py) --install (--nccl .*)": r"! CUDA_HOME=cuda \1 \2",
    r"mpirun -np 8 (?:-H \S+ )?(.+ --data) .*": rf"mpirun -np 2 \1 images --output runs/tried {TINY}",
    r"/path/to/imagenet": "images",
    r"advise --mpirun .+ -H node1,node2\"": 'advise --mpirun "mpirun -np 2" --model resnet50',
    r"paper torchvision short": "short",
    r"--recipe \$recipe": "--recipe $recipe --arch resnet18",
    r"/cnn\.py.*": r"\g<0> --epochs 2",
    r"/every_compressor\.py --epochs.*": r"\g<0> --epochs 1",
    r"/every_compressor\.py$": r"\g<0> --epochs 1 --only none topk",
    r"/masked_words\.py.*": r"\g<0> --steps 25 --words 1000",
    r"--data /usr/share/datasets/fashion-mnist": "--data idx --short --seeds 0",
    r"benchmarks/step_cost\.py": r"\g<0> --warmup 1 --repetitions 1",
    r"benchmarks/operators\.py": r"\g<0> --repetitions 1",
    r"benchmarks/slow_link\.py": r"\g<0> --rates 10gbit --steps 1 --rounds 1",
    r"benchmarks/scale\.py": r"\g<0> --layouts 2x1 --rounds 1 --elements 100000",
    r"advise --batch-size 16": r"\g<0> --model squeezenet1_1",
    r"-np 4 python benchmarks/soak\.py": "-np 2 python benchmarks/soak.py --steps 20",
    r"-np 4 python benchmarks/straggler\.py": "-np 2 python benchmarks/straggler.py --steps 8 --seconds 0.01",
    r"--model resnet50 --batch-size 64": "--model squeezenet1_1 --batch-size 2 --image-size 64 --json found.json",
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


@pytest.mark.ranks(2)
@pytest.mark.parametrize("document", [document for document in WITH_PYTHON if document != "docs/scale.md"])
def test_python(world: World, document: str, tmp_path: Path) -> None:
    world.run(run_script, document, script(document), str(tmp_path))


def test_python_that_makes_process_sets() -> None:
    """They would stay in a world of ranks for other tests."""
    ended = launch(2, script("docs/scale.md"))
    assert ended.returncode == 0, ended.stdout
    assert "hvd_compress.auto" not in ended.stdout  # nothing chose by itself


# -------------------------------------------------------------------------------------------------------- commands


def starts(command: str, beginnings: Iterable[str]) -> bool:
    return any(command.strip().startswith(beginning) for beginning in beginnings)


def lines(document: str) -> list[str]:
    return [line.strip() for block in blocks(document, "sh") for line in commands(block)]


def to_run(parts: list[Block], left_out: Iterable[str], changed: Mapping[str, str]) -> str:
    """The commands of blocks as they are run."""
    text = "\n".join(line for block in parts for line in commands(block) if not starts(line, left_out))
    for pattern, replacement in {**CHANGED, **changed}.items():
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


@cache
def shell_script(document: str) -> str:
    return to_run(blocks(document, "sh"), [*cannot_run(), *ON_SLURM], CHANGED_ELSEWHERE)


def write_idx(directory: Path) -> None:
    """Images of 8 × 8 pixels with one bright row each, which is the label."""
    directory.mkdir()
    for part, number in {"train": 240, "t10k": 60}.items():
        labels = np.arange(number, dtype=np.uint8) % 8
        images = np.zeros((number, 8, 8), np.uint8)
        images[np.arange(number), labels] = 255
        for kind, array in {"images-idx3": images, "labels-idx1": labels}.items():
            header = np.array([0x800 + array.ndim, *array.shape], ">u4")
            (directory / f"{part}-{kind}-ubyte").write_bytes(header.tobytes() + array.tobytes())


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    """A copy to write into, and what its reader has: programs, Horovod's wheel, a script, runs, images, a host."""
    with TemporaryDirectory(prefix="hvd-compress-documents-") as directory:
        copy = Path(directory)
        for path in ROOT.iterdir():
            if path.is_file() and path.name != ".git":  # of a worktree: git would work on the original
                shutil.copy(path, copy)
        for name in ("benchmarks", "docs", "examples", "scripts", "slurm", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / ".venv").symlink_to(sys.prefix)
        program, _, _, *flags = mpirun_command(2)
        for name, lines in {
            "bin/mpirun": f'exec {shlex.join([program, *flags])} "$@"',
            "bin/sudo": 'exec "$@"',  # root may have none
            "cuda/bin/nvcc": f"echo release {torch.version.cuda}",
            "hosts.sh": "echo localhost:2",
        }.items():
            file = copy / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"#!/bin/sh\n{lines}\n")
            file.chmod(0o755)
        (copy / "cuda" / "include").mkdir()
        (copy / "cuda" / "include" / "cuda_runtime.h").touch()
        (copy / "train.py").write_text("import horovod.torch as hvd\nhvd.init()\nassert hvd.size() > 1\n")
        for name, records in {"paper": COMPRESSED, "torchvision": PLAIN, "baseline": PLAIN}.items():
            write(copy / "runs" / name, records)
        for part in ("train/cat", "train/dog", "val/cat", "val/dog"):
            (copy / "images" / part).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40, 40), "red").save(copy / "images" / part / f"{number}.png")
        write_idx(copy / "idx")
        (cache := copy / "home" / ".cache" / "hvd-compress").mkdir(parents=True)
        if WHEELS.exists():
            shutil.copytree(WHEELS, cache / "wheels", ignore=shutil.ignore_patterns(".building-*"))
        yield copy


def bash(project: Path, *arguments: str, typed: str = "", **variables: str) -> str:
    """What it prints in the copy, with a home of its own."""
    path = os.pathsep.join([str(project / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(project / "home"), "XDG_CACHE_HOME": ""}
    own |= {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}  # few cores, and no network
    ended = subprocess.run(
        ["bash", "-euxo", "pipefail", *arguments],
        cwd=project,
        env={**os.environ, **own, **variables},
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


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_commands(printed: Callable[[str], str], document: str) -> None:
    printed(document)


@pytest.mark.parametrize("start", NEEDS)
def test_commands_with_needs(printed: Callable[[str], str], start: str) -> None:
    if start in cannot_run():
        pytest.skip(f"`{start} …` in documents: {cannot_run()[start]}")
    having = [document for document in WITH_COMMANDS if any(starts(line, [start]) for line in lines(document))]
    assert having
    assert all(f"\n+ {start}" in "\n" + printed(document) for document in having)


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
            # mpirun would read what is typed after it; :func:`test_commands` has done both.
            left_out = [*cannot_run(), "git clone", "mpirun"]
            text = bash(fresh, typed=to_run([all_of_it], left_out, CHANGED_THERE), TMPDIR=directory)
        finally:
            bash(fresh, "-c", "python3 slurm/sandbox.py stop", TMPDIR=directory)
    *_, status = text.split("submit.py status\n")
    assert dict(re.findall(r"^│ (\d\S*) +│ \S+ +│ (\w+)", status, flags=re.MULTILINE)) == states, text
    assert dict(re.findall(r"^Job (\d), (\d) ranks, restarted 0 times$", text, flags=re.MULTILINE)) == followed, text
    assert "Finished runs" in text
    assert "Picture: runs/sweep/accuracy-vs-megabytes.png" in text


def test_pip_finds_the_extras(printed: Callable[[str], str]) -> None:
    """Of those that are not there, it only warns."""
    assert "does not provide the extra" not in printed("docs/install.md")


def test_horovod_for_gpus_is_built_up_to_its_download(printed: Callable[[str], str]) -> None:
    """With all that comes before: the toolkit, NCCL, compilers."""
    if "python scripts/build_horovod.py" in cannot_run() or not torch.version.cuda:
        pytest.skip("without a wheel in the cache, or with a torch for CPUs, it ends earlier")
    assert "error: pip's index has no fitting package" in printed("docs/install.md")


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


def of_example(printed: Callable[[str], str], name: str) -> str:
    """What it prints: `bash` shows each command before it runs."""
    text = printed("docs/examples.md").partition(f"+ mpirun -np 2 python examples/{name}")[2]
    return text.partition("\n+ ")[0]


@pytest.mark.parametrize(
    ("name", "least"), [("quickstart.py", 20), ("custom_compressor.py", 20), ("local_steps.py", 200)]
)
def test_examples_learn_and_save(printed: Callable[[str], str], name: str, least: float) -> None:
    output = of_example(printed, name)
    losses = numbers(r"loss ([\d.]+)", output)
    assert losses[-1] < 0.5 < losses[0]
    (saved,) = numbers(r"([\d.]+) times less", output)  # by one of the ranks
    assert saved > least


def test_cnn(printed: Callable[[str], str]) -> None:
    output = of_example(printed, "cnn.py")
    before, after = numbers(r"([\d.]+) at (?:first|last)", output)
    assert after < 0.85 * before
    assert numbers(r"accuracy ([\d.]+)%", output)
    assert numbers(r"([\d.]+) times less", output)[0] > 30


def test_masked_words(printed: Callable[[str], str]) -> None:
    output = of_example(printed, "masked_words.py")
    before, after = numbers(r"([\d.]+) at (?:first|last)", output)
    assert after < 0.9 * before
    assert numbers(r"logits.weight: .* ([\d.]+) times less", output)[0] > 40
    assert numbers(r"embedding.weight: .* ([\d.]+) times less", output) == [1.0]  # Horovod gathers its rows


def test_every_compressor(printed: Callable[[str], str]) -> None:
    output = of_example(printed, "every_compressor.py")
    rows = dict(re.findall(r"^│ (\w+) .*?│.*?│ +([\d.]+)% │", output, flags=re.MULTILINE))
    assert rows.keys() == {"none", "fp16", *COMPRESSORS}
    assert all(float(accuracy) > 25 for accuracy in rows.values()), output  # by chance it would be 10


@pytest.mark.parametrize("name", ["qsparse", "adaptive", "truncated"])
def test_experiments_end_with_tables_and_a_figure(project: Path, printed: Callable[[str], str], name: str) -> None:
    text = printed(f"docs/experiments/{name}.md")
    results = project / "runs" / "papers" / f"{name}.jsonl"
    parts = {json.loads(line)["case"]["part"] for line in results.read_text().splitlines()}
    assert text.count("| ---") >= len(parts) > 0
    assert results.with_suffix(".png").stat().st_size > 5_000


def test_advice_says_what_it_measured(project: Path, printed: Callable[[str], str]) -> None:
    text = printed("docs/imagenet.md")
    assert "1,235,496 gradients in 52 tensors, 4.9 MB in fp32" in text
    assert re.search(r"Advice: (do not compress|compress, from)", text)
    record = json.loads((project / "found.json").read_text())
    assert (record["ranks"], record["elements"]) == (2, 1_235_496)
    topk = next(c for c in record["candidates"] if c["name"] == "top-k 1 %")
    kept = 0.01 * 1_235_496 * (32 + 8.1) / 8
    assert kept < topk["message"] < 2 * kept, "small tensors are whole, and the packet has a head"


def test_advice_on_a_slow_link(printed: Callable[[str], str]) -> None:
    """Half of 4.9 MB of gradients take 0.2 s at 100 Mbit/s, a message of top-k a tenth of it."""
    if "sudo" in cannot_run():
        pytest.skip(cannot_run()["sudo"])
    text = printed("docs/imagenet.md").partition("+ sudo ")[2].partition("\n+ .venv")[0]
    assert "Measured between 2 ranks on 2 nodes, 1 on each" in text
    assert "Advice: compress, from 2 nodes on" in text


def test_the_table_of_bytes_is_what_its_command_prints(printed: Callable[[str], str]) -> None:
    section = (ROOT / "docs" / "performance.md").read_text().partition("\n## Bytes\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d,]+) \|", section, flags=re.MULTILINE)
    assert len(rows) > 10
    of_command = re.findall(
        r"^│ (.+?) +│ +([\d,]+) │ +([\d,]+) │", printed("docs/performance.md"), flags=re.MULTILINE
    )
    assert rows == of_command


def test_what_is_left_out_or_changed_is_there() -> None:
    there = [line for document in DOCUMENTS for line in lines(document)]
    for start in [*NEEDS, *ON_SLURM]:
        assert any(starts(line, [start]) for line in there), start
    for pattern in {**CHANGED, **CHANGED_THERE, **CHANGED_ELSEWHERE}:
        assert any(re.search(pattern, line) for line in there), pattern
    for document, start in DRAWINGS.items():
        assert any(block.text.startswith(start) for block in blocks(document, "text")), document
