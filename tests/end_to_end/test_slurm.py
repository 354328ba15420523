"""examples/slurm: what a job starts, and how it ends, with stand-ins for Slurm's own commands only."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import tiny
from slurm import ROOT, Job

# A rank that takes a while to save when it is told to stop.
_RANK = """
import pathlib, signal, sys, time
def stop(number, frame):
    with open("signals", "a") as notes: notes.write(f"{number}\\n")
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, stop)
with open("starts", "a") as notes: notes.write("start\\n")
time.sleep(60)
"""


def launches(job: Job) -> list[list[str]]:
    return [shlex.split(line) for line in job.text().splitlines() if line.startswith("torchrun ")]


def test_every_node_gets_the_same_rendezvous(tmp_path: Path) -> None:
    job = Job(tmp_path, "--lr", "1e-3", "--dry-run", nodes=2, NPROC="4", PRESET="1b")
    assert job.finish() == 0
    one, two = launches(job)
    assert one == two
    launch = get_args_parser().parse_args(one[1:])
    assert (launch.nnodes, launch.nproc_per_node, launch.max_restarts) == ("2", "4", 3)
    assert launch.rdzv_backend == "c10d"
    assert launch.rdzv_endpoint == f"localhost:{20000 + os.getpid() % 20000}"
    assert launch.rdzv_id == str(os.getpid())
    assert launch.training_script_args[-2:] == ["--lr", "1e-3"]
    assert "runs/1b/qk_eq_v" in one
    assert "Run: 8 x A100-40GB, DP 8" in job.text()


def test_array_task_chooses_the_run(tmp_path: Path) -> None:
    job = Job(tmp_path, "--dry-run", RUNS="qkv qk_eq_v:4", SLURM_ARRAY_TASK_ID="1")
    assert job.finish() == 0
    [command] = launches(job)
    assert "runs/300m/qk_eq_v_g4" in command
    assert command[-5:] == [
        "--attention-variant",
        "qk_eq_v",
        "--group-query-attention",
        "--num-query-groups",
        "4",
    ]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RUNS": "qkv", "SLURM_ARRAY_TASK_ID": "1"},
            "array task 1: RUNS has 1 run(s); use --array=0-0",
        ),
        ({"PRESET": "7b"}, "examples/pretrain_7b.sh is not there; start sbatch from the repository's folder"),
    ],
)
def test_mistakes(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    job = Job(tmp_path, **environment)
    assert job.finish() == 2
    assert message in job.text()
    assert job.calls("srun") == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_node_lets_its_ranks_save(tmp_path: Path, number: signal.Signals, code: int) -> None:
    (tmp_path / "rank.py").write_text(_RANK)
    launch = (
        f"exec {shlex.quote(sys.executable)} -m torch.distributed.run --standalone --max-restarts 3 rank.py\n"
    )
    (tmp_path / "run.sh").write_text(launch)
    node = subprocess.Popen(
        ["bash", ROOT / "examples" / "slurm" / "node.sh", "run.sh"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    while not (tmp_path / "starts").exists():
        assert node.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    for _ in range(2):  # the second changes nothing
        node.send_signal(number)
        time.sleep(0.1)
    assert node.wait(timeout=60) == code
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "signals").read_text() == "15\n"
    assert (tmp_path / "starts").read_text() == "start\n"  # not started again


@pytest.mark.parametrize("code", [0, 3])
def test_node_passes_an_exit_code_on(tmp_path: Path, code: int) -> None:
    (tmp_path / "run.sh").write_text(f"exit {code}\n")
    node = subprocess.run(["bash", ROOT / "examples" / "slurm" / "node.sh", tmp_path / "run.sh"])
    assert node.returncode == code


def trained(folder: Path) -> list[int]:
    """Iterations in a run's log."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines]


@pytest.mark.slow
def test_two_nodes_are_requeued_and_resume(tmp_path: Path) -> None:
    prefix = tiny.write_data(tmp_path)
    runs = tmp_path / "runs"
    environment = {"NPROC": "1", "OMP_NUM_THREADS": "1", "SAVE": str(runs), "RUNS": "qk_eq_v:1"}
    line = tiny.flags(
        prefix,
        attention_variant=None,
        train_iters=100000,
        split="90,10,0",
        ffn_hidden_size=64,
        log_interval=1,
    )
    first = Job(tmp_path / "first", *line, nodes=2, **environment)
    first.wait_for("iteration        3/")
    first.signal_tasks(signal.SIGUSR1)
    assert first.finish() == 138, first.text()[-4000:]
    assert first.calls("scontrol")[-1] == f"requeue {os.getpid()}"
    done = trained(runs / "qk_eq_v_g1")[-1]
    assert f"saved checkpoint {runs}/qk_eq_v_g1/iter_{done:07d}" in first.text()
    again = Job(tmp_path / "again", *line, "--train-iters", str(done + 2), nodes=2, **environment)
    assert again.finish() == 0, again.text()[-4000:]
    assert f"iteration {done}, " in again.text() and "2 process(es)" in again.text()
    assert trained(runs / "qk_eq_v_g1")[-2:] == [done + 1, done + 2]
    assert [call for call in again.calls("scontrol") if call.startswith("requeue")] == []


@pytest.mark.slow
def test_elastic_agent_starts_a_killed_rank_again(tmp_path: Path) -> None:
    prefix = tiny.write_data(tmp_path)
    line = tiny.flags(
        prefix, train_iters=40, split="90,10,0", ffn_hidden_size=64, save_interval=5, log_interval=1
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "NPROC": "1",
        "MAX_RESTARTS": "1",
        "SAVE": str(tmp_path),
    }
    script = ROOT / "examples" / "pretrain_300m.sh"
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(["bash", script, *line], env=environment, stdout=log, stderr=log)
        end = time.monotonic() + 120
        text = (tmp_path / "log").read_text
        while "saved checkpoint" not in text():
            assert run.poll() is None and time.monotonic() < end, text()[-4000:]
            time.sleep(0.02)
        # run became torchrun, and its only child is the rank.
        [rank] = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGKILL)
        assert run.wait(timeout=120) == 0, text()[-4000:]
    assert "resumed from" in text()
    assert trained(tmp_path / "qk_eq_v")[-1] == 40
