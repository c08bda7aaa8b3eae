"""Trains while ranks come and go: started by ``horovodrun`` in test_elastic.py.

The number of ranks goes from 2 to 3, back to 2 as one is told to go, and on to 1 as one is killed. At the end, the
model less the mean memory is where all uncompressed steps would have led, exactly.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from models import Vectors
from test_resize import SHAPES, gradient_path, gradients, local_sgd, mean_gradient, memories

from hvd_compress.elastic import ElasticState

STEPS = 4  # with each number of ranks, at least


def main(hosts: Path) -> None:
    hvd.init()
    models = {"gradient": Vectors(SHAPES), "local": Vectors(SHAPES)}
    optimizer, compression = gradient_path(models["gradient"], None, "residual")
    local, _ = local_sgd(models["local"], None, "residual")
    state = ElasticState(
        model=models["gradient"],
        optimizer=optimizer,
        compression=compression,
        other_model=models["local"],
        local=local,
        sizes=[],  # of the world, in each step
    )

    @hvd.elastic.run
    def train(state: ElasticState) -> None:
        entered = len(state.sizes)
        while True:
            step = len(state.sizes)
            for model, each in ((models["gradient"], optimizer), (models["local"], local)):
                each.zero_grad()
                model(gradients(hvd.rank(), step)).backward()
                each.step()
            state.sizes = [*state.sizes, hvd.size()]
            time.sleep(0.02)
            if step % 2 == 0:  # local SGD is in mid-round
                continue
            if step - entered > STEPS:
                if hvd.size() == 3:
                    announce(hosts, "localhost:1\n127.0.0.1:1\n")
                elif hvd.size() == 1:
                    return
                elif 3 not in state.sizes:
                    announce(hosts, "localhost:2\n127.0.0.1:1\n")
                elif os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1":
                    os.kill(os.getpid(), signal.SIGKILL)  # two steps after a commit
            state.commit()

    train(state)
    assert hvd.size() == 1
    assert sorted({*state.sizes}) == [1, 2, 3], state.sizes
    for path, model, stateful in (
        ("gradient", models["gradient"], compression),
        ("local", models["local"], local),
    ):
        for name, p in model.named_parameters():
            moved = -torch.stack([mean_gradient(name, n, step) for step, n in enumerate(state.sizes)]).sum(0)
            memory = memories(stateful.state_dict())[name]
            assert memory.abs().sum() > 0
            assert torch.equal(p.detach() - memory.view_as(p), moved), (path, name)
    print("sizes", state.sizes, "all is there; bytes", compression.ledger.total, local.ledger.total, flush=True)


def announce(hosts: Path, text: str) -> None:
    """What the discovery script will say from now on."""
    if hvd.rank() == 0:
        draft = hosts.with_suffix(".draft")
        draft.write_text(text)
        draft.rename(hosts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
