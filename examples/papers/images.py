"""Small images to train on: IDX files, as MNIST and its successors come in, or scikit-learn's digits."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

_MAGIC = {1: 0x801, 3: 0x803}  # unsigned bytes in one dimension, in three


@dataclass(frozen=True)
class Images:
    """One rank's part of grey images (n, 1, side, side), float32 of mean 0 and variance 1, and labels (n,)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    tests: int  # test images of all ranks

    @property
    def side(self) -> int:
        """Pixels."""
        return self.train_images.shape[-1]


def open_images(directory: Path | None, rank: int, size: int, *, tests: int) -> Images:
    """The IDX files in ``directory``, compressed or not; without a directory, the digits that scikit-learn ships.

    Args:
        directory: has ``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte`` and the two others.
        rank, size: every ``size``-th image is this rank's.
        tests: test images that are kept, the first ones, since they are looked at often.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or is no such file.
    """
    if directory is None:
        name, digits = "digits", load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target
        is_test = np.arange(len(labels)) % 5 == 4
        train_images, train_labels, test_images, test_labels = (
            images[~is_test], labels[~is_test], images[is_test], labels[is_test]
        )  # fmt: skip
    else:
        name = directory.resolve().name
        train_images, test_images = (
            read_idx(directory, f"{part}-images-idx3-ubyte", 3) for part in ("train", "t10k")
        )
        train_labels, test_labels = (
            read_idx(directory, f"{part}-labels-idx1-ubyte", 1) for part in ("train", "t10k")
        )
    test_images, test_labels = test_images[:tests], test_labels[:tests]
    mean, deviation = float(train_images.mean()), float(train_images.std())

    def own_images(images: np.ndarray) -> Tensor:
        return torch.tensor(images[rank::size], dtype=torch.float32).sub_(mean).div_(deviation).unsqueeze(1)

    def own_labels(labels: np.ndarray) -> Tensor:
        return torch.tensor(labels[rank::size], dtype=torch.int64)

    return Images(
        name,
        own_images(train_images),
        own_labels(train_labels),
        own_images(test_images),
        own_labels(test_labels),
        len(test_labels),
    )


def read_idx(directory: Path, name: str, dimensions: int) -> np.ndarray:
    """A file of unsigned bytes."""
    path = next((p for p in (directory / name, directory / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise FileNotFoundError(f"there is no {directory / name}, nor {name}.gz beside it")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header = np.frombuffer(data, ">u4", 1 + dimensions)
    shape = tuple(int(n) for n in header[1:])
    if header[0] != _MAGIC[dimensions] or len(data) != header.nbytes + int(np.prod(shape)):
        raise ValueError(f"{path} is no IDX file of unsigned bytes in {dimensions} dimension(s)")
    return np.frombuffer(data, np.uint8, offset=header.nbytes).reshape(shape)
