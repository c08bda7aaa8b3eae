"""Checkpoints: all ranks' or none, whatever happens, and one decision for all ranks."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from models import interrupted_soon, through_a_file
from world import World, environment, launch, mpirun_command

import hvd_compress
from hvd_compress import Checkpoints, Interruption, random_state, set_random_state

EXAMPLES = Path(__file__).parent.parent / "examples"

# Each rank's state says whose it is and of which step, in every element.
SAVES_FOR_EVER = """
import sys, torch, horovod.torch as hvd
from hvd_compress import Checkpoints
hvd.init()
checkpoints = Checkpoints(sys.argv[1])
saved = checkpoints.load()
step = saved.step if saved else 0
if saved:
    assert torch.equal(saved.state["w"], torch.full((200_000,), 10.0 * step + hvd.rank())), saved.state["w"]
    assert set(hvd.allgather_object(step)) == {step}
print("starts at", step, flush=True)
while True:
    step += 1
    checkpoints.save(step, {"w": torch.full((200_000,), 10.0 * step + hvd.rank())})
"""

INTERRUPTED = """
import os, signal, sys, time, horovod.torch as hvd
import hvd_compress
hvd.init()
interruption = hvd_compress.Interruption()
assert not interruption.agreed()
step = 0
while not interruption.agreed():
    step += 1
    if step == 5 and hvd.rank() == int(sys.argv[1]):
        os.kill(os.getpid(), int(sys.argv[2]))
        while not interruption.requested:  # another thread may be handed the signal, and Python hear of it later
            time.sleep(0.001)
print("stopped", hvd.allgather_object(step), flush=True)
hvd.barrier()
sys.exit(hvd_compress.EXIT_REQUEUE)
"""


SIGNALLED_WITH_ITS_WORKERS = """
import os, signal, sys, torch

class Pids(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return os.getpid()

if __name__ == "__main__":
    import horovod.torch as hvd
    from hvd_compress import Interruption
    hvd.init()
    interruption = Interruption()
    loader = torch.utils.data.DataLoader(
        Pids(), num_workers=1, multiprocessing_context=sys.argv[1], persistent_workers=True
    )
    seen = 0
    for (pid,) in loader:
        if not seen:
            for number in (signal.SIGTERM, signal.SIGUSR2):
                os.kill(pid, number)
                os.kill(os.getpid(), number)
        seen += 1
    print(seen, interruption.requested, flush=True)
"""


@pytest.mark.parametrize("keep", [0, 1.5, "2", True])
def test_keep_is_a_number_of_checkpoints(keep: Any) -> None:
    with pytest.raises(ValueError, match="keep must be a number of checkpoints ≥ 1, got"):
        Checkpoints("nowhere", keep=keep)


@pytest.mark.parametrize(("timeout", "error"), [(-1.0, ValueError), (0, ValueError), (None, TypeError)])
def test_an_interruption_waits_for_a_time(timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout must be"):
        Interruption(timeout=timeout)


def save_and_load(directory: str) -> None:
    checkpoints = Checkpoints(directory, keep=2)
    assert checkpoints.load() is None
    for step in (0, 7, 12, 100):
        checkpoints.save(step, {"rank": hvd.rank(), "w": torch.tensor([step, float("nan"), -0.0])})
        saved = checkpoints.load()
        assert saved is not None
        assert saved.step == step
        assert saved.state["rank"] == hvd.rank()
        expected = torch.tensor([step, float("nan"), -0.0])
        assert torch.equal(saved.state["w"].view(torch.int32), expected.view(torch.int32))
    assert sorted(os.listdir(directory)) == ["step-0000000012", "step-0000000100"]


def save_again(directory: str) -> None:
    checkpoints = Checkpoints(directory)
    checkpoints.save(3, {"first": True})
    checkpoints.save(3, {"first": False})  # interrupted at once after going on
    saved = checkpoints.load()
    assert saved is not None
    assert saved.state == {"first": True}


def save_where_another_run_was(directory: str) -> None:
    checkpoints = Checkpoints(directory, keep=2)
    for step in (100, 200):
        checkpoints.save(step, {"run": "old"})
    for step in (10, 100, 199):
        with pytest.raises(ValueError, match=f"{directory} has a checkpoint of step 200") as caught:
            checkpoints.save(step, {"run": "new"})
        assert f"not from step {step}:" in str(caught.value)
    hvd.barrier()
    assert sorted(os.listdir(directory)) == ["step-0000000100", "step-0000000200"]
    checkpoints.save(201, {"run": "new"})
    saved = checkpoints.load()
    assert saved is not None
    assert saved.state == {"run": "new"}


def one_rank_cannot_write(directory: str) -> None:
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, {"step": 1})
    for wrong, error, text in (
        (lambda: 0, OSError, "[Pp]ickle"),
        (np.float64(2), ValueError, r"could not be loaded again.*tensors, numbers, strings"),
    ):
        unsavable: Any = wrong if hvd.rank() == hvd.size() - 1 else 0
        with pytest.raises(error, match=f"(?s)rank {hvd.size() - 1}: .*{text}"):
            checkpoints.save(2, {"step": unsavable})
        saved = checkpoints.load()
        assert saved is not None
        assert saved.state == {"step": 1}
    checkpoints.save(2, {"step": 2})  # the next attempt clears up
    saved = checkpoints.load()
    assert saved is not None
    assert saved.state == {"step": 2}
    hvd.barrier()


def different_steps(directory: str) -> None:
    with pytest.raises(ValueError, match=r"they are at \[0, 1\]"):
        Checkpoints(directory).save(min(hvd.rank(), 1), {})


def save_once(directory: str) -> None:
    Checkpoints(directory).save(4, {"rank": hvd.rank()})


def load_as_another_world(directory: str) -> str:
    with pytest.raises(ValueError, match="saved by") as caught:
        Checkpoints(directory).load()
    return str(caught.value)


def load_damaged(directory: str) -> str:
    with pytest.raises(OSError, match="cannot be read") as caught:
        Checkpoints(directory).load()
    return str(caught.value)


NUMBERS = torch.arange(1.0, 9.0)


def save_numbers(directory: str) -> None:
    Checkpoints(directory).save(4, {"w": NUMBERS})


def interrupted_as_others_write(directory: str) -> None:
    """By a real Ctrl-C, on a rank that waits for them: the checkpoint is written, and the next one."""
    checkpoints = Checkpoints(directory)
    if hvd.rank() == 0:
        with interrupted_soon():
            checkpoints.save(2, {"x": 1})
    else:
        with mock.patch.object(os, "fsync", side_effect=lambda _: time.sleep(1)):
            checkpoints.save(2, {"x": 1})
    checkpoints.save(3, {"x": 2})
    found = checkpoints.load()
    assert found is not None
    assert (found.step, found.state) == (3, {"x": 2})
    assert sorted(path.name for path in Path(directory).iterdir()) == ["step-0000000002", "step-0000000003"]


def interrupted_while_saving(directory: str, where: str) -> None:
    """By Ctrl-C, after which the program goes on, and later saves again."""
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, {"w": NUMBERS})
    is_here = hvd.rank() == (hvd.size() - 1 if where == "_write" else 0)
    interrupted = mock.patch.object(Checkpoints, where, side_effect=KeyboardInterrupt)
    with (
        interrupted if is_here else contextlib.nullcontext(),
        pytest.raises(KeyboardInterrupt if is_here else OSError, match="" if is_here else "KeyboardInterrupt"),
    ):
        checkpoints.save(2, {"w": NUMBERS})
    found = [checkpoints.load()]
    checkpoints.save(3, {"w": NUMBERS})
    found.append(checkpoints.load())
    assert [saved and saved.step for saved in found] == [1, 3]


def load_of_another_format(directory: str) -> str:
    with pytest.raises(ValueError, match="has format") as caught:
        Checkpoints(directory).load()
    return str(caught.value)


def save_with_swapped_arguments(directory: str) -> None:
    arguments: list[Any] = [{"w": torch.zeros(2)}, 4]
    if hvd.rank():  # one rank's mistake is told to all
        arguments.reverse()
    with pytest.raises(TypeError, match=r"step must be an int ≥ 0, got a dict: save\(step, state\)"):
        Checkpoints(directory).save(*arguments)
    assert not os.listdir(directory)


@pytest.mark.ranks(1, 3)
class TestCheckpoints:
    def test_save_and_load(self, world: World, tmp_path: Path) -> None:
        world.run(save_and_load, str(tmp_path / "a" / "b"))

    def test_a_step_is_saved_once(self, world: World, tmp_path: Path) -> None:
        world.run(save_again, str(tmp_path))

    def test_a_step_below_the_newest_is_refused(self, world: World, tmp_path: Path) -> None:
        world.run(save_where_another_run_was, str(tmp_path))

    def test_swapped_arguments(self, world: World, tmp_path: Path) -> None:
        world.run(save_with_swapped_arguments, str(tmp_path))

    def test_failure_on_one_rank(self, world: World, tmp_path: Path) -> None:
        world.run(one_rank_cannot_write, str(tmp_path))

    def test_damaged_file(self, world: World, tmp_path: Path) -> None:
        world.run(save_once, str(tmp_path))
        last = f"rank-{world.ranks - 1:05d}.pt"
        damaged = tmp_path / "step-0000000004" / last
        damaged.write_bytes(damaged.read_bytes()[:-20])
        for text in world.run(load_damaged, str(tmp_path)):
            assert last in text

    def test_a_bit_that_is_wrong(self, world: World, tmp_path: Path) -> None:
        """Which torch.load does not see."""
        world.run(save_numbers, str(tmp_path))
        last = f"rank-{world.ranks - 1:05d}.pt"
        file = tmp_path / "step-0000000004" / last
        content = bytearray(file.read_bytes())
        content[content.index(NUMBERS.numpy().tobytes()) + 3] ^= 0x40
        file.write_bytes(content)
        assert not torch.equal(torch.load(file)["state"]["w"], NUMBERS)
        for text in world.run(load_damaged, str(tmp_path)):
            assert last in text
            assert "checksum" in text

    def test_an_interrupt_while_others_write(self, world: World, tmp_path: Path) -> None:
        if world.ranks > 1:
            world.run(interrupted_as_others_write, str(tmp_path))

    def test_an_interrupt_on_one_rank(self, world: World, tmp_path: Path) -> None:
        for where in ("_make_room", "_write", "_complete"):
            world.run(interrupted_while_saving, str(tmp_path / where), where)

    @pytest.mark.parametrize("wrong", [{"format": 7}, {"size": 9}], ids=["format", "size"])
    def test_one_file_of_another_format(self, world: World, tmp_path: Path, wrong: dict[str, int]) -> None:
        """Every rank raises, and says which one has found it."""
        world.run(save_once, str(tmp_path))
        file = tmp_path / "step-0000000004" / f"rank-{world.ranks - 1:05d}.pt"
        torch.save({**torch.load(file), **wrong}, file)
        for text in world.run(load_of_another_format, str(tmp_path)):
            assert text.startswith(f"rank {world.ranks - 1}: ValueError")


class TestRanks:
    @pytest.mark.ranks(2)
    def test_different_steps(self, world: World, tmp_path: Path) -> None:
        world.run(different_steps, str(tmp_path))

    @pytest.mark.ranks(3)
    def test_another_number_of_ranks(self, world: World, tmp_path: Path) -> None:
        saved = tmp_path / "step-0000000004"
        saved.mkdir()
        for rank in range(2):
            (saved / f"rank-{rank:05d}.pt").touch()
        for text in world.run(load_as_another_world, str(tmp_path)):
            assert "was saved by 2 ranks, this job has 3" in text


class DyingError(BaseException):
    """Not an Exception: nothing that cleans up after errors must run, as at a kill."""


@contextlib.contextmanager
def dying_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this context the process dies at the next call but so many that changes the disk."""
    made = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            made += 1
            if made > calls:
                raise DyingError
            return original(*arguments, **options)

        return call

    names = [(os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "rmdir"), (os, "unlink"), (torch, "save")]
    with monkeypatch.context() as patched:
        for module, name in names:
            patched.setattr(module, name, dying(getattr(module, name)))
        yield


class TestKills:
    def test_at_every_call_that_changes_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The process dies at its first, second … such call; what was saved before is always whole."""
        hvd.init()
        deaths = 0
        for survived in range(1000):
            directory = tmp_path / str(survived)
            checkpoints = Checkpoints(directory, keep=1)
            checkpoints.save(1, {"w": 1})
            checkpoints.save(2, {"w": 2})
            died = False
            with dying_after(survived, monkeypatch):
                try:
                    checkpoints.save(3, {"w": 3})
                except DyingError:
                    died = True
            after = Checkpoints(directory, keep=1)
            saved = after.load()
            assert saved is not None
            assert saved.state == {"w": saved.step}
            assert saved.step in (2, 3)
            after.save(4, {"w": 4})
            assert os.listdir(directory) == ["step-0000000004"]
            if not died:
                assert saved.step == 3
                break
            deaths += 1
        assert 8 <= deaths < 1000

    def test_while_an_example_deletes_them_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those that are left are whole."""
        hvd.init()
        monkeypatch.syspath_prepend(EXAMPLES)
        resumable = importlib.import_module("resumable")
        for survived in range(7):
            checkpoints = Checkpoints(tmp_path / str(survived), keep=2)
            for step in (1, 2):
                checkpoints.save(step, {"w": step})
            with dying_after(survived, monkeypatch):
                if survived < 6:
                    with pytest.raises(DyingError):
                        resumable._delete(checkpoints.directory)
                else:
                    resumable._delete(checkpoints.directory)
            saved = checkpoints.load()
            assert saved is None or saved.state == {"w": saved.step}
            assert (saved is None) == (survived in (4, 5, 6))

    @pytest.mark.parametrize("call", ["rename", "rmdir"])
    def test_one_that_cannot_be_deleted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
    ) -> None:
        """On NFS, for instance, while another process reads it: what was saved is saved, and the log says so."""
        hvd.init()
        checkpoints, original = Checkpoints(tmp_path, keep=1), getattr(os, call)
        checkpoints.save(1, {"w": 1})

        def refuses(path: Any, *arguments: Any, **options: Any) -> None:
            if "step-0000000001" in os.fspath(path):
                raise OSError(errno.EBUSY, "busy", path)
            original(path, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, refuses)
            for step in (2, 3):
                caplog.clear()
                checkpoints.save(step, {"w": step})
                saved = checkpoints.load()
                assert saved is not None
                assert saved.state == {"w": step}
                assert "cannot be deleted" in caplog.text
        checkpoints.save(4, {"w": 4})
        assert os.listdir(tmp_path) == ["step-0000000004"]

    def test_a_step_of_numpy(self, tmp_path: Path) -> None:
        hvd.init()
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(np.int64(3), {"w": 1})
        saved = checkpoints.load()
        assert saved is not None
        assert (saved.step, saved.state) == (3, {"w": 1})

    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        """Is not taken for the checkpoint of fewer ranks, nor resized."""
        hvd.init()
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(3, {"w": 1})
        (file,) = (tmp_path / "step-0000000003").iterdir()
        for rank in (0, 2):
            torch.save({**torch.load(file), "size": 3}, file.with_name(f"rank-0000{rank}.pt"))
        for resize in (None, hvd_compress.resize):
            with pytest.raises(
                OSError, match=r"was saved by 3 ranks and lacks rank-00001\.pt; to go on from an older"
            ):
                checkpoints.load(resize=resize)
        for left in file.parent.iterdir():
            left.unlink()
        with pytest.raises(OSError, match="holds no rank's file"):
            checkpoints.load()

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch's own error is about positions in the file."""

        class Full(io.FileIO):
            def write(self, data: Any) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        hvd.init()
        monkeypatch.syspath_prepend(EXAMPLES)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, {"w": 1})
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", lambda path, mode: Full(path, mode))
            with pytest.raises(OSError, match=r"rank-00000.pt cannot be written .*No space left on device"):
                checkpoints.save(2, {"w": torch.ones(1000)})
        saved = checkpoints.load()
        assert saved is not None
        assert saved.step == 1
        run_directory = importlib.import_module("run_directory")
        with pytest.raises(OSError, match=r"\.last\.pt\.partial cannot be written, is the disk full\?"):
            run_directory.RunDirectory(tmp_path)._replace("last.pt", lambda _: torch.save({}, "/dev/full"))

    def test_killed_while_saving(self, tmp_path: Path) -> None:
        """Real kills of two ranks that do nothing but save. What they start from was verified by themselves."""
        starts = []
        for seconds in (0.5, 0.53, 0.57, 0.6, 0.0):
            process = subprocess.Popen(
                [*mpirun_command(2), sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path)],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("starts at"):
                        starts.append(int(line.split()[-1]))
                        break
                else:
                    pytest.fail(f"ended with {process.wait()}")
                time.sleep(seconds)
            finally:
                # The ranks have process groups of their own.
                for pid in [*children(process.pid), process.pid]:
                    os.kill(pid, signal.SIGKILL)
                process.wait()
        assert starts[0] == 0
        assert starts == sorted(starts)
        assert starts[-1] > 0


def children(pid: int) -> list[int]:
    """Its own and theirs, the last ones first."""
    own = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return [descendant for child in own for descendant in [*children(child), child]]


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
    def test_one_rank_is_told_and_all_stop(self, number: int) -> None:
        ended = launch(3, ["-c", INTERRUPTED, "1", str(int(number))])
        assert "stopped [5, 5, 5]" in ended.stdout
        assert ended.returncode == 75

    def test_ctrl_c_twice(self) -> None:
        script = (
            "import os, signal, horovod.torch as hvd\n"
            "from hvd_compress import Interruption\n"
            "hvd.init()\n"
            "interruption = Interruption()\n"
            "os.kill(os.getpid(), signal.SIGINT)\n"
            "print('once', interruption.requested, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGINT)\n"
        )
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert ended.stdout == "once True\n"
        assert ended.stderr.rstrip().endswith("KeyboardInterrupt")

    def test_two_in_one_program(self) -> None:
        script = (
            "import os, signal, horovod.torch as hvd\n"
            "from hvd_compress import Interruption\n"
            "hvd.init()\n"
            "first, second, third = Interruption(), Interruption(), Interruption()\n"
            "print(first.requested, third.requested)\n"
            "os.kill(os.getpid(), signal.SIGINT)\n"
            "print(first.requested, second.requested, third.requested)\n"
        )
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert ended.stdout == "False False\nTrue True True\n"

    def test_processes_started_later_are_not_ended(self) -> None:
        script = (
            "import os, signal, subprocess, horovod.torch as hvd\n"
            "from hvd_compress import Interruption\n"
            "hvd.init()\n"
            "interruption = Interruption()\n"
            "child = subprocess.Popen(['sh', '-c', 'read line; echo got $line'], stdin=subprocess.PIPE)\n"
            "for number in (signal.SIGTERM, signal.SIGUSR2):\n"
            "    child.send_signal(number)\n"
            "child.communicate(b'data')\n"
            "assert child.returncode == 0, child.returncode\n"
            "assert not interruption.requested\n"
        )
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (0, "got data\n"), ended.stderr

    def test_pools_end(self, tmp_path: Path) -> None:
        """Whose processes inherit that SIGTERM is blocked."""
        script = tmp_path / "script.py"
        script.write_text(
            "if __name__ == '__main__':\n"
            "    import multiprocessing\n"
            "    import horovod.torch as hvd\n"
            "    from hvd_compress import Interruption\n"
            "    hvd.init()\n"
            "    Interruption()\n"
            "    for method in ('fork', 'forkserver', 'spawn'):\n"
            "        with multiprocessing.get_context(method).Pool(2) as pool:\n"
            "            print(method, sum(pool.map(abs, range(-3, 4))), flush=True)\n"
        )
        ended = subprocess.run(
            [sys.executable, script], env=environment(), capture_output=True, text=True, timeout=60, check=False
        )
        assert (ended.returncode, ended.stdout) == (0, "fork 12\nforkserver 12\nspawn 12\n"), ended.stderr

    @pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
    def test_signals_to_every_process(self, tmp_path: Path, method: str) -> None:
        """As Slurm's. DataLoader's process goes on, and ends with the program, which does not wait for it."""
        script = tmp_path / "script.py"
        script.write_text(SIGNALLED_WITH_ITS_WORKERS)
        process = subprocess.Popen(
            [sys.executable, script, method],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert (process.returncode, stdout) == (0, "12 True\n"), stderr
        assert "Error" not in stderr


def test_random_numbers_go_on() -> None:
    def draw() -> list[float]:
        return [
            torch.rand(()).item(),
            torch.randn(()).item(),
            random.gauss(0, 1),
            np.random.normal(),
            random.random(),
        ]

    draw()  # so that the generators hold a second normal number back
    state = through_a_file(random_state())
    expected = [draw() for _ in range(3)]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    set_random_state(state)
    assert [draw() for _ in range(3)] == expected
