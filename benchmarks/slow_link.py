"""A training step of ResNet-50 over slow links: two ranks on this machine, whose traffic a token bucket holds up.

    sudo python benchmarks/slow_link.py

For each rate, a network namespace of its own is made whose loopback device sends no faster than that; MPI is told to
use TCP on it. Both directions share the device, as on a half-duplex link. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RATES = {"10gbit": None, "1gbit": 4, "100mbit": 1}
"""Rate of the link, and steps of plain Horovod in a round there, if others than --steps."""


def main() -> None:
    """Measure at all rates, and print a table for each."""
    parser = argparse.ArgumentParser(description="A training step of ResNet-50 over slow links.")
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="of the link, in tc's units")
    parser.add_argument("--steps", type=int, default=8, help="of each method in a round (default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=6,
        help="in turn with the others; plain Horovod takes part in two (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="file for the seconds, which figures.py draws")
    args = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("tc") or not shutil.which("ip"):
        sys.exit("slow links need root, and the programs ip and tc (Debian: iproute2); nothing was measured")
    measured: dict[str, dict[str, float]] = {}
    for rate in args.rates:
        load = os.getloadavg()[0]
        with namespace(rate) as name:
            seconds = train_in(name, args.steps, args.rounds, RATES.get(rate))
        report(rate, seconds, load)
        measured[rate] = seconds
    if args.json:
        args.json.write_text(json.dumps(measured))


@contextmanager
def namespace(rate: str) -> Iterator[str]:
    """A network namespace whose loopback device has the given rate."""
    name = f"hvd-compress-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        inside = ["ip", "netns", "exec", name]
        subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)
        limit = ["rate", rate, "burst", "1mb", "latency", "100ms"]
        subprocess.run([*inside, "tc", "qdisc", "add", "dev", "lo", "root", "tbf", *limit], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def train_in(name: str, steps: int, rounds: int, dense_steps: int | None) -> dict[str, float]:
    """Seconds for a step by method, from two ranks in the namespace."""
    beside_python = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside_python) if beside_python.exists() else "mpirun"
    command = ["ip", "netns", "exec", name, mpirun, "-np", "2", "--allow-run-as-root", "--oversubscribe"]
    command += ["--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
    command += ["--mca", "pml", "ob1", "--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo"]
    command += [sys.executable, str(HERE / "train_step.py"), "--steps", str(steps), "--rounds", str(rounds)]
    command += ["--dense-steps", str(dense_steps)] if dense_steps else []
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def report(rate: str, seconds: dict[str, float], load: float) -> None:
    """A table for one rate."""
    compute = seconds["compute only"]
    fp16 = seconds["Horovod, fp16"] - compute
    rows = Table(title=f"ResNet-50, 2 ranks, {rate}; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    rows.add_column("method")
    for heading in ("s per step", "exposed s", "of fp16's", "of compute"):
        rows.add_column(heading, justify="right")
    for name, value in seconds.items():
        exposed = value - compute
        share = f"1/{fp16 / exposed:.1f}" if 0 < exposed < fp16 else f"{exposed / fp16:.2f}"
        exposure = ["", ""] if name == "compute only" else [f"{exposed:.3f}", share]
        rows.add_row(name, f"{value:.3f}", *exposure, f"{value / compute:.2f}×")
    Console(force_terminal=False, width=100).print(rows)


if __name__ == "__main__":
    main()
