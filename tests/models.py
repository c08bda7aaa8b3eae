"""Models whose gradients a test knows beforehand, and what ranks need to compare."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor


@contextlib.contextmanager
def signals_as_they_were() -> Iterator[None]:
    """A context at whose end signals are handled as at its begin, and none is left, whatever an Interruption set."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        yield
    finally:
        while signal.sigtimedwait([*handlers], 0):
            pass
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class Vectors(torch.nn.Module):
    """Named parameters w; the loss is Σ w·c, so that the gradient of each w is the c it was given."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(tuple(shape), dtype=dtype)))

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Terms are added in the order of ``gradients``, which sets the order of the backward pass."""
        terms = [(self.get_parameter(name) * c).sum() for name, c in gradients.items()]
        loss = terms[0]
        for term in terms[1:]:
            loss = loss + term
        return loss


def gradient(
    shape: Sequence[int], rank: int, step: int, which: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Any rank can compute any other's."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * rank + which)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def assert_replicas_identical(tensors: Sequence[Tensor]) -> None:
    """All ranks hold the same bits."""
    flat = torch.cat([t.detach().reshape(-1).view(torch.uint8) for t in tensors])
    for rank, other in enumerate(hvd.allgather(flat[None], name="replicas")):
        assert torch.equal(other, flat), f"rank {rank} differs from rank {hvd.rank()}"


def through_a_file(state: Any) -> Any:
    """As a checkpoint: saved, and loaded in the way that allows no code in it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class ByDefinition:
    """Top-k with error feedback on all ranks, computed on one, straight from the definition."""

    def __init__(self, ranks: int, k: int) -> None:
        self.k = k
        self.memories: list[dict[str, Tensor]] = [{} for _ in range(ranks)]

    def sent(self, rank: int, name: str, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        p = self.memories[rank].get(name, torch.zeros_like(flat)) + flat
        kept = torch.sort(p.abs(), descending=True, stable=True).indices[: self.k]
        message = torch.zeros_like(p)
        message[kept] = p[kept]
        self.memories[rank][name] = p - message
        return message.reshape(x.shape)

    def total(self, name: str, xs: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(xs[0])
        for rank, x in enumerate(xs):
            total += self.sent(rank, name, x)
        return total


@contextlib.contextmanager
def half_set(optimizer: Any) -> Iterator[None]:
    """A context in which the optimizer is interrupted the first time that it has set one of its parameters."""

    @torch.no_grad()
    def interrupts(values: Mapping[str, Tensor]) -> None:
        del optimizer._set_parameters
        name, p = next(iter(optimizer._parameters.items()))
        p.copy_(values[name])
        raise KeyboardInterrupt

    optimizer._set_parameters = interrupts
    yield


@contextlib.contextmanager
def interrupted_soon(seconds: float = 0.5) -> Iterator[None]:
    """A context in which Ctrl-C comes after that time, and interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
