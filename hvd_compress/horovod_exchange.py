"""What goes through Horovod: tensors as it takes them, and buffers between ranks where it runs without MPI, as under
``horovodrun --gloo`` and in elastic training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from .exchange.gather import Bytes


def for_horovod(tensor: Tensor) -> Tensor:
    """The same numbers as Horovod takes them: it refuses bfloat16 and tensors that are not contiguous."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous()


class HorovodExchange:
    """All-to-all exchange of one buffer per rank by Horovod's own allgather.

    It is what :class:`hvd_compress.exchange.Exchange` is with MPI. Horovod matches operations by name, so others may
    go on beside it. Ranks that do not come are named by Horovod's stall check; if one dies, the others raise
    ``HorovodInternalError``, which elastic training waits for.

    Args:
        process_set: Horovod's, of the ranks that take part.
    """

    library = "horovod"

    def __init__(self, process_set: hvd.ProcessSet) -> None:
        self._process_set = process_set
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()
        self.name = "hvd_compress"  # that Horovod tells this exchange from others by
        # State
        self.sent = 0  # bytes of all tensors handed to Horovod so far
        self.within = 0  # none of them are known to stay within a node

    def allgatherv(self, buffer: Bytes, place: int = 0) -> list[Bytes]:
        """Every rank's ``buffer`` in rank order, this rank's own among them. Collective.

        Args:
            buffer: any length.
            place: see :meth:`hvd_compress.exchange.Exchange.allgatherv`.
        """
        length, data = torch.tensor([buffer.nbytes], device="cpu"), torch.from_numpy(buffer)
        handles = [
            hvd.allgather_async(tensor, name=f"{self.name}.{what}.{place}", process_set=self._process_set)
            for what, tensor in (("lengths", length), ("data", data))
        ]
        self.sent += length.nbytes + data.nbytes
        lengths, gathered = (hvd.synchronize(handle).numpy() for handle in handles)
        return np.split(gathered, np.cumsum(lengths)[:-1])
