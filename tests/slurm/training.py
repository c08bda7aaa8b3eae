"""A small training that the tests submit: two-layer network, Qsparse-local-SGD, checkpoints, a digest at the end."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
import torch.nn.functional as F

from hvd_compress import (
    EXIT_REQUEUE,
    Checkpoints,
    Compression,
    Interruption,
    QsparseLocalSGD,
    random_state,
    set_random_state,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds in each step, so that there is time to act")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--raise-at", type=int)
    args = parser.parse_args()

    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(256, 10)
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    compression = Compression.topk(ratio=args.ratio, named_parameters=model.named_parameters())
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        named_parameters=model.named_parameters(),
        compression=compression,
        sync_every=4,
    )
    torch.manual_seed(args.seed + 1 + hvd.rank())  # inputs and dropout

    checkpoints, interruption = Checkpoints(args.output / "checkpoint"), Interruption()
    saved = checkpoints.load()
    if saved is not None:
        model.load_state_dict(saved.state["model"])
        optimizer.load_state_dict(saved.state["optimizer"])
        set_random_state(saved.state["random"])
    start = saved.step if saved else 0
    print(f"rank {hvd.rank()} on {socket.gethostname()} starts at step {start}", flush=True)

    for step in range(start + 1, args.steps + 1):
        inputs = torch.randn(16, 64)
        labels = (inputs[:, :10].argmax(dim=1) + step % 2) % 10
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        if step == args.raise_at and hvd.rank() == hvd.size() - 1:
            raise RuntimeError(f"this rank was told to fail in step {step}")
        time.sleep(args.pause)
        stop = interruption.agreed()
        if stop or step % args.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state()}
            checkpoints.save(step, state)
        if stop:
            print(f"rank {hvd.rank()} saved step {step}", flush=True)
            hvd.barrier()
            sys.exit(EXIT_REQUEUE)

    optimizer.synchronize()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    digests = hvd.allgather_object(digest)
    assert len({*digests}) == 1, "the ranks' weights differ"
    with torch.no_grad():
        correct = (model.eval()(torch.eye(64)[:10]).argmax(dim=1) == torch.arange(10)).float().mean().item()
    if hvd.rank() == 0:
        traffic = optimizer.ledger.total
        hosts = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
        record = {"digest": digest, "accuracy": correct, "megabytes_sent": traffic.mpi / 1e6, "ratio": traffic.ratio}
        record |= {"ranks": hvd.size(), "hosts": hosts, "exchanges": optimizer.ledger.exchanges, "start": start}
        (args.output / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        print(f"finished: {record}", flush=True)


if __name__ == "__main__":
    main()
