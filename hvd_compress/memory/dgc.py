"""Deep Gradient Compression: momentum on each rank, before what is sent is chosen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import check_numbers
from .base import MASS, Memory, Sent


class DGC(Memory):
    """Momentum correction and momentum factor masking (Lin et al., arXiv 1712.01887, sections 3.1 to 3.2).

    Each rank accumulates its own velocity, and what is accumulated is compressed rather than the gradient::

        u ← μ u + x,          v ← v + u             (Nesterov: u ← μ (u + x),  v ← v + u + x)
        send C(v),            v ← v − C(v),   u ← 0 where something was sent

    So an element that waits for n steps is sent with the momentum that n steps of plain SGD would have given it; the
    masking stops a delayed gradient from carrying the weights on in a stale direction. A message of all elements
    delays nothing and masks nothing: with it, this is momentum SGD.

    The optimizer must apply no momentum of its own (``torch.optim.SGD(…, momentum=0)``). For that reason small
    tensors, which are sent whole, get their momentum here as well.

    Args:
        momentum: μ, 0 ≤ μ < 1.
        nesterov: look ahead by one gradient.
        masking: momentum factor masking.
        clip: largest l2 norm of one tensor's gradient on one rank; larger ones are scaled down to it before they are
            accumulated. The paper clips each rank at ``threshold / √(number of ranks)``. None for no clipping.

    Raises:
        ValueError: a setting out of its range.
        TypeError: one that is no number.
    """

    covers_small = True
    feeds_back = True

    def __init__(
        self, momentum: float = 0.9, *, nesterov: bool = False, masking: bool = True, clip: float | None = None
    ) -> None:
        check_numbers(momentum=momentum)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        if clip is not None:
            check_numbers(clip=clip)
            if not clip > 0:
                raise ValueError(f"clip must be a positive norm or None, got {clip!r}")
        # Configuration
        self._momentum = momentum
        self._nesterov = nesterov
        self._masking = masking
        self._clip = clip
        # State: name → [d]
        self._velocities: dict[str, Tensor] = {}  # u
        self._accumulated: dict[str, Tensor] = {}  # v
        self._pending: dict[str, tuple[Tensor, Tensor]] = {}  # u and v that wait for their exchange's outcome

    def __repr__(self) -> str:
        settings = f"nesterov={self._nesterov}, masking={self._masking}, clip={self._clip}"
        return f"DGC(momentum={self._momentum}, {settings})"

    @property
    def rows(self) -> tuple[str, ...]:
        """u and v."""
        return (MASS, MASS)

    def compensate(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """v, with this step's velocity."""
        x = tensor if self._clip is None else tensor * _shrink(tensor, self._clip)
        velocity = self._velocities[name].to(x) if name in self._velocities else torch.zeros_like(x)
        if self._nesterov:
            velocity = (velocity + x) * self._momentum
            accumulated = velocity + x
        else:
            velocity = velocity * self._momentum + x
            accumulated = velocity.clone()
        if name in self._accumulated:
            accumulated += self._accumulated[name].to(x)
        self._pending[name] = velocity, accumulated
        return accumulated, None

    def update(self, name: str, sent: Sent) -> None:
        """Take off what was sent, from v and from u."""
        velocity, accumulated = self._pending[name]
        sent.add_to(accumulated, alpha=-1)
        if self._masking:
            sent.clear_in(velocity)

    def commit(self, name: str) -> None:
        """See :meth:`Memory.commit`."""
        self._velocities[name], self._accumulated[name] = self._pending.pop(name)

    def rollback(self, name: str) -> None:
        """See :meth:`Memory.rollback`."""
        self._pending.pop(name, None)

    def reset(self) -> None:
        """u ← 0, v ← 0."""
        self._velocities.clear()
        self._accumulated.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """u and v, ``[2, d]``."""
        return {name: torch.stack([u, self._accumulated[name]]) for name, u in self._velocities.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Memory.load_state_dict`."""
        self._check(state, 2)
        self._velocities = {name: memory[0].clone() for name, memory in state.items()}
        self._accumulated = {name: memory[1].clone() for name, memory in state.items()}


def _shrink(tensor: Tensor, norm: float) -> Tensor:
    """The factor that brings the l2 norm of ``tensor`` down to ``norm``, or 1; NaN stays NaN."""
    # In float32 torch's norm is off by percents for many elements, and infinite for large ones.
    return torch.clamp(norm / torch.linalg.vector_norm(tensor, dtype=torch.float64), max=1.0).to(tensor.dtype)
