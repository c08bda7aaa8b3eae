"""Error feedback and its absence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import check_numbers
from .base import Memory, Sent


class Residual(Memory):
    """Error feedback: what was not sent is added to the next tensor.

    ``p = decay · m + x``, send ``C(p)``, ``m ← p − C(p)``: with decay 1, Qsparse-local-SGD (arXiv 1906.02367),
    Algorithm 1, lines 8 and 10, and EF-SGD (arXiv 1901.09847), Algorithm 2; below 1, SparseLoCo (arXiv 2508.15706).
    The memory is in the units of what it is given: gradients on the gradient path, parameters under local SGD. So on
    the gradient path it is EF-SGD's while the learning rate stays: what waits when that changes gets the new one.

    Args:
        decay: part of the memory that is kept at each exchange, 0 < decay ≤ 1. Below 1 what has waited long counts
            less, and the model no longer catches up with all that was not sent.

    Raises:
        ValueError: ``decay`` is out of its range.
        TypeError: it is no number.
    """

    feeds_back = True
    only_adds = True
    takes_back = True

    def __init__(self, decay: float = 1.0) -> None:
        check_numbers(decay=decay)
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay!r}")
        # Configuration
        self._decay = decay
        # State
        self._residuals: dict[str, Tensor] = {}  # name → [d], in the tensor's working dtype, on its device
        self._before: dict[str, Tensor | None] = {}  # what they were, while an exchange's outcome is awaited

    def __repr__(self) -> str:
        return f"Residual(decay={self._decay})"

    def compensate(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """decay · m + x, in place of x. A parameter's first m is 0."""
        before = self._residuals.get(name)
        if before is not None and (before.device, before.dtype) != (tensor.device, tensor.dtype):
            before = before.to(tensor)  # loaded, from a checkpoint on the CPU for instance
        self._residuals[name], self._before[name] = tensor, before
        return tensor, before if before is None or self._decay == 1 else before * self._decay

    def update(self, name: str, sent: Sent) -> None:
        """m ← p − C(p), in place of p, which is likely to be in the cache still."""
        sent.add_to(self._residuals[name], alpha=-1)

    def commit(self, name: str) -> Tensor:
        """Give the storage of the old m away."""
        before = self._before.pop(name)
        return torch.empty_like(self._residuals[name]) if before is None else before

    def rollback(self, name: str) -> None:
        """See :meth:`Memory.rollback`."""
        if name not in self._before:
            return
        before = self._before.pop(name)
        if before is None:
            del self._residuals[name]
        else:
            self._residuals[name] = before

    def take_back(self, name: str, start: int, rest: Tensor) -> None:
        """m ← m + rest, for the elements in question."""
        self._residuals[name][start : start + len(rest)] += rest

    def residual(self, name: str) -> Tensor | None:
        """m."""
        return self._residuals.get(name)

    def reset(self) -> None:
        """m ← 0."""
        self._residuals.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """m, ``[d]``."""
        return {name: residual.clone() for name, residual in self._residuals.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Memory.load_state_dict`."""
        self._check(state, 1)
        self._residuals = {name: residual.clone() for name, residual in state.items()}


class NoMemory(Memory):
    """What was not sent is forgotten."""

    only_adds = True

    def compensate(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tensor itself."""
        return tensor, None

    def update(self, name: str, sent: Sent) -> None:
        """Nothing to remember."""

    def commit(self, name: str) -> None:
        """Nothing to remember."""

    def rollback(self, name: str) -> None:
        """Nothing to forget."""

    def residual(self, name: str) -> Tensor | None:
        """None."""
        return None

    def reset(self) -> None:
        """Nothing to forget."""

    def state_dict(self) -> dict[str, Tensor]:
        """Always empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Accepts only the empty state.

        Raises:
            ValueError: ``state`` holds memories, which would be lost.
        """
        if state:
            raise ValueError(f"this compressor keeps no memory, the state has {len(state)}: use memory='residual'")
