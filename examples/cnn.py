"""A convolutional network on small images, with any compressor.

    mpirun -np 2 python examples/cnn.py --compression qtopk --ratio 0.01
    mpirun -np 2 python examples/cnn.py --data /path/to/cifar --compression signtopk --ratio 0.01

With ``--data``, CIFAR-10 as torchvision unpacks it (a directory with ``cifar-10-batches-py``). Without, the 1,797
digits that come with scikit-learn, enlarged to CIFAR's 3 × 32 × 32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from hvd_compress import Compression


class CNN(nn.Sequential):
    """Three convolutions, each followed by half as many pixels, and a linear layer: 97,482 parameters."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inside, outside in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def load(directory: Path | None, train: bool) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) of mean 0 and variance 1, and labels."""
    if directory is not None:
        data = CIFAR10(str(directory), train=train)  # an error that says what is missing, if it is
        images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2).float(), torch.tensor(data.targets)
    else:
        digits = load_digits()
        is_test = torch.arange(len(digits.target)) % 5 == 4
        images = torch.tensor(digits.images, dtype=torch.float32)[is_test != train].unsqueeze(1)
        images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
        labels = torch.tensor(digits.target)[is_test != train]
    return (images - images.mean()) / images.std(), labels


def main() -> None:
    """Train, then print accuracy and bytes."""
    args = parse_arguments()
    hvd.init()
    torch.set_num_threads(max(1, torch.get_num_threads() // hvd.local_size()))
    torch.manual_seed(args.seed)
    model = CNN()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    settings = {} if args.compression in ("none", "fp16") else {"named_parameters": model.named_parameters()}
    if args.compression in ("topk", "qtopk", "signtopk", "randk"):
        settings["ratio"] = args.ratio
    compression = Compression.by_name(args.compression, **settings)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9),
        named_parameters=model.named_parameters(),
        compression=compression,
    )

    images, labels = load(args.data, train=True)
    generator = torch.Generator().manual_seed(args.seed)
    losses = []
    for _ in tqdm(range(args.epochs), unit="epoch", disable=None if hvd.rank() == 0 else True):
        for batch in torch.randperm(len(labels), generator=generator).split(args.batch_size * hvd.size())[:-1]:
            own = batch[hvd.rank() :: hvd.size()]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[own]), labels[own])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    test_images, test_labels = (part[hvd.rank() :: hvd.size()] for part in load(args.data, train=False))
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in test_images.split(256)]) == test_labels
    accuracy = float(hvd.allreduce(right.float().mean(), name="accuracy"))
    if hvd.rank() == 0:
        print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last; accuracy {accuracy:.1%}")
        if settings:  # Horovod's own compressors count nothing
            print(compression.ledger.total)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with cifar-10-batches-py")
    parser.add_argument("--compression", default="topk", help="Compression.<name> (%(default)s)")
    parser.add_argument("--ratio", type=float, default=0.01, help="of those that select elements (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="of each rank (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.05, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
