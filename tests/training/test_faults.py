"""What goes wrong in a run: bad steps, signals outside of steps, dead loaders and ranks, cut caches."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from megatron_sharedproj.data import datasets
from megatron_sharedproj.training.bad_steps import BadStepsError
from megatron_sharedproj.training.signals import Stopped

REPO = Path(__file__).resolve().parents[2]


def spoil(trainer: Any, steps: set[int]) -> None:
    """Make the gradient of a bias NaN in these steps."""
    bias = trainer.model.module.decoder.final_layernorm.bias
    bias.register_hook(lambda grad: grad * (math.nan if trainer.iteration + 1 in steps else 1.0))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_bad_step_is_skipped_counted_and_described(
    parallel_state: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = tiny.flags(tiny.write_data(tmp_path), save=run, lr_warmup_iters=0, log_interval=2)
    trainer = tiny.trainer(line)
    spoil(trainer, {3})
    seen: dict[int, torch.Tensor] = {}
    weight = trainer.model.module.decoder.final_layernorm.weight
    trainer.hooks.append(lambda t: seen.update({t.iteration: weight.detach().clone()}))
    assert trainer.train() == 0
    trainer.log.close()
    assert torch.equal(seen[3], seen[2]) and not torch.equal(seen[4], seen[3])
    assert trainer.consumed_samples == 24
    written = records(run)
    assert [record["nan_iterations"] for record in written] == [0, 1, 0]
    assert [record["skipped_iterations"] for record in written] == [0, 1, 0]
    assert all(math.isfinite(record["lm_loss"]) for record in written)
    out = capsys.readouterr().out
    assert "its gradient is not at iteration 3: step skipped (1 in a row, the run stops at 5)" in out
    assert "number of nan iterations:   1 |" in out
    (described,) = (run / "bad_steps").iterdir()
    assert described.name == "iter_0000003_rank0.json"
    what = json.loads(described.read_text())
    assert what["samples"] == [8, 12] and what["parameters_with_bad_gradients"] == 1
    assert what["bad_elements"] == {"decoder.final_layernorm.bias": 32}


def test_a_bad_step_that_cannot_be_described_is_skipped(
    parallel_state: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk, say, of one rank: the others would wait for it."""
    run = tmp_path / "run"
    trainer = tiny.trainer(tiny.flags(tiny.write_data(tmp_path), save=run, lr_warmup_iters=0))
    (run / "bad_steps").write_text("in the way")
    spoil(trainer, {3})
    assert trainer.train() == 0
    trainer.log.close()
    assert sum(record["nan_iterations"] for record in records(run)) == 1
    assert "bad_steps cannot be written (File exists)" in capsys.readouterr().err


def test_bad_steps_in_a_row_stop_the_run_across_a_resume(parallel_state: Any, tmp_path: Path) -> None:
    options = {"save": tmp_path / "run", "lr_warmup_iters": 0, "max_nan_iterations": 3, "save_interval": 1}
    line = tiny.flags(tiny.write_data(tmp_path), **options)
    trainer = tiny.trainer([*line, "--exit-interval", "4"])
    spoil(trainer, {1, 3, 4})  # one that stood alone does not count
    assert trainer.train() == 0
    resumed = tiny.trainer(line)
    spoil(resumed, {5})
    with pytest.raises(BadStepsError, match="at iteration 5, 3 steps in a row, the last checkpoint is iter"):
        resumed.train()
    assert resumed.bad_steps_in_a_row == 3


def test_an_interval_without_a_finite_loss(parallel_state: Any, tmp_path: Path) -> None:
    from megatron_sharedproj.reporting.plots import load_run

    run = tmp_path / "run"
    trainer = tiny.trainer(tiny.flags(tiny.write_data(tmp_path), save=run, lr_warmup_iters=0))
    spoil(trainer, {2})
    assert trainer.train() == 0
    trainer.log.close()
    assert [record["lm_loss"] is None for record in records(run)] == [False, True] + 4 * [False]
    assert [record["iteration"] for record in load_run(run).training] == [1, 3, 4, 5, 6]


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max-nan-iterations 0: must be at least 1"):
        tiny.trainer(tiny.flags(tiny.write_data(tmp_path), max_nan_iterations=0))


@pytest.mark.parametrize("last", [False, True])
def test_a_signal_during_a_validation(parallel_state: Any, tmp_path: Path, last: bool) -> None:
    """The validation is left out; training is saved, and a restart does what is missing."""
    options = {"save": tmp_path / "run", "eval_iters": 25, "eval_interval": 3, "lr_warmup_iters": 0}
    line = tiny.flags(tiny.write_data(tmp_path, documents=200), **options)
    trainer = tiny.trainer(line)
    steps, calls = trainer._schedule_step, []

    def schedule_step(iterator: Any, micro_batches: int, forward_only: bool) -> float:
        if forward_only and trainer.iteration == (6 if last else 3):
            calls.append(micro_batches)
            os.kill(os.getpid(), signal.SIGTERM)
        return steps(iterator, micro_batches, forward_only)

    trainer._schedule_step = schedule_step
    assert trainer.train() == 128 + signal.SIGTERM
    trainer.log.close()
    assert calls == [40] and trainer.last_saved == trainer.iteration == (6 if last else 3)
    resumed = tiny.trainer(line)
    assert resumed.train() == 0
    resumed.log.close()
    scored = [r["iteration"] for r in records(tmp_path / "run") if "validation_lm_loss" in r]
    assert scored == ([3, 6] if last else [6])


def test_a_signal_while_indices_are_built(
    parallel_state: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are completed, and nothing else is written."""
    from megatron.core.datasets import gpt_dataset

    prefix, save = tiny.write_data(tmp_path), np.save

    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        save(*args, **kwargs)

    monkeypatch.setattr(gpt_dataset.numpy, "save", interrupted)
    with pytest.raises(Stopped, match="SIGUSR1"):
        tiny.trainer(tiny.flags(prefix, save=tmp_path / "run"))
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()
    for path in tmp_path.rglob("*.npy"):
        np.load(path, mmap_mode="r")


def test_a_cut_index_cache_is_built_anew(
    parallel_state: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = tiny.flags(tiny.write_data(tmp_path))
    whole = tiny.losses(line)
    caches = sorted(tmp_path.rglob("*.npy"))
    assert len(caches) >= 3
    for path in caches:
        path.write_bytes(path.read_bytes()[: path.stat().st_size - 8])
    assert tiny.losses(line) == whole
    assert capsys.readouterr().err.count("is cut short and is built anew") == len(caches)


def workers() -> list[int]:
    """This process's children."""
    out = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in out.stdout.splitlines() if "ps" not in line.split()[1:]]


def test_a_killed_loader_is_replaced(
    parallel_state: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prefix = tiny.write_data(tmp_path)
    expected = tiny.losses(tiny.flags(prefix, train_iters=12))
    trainer = tiny.trainer(tiny.flags(prefix, train_iters=12, num_workers=2))
    found: list[float] = []

    def kill(t: Any) -> None:
        found.append(t.last_loss)
        if t.iteration == 3:
            for pid in workers():
                os.kill(pid, signal.SIGKILL)

    trainer.hooks.append(kill)
    assert trainer.train() == 0
    assert found == expected
    assert "; started anew" in capfd.readouterr().err


class Raising:
    """A loader whose batches raise."""

    def __init__(self, error: Exception):
        self.error, self.starts = error, []

    def __call__(self, position: int) -> Any:
        self.starts.append(position)
        return self

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        raise self.error


def test_loaders_that_keep_dying_are_an_error() -> None:
    loader = Raising(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.\nmore"))
    with pytest.raises(ValueError, match=r"--num-workers: data loader processes die again .*Killed\.\)"):
        next(datasets._Loading(loader, 8, 4))
    assert loader.starts == [8] * 4


def test_an_error_of_the_data_is_not_a_death() -> None:
    loader = Raising(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nmore"))
    with pytest.raises(RuntimeError, match="^Caught"):
        next(datasets._Loading(loader, 0, 4))
    assert loader.starts == [0]


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_lost_rank_is_named(tmp_path: Path, how: str) -> None:
    """Without torchrun, which would end the others; a stopped one is noticed by the timeout."""
    prefix = tiny.write_data(tmp_path)
    line = tiny.flags(
        prefix, save=tmp_path / "run", train_iters=100_000, save_interval=5, micro_batch_size=1,
        global_batch_size=2, distributed_timeout_minutes=1,
    )  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 2000),
    }  # fmt: skip
    command = [sys.executable, "-m", "megatron_sharedproj.pretrain", *line]
    ranks = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists():
            assert time.monotonic() < deadline and ranks[0].poll() is None
            time.sleep(0.1)
        ranks[1].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        assert ranks[0].wait(240) == 5
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].stderr is not None
    (message,) = [text for text in ranks[0].stderr if text.startswith("error: ")]
    assert message.startswith("error: rank 1 ended or does not answer at iteration ")
    assert "the last checkpoint is iteration " in message
