"""The model, how images come to it, and what is kept beside its weights."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import torch
import torchvision
from imagenet_data import Batch
from ranks import device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_compress import Ledger


def make_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """One of torchvision's residual networks, with random weights."""
    return torchvision.models.get_model(args.arch, num_classes=classes, zero_init_residual=args.zero_init)


def on_device(batches: Iterable[Batch], channels_last: bool) -> Iterator[Batch]:
    """The batches, one after the other, where the model is.

    With ``channels_last`` only the images get that layout, which activations then take over. The weights keep
    theirs, and so do their gradients: Horovod refuses gradients in another one, as they are not contiguous.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch in batches:
        images = batch.images.to(device(), non_blocking=True).contiguous(memory_format=layout)
        yield batch._replace(images=images, labels=batch.labels.to(device(), non_blocking=True))


def parameter_groups(model: nn.Module, weight_decay: float, decay_norm: bool) -> list[dict[str, Any]]:
    """For the optimizer: the weights, and without weight decay, if so wished, those of batch norm."""
    norm = {id(p) for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in norm], "weight_decay": weight_decay},
        {
            "params": [p for p in model.parameters() if id(p) in norm],
            "weight_decay": weight_decay if decay_norm else 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


class Statistics:
    """Mean and variance of a model's batch norms, which each rank gathers from its own images.

    Args:
        model: whose buffers they are.
        ledger: where the bytes of averaging them are written down.
    """

    def __init__(self, model: nn.Module, ledger: Ledger) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._means = [norm.running_mean for norm in norms if norm.running_mean is not None]
        self._variances = [norm.running_var for norm in norms if norm.running_var is not None]
        self._ledger = ledger

    @torch.no_grad()
    def average(self) -> None:
        """Give all ranks the statistics of the mixture of what each of them has seen. Collective."""
        if hvd.size() == 1 or not self._means:
            return
        mean, variance = _flat(self._means), _flat(self._variances)
        moments = torch.cat([mean, variance + mean * mean])
        self._ledger.shared.horovod += moments.nbytes
        mean, square = hvd.allreduce(moments, name="batch-norm", op=hvd.Average).chunk(2)
        _fill(self._means, mean)
        _fill(self._variances, (square - mean * mean).clamp_(min=0))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which all ranks have the average; then each has its own again."""
        own = [tensor.clone() for tensor in (*self._means, *self._variances)]
        before = self._ledger.shared.horovod
        self.average()
        # Every method does this for its validation, plain Horovod too.
        self._ledger.shared.dense += self._ledger.shared.horovod - before
        try:
            yield
        finally:
            for tensor, value in zip((*self._means, *self._variances), own, strict=True):
                tensor.copy_(value)


class MovingAverage:
    """An exponential moving average of a model's weights and statistics.

    Between exchanges ranks have different weights, so it takes those that all agree on, at each exchange, with the
    decay of all steps since the last one: so it is the same on all ranks, and costs no communication.

    Args:
        model: that is averaged.
        decay: in each step; 0 keeps no average. In the first steps it is less, so that the start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._tensors = [t for t in model.state_dict().values() if t.is_floating_point()] if decay else []
        self._averages = [tensor.clone() for tensor in self._tensors]
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the present weights in.

        Args:
            step: how many steps were taken in all.
        """
        passed, self._steps = step - self._steps, step
        if self._averages:
            kept = min(self._decay, (1 + step) / (10 + step)) ** passed
            torch._foreach_lerp_(self._averages, self._tensors, 1 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model is the average; then it is as before."""
        own = [tensor.clone() for tensor in self._tensors]
        for tensor, average in zip(self._tensors, self._averages, strict=True):
            tensor.copy_(average)
        try:
            yield
        finally:
            for tensor, value in zip(self._tensors, own, strict=True):
                tensor.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The average, in the order of the model's state."""
        return {"averages": [average.clone() for average in self._averages], "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
        self._steps = state["steps"]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _fill(tensors: list[Tensor], flat: Tensor) -> None:
    for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
