"""Parts of the ImageNet training: recipes, images, shards, evaluation, and a job that is killed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
import webdataset
import yaml
from models import signals_as_they_were
from PIL import Image
from test_imagenet_example import EXAMPLES, assert_equal, metrics, run, sizes
from torch import nn
from world import World, environment, mpirun_command

from hvd_compress import Ledger


def example(name: str) -> ModuleType:
    """A module of the examples, on ranks of a world too."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of 20 classes, made of the embedded images."""
    root = tmp_path_factory.mktemp("images") / "numbers"
    example("embedded_images").write_numbers(root)
    return root


@pytest.fixture(scope="module")
def few(numbers: Path) -> Path:
    """The same with 80 images to validate with."""
    root = numbers.parent / "few"
    shutil.copytree(numbers / "train", root / "train")
    for path in (numbers / "val").glob("*/000[0-3].png"):
        (root / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "val" / path.parent.name)
    return root


@pytest.fixture(scope="module")
def shards(numbers: Path) -> Path:
    """The same in shards."""
    for split in ("train", "val"):
        example("imagenet_shards").pack(numbers / split, numbers.parent / "shards" / split, per_shard=100)
    return numbers.parent / "shards"


def settings(*arguments: object) -> argparse.Namespace:
    """What the program makes of a command line."""
    hvd.init()
    return example("imagenet_options").parse_arguments(None, list(map(str, arguments)))


class TestRecipes:
    def test_the_paper_s(self) -> None:
        """Basu et al. 2019, section 5; it is what ImageNet is trained with unless another one is named."""
        args = settings("--data", "somewhere")
        assert (args.recipe, args.optimizer, args.sync_every) == ("paper", "local-sgd", 8)
        assert (args.compression, args.k, args.bits) == ("qtopk", 1000, 4)
        assert (args.epochs, args.batch_size) == (90, 256)
        assert (args.momentum, args.nesterov, args.weight_decay, args.batch_norm) == (0.9, True, 1e-4, "local")
        assert (args.schedule, args.warmup_epochs, args.drop_at) == ("step", 5, [30, 60, 80])
        assert args.lr * 8 * 256 / 256 == pytest.approx(0.128 * (256 * 8) / 1024)

    def test_a_line_beats_a_recipe_beats_a_default(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(
            "epochs: 7\nk: 5\nlabel-smoothing: 0.25\ndrop_at: [1, 2.5]\nnesterov: false"
        )
        args = settings("--recipe", tmp_path / "mine.yaml", "--epochs", 3, "--ratio", 0.5)
        assert (args.epochs, args.label_smoothing, args.drop_at, args.nesterov) == (3, 0.25, [1, 2.5], False)
        assert (args.k, args.ratio) == (None, 0.5), "k of the recipe and ratio of the line exclude each other"
        assert args.batch_size == 256
        assert settings().recipe == "digits"

    @pytest.mark.parametrize("recipe", sorted(path.stem for path in (EXAMPLES / "recipes").glob("*.yaml")))
    def test_a_run_s_settings_are_a_recipe(self, recipe: str, tmp_path: Path) -> None:
        options = example("imagenet_options")
        args = settings("--recipe", recipe, "--seed", 3, "--output", tmp_path)
        (tmp_path / "config.yaml").write_text("# a comment\n" + options.as_recipe(args))
        again = settings("--recipe", tmp_path / "config.yaml", "--output", tmp_path)
        assert vars(again) == {**vars(args), "recipe": str(tmp_path / "config.yaml")}
        assert options.settings_of_a_run(again) == options.settings_of_a_run(args)

    @pytest.mark.parametrize(
        ("recipe", "expected"),
        [
            ("epoch: 3", "unknown setting 'epoch'; did you mean 'epochs'?"),
            ("weight_decai: 3", "unknown setting 'weight_decai'; did you mean 'weight-decay'?"),
            ("xyzzy: 3", "known are data, image-size"),
            ("output: runs/mine", "output belongs on the command line"),
            ("epochs: many", "argument --epochs: invalid positive value: 'many'"),
            ("nesterov: 1", "nesterov must be true or false, got 1"),
            ("epochs: true", "epochs must be a value, got True"),
            ("schedule: steps", "invalid choice: 'steps'"),
            ("- epochs", "must hold settings as 'name: value'"),
            ("a: b: c", "is not YAML"),
        ],
    )
    def test_mistakes(self, recipe: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "wrong.yaml").write_text(recipe)
        with pytest.raises(SystemExit):
            settings("--recipe", tmp_path / "wrong.yaml")
        assert expected in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("--recipe papr", "did you mean paper? there are digits, paper, short, torchvision"),
            ("--optimizer gradient --sync-every 4", "--sync-every is for --optimizer local-sgd"),
            ("--optimizer gradient --compression none --compare", "choose another"),
            ("--epochs 0", "must be 1 or more"),
            ("--compare --checkpoint somewhere", "--checkpoint is for one run"),
            ("--no-checkpoint --checkpoint somewhere", "--no-checkpoint contradicts"),
            ("--batch-size 8 --accumulate 3", "must divide --batch-size 8"),
            ("--momentum 0", "--no-nesterov goes without"),
            ("--k 3 --ratio 0.1", "not allowed with argument"),
        ],
    )
    def test_contradictions(self, line: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            settings(*line.split())
        assert expected in capsys.readouterr().err

    @pytest.mark.parametrize("method", ["local-sgd", "gradient"])
    def test_every_compressor_gets_its_settings_or_a_clear_error(self, method: str) -> None:
        from hvd_compress.compression import COMPRESSORS

        module, options = example("imagenet_optimizer"), example("imagenet_options")
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        made = set()
        for name in ("none", "fp16", *COMPRESSORS):
            args = settings("--optimizer", method, "--compression", name, "--ratio", 0.1)
            try:
                module.make_compression(options.chosen_method(args), nn.Linear(50, 50), args, scaler, 10)
                made.add(name)
            except ValueError as error:
                assert f"--compression {name} needs" in str(error)  # noqa: PT017
        assert {*COMPRESSORS} - made == {"accordion", "threshold"}

    @pytest.mark.parametrize(
        ("compression", "of_sgd", "of_compressor"), [("topk", 0.8, None), ("ef21", 0.8, 0.0), ("dgc", 0.0, 0.8)]
    )
    def test_momentum_comes_once(
        self, compression: str, of_sgd: float, of_compressor: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, options = example("imagenet_optimizer"), example("imagenet_options")
        monkeypatch.setattr(hvd, "size", lambda: 2)
        args = settings("--compression", compression, "--ratio", 0.1, "--momentum", 0.8)
        method, model = options.chosen_method(args), nn.Linear(50, 50)
        group = module.make_sgd(method, model, args).param_groups[0]
        assert (group["momentum"], group["nesterov"]) == (of_sgd, of_sgd > 0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        made = module.make_compression(method, model, args, scaler, 10)
        memory = made.settings.memory()
        assert getattr(memory, "_momentum", None) == of_compressor
        assert getattr(memory, "_nesterov", False) is (compression == "dgc")


class TestImages:
    def test_twenty_classes_of_embedded_images(self, numbers: Path) -> None:
        for split in ("train", "val"):
            classes = sorted(path.name for path in (numbers / split).iterdir())
            assert classes == [f"{number:02d}" for number in range(20)]
            assert all(len(list((numbers / split / name).iterdir())) > 30 for name in classes)
        with Image.open(numbers / "val" / "13" / "0000.png") as image:
            assert image.size == (16, 8)
        halves = {
            split: {
                bytes(np.asarray(Image.open(path))[:, part].tobytes())
                for path in (numbers / split).rglob("*.png")
                for part in (slice(0, 8), slice(8, 16))
            }
            for split in ("train", "val")
        }
        assert len(halves["train"] & halves["val"]) <= 1, "digits of both parts"  # scikit-learn has one image twice

    @pytest.mark.parametrize(
        ("images", "size", "batch"), [(16, 3, 2), (17, 4, 1), (100, 7, 3), (11, 1, 4), (3, 2, 2)]
    )
    def test_every_rank_has_as_many_and_none_comes_twice(self, images: int, size: int, batch: int) -> None:
        data = example("imagenet_data")

        class Some:
            def __len__(self) -> int:
                return images

            def shuffled(self, generator: torch.Generator) -> torch.Tensor:
                return torch.randperm(images, generator=generator)

        orders = []
        for epoch in (1, 2):
            samplers = [data.EpochSampler(Some(), rank, size, seed=0, batch_size=batch) for rank in range(size)]
            for sampler in samplers:
                sampler.begin(epoch)
            shares = [list(sampler) for sampler in samplers]
            assert {len(share) for share in shares} == {images // (size * batch) * batch}
            keys = list(itertools.chain(*shares))
            assert len({*keys}) == len(keys)
            assert images - len(keys) < size * batch
            orders.append([index for _, index in keys])
        assert orders[0] != orders[1] or len(orders[0]) < 4

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
    def test_validation_batches_do_not_depend_on_the_ranks(self, size: int) -> None:
        data = example("imagenet_data")
        whole = list(data.EveryOther(11, 0, 1, 3))
        assert whole == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
        parts = [list(data.EveryOther(11, rank, size, 3)) for rank in range(size)]
        assert sorted(itertools.chain(*parts)) == whole
        assert [len(part) for part in parts] == [len(data.EveryOther(11, rank, size, 3)) for rank in range(size)]

    def test_images_grow(self) -> None:
        transforms = example("imagenet_data").Transforms
        grown = transforms(sizes(image_size=192, grow_from=128, grow_until=13))
        assert [grown.size(epoch) for epoch in (1, 6, 7, 12, 13, 16)] == [128, 128, 160, 160, 192, 192]
        assert transforms(sizes(grow_from=128)).size(1) == 32, "never larger than --image-size"
        picture = Image.new("RGB", (300, 200))
        assert grown.training(1)(picture).shape == (3, 128, 128)
        assert grown.training(14)(picture).shape == (3, 192, 192)
        assert transforms(sizes(eval_size=64)).validation(picture).shape == (3, 64, 64)

    def test_unreadable_images_are_named_and_do_not_end_the_run(self, numbers: Path, tmp_path: Path) -> None:
        data = example("imagenet_data")
        tree = tmp_path / "numbers"
        shutil.copytree(numbers / "val", tree)
        first, last = sorted((tree / "00").iterdir())[0], sorted((tree / "19").iterdir())[-1]
        first.write_bytes(b"no image")
        last.write_bytes(last.read_bytes()[:60])  # a head without a body
        source = data.Folder(tree)
        augmented = data.Augmented(source, data.Transforms(sizes()), seed=0)
        replaced = augmented[1, len(source) - 1]
        assert [problem.split(": ")[0] for problem in replaced.problems] == [str(last), str(first)]
        assert replaced.label == 0, "the next one that can be read is the second of the first class"
        assert torch.isfinite(replaced.image).all()
        whole = data.Whole(source, data.Transforms(sizes()))
        batch = data.collate([whole[0], whole[1], whole[len(source) - 1]])
        assert batch.labels.tolist() == [-1, 0, -1]
        assert [problem.split(": ")[0] for problem in batch.problems] == [str(first), str(last)]
        for path in tree.rglob("*.png"):
            path.write_bytes(b"")
        with pytest.raises(OSError, match="100 images in a row cannot be read; "):
            augmented[1, 0]

    def test_processes_that_read_end_with_a_rank_that_is_killed(self, few: Path) -> None:
        """They hold its output open, for whose end mpirun waits."""
        program = (
            "import os, signal, sys\n"
            "from imagenet_data import Folder, Transforms, Whole, loader\n"
            "from test_imagenet_example import sizes\n"
            "if __name__ == '__main__':\n"
            "    images = Whole(Folder(sys.argv[1]), Transforms(sizes()))\n"
            "    batches = [iter(loader(images, 1, batch_size=4)) for _ in range(2)]\n"
            "    print([len(next(each).labels) for each in batches], flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        path = os.pathsep.join([str(EXAMPLES), str(Path(__file__).parent)])
        ended = subprocess.run(
            [sys.executable, "-c", program, str(few / "val")],
            env={**environment(), "PYTHONPATH": os.pathsep.join([path, environment()["PYTHONPATH"]])},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "[4, 4]\n"), ended.stderr


class TestShards:
    def test_the_same_samples_as_the_folder_s(self, numbers: Path, shards: Path) -> None:
        """To the bit, after decoding and random augmentation, and with the same labels under the same numbers."""
        data = example("imagenet_data")
        packed, folder = data.open_images(shards), data.open_images(numbers)
        transforms = data.Transforms(sizes())
        for one, other in zip(packed, folder, strict=True):
            assert one.classes == other.classes
            assert len(one) == len(other)
            a, b = (data.Augmented(source, transforms, seed=5) for source in (one, other))
            c, d = (data.Whole(source, transforms) for source in (one, other))
            for index in (*range(0, len(one), 7), len(one) - 1):
                for left, right in ((a[2, index], b[2, index]), (c[index], d[index])):
                    assert left.label == right.label
                    assert torch.equal(left.image, right.image)

    def test_other_programs_read_them(self, numbers: Path, shards: Path) -> None:
        files = sorted(map(str, (shards / "val").glob("*.tar")))
        assert len(files) == -(-len(list((numbers / "val").rglob("*.png"))) // 100)
        found = {}
        for sample in webdataset.WebDataset(files, shardshuffle=False, empty_check=False):
            found[json.loads(sample["json"])["path"]] = (sample["png"], int(sample["cls"]))
        for path in (numbers / "val").rglob("*.png"):
            content, label = found.pop(str(path.relative_to(numbers / "val")))
            assert content == path.read_bytes()
            assert label == int(path.parent.name)
        assert not found
        # A shard has many classes, so that reading it from front to end is a random order.
        labels = Counter(
            int(s["cls"]) for s in webdataset.WebDataset(files[:1], shardshuffle=False, empty_check=False)
        )
        assert len(labels) > 15

    def test_an_epoch_has_all_images_and_goes_from_shard_to_shard(self, shards: Path, monkeypatch: Any) -> None:
        module = example("imagenet_shards")
        monkeypatch.setattr(module, "WINDOW", 150)
        source = module.Shards(shards / "train")
        first, second = (source.shuffled(torch.Generator().manual_seed(seed)) for seed in (1, 2))
        assert sorted(first.tolist()) == list(range(len(source)))
        assert first.tolist() != second.tolist()
        near = [
            len({*source._shard[first[start : start + 150].numpy()].tolist()}) for start in range(0, len(first), 150)
        ]
        assert max(near) <= 3, "a window of 150 images lies in 3 shards of 100 at most"

    def test_worker_processes_open_their_own_files(self, shards: Path) -> None:
        source = example("imagenet_shards").Shards(shards / "val")
        image, label = source.read(0)
        again = pickle.loads(pickle.dumps(source))
        assert again._opened == {}
        assert again.read(0) == (image, label)
        assert source.name(0).startswith(f"{shards / 'val'}/images-")
        assert source.name(0).endswith("/00000000.png")

    def test_imagenet_s_own_archives_beside_what_was_in_them(self, numbers: Path, tmp_path: Path) -> None:
        data = example("imagenet_data")
        shutil.copytree(numbers, tmp_path / "raw")
        (tmp_path / "raw" / "train" / "n01440764.tar").touch()
        assert len(data.open_images(tmp_path / "raw").training) == len(data.open_images(numbers).training)

    @pytest.mark.parametrize("origin", ["[1, 2]", "3", "{}"])
    def test_shards_from_elsewhere(self, tmp_path: Path, origin: str) -> None:
        """Whatever their .json says; and images of every kind that a folder may have."""
        module = example("imagenet_shards")
        with webdataset.TarWriter(str(tmp_path / "some.tar")) as writer:
            for number, ending in enumerate(("jpg", "pgm", "webp")):
                writer.write({"__key__": f"{number}", ending: b"image", "cls": number, "json": origin.encode()})
        assert module.make_index(tmp_path) == 3

    def test_damage(self, shards: Path, tmp_path: Path) -> None:
        module, data = example("imagenet_shards"), example("imagenet_data")
        copy = tmp_path / "val"
        shutil.copytree(shards / "val", copy)
        (copy / "index.npz").unlink()
        with pytest.raises(FileNotFoundError, match=r"imagenet_shards[.]py index"):
            module.Shards(copy)
        assert module.make_index(copy) == len(module.Shards(shards / "val"))
        source = module.Shards(copy)
        assert [source.read(i)[1] for i in range(9)] == [module.Shards(shards / "val").read(i)[1] for i in range(9)]
        # One byte of an image within a shard: its name is told, the others are read.
        place = int(source._offset[3])
        file = copy / source._files[source._shard[3]]
        content = bytearray(file.read_bytes())
        content[place : place + 4] = b"oops"
        file.write_bytes(content)
        sample = data.Whole(module.Shards(copy), data.Transforms(sizes()))[3]
        assert sample.label == -1
        assert "/00000003.png: " in sample.problems[0]
        with file.open("ab") as opened:
            opened.write(b"more")
        with pytest.raises(ValueError, match="make the index anew"):
            module.Shards(copy)

    def test_command_line(self, numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        module = example("imagenet_shards")
        command = ["imagenet_shards.py", "pack", str(numbers), str(tmp_path / "packed"), "--per-shard", "500"]
        monkeypatch.setattr(sys, "argv", command)
        module.main()
        assert "704 images are in" in capsys.readouterr().out
        assert len(list((tmp_path / "packed" / "train").glob("*.tar"))) == 6
        shutil.rmtree(tmp_path / "packed" / "val")
        module.main()
        said = capsys.readouterr().out
        assert f"{tmp_path / 'packed' / 'train'} is there already, and left as it is" in said
        assert re.findall(r"images are in (.*)", said) == [str(tmp_path / "packed" / "val")]

    def test_nothing_is_packed_if_a_part_is_missing(
        self, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        """It was found out last, hours later."""
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree" / "train").symlink_to(few / "train")
        command = ["imagenet_shards.py", "pack", str(tmp_path / "tree"), str(tmp_path / "packed")]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit):
            example("imagenet_shards").main()
        assert f"there is no directory {tmp_path / 'tree' / 'val'}" in capsys.readouterr().err
        assert not (tmp_path / "packed").exists()


class TestModel:
    def test_weight_decay(self) -> None:
        module = example("imagenet_model")
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
        weights, norm = module.parameter_groups(model, 0.1, decay_norm=False)
        assert (weights["weight_decay"], norm["weight_decay"]) == (0.1, 0.0)
        assert {*map(id, norm["params"])} == {*map(id, model[1].parameters())}
        assert len(weights["params"]) == 4
        assert [g["weight_decay"] for g in module.parameter_groups(model, 0.1, decay_norm=True)] == [0.1, 0.1]
        assert len(module.parameter_groups(nn.Linear(2, 2), 0.1, decay_norm=False)) == 1

    def test_moving_average(self) -> None:
        """After exchanges at steps 2 and 3, by hand; the first steps forget the start."""
        module = example("imagenet_model")
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 1.0)
        average = module.MovingAverage(model, 0.5)
        expected = 1.0
        for step, passed, value in ((2, 2, 3.0), (3, 1, 5.0)):
            nn.init.constant_(model.weight, value)
            average.update(step)
            kept = min(0.5, (1 + step) / (10 + step)) ** passed
            expected = kept * expected + (1 - kept) * value
        with average.in_place():
            assert model.weight.item() == pytest.approx(expected)
            saved = average.state_dict()
        assert model.weight.item() == 5.0
        other = module.MovingAverage(model, 0.5)
        other.load_state_dict(saved)
        with other.in_place():
            assert model.weight.item() == pytest.approx(expected)
        off = module.MovingAverage(model, 0.0)
        off.update(1)
        assert off.state_dict() == {"averages": [], "steps": 1}

    def test_channels_last_leaves_gradients_as_horovod_wants_them(self) -> None:
        data, module = example("imagenet_data"), example("imagenet_model")
        model = module.make_model(settings("--arch", "resnet18"), 10)
        layouts = []
        model.layer2[0].conv1.register_forward_hook(lambda _, inputs, output: layouts.append(output))
        batch = data.Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), [], 0.0)
        for channels_last in (False, True):
            (moved,) = module.on_device([batch], channels_last)
            model(moved.images).sum().backward()
            assert layouts[-1].is_contiguous(memory_format=torch.channels_last) == channels_last
            assert all(p.grad is not None and p.grad.is_contiguous() for p in model.parameters())


def test_time_within_time_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 10.0, 20.0, 25.0])
    monkeypatch.setattr("hvd_compress.ledger.time.perf_counter", lambda: next(clock))
    ledger = Ledger()
    with ledger.timed("compress"), ledger.timed("exchange"):
        pass
    assert dict(ledger.seconds) == {"exchange": 3.0, "compress": 7.0}
    with pytest.raises(OSError, match="lost"), ledger.timed("exchange"):
        raise OSError("lost")
    assert ledger.seconds["exchange"] == 8.0
    assert "seconds" not in ledger.state_dict(), "a resumed run has the same bytes, and other times"


def test_an_input_that_is_a_bottleneck_is_called_one() -> None:
    module = example("imagenet_epochs")
    values: dict[str, Any] = {field.name: 1.0 for field in dataclasses.fields(module.Epoch)}
    seconds = {"seconds_compute": 7.0, "seconds_compress": 1.0, "seconds_exchange": 1.0}
    reached = module.Epoch(**{**values, **seconds, "images_per_second": 1812.0, "loader_images_per_second": 2900.0})
    said = module.describe(reached, settings("--workers", 3))
    shares = "input 10%, compute 70%, compress 10%, exchange 10%"
    assert f"1,812 images/s ({shares}); each rank's loader could give 2,900 images/s" in said
    assert "bottleneck" not in said
    slower = dataclasses.replace(reached, seconds_input=1.1)
    assert "The input is a bottleneck: try more --workers (now 3)" in module.describe(
        slower, settings("--workers", 3)
    )


def batch_norm_statistics(tensors: dict[str, list[torch.Tensor]]) -> None:
    """The average is the statistics of all images of all ranks together, as far as each rank has as many."""
    module = example("imagenet_model")
    norm = nn.BatchNorm1d(3, momentum=None)  # a cumulative average: of one batch, that batch's
    own = tensors["images"][hvd.rank()]
    norm(own)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    ledger = Ledger()
    statistics = module.Statistics(norm, ledger)
    everything = torch.cat(tensors["images"][: hvd.size()])
    expected_mean = everything.mean(0)
    within = torch.stack([images.var(0) for images in tensors["images"][: hvd.size()]]).mean(0)
    between = torch.stack([images.mean(0) for images in tensors["images"][: hvd.size()]]).var(0, unbiased=False)
    with statistics.averaged():
        torch.testing.assert_close(norm.running_mean, expected_mean)
        torch.testing.assert_close(norm.running_var, within + between)
        bits = [buffer.tolist() for buffer in norm.buffers()]
        assert hvd.allgather_object(bits) == [bits] * hvd.size()
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    assert ledger.total.horovod == ledger.total.dense == 2 * 3 * 4
    statistics.average()
    torch.testing.assert_close(norm.running_var, within + between)
    assert ledger.total.horovod == 2 * ledger.total.dense


@pytest.mark.ranks(2, 3)
def test_batch_norm_statistics(world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [rank + (rank + 1) * torch.randn(8, 3, generator=generator) for rank in range(3)]
    world.run(batch_norm_statistics, {"images": images})


def found_by(weights: dict[str, torch.Tensor], root: Path, batch_size: int) -> tuple[int, int, float]:
    """What a validation of a model finds; this many ranks."""
    hvd.init()
    data, validation = example("imagenet_data"), example("imagenet_validation")
    args = settings("--arch", "resnet18", "--batch-size", batch_size, "--image-size", 32, "--workers", 0)
    model = example("imagenet_model").make_model(args, 20)
    model.load_state_dict(weights)
    images = data.open_images(root)
    found = validation.validate(model, validation.validation_batches(args, images), args)
    return found.correct, found.correct_top5, found.loss


@pytest.mark.ranks(2, 3)
def test_every_number_of_ranks_finds_the_same(world: World, numbers: Path, shards: Path) -> None:
    """Of 704 images in batches of 150: the last one is shorter, and one rank has more batches than the other."""
    torch.manual_seed(0)
    args = settings("--arch", "resnet18")
    weights = example("imagenet_model").make_model(args, 20).state_dict()
    correct, correct_top5, loss = found_by(weights, numbers, 150)
    assert 0 < correct < correct_top5 < 704
    for root in (numbers, shards):
        for other in world.run(found_by, weights, root, 150):
            assert other[:2] == (correct, correct_top5)
            assert other[2] == pytest.approx(loss, rel=1e-9)


def unreadable_on_each_rank(directory: Path) -> list[int]:
    """How many are counted in two epochs."""
    run = example("run_directory").RunDirectory(directory)
    report = example("imagenet_validation").report_unreadable
    first = report([f"{hvd.rank()}.png: torn", "both.png: empty"], run)
    return [first, report([], run), report(["both.png: empty", f"late-{hvd.rank()}.png: torn"][hvd.rank() :], run)]


@pytest.mark.ranks(2)
def test_unreadable_images_of_all_ranks_and_epochs(world: World, tmp_path: Path) -> None:
    assert world.run(unreadable_on_each_rank, tmp_path) == [[3, 0, 3]] * 2
    names = ["0.png: torn", "1.png: torn", "both.png: empty", "late-0.png: torn", "late-1.png: torn"]
    assert (tmp_path / "unreadable.txt").read_text().splitlines() == names


SHORTENED = ["--arch", "resnet18", "--limit-train-batches", 2, "--batch-size", 4, "--image-size", 32, "--workers", 0]
"""Flags that make a training small."""


@pytest.mark.ranks(3)
@pytest.mark.parametrize("recipe", ["paper", "torchvision"])
def test_recipes_on_three_ranks(world: World, recipe: str, few: Path, tmp_path: Path) -> None:
    """The short one runs below, that of the digits in ``make demo``."""
    size = ["--eval-size", 32, "--epochs", 1, "--no-checkpoint"]
    status, text = run(world, "--recipe", recipe, "--data", few, "--output", tmp_path, *SHORTENED, *size)
    assert status == 0, text
    (epoch,) = metrics(tmp_path)
    assert epoch["ranks"] == 3
    assert 80 * epoch["accuracy"] == pytest.approx(round(80 * epoch["accuracy"]))
    assert (epoch["ratio_to_fp32"] > 50) == (recipe != "torchvision")


class TestKilled:
    """`kill -9` of mpirun and its ranks, and the same command again."""

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        # All at once: half precision with its scale, a moving average, averaged statistics, growing images, parts.
        options: list[object] = ["--recipe", "short", "--arch", "resnet18", "--epochs", 2, "--limit-train-batches", 4]
        options += ["--batch-size", 4, "--accumulate", 2, "--amp", "fp16", "--ema", 0.9, "--workers", 0]
        options += ["--image-size", 32, "--grow-from", 16, "--grow-until", 2, "--eval-size", 32, "--sync-every", 3]
        return subprocess.Popen(
            [
                *mpirun_command(2),
                sys.executable,
                EXAMPLES / "imagenet_resnet50.py",
                *map(str, [*options, *arguments]),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def test_goes_on_bit_for_bit(self, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        at_once, twice = tmp_path / "at-once", tmp_path / "twice"
        whole = self.start("--data", few, "--output", at_once, "--checkpoint-every", 2)
        text, _ = whole.communicate(timeout=180)
        assert whole.returncode == 0, text
        assert "averaged over ranks in each exchange" in text
        assert "a moving average (decay 0.9) of the weights is validated" in text

        options = ["--data", few, "--output", twice, "--checkpoint-every", 2, "--resume", "auto"]
        first = self.start(*options)
        try:
            deadline = time.monotonic() + 120
            while not (twice / "checkpoint" / "step-0000000002").exists() and first.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            kill_tree(first.pid)
            first.communicate()
        assert first.returncode == -signal.SIGKILL

        second = self.start(*options)
        text, _ = second.communicate(timeout=180)
        assert second.returncode == 0, text
        assert "Going on from" in text
        for rank in range(2):
            file = f"checkpoint/step-0000000010/rank-0000{rank}.pt"
            one, other = (torch.load(d / file, weights_only=True)["state"] for d in (at_once, twice))
            for name in ("model", "optimizer", "schedule", "books", "scaler", "average"):
                assert_equal(one[name], other[name], name)
            assert one["scaler"]["scale"] > 1
        for name in ("best.pt", "last.pt"):
            one, other = (torch.load(d / name, weights_only=True) for d in (at_once, twice))
            assert_equal(one, other, name)
        same = ("epoch", "train_loss", "val_loss", "accuracy", "lr", "exchanges")
        one, other = ([[epoch[key] for key in same] for epoch in metrics(d)] for d in (at_once, twice))
        assert one == other
        for kind in ("input", "compute", "compress", "exchange"):
            assert all(epoch[f"seconds_{kind}"] > 0 for epoch in metrics(at_once)), kind
        assert (twice / "config.yaml").exists()
        assert list((twice / "tensorboard").rglob("events.out.*"))
        assert yaml.safe_load((twice / "config.yaml").read_text())["accumulate"] == 2

        # The best weights are those that were validated, and another number of ranks finds as many images right.
        best = torch.load(twice / "best.pt", weights_only=True)
        assert best["accuracy"] == max(epoch["accuracy"] for epoch in metrics(twice))
        again = settings("--recipe", twice / "config.yaml", "--evaluate", twice / "best.pt")
        example("imagenet_validation").evaluate(again, example("imagenet_data").open_images(few))
        said = capsys.readouterr().out
        assert f"epoch {best['epoch']}: {round(best['accuracy'] * 80)} of 80 images are right" in said
        for directory in (at_once, twice):  # pytest keeps what is left
            shutil.rmtree(directory)


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all that it has started."""
    os.kill(pid, signal.SIGSTOP)  # no new ones
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        kill_tree(int(child))
    os.kill(pid, signal.SIGKILL)


def is_asked(directory: Path, steps: int, epochs: int) -> dict[str, Any]:
    """Where a loop with exchanges after 4 steps stops if it is asked to at its begin, and what a new start finds."""
    module = example("resumable")
    options: dict[str, Any] = {"save_every": 1000, "ask_every": 4}

    def loop(resumable: Any) -> int:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # another thread could hear of it some steps later
        for epoch in range(1, epochs + 1):
            for step in range(1, steps + 1):
                resumable.after_step((epoch - 1) * (steps + 1) + step, (epoch - 1) * steps + step, dict)
            resumable.after_epoch(epoch * (steps + 1), {})
        raise AssertionError("it was not asked")

    try:
        with signals_as_they_were():
            with pytest.raises(SystemExit) as ended:
                loop(module.Resumable(directory, {}, {}, **options))
            found = {"status": ended.value.code, "saved": [path.name for path in directory.glob("step-*")]}
            for restarts in (1, 0):
                os.environ["SLURM_RESTART_COUNT"] = str(restarts)
                hvd.barrier()  # rank 0 deletes for all: not before the others have looked
                module.Resumable(directory, {}, {}, **options, afresh=True)
                found[f"left after {restarts} restarts"] = len([*directory.glob("step-*")])
    finally:
        os.environ.pop("SLURM_RESTART_COUNT", None)
    return found


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("steps", "saved"), [(9, 4), (3, 4), (1, 2), (4, 4)])
def test_an_interruption_is_heard_at_an_exchange_or_after_an_epoch(
    world: World, tmp_path: Path, steps: int, saved: int
) -> None:
    """However many steps an epoch has; and a requeued job keeps the checkpoint that it has saved."""
    expected = {"status": 75, "saved": [f"step-{saved:010}"], "left after 1 restarts": 1, "left after 0 restarts": 0}
    assert world.run(is_asked, tmp_path / "checkpoint", steps, 10) == [expected] * 2


class TestGently:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2])  # as a launcher's clock sends
    def test_ctrl_c_lets_the_ranks_save(self, number: int, tmp_path: Path) -> None:
        """mpirun would kill them within a second."""
        program = tmp_path / "program.py"
        program.write_text(
            "import os, pathlib, signal, sys, time\n"
            "signal.signal(signal.SIGUSR2, lambda *_: stop.append(1))\n"
            "stop = []\n"
            "here = pathlib.Path(sys.argv[1])\n"
            "rank = os.environ.get('OMPI_COMM_WORLD_RANK') or os.environ['PMI_RANK']\n"
            "(here / f'started-{rank}').touch()\n"
            "while not stop: time.sleep(0.01)\n"
            "time.sleep(2)\n"
            "(here / f'saved-{rank}').touch()\n"
            "sys.exit(75)\n"
        )
        command = [sys.executable, str(EXAMPLES.parent / "scripts" / "gently.py"), *mpirun_command(2)]
        job = subprocess.Popen(
            [*command, sys.executable, str(program), str(tmp_path)],
            env=environment(),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs in the background ignores it
        )
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("started-*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.send_signal(number)
        assert job.wait(timeout=60) == 75
        assert len(list(tmp_path.glob("saved-*"))) == 2

    def test_what_is_ignored_stays_ignored(self) -> None:
        """Behind nohup, a terminal that closes ends nothing."""
        job = subprocess.Popen(
            [sys.executable, str(EXAMPLES.parent / "scripts" / "gently.py"), "sh", "-c", "echo here; sleep 2"],
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert job.stdout is not None
        assert job.stdout.readline() == "here\n"
        job.send_signal(signal.SIGHUP)
        assert job.communicate(timeout=60)[0] == ""
        assert job.returncode == 0
