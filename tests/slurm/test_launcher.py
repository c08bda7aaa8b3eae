"""Profiles, commands, sbatch files and sweeps: all that needs no cluster."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jobs
import profiles
import pytest
import sweep
from launch import make_job, slurm_executor
from profiles import Profile, ProfileError, merge, parse_time
from submitit.core.utils import JobPaths, cloudpickle_dump

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
SCRIPT = "examples/quickstart.py"


def submit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "slurm/submit.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def program(path: Path, text: str) -> None:
    """One that stands in for Slurm's."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


class TestProfiles:
    def test_command_line_beats_profile_beats_default(self) -> None:
        profile = merge(
            ("file", {"nodes": 2, "gpus_per_node": 8, "sbatch": {"mem": 0, "qos": "a"}, "modules": ["gcc"]}),
            ("command line", {"nodes": 4, "sbatch": {"qos": "b"}}),
        )
        assert (profile.nodes, profile.gpus_per_node, profile.mpi) == (4, 8, "pmix")
        assert profile.sbatch == {"mem": 0, "qos": "b"}
        assert profile.modules == ("gcc",)
        assert profile.ranks == 32

    def test_a_heading_with_nothing_below(self) -> None:
        profile = merge(("file", {"environment": None}), ("command line", {"environment": {"A": "1"}}))
        assert profile.environment == {"A": "1"}

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"gpu_per_node": 8}, "unknown setting 'gpu_per_node': did you mean 'gpus_per_node'?"),
            ({"partion": "gpu"}, "did you mean 'partition'?"),
            ({"zzz": 1}, "unknown setting 'zzz'; known are partition, account"),
            ({"time": 43200}, "time must be a text, got 43200 (in YAML, write it in quotes)"),
            ({"time": "soon"}, "d-hh:mm:ss, got 'soon'"),
            ({"nodes": "4"}, "nodes must be a whole number"),
            ({"nodes": True}, "nodes must be a whole number"),
            ({"nodes": 0}, "nodes must be 1 or more"),
            ({"launcher": "horovodrun"}, "launcher must be srun or mpirun"),
            ({"modules": "gcc"}, "modules must be a list of texts"),
            ({"time": "2"}, "signal_seconds=120 must be less than time=2"),
            ({"sbatch": {"ntasks_per_node": 3}}, "ntasks_per_node has a setting of its own"),
            ({"sbatch": {"no-requeue": True}}, "no-requeue cannot be set; what you mean is requeue: false"),
            ({"sbatch": {"job_name": "x"}}, "job_name cannot be set; what you mean is --name"),
            ({"sbatch": {"output": "x"}}, "sbatch: output cannot be set"),
            ({"sbatch": {"qos:long": None}}, "sbatch: 'qos:long' is no option's name; in 'name: value', a space"),
            ({"sbatch": {"exclude": ["a", "b"]}}, "sbatch: exclude must be one value, got ['a', 'b']"),
            ({"sbatch": {"time_min": 3600}}, "time_min must be a text, got 3600 (in YAML, write it in quotes)"),
            ({"environment": {"A:1": None}}, "environment: 'A:1' is no variable's name"),
            ({"environment": {"A": True}}, "environment: A must be a text, got True: put it in quotes"),
            ({"environment": {"A": ["b"]}}, "environment: A must be a text, got ['b']: put it in quotes"),
            ({"gpu_type": "a100"}, "gpu_type=a100 needs gpus_per_node"),
            ({"gpu_binding": "task", "gpus_per_node": 4, "launcher": "mpirun"}, "gpu_binding=task is srun's"),
            ({"gpu_binding": "task", "gpus_per_node": 4, "ranks_per_node": 2}, "as many ranks as GPUs on each node"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], expected: str) -> None:
        with pytest.raises(ProfileError) as caught:
            merge(("profile x", settings))
        assert expected in str(caught.value)
        assert str(caught.value).startswith("profile x: ")

    @pytest.mark.parametrize(
        ("text", "minutes"),
        [("30", 30), ("1:30", 2), ("12:00:00", 720), ("0:00:01", 1), ("2-12", 3600), ("1-00:30", 1470)],
    )
    def test_time(self, text: str, minutes: int) -> None:
        assert parse_time(text) == minutes

    def test_the_one_for_gpus_explains_all_settings(self) -> None:
        text = (profiles.CLUSTERS / "gpu.yaml").read_text()
        settings = [setting.name for setting in dataclasses.fields(Profile)]
        assert [name for name in settings if not re.search(rf"^#? ?{name}:|#.*\b{name}: ", text, re.MULTILINE)] == []

    def test_no_such_profile(self) -> None:
        with pytest.raises(ProfileError, match=r"there are apptainer, cpu, gpu, sandbox"):
            profiles.load("nowhere")

    def test_not_yaml(self, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_text("a: [1")
        with pytest.raises(ProfileError, match="is not YAML"):
            profiles.load(str(tmp_path / "bad.yaml"))


class TestSbatchFile:
    @pytest.mark.parametrize("name", sorted(path.stem for path in profiles.CLUSTERS.glob("*.yaml")))
    def test_of_each_profile(self, name: str) -> None:
        """A change here changes what users' clusters are told; to accept it, write the new text to the file."""
        profile = merge((name, profiles.load(name)), ("command line", {"nodes": 4}))
        executor = slurm_executor(profile, Path("/shared/runs"), "train")
        command = " ".join(make_job(profile, ["train.py", "--lr", "0.1"]).command)
        text = f"{executor.sbatch_file()}\n# {command}\n"
        text = text.replace(sys.executable, "/shared/venv/bin/python").replace(str(ROOT), "/shared/hvd-compress")
        golden = GOLDEN / f"{name}.sh"
        assert text == golden.read_text()
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)

    def test_setup_may_define_what_loads_modules(self) -> None:
        profile = Profile(setup=("source /etc/profile",), modules=("gcc",), environment={"A": "1"})
        text = slurm_executor(profile, Path("/shared"), "x").sbatch_file()
        assert "\nsource /etc/profile\nmodule load gcc || exit 1\nexport A=1\n" in text

    def test_a_variable_can_be_taken_back(self) -> None:
        profile = merge(("file", {"environment": {"A": "1", "B": "2"}}), ("line", {"environment": {"A": None}}))
        text = slurm_executor(profile, Path("/shared"), "x").sbatch_file()
        assert "export B=2\n" in text
        assert "export A" not in text
        assert not any(word.startswith("A=") for word in make_job(profile, ["train.py"], local=True).command)

    def test_mpirun_starts_all_ranks_itself(self) -> None:
        profile = Profile(nodes=3, ranks_per_node=2, launcher="mpirun", mpirun=("--map-by", "core"), time="10")
        text = slurm_executor(profile, Path("/shared"), "x").sbatch_file()
        assert "\nsrun" not in text
        assert "#SBATCH --signal=B:CONT@120" in text  # what signals them is the launcher
        job = make_job(profile, ["train.py"])
        assert job.command[:5] == ("mpirun", "-np", "6", "--map-by", "core")
        assert job.stop_after == 480

    def test_own_gpu_for_each_task(self) -> None:
        text = slurm_executor(Profile(gpus_per_node=4, gpu_binding="task"), Path("/shared"), "x").sbatch_file()
        assert "#SBATCH --gpus-per-node=4" in text
        assert "--gpus-per-task=1" in text

    def test_gpus_of_a_type(self) -> None:
        text = slurm_executor(Profile(gpus_per_node=4, gpu_type="a100"), Path("/shared"), "x").sbatch_file()
        assert "#SBATCH --gpus-per-node=a100:4\n" in text
        assert "#SBATCH --ntasks-per-node=4\n" in text

    def test_switches_can_be_taken_back(self) -> None:
        profile = merge(
            ("file", {"sbatch": {"exclusive": True, "mem": 0, "qos": "a"}}),
            ("command line", {"sbatch": {"exclusive": False, "qos": None}}),
        )
        text = slurm_executor(profile, Path("/shared"), "x").sbatch_file()
        assert "#SBATCH --mem=0\n" in text
        assert "exclusive" not in text
        assert "qos" not in text

    @pytest.mark.parametrize("launcher", ["srun", "mpirun"])
    def test_requeueing_can_be_turned_off(self, launcher: str) -> None:
        profile = merge(("file", {"launcher": launcher, "sbatch": {"requeue": False, "mem_per_cpu": "2G"}}))
        text = slurm_executor(profile, Path("/shared"), "x").sbatch_file()
        assert "#SBATCH --no-requeue\n" in text
        assert "--requeue" not in text
        assert "requeue the job" not in text  # nor does a job wait for that when it has lost a node
        assert "#SBATCH --mem-per-cpu=2G\n" in text

    @pytest.mark.parametrize(
        ("record", "expected"),
        [
            ("JobState=RUNNING Requeue=1", "requeue 7\n"),
            ("JobState=RUNNING Requeue=0", "not requeued, since that is off (sbatch: {requeue: false})"),
            ("JobState=CANCELLED Requeue=1", "not requeued, since it is CANCELLED"),
        ],
    )
    def test_saved_state_is_requeued_if_slurm_would(self, tmp_path: Path, record: str, expected: str) -> None:
        program(tmp_path / "scontrol", f"echo JobId=7 {record}")
        task = "import job\njob.REQUEUE_SECONDS = 0\njob._requeue(lambda *_: print('requeue 7'))\n"
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7"}
        ended = subprocess.run(
            [sys.executable, "-c", task], cwd=ROOT / "slurm", env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 1
        assert expected in ended.stdout + ended.stderr
        assert ("since" in ended.stderr) == ("since" in expected)
        assert "Traceback" not in ended.stderr

    def test_the_ranks_keep_what_srun_hands_to_its_task(self) -> None:
        """With --mpi=pmi2 that is an open file, through which MPI_Init speaks to Slurm."""
        reader, writer = os.pipe()
        rank = f"import os; os.write({writer}, b'init')"
        task = f"import job, sys; job.Job((sys.executable, '-c', {rank!r}), 0)()"
        subprocess.run([sys.executable, "-c", task], cwd=ROOT / "slurm", pass_fds=[writer], check=True)
        os.close(writer)
        assert os.read(reader, 10) == b"init"
        os.close(reader)


class TestCommandLine:
    def test_dry_run_submits_nothing(self, tmp_path: Path) -> None:
        ended = submit(
            "--profile", "gpu", "--nodes", "2", "--folder", str(tmp_path), "--dry-run", "--", SCRIPT, "a b"
        )
        assert ended.returncode == 0, ended.stderr
        assert "#SBATCH --nodes=2" in ended.stdout
        assert "#SBATCH --partition=gpu" in ended.stdout
        assert not list(tmp_path.iterdir())

    def test_each_set_adds_to_those_before(self) -> None:
        settings = ["--set=sbatch={qos: long, mem: 0}", "--set=sbatch={qos: short}", "--set=environment={A: 1}"]
        ended = submit(*settings, "--set=environment={B: 2}", "--dry-run", "--", SCRIPT)
        assert ended.returncode == 0, ended.stderr
        for line in ("#SBATCH --qos=short", "#SBATCH --mem=0", "export A=1", "export B=2"):
            assert f"\n{line}\n" in ended.stdout

    @pytest.mark.parametrize("command", ["submit", "sweep"])
    def test_dry_run_prints_what_is_submitted(self, tmp_path: Path, command: str) -> None:
        """An sbatch that takes any file shows which it was given; ``python`` is not the one that submits."""
        for name in ("sbatch", "srun"):
            program(tmp_path / name, "echo Submitted batch job 42")
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        (tmp_path / "grid.yaml").write_text("{seed: [0, 1, 2]}")
        options = [command, "--profile=gpu", "--set=python=/else/where/python", f"--folder={tmp_path / 'logs'}"]
        if command == "sweep":
            options += [str(tmp_path / "grid.yaml"), f"--output={tmp_path / 'runs'}", "--parallel=2", "--name=quick"]
        shown = submit(*options, "--dry-run", "--", SCRIPT, PATH=path)
        assert shown.returncode == 0, shown.stderr
        ended = submit(*options, "--", SCRIPT, PATH=path)
        assert ended.returncode == 0, ended.stderr
        (file,) = (tmp_path / "logs").glob("*submission.sh")
        assert shown.stdout.startswith(file.read_text())
        assert " /else/where/python -u -m submitit.core._submit " in file.read_text()
        assert ("#SBATCH --array=0-2%2" in file.read_text()) == (command == "sweep")

    @pytest.mark.parametrize("cluster", ["local", "debug"])
    def test_dry_run_here_runs_nothing(self, tmp_path: Path, cluster: str) -> None:
        script = tmp_path / "never.py"
        script.write_text("raise SystemExit('it ran')\n")
        options = ["--cluster", cluster, "--ranks-per-node", "3", "--folder", str(tmp_path / "logs")]
        ended = submit(*options, "--dry-run", "--", str(script), "a b")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.endswith(f"{script} 'a b'\n")
        assert ("--mpirun 3" in ended.stdout) == (cluster == "local")
        assert not (tmp_path / "logs").exists()

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--profile", "nowhere", "--", SCRIPT], "no profile"),
            (
                ["--set", "mdules=[gcc]", "--", SCRIPT],
                "command line: unknown setting 'mdules': did you mean",
            ),
            (["--set", "modules", "--", SCRIPT], "--set needs NAME=VALUE"),
            (["--set", "modules=[a", "--", SCRIPT], "--set modules=[a is not YAML"),
            (["--gpu-pernode", "8", "--", SCRIPT], "unknown option --gpu-pernode: did you mean '--gpus-per-node'?"),
            (["--modules=gcc", "--", SCRIPT], "--modules=gcc has no option of its own: --set modules=VALUE"),
            (["stauts"], "unknown command 'stauts': did you mean 'status'?"),
            (["--nodes", "2", SCRIPT], f"-- is missing before {SCRIPT}"),
            (["--nodes", "2"], "nothing to run"),
            (["--", "no/such/script.py"], "no/such/script.py is no Python program"),
            (["collect", "no/such/sweep"], "there is no sweep in no/such/sweep"),
        ],
    )
    def test_errors(self, arguments: list[str], expected: str) -> None:
        ended = submit(*arguments)
        assert ended.returncode == 1
        assert expected in ended.stderr
        assert "Traceback" not in ended.stderr

    @pytest.mark.parametrize("text", ['[{"job":', '[{"job": "1"}]', "[7]", "[]", "{}"])
    def test_a_damaged_record_of_a_sweep(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "sweep.json").write_text(text)
        ended = submit("collect", str(tmp_path))
        assert ended.returncode == 1
        assert f"{tmp_path / 'sweep.json'} " in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_help(self) -> None:
        assert "python slurm/submit.py --nodes 4" in submit("--help").stdout
        for command in ("submit", "sweep", "status", "logs", "cancel", "collect"):
            ended = submit(command, "--help")
            assert ended.returncode == 0
            assert ended.stdout.startswith("usage: slurm/submit.py")

    def test_debug_runs_in_this_process(self, tmp_path: Path) -> None:
        script = tmp_path / "hello.py"
        script.write_text("import sys, os\nprint('here', sys.argv[1:], __name__, os.getppid())\n")
        ended = submit("--cluster", "debug", "--folder", str(tmp_path), "--", str(script), "--a", "b")
        assert f"here ['--a', 'b'] __main__ {os.getpid()}" in ended.stdout
        assert ended.returncode == 0

    def test_a_file_that_the_script_misses_is_no_missing_slurm(self, tmp_path: Path) -> None:
        script = tmp_path / "reads.py"
        script.write_text("open('/no/such/file')\n")
        ended = submit("--cluster", "debug", "--folder", str(tmp_path / "logs"), "--", str(script))
        assert ended.returncode == 1
        assert "FileNotFoundError" in ended.stderr
        assert "/no/such/file" in ended.stderr
        assert "login node" not in ended.stderr

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        ended = submit("--cluster", "local", "--folder", str(tmp_path / "file" / "logs"), "--", SCRIPT)
        assert ended.returncode == 1
        assert ended.stderr.startswith("error: ")
        assert f"{tmp_path}/file/logs" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_ranks_before_the_project_is_set_up(self, tmp_path: Path) -> None:
        scripts = tmp_path / "scripts"
        shutil.copytree(ROOT / "scripts", scripts)
        for name in ("constraints.txt", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, tmp_path)
        command = [sys.executable, str(scripts / "bootstrap.py"), "--mpi=pip", "--mpirun", "2", "true"]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 1
        assert ended.stderr.startswith("\nerror: There is no mpirun here")
        assert "make env" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_local_runs_all_ranks(self, tmp_path: Path) -> None:
        script = tmp_path / "ranks.py"
        script.write_text(
            "import sys\nfrom mpi4py import MPI\nprint('rank', MPI.COMM_WORLD.rank, 'of', MPI.COMM_WORLD.size)\n"
            "if len(sys.argv) > 1 and MPI.COMM_WORLD.rank == 1: raise ValueError('as told')\n"
        )
        options = ["--cluster", "local", "--ranks-per-node", "2", "--folder", str(tmp_path / "logs")]
        ended = submit(*options, "--", str(script))
        assert ended.returncode == 0, ended.stderr
        assert {"rank 0 of 2", "rank 1 of 2"} <= {*ended.stdout.splitlines()}
        assert re.search(r"^  \S+: ranks 0, 1; cores for each: \d+; ", ended.stdout, re.MULTILINE)
        ended = submit(*options, "--", str(script), "fail")
        assert ended.returncode == 1
        assert "ValueError: as told" in ended.stderr

    @pytest.mark.parametrize("chosen", [None, "2,3"])
    def test_local_sees_the_gpus_and_variables_that_it_was_given(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
    ) -> None:
        """submitit would hide them all: training went on without, on the processor."""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if chosen is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        script = tmp_path / "variables.py"
        script.write_text(
            "import os\nfrom mpi4py import MPI\n"
            "print('sees', os.environ.get('CUDA_VISIBLE_DEVICES'), 'and', os.environ['OWN'], MPI.COMM_WORLD.size)\n"
        )
        options = ["--cluster", "local", "--set=environment={OWN: a b}", "--folder", str(tmp_path / "logs")]
        ended = submit(*options, "--", str(script))
        assert ended.returncode == 0, ended.stderr
        assert f"sees {chosen} and a b 1" in ended.stdout.splitlines()

    def test_local_goes_on_after_a_checkpoint(self, tmp_path: Path) -> None:
        script = tmp_path / "twice.py"
        script.write_text(
            "import sys\nfrom pathlib import Path\nfrom mpi4py import MPI\n"
            f"done = Path({str(tmp_path / 'done')!r})\n"
            "again = MPI.COMM_WORLD.bcast(done.exists())\n"
            "done.touch()\nprint('again', again, flush=True)\nMPI.COMM_WORLD.barrier()\n"
            "sys.exit(0 if again else 75)\n"
        )
        options = ["--cluster", "local", "--ranks-per-node", "2", "--folder", str(tmp_path / "logs")]
        ended = submit(*options, "--", str(script))
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("again False") >= 1
        assert ended.stdout.count("again True") == 2
        assert re.findall(r"restarted \d times", ended.stdout) == ["restarted 0 times", "restarted 1 times"]


class TestJobs:
    """With programs that stand in for Slurm's: a job 3 that runs, jobs 1, 2 and 12 that squeue has forgotten."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        program(tmp_path / "squeue", "echo '3|RUNNING|train|1:00|node1'")
        program(tmp_path / "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
        folder = tmp_path / "logs"
        folder.mkdir()
        for job in ("1", "2", "3", "12_0", "12_1"):
            JobPaths(folder, job).submitted_pickle.touch()
        cloudpickle_dump(("success", None), JobPaths(folder, "1").result_pickle)
        cloudpickle_dump(("error", "Traceback"), JobPaths(folder, "12_1").result_pickle)
        return folder

    def test_from_the_accounting(self, tmp_path: Path, folder: Path) -> None:
        program(tmp_path / "sacct", "echo '2|CANCELLED by 0|train|00:01:00|node1'")
        assert [state.state for state in jobs.states(["2", "3"], folder)] == ["CANCELLED", "RUNNING"]

    def test_without_accounting(self, folder: Path) -> None:
        """As on many small clusters: there submitit's results tell how a job has ended."""
        ended = submit("status", f"--folder={folder}")
        assert ended.returncode == 0, ended.stderr
        states = re.findall(r"^│ (\w+) +│.*? │ (\w+)", ended.stdout, re.MULTILINE)
        expected = {"1": "COMPLETED", "2": "UNKNOWN", "3": "RUNNING", "12_0": "UNKNOWN", "12_1": "FAILED"}
        assert dict(states) == expected
        (warning,) = ended.stderr.splitlines()
        assert warning.startswith("warning: no accounting (sacct: Slurm accounting storage is disabled): of jobs")
        assert submit("logs", "1", f"--folder={folder}").stdout == "Job 1 ended: COMPLETED.\n"

    def test_no_sacct_at_all(self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "sacct").unlink()
        monkeypatch.setenv("PATH", str(tmp_path))
        program(tmp_path / "squeue", "/bin/echo '3|RUNNING|train|1:00|node1'")
        assert [state.state for state in jobs.states(["1", "3"], folder)] == ["COMPLETED", "RUNNING"]

    def test_no_slurm_at_all(self, folder: Path, tmp_path: Path) -> None:
        ended = submit("logs", "3", f"--folder={folder}", PATH="/nowhere")
        assert ended.returncode == 1
        assert ended.stderr == "error: there is no squeue here: is this a login node of a Slurm cluster?\n"

    def test_who_waits_outlasts_a_busy_controller(self, tmp_path: Path, folder: Path) -> None:
        busy = f"test -e {tmp_path}/asked || {{ touch {tmp_path}/asked; echo Socket timed out >&2; exit 1; }}"
        program(tmp_path / "squeue", f"{busy}\necho '3|COMPLETED|train|1:00|node1'")
        ended = submit("logs", "3", f"--folder={folder}")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == "Job 3 ended: COMPLETED.\n"
        assert "warning: squeue: Socket timed out; asking again for 5 minutes\n" in ended.stderr
        (tmp_path / "asked").unlink()
        told: list[int] = []
        assert [state.state for state in jobs.wait(["1", "3"], folder, told.append)] == ["COMPLETED", "COMPLETED"]
        assert told == [2]

    def test_patience_ends(self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program(tmp_path / "squeue", "echo Unable to contact slurm controller >&2; exit 1")
        monkeypatch.setattr(jobs, "PATIENCE_SECONDS", 1.5)
        began = time.monotonic()
        with pytest.raises(jobs.SlurmError, match="squeue: Unable to contact"):
            jobs.wait(["3"], folder, lambda ended: None)
        assert time.monotonic() - began > 1.5

    def test_logs_of_an_array(self, folder: Path) -> None:
        ended = submit("logs", "12", f"--folder={folder}")
        assert ended.returncode == 1
        assert ended.stderr == "error: 12 is an array: ask for one of its jobs, 12_0 to 12_1\n"


class TestSweeps:
    def test_grid(self, tmp_path: Path) -> None:
        grid = tmp_path / "grid.yaml"
        grid.write_text("- {ratio: [0.1, 0.01], seed: [0, 1]}\n- {compression: [none]}\n")
        points = sweep.read_grid(grid)
        assert points == [
            {"ratio": 0.1, "seed": 0},
            {"ratio": 0.1, "seed": 1},
            {"ratio": 0.01, "seed": 0},
            {"ratio": 0.01, "seed": 1},
            {"compression": "none"},
        ]
        line = sweep.arguments(["train.py", "--output", "{run}/out"], points[2], Path("/s/p"))
        assert line == ["train.py", "--output", "/s/p/out", "--ratio", "0.01", "--seed", "0"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("ratio: 0.1", "ratio needs a list"),
            ("- 3", "a grid is a mapping"),
            ("- {a: [1, 1]}", "a point occurs twice: a=1"),
            ("a: [on]", "a needs a list of numbers or texts, got [True]"),
        ],
    )
    def test_bad_grid(self, tmp_path: Path, text: str, expected: str) -> None:
        (tmp_path / "grid.yaml").write_text(text)
        with pytest.raises(ProfileError) as caught:
            sweep.read_grid(tmp_path / "grid.yaml")
        assert expected in str(caught.value)

    @pytest.mark.parametrize("arguments", [["--output", "{run}"], []])
    def test_runs_without_a_directory_of_their_own(self, tmp_path: Path, arguments: list[str]) -> None:
        (tmp_path / "grid.yaml").write_text("{seed: [0, 1]}")
        options = ["sweep", str(tmp_path / "grid.yaml"), f"--output={tmp_path / 'runs'}", "--dry-run"]
        ended = submit(*options, "--", SCRIPT, *arguments)
        assert ended.returncode == 0, ended.stderr
        assert ("warning: {run} is not among the script's arguments" in ended.stderr) == (not arguments)

    @pytest.fixture
    def swept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Two finished runs without a result, one that runs, and one that has all."""
        texts = [None, '{"accuracy": null, "megabytes_sent": 3}\n', "", '{"accuracy": 0.5, "megabytes_sent": 3}\n']
        points = [sweep.Point(f"7_{i}", str(tmp_path / str(i)), {"seed": i}, str(tmp_path)) for i in range(4)]
        for point, text in zip(points, texts, strict=True):
            Path(point.directory).mkdir()
            if text is not None:
                (Path(point.directory) / "metrics.jsonl").write_text(text)
        sweep.write_record(tmp_path, points)
        lines = [f"7_{i}|{'RUNNING' if i == 2 else 'COMPLETED'}|x|1:00|node1" for i in range(4)]
        program(tmp_path / "squeue", "\n".join(f"echo '{line}'" for line in lines))
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path

    def test_collect_leaves_out_what_has_no_result(self, swept: Path) -> None:
        ended = submit("collect", str(swept))
        assert ended.returncode == 0, ended.stderr
        assert re.search(r"^ +1 │ +50.0% │ +3.0 *$", ended.stdout, re.MULTILINE), ended.stdout
        first, second, third = ended.stderr.splitlines()
        assert first.startswith(f"Left out: job 7_0 (seed=0): {swept}/0/metrics.jsonl: no line with accuracy")
        assert second.endswith("1/metrics.jsonl: in the last line accuracy must be a number, got null")
        assert third == "Left out: job 7_2 (seed=2): it is RUNNING"
        assert (swept / "accuracy-vs-megabytes.png").exists()

    def test_nothing_to_collect(self, swept: Path) -> None:
        (swept / "3" / "metrics.jsonl").write_text("[]\n")
        ended = submit("collect", str(swept))
        assert ended.returncode == 1
        assert ended.stderr.count("Left out: ") == 4
        assert ended.stderr.endswith("\nerror: no run has finished with a result yet\n")

    def test_seeds_are_one_line(self, tmp_path: Path) -> None:
        results = [
            sweep.Result({"ratio": 0.1, "seed": 0}, 0.5, 10.0),
            sweep.Result({"ratio": 0.1, "seed": 1}, 0.7, 12.0),
            sweep.Result({"compression": "none", "seed": 0}, 0.9, 1000.0),
        ]
        rendered = sweep.table(results)
        columns = [list(column.cells) for column in rendered.columns]
        assert [column.header for column in rendered.columns][:3] == ["ratio", "compression", "seeds"]
        assert columns == [["0.1", ""], ["", "none"], ["2", "1"], ["60.0% ± 14.1", "90.0%"], ["11.0", "1,000.0"]]
        sweep.draw(results, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000
