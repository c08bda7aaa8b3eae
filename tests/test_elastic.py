"""Where Horovod runs without MPI: under ``horovodrun --gloo``, and with ranks that come and go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import horovod.torch as hvd
import pytest
from world import TESTS, environment

pytestmark = pytest.mark.skipif(not hvd.gloo_built(), reason="Horovod was built without gloo")

WITHOUT_MPI = """
import numpy as np, pytest, torch, horovod.torch as hvd
from hvd_compress import Checkpoints, Compression, RankMismatchError
from hvd_compress.horovod_exchange import HorovodExchange
hvd.init()
assert not hvd.mpi_enabled()
rank, size = hvd.rank(), hvd.size()

exchange = HorovodExchange(hvd.global_process_set)
sent = 0
for round in range(6):
    buffers = [np.full((7 * r + round) % 3 * 100, 17 * r + round, np.uint8) for r in range(size)]
    received = exchange.allgatherv(buffers[rank])
    assert all(np.array_equal(a, b) for a, b in zip(received, buffers, strict=True))
    sent += buffers[rank].nbytes + 8
assert exchange.sent == sent

def wrap(k):
    model = torch.nn.Linear(40, 30)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    compression = Compression.topk(k=k, named_parameters=model.named_parameters())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(
        sgd, named_parameters=model.named_parameters(), compression=compression)
    return model, compression, optimizer

model, compression, optimizer = wrap(20)
for step in range(5):
    optimizer.zero_grad()
    model(torch.randn(4, 40)).square().sum().backward()
    optimizer.step()
mine = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
assert all(torch.equal(mine, other) for other in hvd.allgather(mine[None]))
total = compression.ledger.total
assert total.mpi == 0 and 0 < total.horovod < total.dense / 10, total

model, compression, optimizer = wrap(20 + rank)
loss = model(torch.randn(4, 40)).square().sum()
with pytest.raises(RankMismatchError, match="rank 0 and rank 1 do not agree.*k=20.*k=21"):
    loss.backward()
with pytest.raises(RankMismatchError, match="mpirun"):
    Checkpoints("nowhere")
print("fine", rank, flush=True)
"""


def horovodrun(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "--network-interface", "lo", *arguments]
    return subprocess.run(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_without_mpi(tmp_path: Path) -> None:
    script = tmp_path / "without_mpi.py"
    script.write_text(WITHOUT_MPI)
    ended = horovodrun("-np", "2", sys.executable, str(script))
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("fine") == 2


@pytest.mark.parametrize("function", ["twins_exchange_at_once(20)", "all_give_up(30)", "one_gives_up()"])
def test_buckets_without_mpi(tmp_path: Path, function: str) -> None:
    script = tmp_path / "buckets.py"
    script.write_text(f"""
import faulthandler, horovod.torch as hvd, test_buckets
faulthandler.dump_traceback_later(60, exit=True)
hvd.init()
assert not hvd.mpi_enabled()
test_buckets.{function}
""")
    ended = horovodrun("-np", "2", sys.executable, str(script))
    assert ended.returncode == 0, ended.stdout


def test_a_rank_comes_one_goes_and_one_dies(tmp_path: Path) -> None:
    """The script verifies to the bit that nothing is lost. 127.0.0.1 is a second host, which may be lost."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost:2\n")
    discovery = tmp_path / "discovery.sh"
    discovery.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discovery.chmod(0o755)
    elastic = ["--min-np", "1", "--max-np", "3", "--host-discovery-script", str(discovery)]
    script = [sys.executable, str(TESTS / "elastic_training.py"), str(hosts)]
    # On a busy machine the others wait long until a new rank has imported torch.
    ended = horovodrun("-np", "2", *elastic, "--gloo-timeout-seconds", "90", *script, timeout=240)
    assert ended.returncode == 0, ended.stdout
    assert "all is there" in ended.stdout, ended.stdout
