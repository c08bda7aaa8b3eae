"""Real images for where there is no ImageNet: scikit-learn's handwritten digits, written out as an ImageFolder tree.

``sklearn.datasets.load_digits`` ships 1,797 grey 8×8 images with scikit-learn itself, so nothing is downloaded. Put
side by side in pairs they make up to 100 classes, for trials that need more than ten::

    python examples/embedded_images.py data/numbers --classes 20
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

VALIDATION_EVERY = 5
"""Of each class, each fifth image is kept for validation: 1,442 images to train on, 355 to validate."""
PIXELS = npt.NDArray[np.uint8]


def write_digits(root: Path) -> None:
    """Write ``root/{train,val}/<digit>/<number>.png``, unless ``root`` is there already.

    The split has no chance in it. The tree appears whole or not at all, even when the program is killed meanwhile.
    """

    def images() -> Iterator[tuple[str, PIXELS]]:
        for split, digits in _digits().items():
            for digit, pictures in digits.items():
                for number, pixels in pictures:
                    yield f"{split}/{digit}/{number:04d}.png", pixels

    _write(root, images)


def write_numbers(root: Path, classes: int = 20) -> None:
    """Write two-digit numbers, ``root/{train,val}/<00 to 99>/<number>.png``, as :func:`write_digits` does digits.

    Args:
        root: of the tree.
        classes: the first so many numbers, at most 100. Each has as many images as its rarer digit: of training
            digits for training, of validation digits for validation.
    """

    def images() -> Iterator[tuple[str, PIXELS]]:
        for split, digits in _digits().items():
            for number in range(classes):
                tens, units = digits[number // 10], digits[number % 10]
                # Another one of the units for each number, so that not always the same two meet.
                for place, (_, left) in enumerate(tens[: min(len(tens), len(units))]):
                    _, right = units[(place + number) % len(units)]
                    yield f"{split}/{number:02d}/{place:04d}.png", np.hstack([left, right])

    _write(root, images)


def _digits() -> dict[str, dict[int, list[tuple[int, PIXELS]]]]:
    """Numbered images by split and digit."""
    digits = load_digits()
    images: dict[str, dict[int, list[tuple[int, PIXELS]]]] = {"train": defaultdict(list), "val": defaultdict(list)}
    for number, (image, digit) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        seen = 1 + sum(len(images[split][digit]) for split in images)
        split = "val" if seen % VALIDATION_EVERY == 0 else "train"
        grey = np.rint(image * (255 / 16)).astype(np.uint8)  # the data set's greys go from 0 to 16
        images[split][digit].append((number, grey))
    return images


def _write(root: Path, images: Callable[[], Iterator[tuple[str, PIXELS]]]) -> None:
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
        tree = Path(scratch) / root.name
        for name, pixels in images():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tree / name)
        os.replace(tree, root)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="directory that is made; left as it is if it is there")
    parser.add_argument("--classes", type=int, default=20, choices=range(1, 101), metavar="N", help="(%(default)s)")
    args = parser.parse_args()
    write_numbers(args.root, args.classes)
    print(f"{args.root} has {len(list((args.root / 'train').iterdir()))} classes")


if __name__ == "__main__":
    main()
