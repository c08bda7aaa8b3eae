"""An operator of your own: the largest element of each chunk. Run: mpirun -np 2 python custom_compressor.py."""

from dataclasses import dataclass

import horovod.torch as hvd
import torch
from quickstart import Net, train
from torch.nn.functional import pad

from hvd_compress import Compression
from hvd_compress.operators import Operator
from hvd_compress.wire import Message


@dataclass(frozen=True)
class ChunkMax(Operator):
    """Of each ``chunk`` consecutive elements the largest: nearly top-k, and nothing has to be sorted."""

    chunk: int = 100
    draws = False  # no random numbers are needed

    def encode(self, x: torch.Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`."""
        flat = x.reshape(-1).float()
        chunks = pad(flat.abs(), (0, -len(flat) % self.chunk), value=-1.0).view(-1, self.chunk)
        indices = chunks.argmax(1) + self.chunk * torch.arange(len(chunks), device=x.device)
        return Message.sparse(tuple(x.shape), indices, flat[indices])


if __name__ == "__main__":
    hvd.init()
    model = Net()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    compression = Compression.of(ChunkMax(), named_parameters=model.named_parameters())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    train(model, optimizer)
    if hvd.rank() == 0:
        print(compression.ledger.total)
