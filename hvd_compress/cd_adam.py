"""CD-Adam's optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class CDAdam(torch.optim.Adam):
    """AMSGrad as in CD-Adam (Wang, Lin and Chen, arXiv 2111.00705), to go with ``Compression.cd_adam(…)``.

    ::

        m ← β₁ m + (1 − β₁) G,   v ← β₂ v + (1 − β₂) G²,   v̂ ← max(v̂, v)
        x ← x − lr/(1 − β₁^t) · m / (√v̂/√(1 − β₂^t) + ε)

    where G is the estimate of the mean gradient that the compressor hands out, plus ``weight_decay · x``. This is
    torch's Adam with ``amsgrad=True``; what differs are the paper's defaults.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: of the l2 penalty.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=True)
