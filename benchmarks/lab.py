"""A small cluster on this machine: nodes with a network card, host name and shared memory of their own.

    sudo python benchmarks/lab.py --nodes 4 --ranks-per-node 2 -- python -c 'import os; print(os.uname())'

Each node is a network namespace whose card (a veth pair) is plugged into a bridge; a token bucket holds the card up
in both directions. Open MPI starts ranks there through an agent in the place of ssh, takes shared memory within a
node, and TCP over the cards between nodes. Needs root, and the programs ip, tc and unshare. Everything ends with the
program.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

NETWORK = "198.18.78"  # reserved for tests
CARD = "eth0"
BURST = "256kb"
# What ssh would be: HOST COMMAND…
AGENT = """#!/bin/sh
host=$1; shift
exec ip netns exec {prefix}$host unshare --mount --uts --ipc --propagation private sh -c '
hostname "$0" && mount --bind {hosts} /etc/hosts && mount -t tmpfs shm /dev/shm && exec sh -c "$*"' "$host" "$@"
"""


def missing() -> str | None:
    """Why there can be no lab here, if so."""
    absent = [program for program in ("ip", "tc", "unshare", "mount") if not shutil.which(program)]
    if absent:
        return f"no {', '.join(absent)} on PATH (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "only root may make namespaces"
    namespace = f"hvdc{os.getpid()}-try"
    for command in (
        f"ip netns add {namespace}",
        f"ip -n {namespace} link add v type veth peer name w",
        f"ip netns exec {namespace} unshare --mount --uts --ipc true",
        f"tc -n {namespace} qdisc add dev v root tbf rate 1gbit burst {BURST} latency 100ms",
    ):
        tried = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        if tried.returncode:
            break
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
    return f"{command!r} is not permitted here: {tried.stderr.strip()}" if tried.returncode else None


class Lab:
    """A cluster for the length of a ``with`` block.

    Args:
        nodes: how many.
        rate: of each node's card in each direction, in tc's units; None for as fast as it goes.

    Raises:
        RuntimeError: there can be none here.
    """

    def __init__(self, nodes: int, rate: str | None) -> None:
        self._prefix = f"hvdc{os.getpid()}-"
        self._names = [f"node{i}" for i in range(1, nodes + 1)]
        self._rate = rate
        self._directory = Path(tempfile.mkdtemp(prefix="hvd-compress-lab-"))

    def __enter__(self) -> Lab:
        if reason := missing():
            raise RuntimeError(f"no lab: {reason}")
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def command(self, ranks_per_node: int, program: Sequence[str], environment: Sequence[str] = ()) -> list[str]:
        """What runs ``program`` on ``ranks_per_node`` ranks of each node.

        Args:
            ranks_per_node: whatever the number of cores.
            program: its command line.
            environment: names of variables that the ranks get too.
        """
        beside_python = Path(sys.executable).parent / "mpirun"
        mpirun = str(beside_python) if beside_python.exists() else "mpirun"
        hosts = ",".join(f"{name}:{ranks_per_node}" for name in self._names)
        line = [mpirun, "-np", str(ranks_per_node * len(self._names)), "--host", hosts]
        line += ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--map-by", "slot"]
        line += ["--prtemca", "plm_ssh_agent", str(self._agent), "--prtemca", "prte_if_include", CARD]
        line += ["--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp", "--mca", "btl_tcp_if_include", CARD]
        line += ["--mca", "mpi_yield_when_idle", "1"]
        for name in ("OMP_NUM_THREADS", "PYTHONPATH", *environment):
            if name in os.environ:
                line += ["-x", name]
        return [str(self._agent), self._names[0], shlex.join([*line, *program])]

    def run(
        self, ranks_per_node: int, program: Sequence[str], environment: Sequence[str] = (), timeout: float = 300
    ) -> str:
        """Run ``program`` to its end and return what it printed on stdout; see :meth:`command`.

        Raises:
            RuntimeError: it failed, or did not end in time; the text has its output.
        """
        process = subprocess.Popen(
            self.command(ranks_per_node, program, environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._kill()
            output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{shlex.join(program)} ended with {process.returncode}:\n{output}\n{errors}")
        return output

    @property
    def _agent(self) -> Path:
        return self._directory / "agent"

    def _start(self) -> None:
        hosts = "".join(f"{NETWORK}.{i} {name}\n" for i, name in enumerate(self._names, start=1))
        (self._directory / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        self._agent.write_text(AGENT.format(prefix=self._prefix, hosts=self._directory / "hosts"))
        self._agent.chmod(0o755)
        switch = f"{self._prefix}switch"
        _call(f"ip netns add {switch}")
        _call(f"ip -n {switch} link add bridge type bridge")
        _call(f"ip -n {switch} link set bridge up")
        for i, name in enumerate(self._names, start=1):
            node = self._prefix + name
            _call(f"ip netns add {node}")
            _call(f"ip -n {switch} link add {name} type veth peer name {CARD} netns {node}")
            _call(f"ip -n {switch} link set {name} master bridge up")
            _call(f"ip -n {node} link set lo up")
            _call(f"ip -n {node} address add {NETWORK}.{i}/24 dev {CARD}")
            _call(f"ip -n {node} link set {CARD} up")
            for namespace, device in ((switch, name), (node, CARD)) if self._rate else ():
                limit = f"rate {self._rate} burst {BURST} latency 100ms"
                _call(f"tc -n {namespace} qdisc add dev {device} root tbf {limit}")

    def _kill(self) -> None:
        """End what runs in the namespaces, which nobody else has."""
        for name in self._names:
            pids = subprocess.run(
                ["ip", "netns", "pids", self._prefix + name], capture_output=True, text=True, check=False
            ).stdout
            for pid in pids.split():
                subprocess.run(["kill", "-KILL", pid], capture_output=True, check=False)

    def _stop(self) -> None:
        self._kill()
        for name in (*self._names, "switch"):
            subprocess.run(["ip", "netns", "delete", self._prefix + name], capture_output=True, check=False)
        shutil.rmtree(self._directory, ignore_errors=True)


def _call(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


def end_on_sigterm() -> None:
    """Let a lab be taken down when the program is told to end."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def main() -> None:
    """Command line."""
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4, help="how many (default: %(default)s)")
    parser.add_argument("--ranks-per-node", type=int, default=2, help="on each (default: %(default)s)")
    parser.add_argument("--rate", default="1gbit", help="of each node's card, in tc's units (default: %(default)s)")
    parser.add_argument("program", nargs="+", help="what to run, after --")
    args = parser.parse_args()
    try:
        with Lab(args.nodes, args.rate) as lab:
            sys.exit(subprocess.run(lab.command(args.ranks_per_node, args.program), check=False).returncode)
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
