"""A convolutional network on small images, with a compressor by its name.

    mpirun -np 2 python examples/cnn.py --compression qtopk --ratio 0.01
    mpirun -np 2 python examples/cnn.py --data /path/to/cifar --compression signtopk --ratio 0.01

With ``--data``, CIFAR-10 as torchvision unpacks it (a directory with ``cifar-10-batches-py``). Without, the 1,797
digits that come with scikit-learn, enlarged to CIFAR's 3 × 32 × 32.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from statistics import mean

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from ranks import on_all_ranks
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from hvd_compress import Compression
from hvd_compress.compression import COMPRESSORS

MOMENTUM = 0.9
PLAIN = ("none", "fp16")
NOT_HERE = ("adaptive_topk", "accordion", "hard_threshold", "threshold", "cd_adam")
"""What needs more settings than a ratio, or an optimizer of its own: every_compressor.py has them."""


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
        try:
            data = CIFAR10(str(directory), train=train)
        except RuntimeError as error:
            raise OSError(
                f"--data {directory}: no cifar-10-batches-py there as torchvision wants it: {error}"
            ) from None
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
    settings = settings_of(args)
    named = {} if args.compression in PLAIN else {"named_parameters": model.named_parameters()}
    compression = on_all_ranks(lambda: Compression.by_name(args.compression, **settings, **named))
    momentum = 0.0 if "momentum" in settings else MOMENTUM  # once: some compressors have it on the ranks
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=args.lr, momentum=momentum),
        named_parameters=model.named_parameters(),
        compression=compression,
    )

    images, labels = on_all_ranks(lambda: load(args.data, train=True))
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
    if not losses:
        raise SystemExit(
            f"cnn.py: no steps: --epochs {args.epochs} of {len(labels)} images, --batch-size {args.batch_size} on "
            f"{hvd.size()} rank(s); take more epochs, or smaller batches"
        )

    test_images, test_labels = (part[hvd.rank() :: hvd.size()] for part in load(args.data, train=False))
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in test_images.split(256)]) == test_labels
    # Counts, not accuracies: ranks may have different numbers of images.
    correct, number = hvd.allreduce(torch.tensor([right.sum(), len(right)]), name="correct", op=hvd.Sum).tolist()
    if hvd.rank() == 0:
        print(f"loss {losses[0]:.2f} at first, {mean(losses[-5:]):.2f} at last; accuracy {correct / number:.1%}")
        if args.compression not in PLAIN:  # Horovod's own compressors count nothing
            print(compression.ledger.total)


def settings_of(args: argparse.Namespace) -> dict[str, float]:
    """The ratio and the momentum, if the compressor takes them."""
    if args.compression in PLAIN:
        return {}
    taken = inspect.signature(COMPRESSORS[args.compression]).parameters
    return {name: value for name, value in {"ratio": args.ratio, "momentum": MOMENTUM}.items() if name in taken}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with cifar-10-batches-py")
    names = [*PLAIN, *(name for name in COMPRESSORS if name not in NOT_HERE)]
    parser.add_argument(
        "--compression", default="topk", choices=names, metavar="NAME", help=f"{', '.join(names)} (topk)"
    )
    parser.add_argument("--ratio", type=float, default=0.01, help="of those that select elements (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="of each rank (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch-size must be 1 or more, got {args.batch_size}")
    return args


if __name__ == "__main__":
    main()
