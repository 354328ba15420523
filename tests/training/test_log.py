"""What the training loop logs: JSON lines, Megatron's line, repair of a torn line, progress."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

import tiny
from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.reporting.plots import load_run
from tiny import history, records

pytestmark = pytest.mark.usefixtures("parallel_state")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tiny.write_data(tmp_path)


def test_json_lines(prefix: Path, tmp_path: Path) -> None:
    line = tiny.flags(prefix, "q_eq_k", save=tmp_path / "run", log_interval=2, train_iters=5)
    trainer = tiny.trainer(line)
    steps = history(trainer)
    trainer.log.close()
    found = records(tmp_path / "run")
    assert [record["iteration"] for record in found] == [2, 4, 5]  # the last step too
    for record in found:
        done = record["iteration"]
        assert record["train_iters"] == 5
        assert record["consumed_samples"] == 4 * done
        assert record["consumed_tokens"] == 4 * done * tiny.SEQ
        assert record["variant"] == "q_eq_k"
        assert record["global_batch_size"] == 4
        assert record["loss_scale"] == 1.0
        assert record["skipped_iterations"] == 0
        assert record["grad_norm"] == steps[done - 1][1]
        for name in ("tokens_per_second", "elapsed_ms_per_iteration", "tflops_per_rank"):
            assert 0 < record[name] < math.inf
        # 4 sequences of 32 tokens a step, in the time of a step.
        seconds = record["elapsed_ms_per_iteration"] / 1000
        assert record["tokens_per_second"] * seconds == pytest.approx(4 * tiny.SEQ)
    # The mean over the interval, which the last, shorter one starts anew.
    losses = [loss for loss, _ in steps]
    means = [sum(losses[0:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [record["lm_loss"] for record in found] == [pytest.approx(mean) for mean in means]


def test_the_log_line_reads_like_megatrons(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.trainer(tiny.flags(prefix, train_iters=1, lr_warmup_iters=0, log_throughput=True)).train()
    line = next(text for text in capsys.readouterr().out.splitlines() if "iteration        1/" in text)
    for part in (
        "] iteration        1/       1 | consumed samples:            4 | elapsed time per iteration (ms): ",
        "| throughput per GPU (TFLOP/s/GPU): ",
        "| learning rate: 1.000000E-02 | global batch size:     4 | lm loss: ",
        "| loss scale: 1.0 | grad norm: ",
        "| number of skipped iterations:   0 | number of nan iterations:   0 |",
        "| variant: qk_eq_v |",
    ):
        assert part in line, part


@pytest.mark.parametrize("torn", ['{"iteration": 3, "lm_lo', '{"iteration": 3, "lm_loss": 1.0}', "\x00\x00"])
def test_a_torn_last_line_is_repaired_on_resume(prefix: Path, tmp_path: Path, torn: str) -> None:
    """Half a record without a newline would swallow the next one and make the log unreadable."""
    run = tmp_path / "run"

    def start(**changes: Any) -> None:
        trainer = tiny.trainer(tiny.flags(prefix, save=run, train_iters=4, **changes))
        trainer.train()
        trainer.log.close()

    start(exit_interval=2)
    with (run / "log.jsonl").open("a") as log:
        log.write(torn)
    start()
    assert [record["iteration"] for record in records(run)] == [1, 2, 3, 4]
    assert load_run(run).training_curve()[0] == [1, 2, 3, 4]


def test_a_disabled_log_writes_nothing(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_sharedproj.training.log import TrainingLog

    trainer = tiny.trainer(tiny.flags(prefix))
    capsys.readouterr()
    config = dataclasses.replace(
        trainer.config, checkpoint=dataclasses.replace(trainer.config.checkpoint, save=str(tmp_path / "no"))
    )
    log = TrainingLog(config, world_size=2, device_name="cpu", enabled=False)
    log.message("nothing")
    log.step(
        1,
        loss=1.0,
        grad_norm=1.0,
        learning_rate=0.1,
        batch_size=4,
        consumed_samples=4,
        skipped=False,
        loss_scale=1.0,
    )
    log.evaluation("validation", 1, {"lm_loss": 1.0})
    log.close()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "no").exists()


def test_progress_counts_evaluation_and_saving_but_not_the_start(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run of 10 steps, at iteration 4: 3 s before its first step, 1 s a step, 4 s of validation."""
    import io

    from megatron_sharedproj.training import log as module

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, terminal = [0.0], Terminal()
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module.sys, "stderr", terminal)
    line = tiny.flags(prefix, train_iters=10, log_interval=100)
    config = run_config(build_parser().parse_args(line), tiny.VOCAB, 1)
    log = module.TrainingLog(config, world_size=1, device_name="cpu", enabled=True)
    clock[0] += 3
    log.restart_clock()

    def step(iteration: int) -> str:
        clock[0] += 1
        rest = {
            "learning_rate": 0.1,
            "batch_size": 4,
            "consumed_samples": 4,
            "skipped": False,
            "loss_scale": 1.0,
        }
        log.step(iteration, loss=2.0, grad_norm=1.0, **rest)
        return terminal.getvalue().rpartition("\r")[2]

    assert "step 5/10  loss 2.0000  1.00 s/step  ETA 5s" in step(5)
    paused = log.pause()
    clock[0] += 4
    log.resume(paused)
    assert "step 6/10  loss 2.0000  3.00 s/step  ETA 12s" in step(6)
