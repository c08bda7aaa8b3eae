#!/usr/bin/env python3
"""A private Slurm cluster of several nodes on this machine, to try the launcher and to test it.

    python slurm/sandbox.py start                 a controller with accounting, and four nodes
    python slurm/sandbox.py exec -- sinfo         a command on the controller, which is also the login node
    python slurm/sandbox.py crash node2           what a power failure does; boot node2 ends it
    python slurm/sandbox.py stop                  nothing is left

Every node is a set of Linux namespaces: its own host name, network card, process table and shared memory. So host
names differ, MPI's messages between nodes really take a network (a bridge), and a crash takes all of a node with it.
What the nodes share is the file system, as on most clusters. The GPUs are pretended: Slurm counts them, and there is
nothing behind them.

Needs root, and on Debian 12: apt-get install --no-install-recommends $(python3 slurm/sandbox.py packages)
No configuration of the system is touched; everything lies in one directory, and all processes live in one process
namespace that ends as a whole.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

PACKAGES = (
    "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libpmix-dev iproute2 slurmdbd "
    "slurm-wlm-mysql-plugin mariadb-server"
)
PROGRAMS = [
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "munged",
    "slurmdbd",
    "mariadbd",
    "mariadb-install-db",
    "ip",
    "unshare",
    "nsenter",
]
NETWORK = "198.18.77"  # reserved for tests, and seen by the sandbox only
CONTROLLER = "ctl"
DIRECTORY = Path(tempfile.gettempdir()) / "hvd-compress-slurm"
# Process 1 of each host: collects orphans, does nothing, and takes all others with it when it is killed.
INIT = """
set -e
hostname {name}
mount --bind {hosts} /etc/hosts
mount -t tmpfs shm /dev/shm
ip link set lo up
set +e
echo > {ready}
while :; do sleep 3600 & wait; done
"""
HOST = [
    "unshare",
    "--fork",
    "--kill-child",
    "--pid",
    "--mount-proc",
    "--mount",
    "--net",
    "--uts",
    "--ipc",
    "--propagation",
    "private",
]


class SandboxError(RuntimeError):
    """It could not be started; the text says what to do."""


def missing() -> str | None:
    """Why a sandbox cannot run here, if so."""
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    if absent:
        return f"no {', '.join(absent)} on PATH: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "only root may make namespaces"
    tried = subprocess.run([*HOST, "true"], capture_output=True, text=True, check=False)
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else None


class Sandbox:
    """One cluster.

    Args:
        directory: all its files; it is made, and must be seen by this machine only.
        nodes: how many, besides the controller.
        cpus: that each node says to have, whatever this machine has.
        gpus: that each node pretends to have, at most 2.
        dies_with_parent: end it with the process that starts it, even if that is killed.
    """

    def __init__(
        self,
        directory: Path = DIRECTORY,
        *,
        nodes: int = 4,
        cpus: int = 4,
        gpus: int = 2,
        dies_with_parent: bool = False,
    ) -> None:
        self.directory = directory.absolute()
        self.names = [f"node{i}" for i in range(1, nodes + 1)]
        self._cpus = cpus
        self._gpus = gpus
        self._tie = ["setpriv", "--pdeathsig", "KILL"] if dies_with_parent else []
        self._record = self.directory / "processes.json"

    def start(self) -> None:
        """Start all, and wait until all nodes are up.

        Raises:
            SandboxError: it cannot run here, runs already, or a part of it did not come up.
        """
        if reason := missing():
            raise SandboxError(reason)
        if self._hosts():
            raise SandboxError(f"a sandbox is running in {self.directory}: stop it first")
        shutil.rmtree(self.directory, ignore_errors=True)
        for name in ("etc", "run", "log", "state", "spool", "database", "tmp"):
            (self.directory / name).mkdir(parents=True)
        self._configure()
        try:
            self._start_controller()
            for name in self.names:
                self.boot(name, wait=False)
            self._until(30, lambda: self._are_up(*self.names), "the nodes")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all of it at once; its files stay for reading."""
        for name, process in sorted(self._hosts().items()):  # the controller first: the nodes are inside of it
            if _is_alive(process):
                os.kill(process[0], signal.SIGKILL)
            self._until(20, partial(_is_dead, process), f"the end of {name}")
        self._record.unlink(missing_ok=True)

    def command(self, arguments: Sequence[str], host: str = CONTROLLER) -> list[str]:
        """What runs ``arguments`` on a host, in the present directory."""
        target = str(self._hosts()[host][0])
        enter = ["nsenter", "--target", target, "--mount", "--net", "--uts", "--ipc", "--pid"]
        return [*enter, f"--wdns={os.getcwd()}", "env", f"SLURM_CONF={self._conf}", *arguments]

    def run(self, *arguments: str, host: str = CONTROLLER, timeout: float = 60) -> str:
        """Run a command to its end and return what it printed on stdout.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        command = self.command(arguments, host)
        ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        if ended.returncode:
            raise subprocess.CalledProcessError(ended.returncode, arguments, ended.stdout, ended.stderr)
        return ended.stdout

    def crash(self, name: str) -> None:
        """End all processes of a node, as if its power failed."""
        process = self._hosts()[name]
        if _is_alive(process):
            os.kill(process[0], signal.SIGKILL)
        self._until(10, partial(_is_dead, process), f"the end of {name}")
        self._remember(name, None)

    def boot(self, name: str, *, wait: bool = True) -> None:
        """Start a node, or start it again."""
        if name not in self.names:
            raise SandboxError(f"there is no {name}, only {', '.join(self.names)}")
        if name in self._hosts():
            raise SandboxError(f"{name} is running")
        number = self.names.index(name) + 1
        within = self.command([])
        within = within[: within.index("env")]
        pid = self._host(name, [*within, *HOST], depth=2)
        network = ["nsenter", "--target", str(self._hosts()[CONTROLLER][0]), "--net", "ip", "link"]
        _check([*network, "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(pid)])
        _check([*network, "set", f"v-{name}", "master", "br0", "up"])
        self.run("ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0", host=name)
        self.run("ip", "link", "set", "eth0", "up", host=name)
        for folder in ("spool", "tmp"):  # a crash leaves sockets behind, which slurmd does not clear away
            shutil.rmtree(self.directory / folder / name, ignore_errors=True)
            (self.directory / folder / name).mkdir()
        self.run("slurmd", "-N", name, host=name)
        if wait:
            self._until(30, lambda: self._are_up(name), name)

    def is_around(self) -> bool:
        """Whether this process was started in it, by :meth:`command`: process ids in there are others."""
        return os.environ.get("SLURM_CONF") == str(self._conf)

    @property
    def _conf(self) -> Path:
        return self.directory / "etc" / "slurm.conf"

    def _host(self, name: str, command: list[str], depth: int) -> int:
        """Make namespaces; returns the process id of their process 1, ``depth`` generations below ``command``."""
        ready = self.directory / "run" / f"{name}.ready"
        ready.unlink(missing_ok=True)
        log = (self.directory / "log" / f"{name}.log").open("a")
        script = INIT.format(name=name, hosts=self.directory / "etc" / "hosts", ready=ready)
        started = subprocess.Popen(
            [*command, "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self._until(10, lambda: ready.exists() or started.poll() is not None, f"the host {name}")
        if started.poll() is not None:
            raise SandboxError(f"no namespaces for {name}: see {log.name}")
        pid = started.pid
        for _ in range(depth):
            (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[:1])
        self._remember(name, pid)
        return pid

    def _hosts(self) -> dict[str, tuple[int, str]]:
        """Process 1 of each host: its id out here, and when it began, since ids are used again."""
        try:
            record: dict[str, Any] = json.loads(self._record.read_text())
        except FileNotFoundError:
            return {}
        return {name: (pid, began) for name, (pid, began) in record.items() if _is_alive((pid, began))}

    def _remember(self, name: str, pid: int | None) -> None:
        record: dict[str, Any] = {**self._hosts()}
        if pid is None:
            record.pop(name, None)
        else:
            record[name] = (pid, _began(pid))
        self._record.write_text(json.dumps(record))

    def _start_controller(self) -> None:
        self._host(CONTROLLER, [*self._tie, *HOST], depth=1)
        for arguments in ("add br0 type bridge", "set br0 up"):
            self.run("ip", "link", *arguments.split())
        self.run("ip", "address", "add", f"{NETWORK}.254/24", "dev", "br0")
        run, log, etc = (self.directory / name for name in ("run", "log", "etc"))
        self.run(
            "munged",
            "--force",  # the socket may lie below /tmp
            f"--socket={run}/munge.sock",
            f"--key-file={etc}/munge.key",
            f"--pid-file={run}/munged.pid",
            f"--log-file={log}/munged.log",
            f"--seed-file={run}/munged.seed",
        )
        defaults = f"--defaults-file={etc}/my.cnf"
        self.run("mariadb-install-db", defaults, "--skip-test-db")
        self.run("sh", "-c", f"setsid mariadbd {shlex.quote(defaults)} </dev/null >/dev/null 2>&1 &")
        sql = ["mariadb", "--no-defaults", "-uroot", f"--socket={run}/mysql.sock", "-e"]
        self._until_runs(30, *sql, "create database slurm_acct_db")
        self.run("env", f"MYSQL_UNIX_PORT={run}/mysql.sock", "slurmdbd")
        self._until_runs(30, "sacctmgr", "-i", "-Q", "add", "cluster", "sandbox")
        self.run("sacctmgr", "-i", "-Q", "add", "account", "lab")
        self.run("sacctmgr", "-i", "-Q", "add", "user", "root", "account=lab")
        self.run("slurmctld", "-i")

    def _are_up(self, *names: str) -> bool:
        """Idle, at work or drained; Slurm marks a node that does not answer with a star."""
        states = self.run("sinfo", "-h", "-p", "debug", "-N", "-n", ",".join(names), "-o", "%t").split()
        return len(states) == len(names) and not any(re.match(r"down|unk|.*\*$", state) for state in states)

    def _until_runs(self, seconds: float, *arguments: str) -> None:
        def runs() -> bool:
            try:
                self.run(*arguments)
            except subprocess.CalledProcessError:
                return False
            return True

        self._until(seconds, runs, arguments[0])

    def _until(self, seconds: float, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except subprocess.CalledProcessError:  # not yet
                pass
            if time.monotonic() > deadline:
                raise SandboxError(f"waited {seconds:g} s for {what}: see {self.directory / 'log'}")
            time.sleep(0.1)

    def _configure(self) -> None:
        home, etc = self.directory, self.directory / "etc"
        addresses = {name: f"{NETWORK}.{i}" for i, name in enumerate(self.names, start=1)}
        hosts = {"localhost": "127.0.0.1", CONTROLLER: f"{NETWORK}.254", **addresses}
        (etc / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        key = etc / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (etc / "plugstack.conf").touch()
        devices = ["/dev/null", "/dev/zero"][: self._gpus]  # Slurm wants a device file for each
        (etc / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        # Nodes share /tmp here, ranks run as root, and share cores. mpirun would bind the ranks of each node to the
        # same few of them, where one that waits can starve one that another node's rank waits for.
        prolog = etc / "prolog.sh"
        settings = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
        settings |= dict.fromkeys(("PRTE_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
        settings |= {"OMPI_MCA_mpi_yield_when_idle": "1", "PRTE_MCA_hwloc_default_binding_policy": "none"}
        exports = "".join(f"echo export {name}={value}\n" for name, value in settings.items())
        prolog.write_text(f"#!/bin/sh\necho export TMPDIR={home}/tmp/$SLURMD_NODENAME\n{exports}")
        prolog.chmod(0o755)
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={address} Port=26818 CPUs={self._cpus} RealMemory=4000 Gres=gpu:{len(devices)}"
            for name, address in addresses.items()
        )
        self._conf.write_text(SLURM_CONF.format(home=home, network=NETWORK, nodes=nodes))
        slurmdbd = etc / "slurmdbd.conf"
        slurmdbd.write_text(SLURMDBD_CONF.format(home=home, network=NETWORK))
        slurmdbd.chmod(0o600)
        (etc / "my.cnf").write_text(MY_CNF.format(home=home))


def _check(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _began(pid: int) -> str:
    """In clock ticks since the machine started; empty when it is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _is_alive(process: tuple[int, str]) -> bool:
    return bool(process[1]) and _began(process[0]) == process[1]


def _is_dead(process: tuple[int, str]) -> bool:
    return not _is_alive(process)


# cred_expire and the short time-outs make requeues and failures quick; a real cluster takes minutes for each.
SLURM_CONF = """\
ClusterName=sandbox
SlurmctldHost=ctl({network}.254)
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/run/munge.sock,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/run/slurmctld.pid
SlurmdPidFile={home}/run/slurmd.%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd.%n.log
TmpFS={home}/tmp/%n
PlugStackConfig={home}/etc/plugstack.conf
TaskProlog={home}/etc/prolog.sh
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=200000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=5
SlurmctldTimeout=10
SlurmdTimeout=10
TCPTimeout=2
PropagateResourceLimits=NONE
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={network}.254
AccountingStoragePort=26819
AccountingStoragePass={home}/run/munge.sock
JobAcctGatherType=jobacct_gather/linux
{nodes}
PartitionName=debug Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={home}/run/munge.sock
DbdHost=ctl
DbdAddr={network}.254
DbdPort=26819
SlurmUser=root
LogFile={home}/log/slurmdbd.log
PidFile={home}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""

MY_CNF = """\
[mysqld]
user=root
datadir={home}/database
socket={home}/run/mysql.sock
pid-file={home}/run/mariadbd.pid
log-error={home}/log/mariadbd.log
skip-networking
skip-grant-tables
innodb_buffer_pool_size=64M
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="of its files (%(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="how many; the same for all commands (%(default)s)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("start", "start a cluster"),
        ("stop", "end it"),
        ("packages", "those of Debian 12 that it needs"),
    ):
        commands.add_parser(name, help=text)
    for name, text in (("crash", "end a node's processes"), ("boot", "start a node again")):
        commands.add_parser(name, help=text).add_argument("node")
    commands.add_parser("exec", help="run a command on it").add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    sandbox = Sandbox(args.directory, nodes=args.nodes)
    if sandbox.is_around() and args.command != "packages":
        sys.exit("error: this is a shell in the sandbox, from where its processes are not seen: exit")
    try:
        if args.command == "packages":
            print(PACKAGES)
        elif args.command == "start":
            began = time.monotonic()
            sandbox.start()
            print(f"{len(sandbox.names)} nodes are up after {time.monotonic() - began:.0f} s, in {sandbox.directory}")
        elif args.command == "stop":
            sandbox.stop()
        elif args.command == "exec":
            command = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
            line = sandbox.command(command or ["bash"])
            os.execvp(line[0], line)
        else:
            getattr(sandbox, args.command)(args.node)
    except KeyError as error:
        sys.exit(f"error: {error} is not running: python slurm/sandbox.py start")
    except (SandboxError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error} {getattr(error, 'stderr', '')}")


if __name__ == "__main__":
    main()
