"""Images in tar files, a thousand in each, for file systems that do not like millions of small files.

Pack both parts of an ImageFolder tree, and train on the result as on the tree itself::

    python examples/imagenet_shards.py pack /path/to/imagenet /path/to/imagenet-shards
    mpirun -np 8 python examples/imagenet_resnet50.py --data /path/to/imagenet-shards

The shards are WebDataset's (https://github.com/webdataset/webdataset), so other programs read them too: an image, its
label as ``.cls`` and its origin as ``.json`` under one key. Images are packed in a random order, so that a shard has
images of many classes; training reads whole shards, in another order in each epoch. A file ``index.npz`` says where
each image lies, so that an epoch may begin anywhere and every rank has as many. Shards from elsewhere get theirs by::

    python examples/imagenet_shards.py index /path/to/shards/train
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm
from webdataset import ShardWriter
from webdataset.tariterators import base_plus_ext

INDEX = "index.npz"
IMAGES = {ending[1:] for ending in IMG_EXTENSIONS}
WINDOW = 4096  # images that are shuffled among each other, beside the order of shards
OPEN_FILES = 8


def has_shards(directory: Path) -> bool:
    """Whether there are tar files in it, and no folders: ImageNet's own archives may lie beside what was in them."""
    return any(directory.glob("*.tar")) and not any(entry.is_dir() for entry in directory.iterdir())


class Shards:
    """Images in a directory of tar shards, numbered as in the tree that they were packed from.

    Raises:
        OSError: there is no index.
        ValueError: shards have changed since the index was made.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        if not (directory / INDEX).is_file():
            raise FileNotFoundError(
                f"{directory} has shards and no {INDEX}: make it with imagenet_shards.py index {directory}. If these "
                "are ImageNet's own archives, unpack each into a folder of its name"
            )
        with np.load(directory / INDEX) as index:
            self.classes: list[str] = index["classes"].tolist()
            self._files: list[str] = index["files"].tolist()
            sizes = index["file_sizes"].tolist()
            self._shard, self._offset, self._size = index["shard"], index["offset"], index["size"]
            self._label = index["label"]
        for file, size in zip(self._files, sizes, strict=True):
            found = (directory / file).stat().st_size
            if found != size:
                raise ValueError(f"{directory / file} has {found} bytes, the index says {size}: make the index anew")
        self._opened: OrderedDict[int, BinaryIO] = OrderedDict()  # the last ones used come last

    def __len__(self) -> int:
        return len(self._label)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}  # each process opens its own

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image and its label."""
        file = self._open(int(self._shard[index]))
        data = os.pread(file.fileno(), int(self._size[index]), int(self._offset[index]))
        return Image.open(BytesIO(data)).convert("RGB"), int(self._label[index])

    def name(self, index: int) -> str:
        """The shard, and the image's name in it."""
        shard, offset = int(self._shard[index]), int(self._offset[index])
        header = os.pread(self._open(shard).fileno(), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
        member = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape").name
        return f"{self._directory / self._files[shard]}/{member}"

    def shuffled(self, generator: torch.Generator) -> torch.Tensor:
        """All indices: shards in a random order, and images within a window of a few shards."""
        rank_of_shard = torch.randperm(len(self._files), generator=generator)
        place = rank_of_shard[torch.from_numpy(self._shard.astype(np.int64))].numpy()
        order = torch.from_numpy(np.lexsort((self._offset, place)))
        windows = [part[torch.randperm(len(part), generator=generator)] for part in order.split(WINDOW)]
        return torch.cat(windows) if windows else order

    def _open(self, shard: int) -> BinaryIO:
        if shard not in self._opened:
            self._opened[shard] = open(self._directory / self._files[shard], "rb", buffering=0)  # noqa: SIM115
            if len(self._opened) > OPEN_FILES:
                self._opened.popitem(last=False)[1].close()
        self._opened.move_to_end(shard)
        return self._opened[shard]


def pack(tree: Path, directory: Path, per_shard: int = 1000, seed: int = 0) -> int:
    """Write the images of one ImageFolder tree, byte by byte as they are, into shards; the number of images.

    The directory appears whole or not at all.

    Raises:
        FileExistsError: it is there already.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} is there already")
    images = ImageFolder(str(tree))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        pattern = str(scratch / "images-%06d.tar")
        with ShardWriter(pattern, maxcount=per_shard, maxsize=float("inf"), verbose=0) as writer:
            for number in tqdm(order, desc=f"packing {tree}", unit="image", mininterval=1):
                path, label = images.samples[number]
                origin = {"index": number, "path": str(Path(path).relative_to(tree))}
                ending = Path(path).suffix[1:].lower()
                writer.write(
                    {"__key__": f"{number:08d}", ending: Path(path).read_bytes(), "cls": label, "json": origin}
                )
        make_index(scratch, images.classes)
        scratch.chmod(0o755)
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return len(images)


def make_index(directory: Path, classes: list[str] | None = None) -> int:
    """Write ``index.npz`` for the shards in a directory; the number of images.

    Images that were packed here keep their numbers, others are numbered as they come.

    Args:
        directory: of the shards.
        classes: their names; the numbers as text if None.

    Raises:
        ValueError: a shard is damaged, or has images without a label.
    """
    files = sorted(directory.glob("*.tar"))
    found = [(shard, *entry) for shard, file in enumerate(files) for entry in _entries(file)]
    if not found:
        raise ValueError(f"{directory} has no shards with images")
    numbers = [entry[1] for entry in found]
    if sorted(numbers) == list(range(len(found))):
        found.sort(key=lambda entry: entry[1])
    shard, _, offset, size, label = (np.array(column) for column in zip(*found, strict=True))
    names = classes or [str(number) for number in range(int(label.max()) + 1)]
    draft = directory / f".{INDEX}"
    with draft.open("wb") as opened:
        np.savez(
            opened,
            classes=np.array(names),
            files=np.array([file.name for file in files]),
            file_sizes=np.array([file.stat().st_size for file in files]),
            shard=shard.astype(np.int32),
            offset=offset.astype(np.int64),
            size=size.astype(np.int64),
            label=label.astype(np.int32),
        )
    draft.replace(directory / INDEX)
    return len(found)


def _entries(file: Path) -> Iterator[tuple[int, int, int, int]]:
    """Of each image in a shard: its number (−1 if it has none), offset, size, label."""
    samples: OrderedDict[str, dict[str, int]] = OrderedDict()
    with tarfile.open(file) as tar:
        for member in tar:
            key, ending = base_plus_ext(member.name)
            if key is None or not member.isfile():
                continue
            sample = samples.setdefault(key, {"number": -1})
            if ending.lower() in IMAGES:
                sample |= {"offset": member.offset_data, "size": member.size}
            elif ending in ("cls", "json"):
                opened = tar.extractfile(member)
                assert opened is not None, "it is a file"
                text = opened.read().decode()
                if ending == "cls":
                    sample["label"] = int(text)
                else:
                    origin = json.loads(text)
                    sample["number"] = origin.get("index", -1) if isinstance(origin, dict) else -1
    for key, sample in samples.items():
        if not {"offset", "label"} <= sample.keys():
            raise ValueError(f"{file}: {key} lacks its image or its .cls")
        yield sample["number"], sample["offset"], sample["size"], sample["label"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    packing = commands.add_parser("pack", help="write train/ and val/ of a tree into shards")
    packing.add_argument("tree", type=Path, help="directory with train/<class>/* and val/<class>/*")
    packing.add_argument("shards", type=Path, help="directory that gets train/*.tar and val/*.tar")
    packing.add_argument("--per-shard", type=int, default=1000, help="images (default: %(default)s)")
    packing.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    indexing = commands.add_parser("index", help="make the index of shards from elsewhere")
    indexing.add_argument("directory", type=Path, help="of tar files with images and .cls")
    args = parser.parse_args()
    try:
        if args.command == "index":
            print(f"{make_index(args.directory):,} images are in {args.directory}")
            return
        splits = [split for split in ("train", "val") if not (args.shards / split).exists()]
        for split in ("train", "val"):
            if split not in splits:
                print(f"{args.shards / split} is there already, and left as it is")
        for split in splits:  # to pack the first one takes hours
            if not (args.tree / split).is_dir():
                raise FileNotFoundError(f"there is no directory {args.tree / split}")
        for split in splits:
            number = pack(args.tree / split, args.shards / split, args.per_shard, args.seed)
            print(f"{number:,} images are in {args.shards / split}")
    except (OSError, ValueError, tarfile.TarError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
