"""Memories that hold an estimate of the gradient, and send by how much it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..checks import check_numbers
from ..operators import Operator
from .base import COMMON, ESTIMATE, TOTAL, Memory, Sent


class EF21(Memory):
    """Each rank's estimate g of its own gradient, corrected by what is sent; the optimizer gets the mean estimate.

    EF21 (Richtárik et al., arXiv 2106.05203), the Markov compressor, and with ``momentum`` EF21-SGDM (Fatkhullin et
    al., arXiv 2305.15155)::

        v ← momentum · v + (1 − momentum) · x       (v = x at first)
        send C(v − g),   g ← g + C(v − g),   G ← G + Σ C(v − g)

    Without momentum it needs gradients with little noise: what differs from one minibatch to the next is sent for
    nothing. The theory wants a contractive C: an unbiased operator with variance ω should be scaled by 1/(1 + ω).

    Args:
        momentum: 0 for EF21; 0.9 is a common start for EF21-SGDM, whose η is ``1 − momentum``.

    Raises:
        ValueError: ``momentum`` is not in [0, 1).
        TypeError: it is no number.
    """

    feeds_back = True

    def __init__(self, momentum: float = 0.0) -> None:
        check_numbers(momentum=momentum)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        # Configuration
        self._momentum = momentum
        # State: name → [d]
        self._own: dict[str, Tensor] = {}  # g
        self._sums: dict[str, Tensor] = {}  # G, the sum of all ranks' estimates: the same on all ranks
        self._means: dict[str, Tensor] = {}  # v, if there is momentum
        self._pending: dict[str, Tensor] = {}  # v that wait for their exchange's outcome
        self._corrections: dict[str, Sent] = {}  # C that wait for it

    def __repr__(self) -> str:
        return f"{type(self).__name__}(momentum={self._momentum})"

    @property
    def rows(self) -> tuple[str, ...]:
        """g, G, and v if there is momentum."""
        return (ESTIMATE, TOTAL, ESTIMATE) if self._momentum else (ESTIMATE, TOTAL)

    def compensate(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """v − g."""
        own = self._own.get(name)
        if own is not None and (own.device, own.dtype) != (tensor.device, tensor.dtype):
            # Loaded, from a checkpoint on the CPU for instance.
            for vectors in reversed(self._vectors()):  # g last: where it is, the others are
                vectors[name] = vectors[name].to(tensor)
            own = self._own[name]
        mean = self._means.get(name)
        if self._momentum and mean is not None:
            tensor = torch.lerp(tensor, mean, self._momentum)
        self._pending[name] = tensor
        return tensor.clone() if own is None else tensor - own, None

    def update(self, name: str, sent: Sent) -> None:
        """See :meth:`Memory.update`."""
        self._corrections[name] = sent

    def commit(self, name: str) -> None:
        """g ← g + C."""
        mean, sent = self._pending.pop(name), self._corrections.pop(name)
        if self._momentum:
            self._means[name] = mean.clone() if name not in self._means else mean
        own = self._own.setdefault(name, torch.zeros_like(mean))
        sent.add_to(own)

    def rollback(self, name: str) -> None:
        """See :meth:`Memory.rollback`."""
        self._pending.pop(name, None)
        self._corrections.pop(name, None)

    def receive(self, name: str, total: Tensor, world_size: int, draws: Callable[[], torch.Generator]) -> Tensor:
        """G, with this exchange's corrections."""
        total += self._sums.get(name, 0)
        self._sums[name] = total.clone()
        return total

    def reset(self) -> None:
        """Forget all estimates."""
        for vectors in self._vectors():
            vectors.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """g, G, and v if there is momentum: ``[2 or 3, d]``."""
        return {name: torch.stack([vectors[name] for vectors in self._vectors()]) for name in self._own}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Memory.load_state_dict`."""
        self._check(state, len(self._vectors()))
        for row, vectors in enumerate(self._vectors()):
            vectors.clear()
            vectors.update({name: memory[row].clone() for name, memory in state.items()})

    def _vectors(self) -> list[dict[str, Tensor]]:
        return [self._own, self._sums, *([self._means] if self._momentum else [])]


class TwoSided(EF21):
    """CD-Adam's memory (Wang, Lin and Chen, arXiv 2111.00705): the way back is compressed as the way there.

    The mean estimate Ĝ of :class:`EF21` is not handed out itself, but another estimate that follows it by compressed
    corrections::

        G̃ ← G̃ + C'(Ĝ − G̃)

    as it would if a server broadcast them. Here every rank has received all messages, so it computes what the server
    would send, and no byte goes back.

    Args:
        operator: C', a contraction.
        momentum: see :class:`EF21`; the paper has none here.

    Raises:
        TypeError: ``operator`` is none; a plan's schedule counts exchanges on the way there only.
    """

    def __init__(self, operator: Operator, momentum: float = 0.0) -> None:
        super().__init__(momentum)
        if not isinstance(operator, Operator):
            raise TypeError(f"on the way back operator must be an Operator, TopK(ratio=0.01) or so, got {operator!r}")
        # Configuration
        self._operator = operator
        # State: name → [d]
        self._handed_out: dict[str, Tensor] = {}  # G̃, the same on all ranks

    def __repr__(self) -> str:
        return f"TwoSided({self._operator!r}, momentum={self._momentum})"

    @property
    def operators(self) -> tuple[Operator, ...]:
        """C': what it does wrong is part of Ĝ − G̃ the next time."""
        return (self._operator,)

    @property
    def rows(self) -> tuple[str, ...]:
        """Those of :class:`EF21`, and G̃."""
        return (*super().rows, COMMON)

    def receive(self, name: str, total: Tensor, world_size: int, draws: Callable[[], torch.Generator]) -> Tensor:
        """G̃, with this exchange's corrections, times the number of ranks."""
        mean = super().receive(name, total, world_size, draws).div_(world_size)
        estimate = self._handed_out.setdefault(name, torch.zeros_like(mean))
        self._operator.encode(mean - estimate, generator=draws()).add_to(estimate)
        return torch.mul(estimate, world_size, out=mean)

    def _vectors(self) -> list[dict[str, Tensor]]:
        return [*super()._vectors(), self._handed_out]
