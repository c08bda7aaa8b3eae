"""Images for training and validation, in an order and with augmentations that a resumed run repeats exactly."""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from imagenet_shards import Shards, has_shards
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What PIL raises when a file is no image, or half of one."""
GIVE_UP_AFTER = 100  # images in a row that cannot be read: then it is not the images


class Source(Protocol):
    """Images on a disk, in an order of their own."""

    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image and its label."""

    def name(self, index: int) -> str:
        """For messages."""

    def shuffled(self, generator: torch.Generator) -> torch.Tensor:
        """All indices in a random order that suits the disk, int64."""


class Folder:
    """A tree with a directory for each class."""

    def __init__(self, root: Path) -> None:
        self._images = ImageFolder(str(root))
        self.classes: list[str] = self._images.classes

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`Source`."""
        return self._images[index]

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        return self._images.samples[index][0]

    def shuffled(self, generator: torch.Generator) -> torch.Tensor:
        """See :class:`Source`."""
        return torch.randperm(len(self), generator=generator)


class Images(NamedTuple):
    """To train on, and to validate with."""

    training: Source
    validation: Source


def open_images(data: Path) -> Images:
    """Training and validation set, each a tree of images or a directory of tar shards.

    Raises:
        OSError, ValueError: there is none, or it is not in order.
    """
    for split in ("train", "val"):
        if not (data / split).is_dir():
            raise FileNotFoundError(f"--data {data}: there is no directory {data / split}")
    training, validation = (
        Shards(data / split) if has_shards(data / split) else Folder(data / split) for split in ("train", "val")
    )
    if training.classes != validation.classes:  # the labels would not mean the same
        different = sorted({*training.classes} ^ {*validation.classes})
        raise ValueError(f"--data {data}: train and val differ in their classes: {', '.join(different[:5])}")
    return Images(training, validation)


class Transforms:
    """From an image to a tensor: by epoch for training, since images may grow, and for validation.

    Args:
        args: with ``image_size``, ``grow_from``, ``grow_until``, ``eval_size`` and ``augment``.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        size = args.eval_size or args.image_size
        whole, to_tensor = v2.Resize([size, size]), _to_tensor()
        centre = [v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size)]
        self.validation = v2.Compose([*([whole] if args.augment == "none" else centre), *to_tensor])

    def size(self, epoch: int) -> int:
        """Of training images, in an epoch counted from 1."""
        args = self._args
        if args.grow_from is None or args.grow_from >= args.image_size or epoch >= args.grow_until:
            return args.image_size
        grown = (args.image_size - args.grow_from) * (epoch - 1) / (args.grow_until - 1)
        return args.grow_from + int(grown) // 32 * 32

    def training(self, epoch: int) -> v2.Transform:
        """Of an epoch counted from 1."""
        size = self.size(epoch)
        whole = [v2.Resize([size, size])]
        cropped = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        return v2.Compose([*(whole if self._args.augment == "none" else cropped), *_to_tensor()])


def _to_tensor() -> list[v2.Transform]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ]


class Sample(NamedTuple):
    """An image on its way into a batch."""

    image: torch.Tensor
    label: int
    problems: list[str]  # names of images that could not be read, and why
    seconds: float  # that it took


class Batch(NamedTuple):
    """Images, and what happened on the way."""

    images: torch.Tensor  # [N, 3, height, width], float32
    labels: torch.Tensor  # [N], int64; −1 for an image that could not be read
    problems: list[str]
    seconds: float  # to read and transform all of them, in one process


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch of samples."""
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
        [problem for sample in samples for problem in sample.problems],
        sum(sample.seconds for sample in samples),
    )


class Augmented(Dataset):
    """Images by epoch and index, whose random augmentation depends on these and on the seed alone.

    So a run that begins in the middle of an epoch sees what it would have seen, with any number of worker processes.
    In place of an image that cannot be read comes the next one.
    """

    def __init__(self, source: Source, transforms: Transforms, seed: int) -> None:
        self._source = source
        self._transforms = transforms
        self._seed = seed

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        start = time.perf_counter()
        epoch, wanted = key
        digest = hashlib.blake2b(struct.pack("<qqq", self._seed, *key), digest_size=8).digest()
        problems: list[str] = []
        while True:
            index = (wanted + len(problems)) % len(self)
            try:
                image, label = self._source.read(index)
                break
            except UNREADABLE as error:
                problems.append(_problem(self._source, index, error))
                if len(problems) == min(GIVE_UP_AFTER, len(self)):
                    raise OSError(f"{len(problems)} images in a row cannot be read; {problems[-1]}") from error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            tensor = self._transforms.training(epoch)(image)
        return Sample(tensor, label, problems, time.perf_counter() - start)


class Whole(Dataset):
    """Images by index, for validation. One that cannot be read is black, and has a label that no model finds."""

    def __init__(self, source: Source, transforms: Transforms) -> None:
        self._source = source
        self._transforms = transforms

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        start = time.perf_counter()
        problems = []
        try:
            image, label = self._source.read(index)
        except UNREADABLE as error:
            problems = [_problem(self._source, index, error)]
            image, label = Image.new("RGB", (8, 8)), -1
        return Sample(self._transforms.validation(image), label, problems, time.perf_counter() - start)


def _problem(source: Source, index: int, error: BaseException) -> str:
    name = source.name(index)
    return f"{name}: {str(error).replace(name, 'this file')}"


class EpochSampler(Sampler[tuple[int, int]]):
    """This rank's part of the images, shuffled anew in each epoch, from any batch on.

    Every rank has as many batches, no image comes twice, and fewer than ``size · batch_size`` are left out: other
    ones in each epoch.
    """

    def __init__(self, source: Source, rank: int, size: int, *, seed: int, batch_size: int) -> None:
        self._source = source
        self._rank = rank
        self._seed = seed
        self._batch_size = batch_size
        self.batches = len(source) // (size * batch_size)  # of this rank in each epoch
        self._epoch = self._skip = 0

    def begin(self, epoch: int, *, skip: int = 0) -> None:
        """What the next iteration gives: an epoch without its first ``skip`` batches."""
        self._epoch, self._skip = epoch, skip

    def __len__(self) -> int:
        return self.batches * self._batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        digest = hashlib.blake2b(struct.pack("<qq", self._seed, self._epoch), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        own = self._source.shuffled(generator)[self._rank * len(self) : (self._rank + 1) * len(self)]
        return ((self._epoch, index) for index in own[self._skip * self._batch_size :].tolist())


class EveryOther(Sampler[list[int]]):
    """This rank's batches of all images in their order: every image is in exactly one batch of one rank.

    The batches are the same whatever the number of ranks, and so is, to the bit, what a model says of their images;
    DistributedSampler would also repeat some to give all ranks as many.
    """

    def __init__(self, images: int, rank: int, size: int, batch_size: int) -> None:
        self._batches = [range(first, min(first + batch_size, images)) for first in range(0, images, batch_size)]
        self._batches = self._batches[rank::size]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self._batches)


def end_with_its_rank(worker: int) -> None:
    """Let this process, number ``worker``, end when its rank is killed.

    Its parent is the fork server, which would live on as long as it does, and mpirun waits for both.
    """

    def watch() -> None:
        rank = multiprocessing.parent_process()
        if rank is not None:
            rank.join()
            os._exit(1)

    threading.Thread(target=watch, name="end with its rank", daemon=True).start()


def loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """Batches of ``dataset``, read by ``workers`` processes."""
    if workers:  # a process that runs MPI should not be forked
        options |= {"multiprocessing_context": "forkserver", "persistent_workers": True}
        options["worker_init_fn"] = end_with_its_rank
    options["pin_memory"] = torch.cuda.is_available()
    # A generator of its own: to seed the workers must not move the global one, whose state is part of a checkpoint.
    return DataLoader(dataset, num_workers=workers, generator=torch.Generator(), collate_fn=collate, **options)
