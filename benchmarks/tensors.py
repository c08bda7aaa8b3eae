"""The sizes of real models' parameters, without the models."""

from __future__ import annotations

import torch
from torchvision.models import resnet50


def resnet50_shapes() -> list[tuple[int, ...]]:
    """161 tensors, 25,557,032 elements."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in resnet50().parameters()]


def bert_shapes(
    layers: int = 12, width: int = 768, words: int = 30_522, positions: int = 512
) -> list[tuple[int, ...]]:
    """BERT-base without its heads: 199 tensors, 109,482,240 elements."""
    norm = [(width,), (width,)]
    square = [(width, width), (width,)]
    layer = [*square * 4, *norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,), *norm]
    return [(words, width), (positions, width), (2, width), *norm, *layer * layers, *square]


MODELS = {"resnet50": resnet50_shapes, "bert": bert_shapes}
