"""Error feedback and its absence."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .base import Memory, Sent


class Residual(Memory):
    """Error feedback: what was not sent is added to the next tensor.

    ``p = decay · m + x``, send ``C(p)``, ``m ← p − C(p)``: with decay 1, Qsparse-local-SGD (arXiv 1906.02367),
    Algorithm 1, lines 8 and 10, and EF-SGD (arXiv 1901.09847), Algorithm 2; below 1, SparseLoCo (arXiv 2508.15706).
    The memory is in the units of what it is given: gradients on the gradient path, parameters under local SGD.

    Args:
        decay: part of the memory that is kept at each exchange, 0 < decay ≤ 1. Below 1 what has waited long counts
            less, and the model no longer catches up with all that was not sent.

    Raises:
        ValueError: ``decay`` is out of its range.
    """

    def __init__(self, decay: float = 1.0) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay!r}")
        # Configuration
        self._decay = decay
        # State
        self._residuals: dict[str, Tensor] = {}  # name → [d], in the tensor's working dtype, on its device
        self._compensated: dict[str, Tensor] = {}  # that wait for their exchange's outcome

    def __repr__(self) -> str:
        return f"Residual(decay={self._decay})"

    def compensate(self, name: str, tensor: Tensor) -> Tensor:
        """decay · m + x. A parameter is seen for the first time with m = 0."""
        residual = self._residuals.get(name)
        compensated = tensor.clone() if residual is None else residual.to(tensor.device) * self._decay + tensor
        self._compensated[name] = compensated
        return compensated

    def commit(self, name: str, sent: Sent) -> None:
        """m ← p − C(p), in place of p."""
        compensated = self._compensated.pop(name)
        sent.add_to(compensated, alpha=-1)
        self._residuals[name] = compensated

    def rollback(self, name: str) -> None:
        """See :meth:`Memory.rollback`."""
        self._compensated.pop(name, None)

    def residual(self, name: str) -> Tensor | None:
        """m."""
        return self._residuals.get(name)

    def reset(self) -> None:
        """m ← 0."""
        self._residuals.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """m, ``[d]``."""
        return dict(self._residuals)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Memory.load_state_dict`."""
        self._check(state, 1)
        self._residuals = {name: residual.clone() for name, residual in state.items()}


class NoMemory(Memory):
    """What was not sent is forgotten."""

    def compensate(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def commit(self, name: str, sent: Sent) -> None:
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
