"""A plain Horovod script with the four lines that compress its gradients. Run: mpirun -np 2 python quickstart.py."""

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits

from hvd_compress import Compression


class Net(torch.nn.Sequential):
    """A small network for 8×8 images."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Ten epochs of each rank's part of the digits."""
    digits = load_digits()
    images = torch.tensor(digits.data[hvd.rank() :: hvd.size()], dtype=torch.float32) / 16
    labels = torch.tensor(digits.target[hvd.rank() :: hvd.size()])
    for epoch in range(10):
        # Every rank takes the same number of steps, whatever its share of a remainder.
        for step in range(len(digits.data) // hvd.size() // 32):
            batch = slice(32 * step, 32 * step + 32)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}")


if __name__ == "__main__":
    hvd.init()
    torch.manual_seed(0)  # so that its figures can be repeated
    model = Net()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    compression = Compression.topk(ratio=0.01, named_parameters=model.named_parameters())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    train(model, optimizer)
    if hvd.rank() == 0:
        print(compression.ledger.total)
