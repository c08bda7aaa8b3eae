"""Images for training and validation, in an order and with augmentations that a resumed run repeats exactly."""

from __future__ import annotations

import argparse
import hashlib
import struct
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

Images = tuple[ImageFolder, ImageFolder]
"""To train on, and to validate with."""


def open_images(args: argparse.Namespace) -> Images:
    """Training and validation set.

    Raises:
        OSError, ValueError: there is no such tree, or it is not in order.
    """
    for split in ("train", "val"):
        if not (args.data / split).is_dir():
            raise FileNotFoundError(f"--data {args.data}: there is no directory {args.data / split}")
    for_training, for_validation = transforms(args)
    train_set = ImageFolder(args.data / "train", for_training)
    val_set = ImageFolder(args.data / "val", for_validation)
    if train_set.classes != val_set.classes:  # the labels would not mean the same
        different = sorted({*train_set.classes} ^ {*val_set.classes})
        raise ValueError(f"--data {args.data}: train and val differ in their classes: {', '.join(different[:5])}")
    return train_set, val_set


def transforms(args: argparse.Namespace) -> tuple[v2.Transform, v2.Transform]:
    """For training and for validation."""
    size = args.image_size
    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ]
    if args.is_embedded:  # flipped or cropped, a digit may become another one
        whole = v2.Compose([v2.Resize([size, size]), *to_tensor])
        return whole, whole
    cropped = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *to_tensor])
    centre = v2.Compose([v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size), *to_tensor])
    return cropped, centre


def loader(dataset: torch.utils.data.Dataset, args: argparse.Namespace, **options: Any) -> DataLoader:
    """Batches of ``dataset``."""
    if args.workers:  # a process that runs MPI should not be forked
        options |= {"multiprocessing_context": "forkserver", "persistent_workers": True}
    options["pin_memory"] = torch.cuda.is_available()
    # A generator of its own: to seed the workers must not move the global one, whose state is part of a checkpoint.
    return DataLoader(dataset, args.batch_size, num_workers=args.workers, generator=torch.Generator(), **options)


def shard(dataset: ImageFolder, rank: int, size: int) -> Subset:
    """Every image on exactly one rank; DistributedSampler would repeat some to give all ranks as many."""
    return Subset(dataset, range(rank, len(dataset), size))


class Augmented(Dataset):
    """Images by epoch and index, whose random augmentation depends on these and on the seed alone.

    So a run that begins in the middle of an epoch sees what it would have seen, with any number of worker processes.
    """

    def __init__(self, images: ImageFolder, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        digest = hashlib.blake2b(struct.pack("<qqq", self.seed, *key), digest_size=8).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            return self.images[key[1]]


class EpochSampler(Sampler[tuple[int, int]]):
    """This rank's part of the images, shuffled anew in each epoch, from any batch on."""

    def __init__(self, images: Dataset, rank: int, size: int, *, seed: int, batch_size: int) -> None:
        self._sampler: DistributedSampler = DistributedSampler(images, size, rank, seed=seed)
        self._batch_size = batch_size
        self._epoch = self._skip = 0

    def begin(self, epoch: int, *, skip: int = 0) -> None:
        """What the next iteration gives: an epoch without its first ``skip`` batches."""
        self._epoch, self._skip = epoch, skip
        self._sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self._epoch, i) for i in islice(self._sampler, self._skip * self._batch_size, None))
