"""The launcher on a real Slurm: five nodes, made of namespaces on this machine (slurm/sandbox.py).

The nodes share this machine's cores, so the tests keep the time that jobs compute small, and let what must wait for
Slurm's clock (a time limit) run beside the other tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sandbox import Sandbox

ROOT = Path(__file__).parents[2]
TRAINING = str(Path(__file__).with_name("training.py"))

pytestmark = [pytest.mark.slurm]


class Cluster:
    """The sandbox, and the launcher as a user calls it there."""

    def __init__(self, directory: Path) -> None:
        self.sandbox = Sandbox(directory / "slurm", nodes=5, dies_with_parent=True)
        self.runs = directory / "runs"
        self.folder = directory / "logs"
        self.sandbox.start()

    def submit(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """``slurm/submit.py`` on the login node."""
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = ["env", f"PYTHONPATH={path}", sys.executable, str(ROOT / "slurm" / "submit.py"), *arguments]
        return subprocess.run(
            self.sandbox.command(command), capture_output=True, text=True, timeout=timeout, check=False
        )

    def train(self, name: str, *arguments: str, settings: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """The small training on two nodes, to its end."""
        options = ["--profile=sandbox", *settings, f"--folder={self.folder}", "--follow"]
        return self.submit(*options, "--", TRAINING, f"--output={self.runs / name}", *arguments)

    def start(self, name: str, *arguments: str, settings: Sequence[str] = ()) -> str:
        """The same, until it is submitted; returns the job's number."""
        options = ["--profile=sandbox", *settings, f"--folder={self.folder}"]
        ended = self.submit(*options, "--", TRAINING, f"--output={self.runs / name}", *arguments)
        assert ended.returncode == 0, ended.stderr
        return number(ended)

    def result(self, name: str) -> dict[str, Any]:
        """What the training has written at its end."""
        return json.loads((self.runs / name / "metrics.jsonl").read_text())

    def checkpoints(self, name: str) -> list[str]:
        """Complete ones."""
        return sorted(path.name for path in (self.runs / name / "checkpoint").glob("step-??????????"))

    def state(self, job: str) -> str:
        """As squeue or sacct has it."""
        try:
            listed = self.sandbox.run("squeue", "-h", "-o%T", f"-j{job}", "-t", "all").split()
        except subprocess.CalledProcessError:  # it has forgotten that job
            listed = []
        return (listed or self.sandbox.run("sacct", "-nXPo", "State", f"-j{job}").split())[0]

    def log(self, job: str, kind: str = "out", rank: int = 0) -> str:
        """What a rank has said so far."""
        path = self.folder / f"{job}_{rank}_log.{kind}"
        return path.read_text() if path.exists() else ""

    def story(self, job: str) -> str:
        """All logs, for a failure's report."""
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(self.folder.glob(f"{job}_*_log.*")))

    def wait(self, job: str, condition: Callable[[], object], seconds: float = 300) -> None:
        """Until it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"job {job} is {self.state(job)}\n{self.story(job)}"
            time.sleep(0.3)

    def wait_for_end(self, job: str, seconds: float = 600) -> str:
        """Returns the state that it ended in."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(job, lambda: self.state(job) in ends, seconds)
        return self.state(job)


def number(ended: subprocess.CompletedProcess[str]) -> str:
    """Of the job that was submitted."""
    (job,) = re.findall(r"Submitted job (\d+)", ended.stdout)
    return job


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.sandbox.stop()


@pytest.fixture(scope="module")
def timed_out(cluster: Cluster) -> str:
    """Has two minutes, of which it needs more: Slurm sends its signal while the other tests run."""
    settings = ["--time=2", "--set=signal_seconds=40", '--set=sbatch={nodelist: "node[1-2]"}']
    return cluster.start("timed-out", "--pause=2.5", settings=settings)


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, timed_out: str) -> dict[str, Any]:
    ended = cluster.train("uninterrupted")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "COMPLETED" in ended.stdout
    return {**cluster.result("uninterrupted"), "output": ended.stdout}


def test_trains_on_two_nodes_with_sparse_messages(uninterrupted: dict[str, Any]) -> None:
    assert (uninterrupted["ranks"], uninterrupted["hosts"], uninterrupted["exchanges"]) == (4, 2, 10)
    assert uninterrupted["ratio"] > 20
    report = uninterrupted["output"]
    assert re.search(r"node\d: ranks 0, 1;", report)
    assert re.search(r"node\d: ranks 2, 3;", report)
    assert "horovod 0.28.1" in report


def test_mpirun_inside_the_allocation(cluster: Cluster, uninterrupted: dict[str, Any]) -> None:
    ended = cluster.train("mpirun", settings=["--launcher=mpirun"])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert cluster.result("mpirun")["digest"] == uninterrupted["digest"]
    assert cluster.result("mpirun")["hosts"] == 2


class TestErrors:
    def test_wrong_partition(self, cluster: Cluster) -> None:
        ended = cluster.train("never", settings=["--partition=gpus"])
        assert ended.returncode == 1
        assert "error: sbatch refused the job: " in ended.stderr
        assert "invalid partition specified: gpus" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_bad_profile(self, cluster: Cluster, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("partition: debug\nrank_per_node: 2\n")
        ended = cluster.submit(f"--profile={tmp_path / 'mine.yaml'}", "--", TRAINING)
        assert ended.returncode == 1
        assert "unknown setting 'rank_per_node': did you mean 'ranks_per_node'?" in ended.stderr

    def test_script_that_raises_on_one_rank(self, cluster: Cluster, timed_out: str) -> None:
        ended = cluster.train("raises", "--raise-at=3", settings=["--ranks-per-node=1"])
        assert ended.returncode == 1
        assert "FAILED" in ended.stdout
        job = number(ended)
        assert "RuntimeError: this rank was told to fail in step 3" in cluster.log(job, "err", rank=1)
        assert "restarted 1 times" not in cluster.log(job)  # its own error is no reason to start it again

    def test_ranks_that_do_not_find_each_other(self, cluster: Cluster, timed_out: str) -> None:
        """Without PMIx, each task would train a model of its own and report success."""
        ended = cluster.train("singletons", settings=["--mpi=none"])
        assert ended.returncode == 1
        assert "MPI sees 1 rank(s), the job has 4" in ended.stderr
        assert not (cluster.runs / "singletons").exists()

    def test_restarted_too_often(self, cluster: Cluster, timed_out: str) -> None:
        options = ["--profile=sandbox", "--nodes=1", "--set=max_requeues=0", f"--folder={cluster.folder}"]
        job = number(cluster.submit(*options, "--", str(Path(__file__).with_name("idle.py"))))
        cluster.wait(job, lambda: "begins" in cluster.log(job))
        cluster.sandbox.run("scontrol", "requeue", job)  # as Slurm does when a node fails
        assert cluster.wait_for_end(job) == "FAILED"
        assert "this is restart 1, and max_requeues=0" in cluster.log(job, "err")


def test_cancel(cluster: Cluster, timed_out: str) -> None:
    """It saves its state, since a cancellation looks like a preemption; and it stays cancelled."""
    job = cluster.start("cancelled", "--pause=0.5", settings=["--ranks-per-node=1"])
    cluster.wait(job, lambda: "starts at" in cluster.log(job))
    assert cluster.submit("cancel", job).returncode == 0
    assert cluster.wait_for_end(job) == "CANCELLED"
    time.sleep(3)
    assert cluster.state(job) == "CANCELLED"
    refused = cluster.submit("cancel", "99999")
    assert refused.returncode == 1
    assert "error: there is no job 99999" in refused.stderr


def test_sweep(cluster: Cluster, tmp_path: Path, timed_out: str) -> None:
    (tmp_path / "grid.yaml").write_text("- {ratio: [0.01], seed: [0, 1]}\n- {ratio: [0.1], steps: [3]}\n")
    sweep, options = cluster.runs / "sweep", [f"--folder={cluster.folder}", "--profile=sandbox", "--nodes=1"]
    options += ["--ranks-per-node=1"]
    ended = cluster.submit(
        "sweep", str(tmp_path / "grid.yaml"), f"--output={sweep}", *options, "--", TRAINING, "--output={run}"
    )
    assert ended.returncode == 0, ended.stderr
    job = re.findall(r"Submitted 3 jobs, (\d+)_0", ended.stdout)[0]
    ended = cluster.submit("collect", "--wait", str(sweep))
    assert ended.returncode == 0, ended.stderr
    for place in range(3):
        assert cluster.state(f"{job}_{place}") == "COMPLETED", cluster.story(f"{job}_{place}")
    assert re.search(r" 0\.01\s+│\s+│\s+2 │", ended.stdout), ended.stdout
    assert (sweep / "accuracy-vs-megabytes.png").exists()
    sent = [json.loads(p.read_text())["megabytes_sent"] for p in sorted(sweep.glob("*/metrics.jsonl"))]
    assert sent[0] == pytest.approx(sent[1], rel=0.1)
    assert sent[2] != pytest.approx(sent[0], rel=0.1)


def test_preempted(cluster: Cluster, uninterrupted: dict[str, Any]) -> None:
    """A job of a higher partition takes the nodes; what it evicts goes on afterwards, bit for bit."""
    nodes = '--set=sbatch={nodelist: "node[3-4]", exclusive: true}'
    job = cluster.start("preempted", "--pause=0.3", settings=["--partition=low", nodes])
    cluster.wait(job, lambda: "starts at step 0" in cluster.log(job))
    cluster.sandbox.run("srun", "-p", "high", "-N2", "-w", "node[3-4]", "--exclusive", "sleep", "1", timeout=300)
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.story(job)
    assert "saved step" in cluster.log(job)
    assert "restarted 1 times" in cluster.log(job)
    result = cluster.result("preempted")
    assert result["start"] > 0
    assert result["digest"] == uninterrupted["digest"]


def test_a_node_boots_beside_others(cluster: Cluster) -> None:
    """Of which one is at work, and one has crashed."""
    job = cluster.sandbox.run("sbatch", "--parsable", "-wnode3", "-o/dev/null", "--wrap=sleep 60").strip()
    cluster.wait(job, lambda: cluster.state(job) == "RUNNING")
    cluster.sandbox.crash("node4")
    cluster.sandbox.crash("node5")
    cluster.wait(job, lambda: cluster.sandbox.run("sinfo", "-hNpdebug", "-o%t").split()[3:] == ["down*", "down*"])
    cluster.sandbox.boot("node5")
    assert cluster.sandbox.run("srun", "-wnode5", "hostname").strip() == "node5"
    cluster.sandbox.boot("node4")
    assert cluster.sandbox.run("srun", "-wnode4", "hostname").strip() == "node4"
    cluster.sandbox.run("scancel", job)


def test_node_is_lost(cluster: Cluster, uninterrupted: dict[str, Any]) -> None:
    """Not the one that runs sbatch's file: the other ranks fail before Slurm notices, which is the harder case."""
    options = ["--set=sbatch={exclude: 'node[1-2]'}"]
    job = cluster.start("lost", "--pause=0.5", "--save-every=4", settings=options)
    cluster.wait(job, lambda: "step-0000000004" in cluster.checkpoints("lost"))
    (last,) = re.findall(r"(node\d): ranks 2, 3", cluster.log(job))
    assert cluster.sandbox.run("squeue", "-ho%B", f"-j{job}").split() != [last]
    cluster.sandbox.crash(last)
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.story(job)
    assert re.search(r"restarted [1-9]", cluster.log(job)), cluster.story(job)
    result = cluster.result("lost")
    assert 4 <= result["start"] < 40
    assert result["digest"] == uninterrupted["digest"]


def test_time_out(cluster: Cluster, timed_out: str, uninterrupted: dict[str, Any]) -> None:
    """The limit is real: Slurm sends the signal by its own clock."""
    assert cluster.wait_for_end(timed_out) == "COMPLETED", cluster.story(timed_out)
    assert "saved step" in cluster.log(timed_out)
    assert "restarted 1 times" in cluster.log(timed_out)
    result = cluster.result("timed-out")
    assert result["start"] > 0
    assert result["digest"] == uninterrupted["digest"]


def test_sacct_answers(cluster: Cluster, uninterrupted: dict[str, Any]) -> None:
    """After some time, only the accounting knows a job that has ended; it writes times in another way."""
    job = re.findall(r"Submitted job (\d+)", uninterrupted["output"])[0]
    cluster.wait(job, lambda: job not in cluster.sandbox.run("squeue", "-h", "-o%i", "-t", "all").split())
    ended = cluster.submit("status", job, f"--folder={cluster.folder}")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"training\s+│ COMPLETED\s+│ 00:", ended.stdout), ended.stdout


def test_a_shell_inside_is_told_to_exit(cluster: Cluster) -> None:
    """It does not see the nodes' processes, so `stop` would forget them and leave them running."""
    script = [sys.executable, str(ROOT / "slurm" / "sandbox.py"), f"--directory={cluster.sandbox.directory}", "stop"]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        cluster.sandbox.run(*script)
    assert (
        refused.value.stderr == "error: this is a shell in the sandbox, from where its processes are not seen: exit\n"
    )
    assert cluster.sandbox.run("hostname") == "ctl\n"


def test_nothing_is_left() -> None:
    """After a stop, and after the end of the process that started it."""
    script = (
        "import sys, os, signal; from pathlib import Path; from sandbox import Sandbox\n"
        "sandbox = Sandbox(Path(sys.argv[1]), nodes=1, dies_with_parent=True)\n"
        "sandbox.start()\n"
        "print(*[pid for pid, _ in sandbox._hosts().values()], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    directory = f"/tmp/hvd-compress-left-{os.getpid()}"
    ended = subprocess.run(
        [sys.executable, "-c", script, directory],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "slurm")},
        check=False,
    )
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2, ended.stderr
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert directory not in commands
