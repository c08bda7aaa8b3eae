"""The models of the experiments: a convex problem, and a small residual network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Softmax(nn.Module):
    """Softmax regression whose one parameter has a column for the bias: 785 × 10 = 7850 elements for MNIST's size."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10, side * side + 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of ten classes."""
        return F.linear(images.flatten(1), self.weight[:, :-1], self.weight[:, -1])


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outside)
        self.around = nn.Sequential()
        if stride != 1 or inside != outside:
            self.around = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        """Half the side for a stride of two."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.around(x))


class ResNet(nn.Sequential):
    """ResNet-8: He et al.'s network for small images with one block for each width, 77,754 parameters.

    Images of more than 16 pixels are halved by the first convolution.
    """

    def __init__(self, side: int) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, stride=2 if side > 16 else 1, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Block(16, 16, 1),
            Block(16, 32, 2),
            Block(32, 64, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


MODELS: dict[str, type[Softmax] | type[ResNet]] = {"softmax": Softmax, "resnet": ResNet}
