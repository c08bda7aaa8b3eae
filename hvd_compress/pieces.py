"""Dividing tensors: into buckets, and their concatenation among ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

_LAST = 1 / 25  # of a full bucket


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened tensor, at least one."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def even_ends(total: int, parts: int) -> list[int]:
    """Where parts of ``total`` elements end that differ by one element at most."""
    return [total * (i + 1) // parts for i in range(parts)]


def cut(sizes: Mapping[str, int], ends: Sequence[int]) -> list[list[Piece]]:
    """The pieces of each part of the concatenation of tensors of these sizes; an empty tensor has none.

    Args:
        sizes: elements by name.
        ends: where each part ends; they do not descend, and the last is the sum of ``sizes``.
    """
    parts: list[list[Piece]] = [[] for _ in ends]
    offset = part = 0
    for name, size in sizes.items():
        start = 0
        while start < size:
            while ends[part] <= offset + start:
                part += 1
            stop = min(size, ends[part] - offset)
            parts[part].append(Piece(name, start, stop))
            start = stop
        offset += size
    return parts


def in_buckets(shapes: Mapping[str, torch.Size], cap_mb: float) -> Iterator[list[str]]:
    """Names of neighbours, the last first, as a backward pass makes gradients; at least one bucket, maybe empty.

    Where there are several, the last has little or nothing in it, since it travels when the backward pass is over.

    Args:
        shapes: of each tensor.
        cap_mb: a bucket is full when its tensors have so many megabytes (10^6 bytes of float32) or more.
    """
    sizes = {name: shape.numel() * 4 / 1e6 for name, shape in shapes.items()}
    last: list[str] = []
    room = cap_mb * _LAST if sum(sizes.values()) > cap_mb else float("inf")
    for name, size in sizes.items():
        room -= size
        if room < 0:
            break
        last.append(name)
    bucket: list[str] = []
    size = 0.0
    for name in reversed(list(sizes)[len(last) :]):
        bucket.append(name)
        size += sizes[name]
        if size >= cap_mb:
            yield bucket
            bucket, size = [], 0.0
    if bucket:
        yield bucket
    yield last[::-1]
