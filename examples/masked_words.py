"""A small BERT: guess the words that were left out, with sparse gradients in the embedding.

    mpirun -np 2 python examples/masked_words.py

The gradient of ``nn.Embedding(sparse=True)`` has rows for the words of a batch only. Horovod gathers those rows by
itself; everything else, the transformer and the output layer, is compressed. The text is the reference manual in
``pydoc_data`` of Python's own library, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pydoc_data.topics import topics
from statistics import mean

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hvd_compress import Compression

MASK = 0  # the number of the word that stands for one left out
RARE = 1  # of all words that are not in the vocabulary


class SmallBert(nn.Module):
    """Embedding, two layers of a transformer, and logits for each place."""

    def __init__(self, words: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, sparse=True)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.logits = nn.Linear(width, words)

    def forward(self, text: Tensor) -> Tensor:
        """Text (batch, length) of word numbers to logits (batch, length, words)."""
        return self.logits(self.encoder(self.embedding(text) + self.places))


def read_text(words: int) -> Tensor:
    """Python's manual as numbers, the most frequent words by their rank from 2 on."""
    tokens = re.findall(r"\w+|[^\w\s]", " ".join(topics[name] for name in sorted(topics)).lower())
    known = {word: number + 2 for number, (word, _) in enumerate(Counter(tokens).most_common(words - 2))}
    return torch.tensor([known.get(token, RARE) for token in tokens])


def main() -> None:
    """Train, and say what was sent."""
    args = parse_arguments()
    hvd.init()
    torch.set_num_threads(max(1, torch.get_num_threads() // hvd.local_size()))
    torch.manual_seed(args.seed)
    model = SmallBert(args.words, args.length)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    compression = Compression.topk(ratio=args.ratio, named_parameters=model.named_parameters())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=args.lr),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    text = read_text(args.words)
    generator = torch.Generator().manual_seed(args.seed * 1_000 + hvd.rank())
    bar = tqdm(range(args.steps), unit="step", disable=None if hvd.rank() == 0 else True)
    losses = []
    for _ in bar:
        starts = torch.randint(len(text) - args.length, (args.batch_size, 1), generator=generator)
        whole = text[starts + torch.arange(args.length)]
        left_out = torch.rand(whole.shape, generator=generator) < 0.15
        optimizer.zero_grad()
        loss = F.cross_entropy(model(whole.masked_fill(left_out, MASK))[left_out], whole[left_out])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.2f}")
    if hvd.rank() == 0:
        print(f"loss {mean(losses[:5]):.2f} at first, {mean(losses[-5:]):.2f} at last")
        for name, traffic in compression.ledger.tensors.items():
            if name in ("embedding.weight", "logits.weight"):
                print(f"{name}: {traffic}")
        print(f"all: {compression.ledger.total}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--ratio", type=float, default=0.01, help="part of each dense gradient (%(default)s)")
    parser.add_argument("--words", type=int, default=5000, help="vocabulary (%(default)s)")
    parser.add_argument("--length", type=int, default=32, help="of a piece of text (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.3, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"no steps: --steps must be 1 or more, got {args.steps}")
    return args


if __name__ == "__main__":
    main()
