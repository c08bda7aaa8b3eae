"""A plain torch loop whose ranks exchange after every eighth step. Run: mpirun -np 2 python local_steps.py."""

import argparse

import horovod.torch as hvd
import torch
from quickstart import Net, train

from hvd_compress import Compression, QsparseLocalSGD


def main() -> None:
    """Train the quickstart's network with Qsparse-local-SGD."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sync-every", type=int, default=8, help="steps between exchanges (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.01, help="part of what moved that is sent (%(default)s)")
    args = parser.parse_args()

    hvd.init()
    model = Net()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        named_parameters=model.named_parameters(),
        compression=Compression.topk(ratio=args.ratio),
        sync_every=args.sync_every,
    )
    train(model, optimizer)
    optimizer.synchronize()  # so that all ranks have one and the same model
    if hvd.rank() == 0:
        print(optimizer.ledger.total)


if __name__ == "__main__":
    main()
