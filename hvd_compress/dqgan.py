"""DQGAN: optimistic mirror descent with quantized messages, for games between networks."""

from __future__ import annotations

from collections.abc import Iterable

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor
from torch import Tensor

from .gradient import GradientCompressor
from .local_sgd import QsparseLocalSGD


class DQGAN(QsparseLocalSGD):
    """Distributed optimistic mirror descent with error feedback (Chen et al., arXiv 2010.13359).

    Simultaneous gradient descent circles around the solution of a game, or leaves it; that of min_x max_y xy it
    leaves with any learning rate. Here each gradient is taken where the last one and the memory lead, and then
    applied from where all ranks are::

        y ← x − (η F(y_before) + m)                     on each rank
        p = m + η F(y),   send C(p),   m ← p − C(p),   x ← x − (1/R) Σ C(p)

    The gradient is taken at the parameters as they are, which is y: train as with any optimizer. F holds the
    gradients of *all* players, each with respect to its own loss, in one ``step()`` (for a GAN, those of the
    generator's and of the discriminator's loss at the same parameters). x is there within :meth:`evaluation`.

    Args:
        optimizer: of all players' parameters; ``torch.optim.SGD(…, lr=η)`` is the paper's. Another one's step takes
            the place of η F.
        named_parameters: names of all of them.
        compression: as for :class:`QsparseLocalSGD`, with the memory ``"residual"`` or ``"none"``.
        process_set: Horovod's; None for all ranks.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        compression: type[Compressor] | GradientCompressor = hvd.Compression.none,
        process_set: hvd.ProcessSet | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            named_parameters=named_parameters,
            compression=compression,
            look_ahead=1.0,
            process_set=process_set,
        )

    def _lead(self, name: str) -> Tensor:
        stepped = self._moved(name)
        residual = super()._lead(name)
        return stepped if residual is None else residual + stepped
