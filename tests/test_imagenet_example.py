"""The training script, as a user starts it, and its parts that need no ranks."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from models import signals_as_they_were
from PIL import Image
from test_examples import run_example
from world import World, environment, mpirun_command

EXAMPLES = Path(__file__).parent.parent / "examples"
MEGABYTES = {"resnet50": 4 * 23.528522, "resnet18": 4 * 11.181642}
"""Of the parameters for 10 classes, in fp32."""
STATISTICS = {"resnet50": 4 * 2 * 26_560 / 1e6, "resnet18": 4 * 2 * 4_800 / 1e6}
"""Megabytes of the batch norms' means and variances."""
SMALL = ["--arch", "resnet18", "--no-checkpoint"]
QUICK = ["--epochs", "1", "--limit-train-batches", "2", "--batch-size", "8"]


def run(world: World, *arguments: object) -> tuple[int, str]:
    """Exit status and everything printed, on a world's ranks, which need not be started; others start their own."""
    statuses, texts = zip(*world.run(one_rank, [*QUICK, *map(str, arguments)]), strict=True)
    assert len({*statuses}) == 1, texts
    return statuses[0], "".join(texts)


def one_rank(arguments: list[str]) -> tuple[int, str]:
    """The same of a rank, which is left as it was."""
    printed = io.StringIO()
    try:
        with signals_as_they_were(), contextlib.redirect_stderr(printed):
            printed.write(run_example("imagenet_resnet50.py", arguments))
    except SystemExit as ended:
        return int(ended.code or 0), printed.getvalue()
    return 0, printed.getvalue()


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def optimizer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("imagenet_optimizer")


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("imagenet_data")


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("embedded_images")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A tree as ImageNet's: two classes of colour images of different sizes."""
    for split, number in (("train", 8), ("val", 3)):
        for name, colour in (("n01440764", (200, 30, 30)), ("n01443537", (30, 30, 200))):
            for i in range(number):
                path = tmp_path / "photographs" / split / name / f"{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40 + 7 * i, 50), colour).save(path)
    return tmp_path / "photographs"


class TestEmbeddedImages:
    def test_all_digits_are_there(self, embedded: ModuleType, tmp_path: Path) -> None:
        root = tmp_path / "some" / "digits"
        embedded.write_digits(root)
        counts = {split: Counter(p.parent.name for p in (root / split).glob("*/*.png")) for split in ("train", "val")}
        assert set(counts["train"]) == set(counts["val"]) == set("0123456789")
        assert (counts["train"].total(), counts["val"].total()) == (1442, 355)
        for digit in "0123456789":
            assert counts["val"][digit] == (counts["train"][digit] + counts["val"][digit]) // 5
        assert [path.name for path in root.parent.iterdir()] == ["digits"]  # nothing temporary is left

    def test_no_image_is_in_both_parts(self, embedded: ModuleType, tmp_path: Path) -> None:
        embedded.write_digits(tmp_path / "digits")
        numbers = [path.name for path in (tmp_path / "digits").rglob("*.png")]
        assert len(set(numbers)) == len(numbers) == 1797

    def test_images_are_the_data_set_s_own(self, embedded: ModuleType, tmp_path: Path) -> None:
        embedded.write_digits(tmp_path / "digits")
        first = embedded.load_digits().images[0]
        with Image.open(tmp_path / "digits" / "train" / "0" / "0000.png") as image:
            assert image.size == (8, 8)
            greys = [image.getpixel((column, row)) for row in range(8) for column in range(8)]
        assert greys == [round(grey * 255 / 16) for grey in first.ravel().tolist()]

    def test_two_trees_are_equal(self, embedded: ModuleType, tmp_path: Path) -> None:
        digests = []
        for name in ("one", "two"):
            root = tmp_path / name
            embedded.write_digits(root)
            files = sorted(root.rglob("*.png"))
            digests.append([(f.relative_to(root), hashlib.sha256(f.read_bytes()).digest()) for f in files])
        assert digests[0] == digests[1]

    def test_an_existing_tree_is_kept(self, embedded: ModuleType, tmp_path: Path) -> None:
        (tmp_path / "digits").mkdir()
        embedded.write_digits(tmp_path / "digits")
        assert not list((tmp_path / "digits").iterdir())


class TestParts:
    def test_learning_rate(self, optimizer: ModuleType) -> None:
        args = argparse.Namespace(warmup_epochs=5, drop_at=[30, 60, 80], schedule="step", epochs=90)
        expected = {0.5: 0.1, 2.5: 0.5, 5: 1, 30: 1, 30.001: 0.1, 60: 0.1, 60.001: 0.01, 80: 0.01, 90: 0.001}
        assert {epoch: optimizer.lr_factor(epoch, args) for epoch in expected} == pytest.approx(expected)
        args = argparse.Namespace(warmup_epochs=0, drop_at=[], schedule="step", epochs=90)
        assert optimizer.lr_factor(0.01, args) == 1
        args = argparse.Namespace(warmup_epochs=2, drop_at=[1], schedule="linear", epochs=10)
        expected = {1: 0.5, 2: 1, 4: 0.75, 10: 0, 10.1: 0}
        assert {epoch: optimizer.lr_factor(epoch, args) for epoch in expected} == pytest.approx(expected)
        args.schedule = "cosine"
        expected = {1: 0.5, 2: 1, 6: 0.5, 10: 0}
        assert {epoch: optimizer.lr_factor(epoch, args) for epoch in expected} == pytest.approx(expected)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_epoch_can_begin_anywhere(self, data: ModuleType, photographs: Path, workers: int) -> None:
        """The same images with the same augmentations as in a whole epoch, and other ones in another epoch."""
        images, _ = data.open_images(photographs)
        transforms = data.Transforms(sizes())

        def batches(epoch: int, skip: int) -> list[list[torch.Tensor]]:
            torch.rand(skip + workers)  # the global generator does not matter
            sampler = data.EpochSampler(images, 1, 2, seed=3, batch_size=2)
            sampler.begin(epoch, skip=skip)
            augmented = data.Augmented(images, transforms, seed=3)
            return [batch[:2] for batch in data.loader(augmented, workers, sampler=sampler, batch_size=2)]

        rest, workers = batches(2, 1), 0
        whole = batches(2, 0)
        assert len(whole) == 4
        assert all(torch.equal(a, b) for x, y in zip(whole[1:], rest, strict=True) for a, b in zip(x, y, strict=True))
        assert not torch.equal(batches(3, 0)[0][0], whole[0][0])


def sizes(**changed: Any) -> argparse.Namespace:
    """What images are made to."""
    usual = {"image_size": 32, "grow_from": None, "grow_until": 2, "eval_size": None, "augment": "crop"}
    return argparse.Namespace(**{**usual, **changed})


class TestRuns:
    @pytest.mark.ranks(2)
    def test_compare(self, world: World, tmp_path: Path) -> None:
        status, text = run(world, "--compare", "--output", tmp_path)
        assert status == 0, text
        assert "No ImageNet was given" in text
        assert text.count("No ImageNet was given") == 1, "each rank spoke"
        for expected in ("topk k=1000, H=4", "plain Horovod, fp32", "accuracy", "exchanges", "1.0×"):
            assert expected in text
        compressed, plain = metrics(tmp_path)
        # 2 steps, all parameters for 10 classes; batch norm's mean and variance, before the validation
        assert plain["megabytes_sent"] == pytest.approx(2 * MEGABYTES["resnet50"] + STATISTICS["resnet50"])
        assert plain["ratio_to_fp32"] == 1
        assert plain["exchanges"] == 2
        assert compressed["exchanges"] == 1  # before the validation: 2 steps are not yet H
        assert compressed["ratio_to_fp32"] * compressed["megabytes_sent"] == pytest.approx(plain["megabytes_sent"])
        for epoch in (compressed, plain):
            right = epoch["accuracy"] * 355  # an odd number of images on two ranks: none may count twice
            assert right == pytest.approx(round(right))
        with Image.open(tmp_path / "accuracy-vs-megabytes.png") as picture:
            assert min(picture.size) > 500

    @pytest.mark.ranks(2)
    def test_gradient_path(self, world: World, tmp_path: Path) -> None:
        status, text = run(world, "--optimizer", "gradient", "--ratio", "0.01", "--output", tmp_path, *SMALL)
        assert status == 0, text
        assert "topk 0.01, each gradient" in text
        (epoch,) = metrics(tmp_path)
        assert epoch["exchanges"] == 2
        assert epoch["ratio_to_fp32"] > 20

    @pytest.mark.ranks(2)
    def test_half_precision_is_half_the_bytes(self, world: World, tmp_path: Path) -> None:
        status, text = run(world, "--optimizer", "gradient", "--compression", "fp16", "--output", tmp_path, *SMALL)
        assert status == 0, text
        (epoch,) = metrics(tmp_path)
        parameters, statistics = 2 * MEGABYTES["resnet18"], STATISTICS["resnet18"]
        assert epoch["megabytes_sent"] == pytest.approx(parameters / 2 + statistics)
        assert epoch["ratio_to_fp32"] == pytest.approx((parameters + statistics) / epoch["megabytes_sent"])

    @pytest.mark.ranks(3)
    def test_photographs_on_three_ranks(self, world: World, photographs: Path, tmp_path: Path) -> None:
        arguments = ["--image-size", 64, "--workers", 0, "--batch-size", 2, "--sync-every", 1]
        arguments += [*SMALL, "--limit-train-batches", 9]
        status, text = run(world, "--data", photographs, "--output", tmp_path / "out", *arguments)
        assert status == 0, text
        (epoch,) = metrics(tmp_path / "out")
        assert epoch["exchanges"] == 2  # 16 images for 3 ranks, by twos: 4 of them are left out
        right = epoch["accuracy"] * 6
        assert right == pytest.approx(round(right))

    @pytest.mark.ranks(1)
    def test_one_rank_and_its_workers(self, world: World, photographs: Path, tmp_path: Path) -> None:
        arguments = ["--optimizer", "gradient", "--image-size", 32, "--workers", 1, *SMALL]
        status, text = run(world, "--data", photographs, "--output", tmp_path / "out", *arguments)
        assert status == 0, text
        (epoch,) = metrics(tmp_path / "out")
        assert (epoch["megabytes_sent"], epoch["ratio_to_fp32"]) == (0, None)


class TestInterruption:
    """`kill -USR2` of mpirun, which passes it on to its ranks, and the same command again."""

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        options = ["--arch", "resnet18", "--epochs", 2, "--batch-size", 2, "--image-size", 32, "--workers", 0]
        options += arguments
        return subprocess.Popen(
            [*mpirun_command(2), sys.executable, EXAMPLES / "imagenet_resnet50.py", *map(str, options)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @pytest.mark.parametrize("method", ["--sync-every 2", "--optimizer gradient --ratio 0.01"])
    def test_goes_on_bit_for_bit(self, photographs: Path, tmp_path: Path, method: str) -> None:
        at_once, twice = tmp_path / "at-once", tmp_path / "twice"
        whole = self.start("--data", photographs, *method.split(), "--checkpoint", at_once, "--output", tmp_path)
        text, _ = whole.communicate(timeout=180)
        assert whole.returncode == 0, text

        # A checkpoint in each step makes the moment known: it is in the middle of the first epoch.
        options = ["--data", photographs, *method.split(), "--checkpoint", twice, "--output", tmp_path / "out"]
        first = self.start(*options, "--checkpoint-every", 1)
        try:
            deadline = time.monotonic() + 120
            while not (twice / "step-0000000001").exists() and first.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            first.send_signal(signal.SIGUSR2)
            text, _ = first.communicate(timeout=120)
        finally:
            first.kill()
        assert first.returncode == 75, text
        saved = int(re.findall(r"Saved as checkpoint (\d+)", text)[0])
        assert 1 <= saved < 9

        second = self.start(*options)
        text, _ = second.communicate(timeout=180)
        assert second.returncode == 0, text
        assert f"checkpoint {saved}." in text
        for rank in range(2):
            file = f"step-0000000010/rank-0000{rank}.pt"
            one, other = (torch.load(d / file, weights_only=True)["state"] for d in (at_once, twice))
            for name in ("model", "optimizer", "schedule", "books"):
                assert_equal(one[name], other[name], name)
            assert_equal(one["random"]["torch"], other["random"]["torch"])
        same = [
            [(record["epoch"], record["train_loss"], record["accuracy"]) for record in metrics(output)]
            for output in (tmp_path, tmp_path / "out")
        ]
        assert same[0] == same[1]
        assert [epoch for epoch, *_ in same[0]] == [1, 2]
        for directory in (at_once, twice):  # pytest keeps what is left
            shutil.rmtree(directory)

    def test_other_settings_or_ranks(self, worlds: Any, tmp_path: Path) -> None:
        options = ["--arch", "resnet18", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path]
        status, text = run(worlds.of(1), *options)
        assert status == 0, text
        status, text = run(worlds.of(1), *options, "--lr", "0.5")
        assert status == 1
        assert "lr was 0.08, is 0.5. Give another --output, or --resume never" in text
        status, text = run(worlds.of(2), *options)
        assert status == 1
        assert "was saved by 1 ranks, this job has 2" in text
        assert "Traceback" not in text


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """To the bit, in whatever they are nested."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"shared"}:  # bytes of the ledger: the ranks greet each other once more
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b, where)
    else:
        assert one == other, where


class TestErrors:
    def failure(self, world: World, *arguments: object) -> str:
        status, text = run(world, *arguments)
        assert status != 0
        assert "Traceback" not in text
        assert text.count("error:") == 1, text
        return text

    @pytest.mark.ranks(2)
    def test_no_validation_directory(self, world: World, photographs: Path, tmp_path: Path) -> None:
        (photographs / "val").rename(photographs / "validation")
        text = self.failure(world, "--data", photographs, "--output", tmp_path / "out")
        assert f"there is no directory {photographs / 'val'}" in text

    def test_empty_class(self, data: ModuleType, photographs: Path) -> None:
        (photographs / "train" / "n01484850").mkdir()
        with pytest.raises(OSError, match="n01484850"):
            data.open_images(photographs)

    def test_other_classes_in_validation(self, data: ModuleType, photographs: Path) -> None:
        (photographs / "val" / "n01443537").rename(photographs / "val" / "n01484850")
        with pytest.raises(ValueError, match="differ in their classes: n01443537, n01484850"):
            data.open_images(photographs)

    @pytest.mark.ranks(2)
    def test_too_few_images(self, world: World, photographs: Path, tmp_path: Path) -> None:
        text = self.failure(
            world, "--data", photographs, "--workers", "0", "--output", tmp_path / "out", "--batch-size", "99"
        )
        assert "16 images are too few for 2 ranks of --batch-size 99" in text

    @pytest.mark.ranks(2)
    def test_unknown_compressor(self, world: World, tmp_path: Path) -> None:
        text = self.failure(world, "--compression", "topp", "--output", tmp_path)
        assert "did you mean 'topk'?" in text

    @pytest.mark.ranks(2)
    def test_unknown_option(self, world: World) -> None:
        assert "--compresion" in self.failure(world, "--compresion", "topk")

    @pytest.mark.ranks(1)
    def test_nothing_to_compare_on_one_rank(self, world: World, tmp_path: Path) -> None:
        assert "2 ranks or more" in self.failure(world, "--compare", "--output", tmp_path)

    @pytest.mark.ranks(2)
    def test_weights_of_another_program(
        self, world: World, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "torchvision.pt")
        text = self.failure(world, "--data", photographs, "--evaluate", tmp_path / "torchvision.pt")
        assert f"{tmp_path / 'torchvision.pt'} is no best.pt or last.pt of this program" in text
        monkeypatch.syspath_prepend(EXAMPLES)
        validation = importlib.import_module("imagenet_validation")
        (tmp_path / "notes.txt").write_text("accuracy: 0.7\n")
        with pytest.raises(ValueError, match=r"is no best\.pt or last\.pt of this program"):
            validation.read_weights(tmp_path / "notes.txt")
        with pytest.raises(ValueError, match=r"is no best\.pt or last\.pt of this program"):
            validation.fill(torch.nn.Linear(1, 1), {"other": torch.zeros(1)}, tmp_path / "best.pt")
        with pytest.raises(FileNotFoundError):
            validation.read_weights(tmp_path / "missing.pt")

    @pytest.mark.ranks(2)
    def test_checkpoints_where_nothing_can_be_written(self, world: World, photographs: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        options = ["--data", photographs, "--workers", 0, "--batch-size", 2, "--image-size", 32, "--arch", "resnet18"]
        text = self.failure(
            world, *options, "--output", tmp_path / "out", "--checkpoint", tmp_path / "file" / "checkpoint"
        )
        assert f"{tmp_path / 'file' / 'checkpoint'}" in text
        assert not (tmp_path / "out" / "config.yaml").exists()  # before anything is trained

    @pytest.mark.parametrize(
        ("option", "value", "expected"),
        [
            ("--momentum", "-1", "--momentum must be 0 or more, got -1.0"),
            ("--workers", "-1", "--workers must be 0 or more, got -1"),
            ("--label-smoothing", "2", "--label-smoothing must be between 0 and 1, got 2.0"),
            ("--label-smoothing", "nan", "--label-smoothing must be between 0 and 1, got nan"),
        ],
    )
    def test_numbers_out_of_range(
        self, monkeypatch: pytest.MonkeyPatch, capsys: Any, option: str, value: str, expected: str
    ) -> None:
        monkeypatch.syspath_prepend(EXAMPLES)
        hvd.init()
        with pytest.raises(SystemExit) as ended:
            importlib.import_module("imagenet_options").parse_arguments(None, [option, value])
        assert ended.value.code == 2
        assert f"error: {expected}\n" in capsys.readouterr().err
