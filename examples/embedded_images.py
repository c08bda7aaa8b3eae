"""Real images for where there is no ImageNet: scikit-learn's handwritten digits, written out as an ImageFolder tree.

``sklearn.datasets.load_digits`` ships 1,797 grey 8×8 images with scikit-learn itself, so nothing is downloaded.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

VALIDATION_EVERY = 5
"""Of each class, each fifth image is kept for validation: 1,442 images to train on, 355 to validate."""


def write_digits(root: Path) -> None:
    """Write ``root/{train,val}/<digit>/<number>.png``, unless ``root`` is there already.

    The split has no chance in it. The tree appears whole or not at all, even when the program is killed meanwhile.
    """
    if root.exists():
        return
    digits = load_digits()
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
        tree = Path(scratch) / root.name
        seen: Counter[int] = Counter()
        for number, (image, digit) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
            seen[digit] += 1
            split = "val" if seen[digit] % VALIDATION_EVERY == 0 else "train"
            path = tree / split / str(digit) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = np.rint(image * (255 / 16)).astype(np.uint8)  # the data set's greys go from 0 to 16
            Image.fromarray(grey).save(path)
        os.replace(tree, root)
