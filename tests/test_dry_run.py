"""--simulate-world-size: the plan's figures, its files, and mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from megatron_sharedproj import formulas
from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.dry_run import dry_run
from megatron_sharedproj.formulas_memory import training_memory_bytes

ROOT = Path(__file__).resolve().parents[1]


def flags(**changes: object) -> list[str]:
    given = {
        "data_path": None,
        "split": None,
        "tokenizer_type": None,
        "simulate_world_size": 8,
        "global_batch_size": 16,
    }
    return tiny.flags("", **{**given, **changes})


def written(path: Path, line: list[str]) -> list[dict]:
    args = build_parser().parse_args([*line, "--simulate-output", str(path)])
    dry_run(args, build=False)
    return json.loads(path.read_text())


def test_plan_is_the_formulas(tmp_path: Path) -> None:
    line = flags(tensor_model_parallel_size=2, simulate_gpu="H100-80GB", simulate_mfu=0.5)
    [row] = written(tmp_path / "plan.json", line)
    config = run_config(build_parser().parse_args(line), tiny.VOCAB, 8)
    tokens = 16 * tiny.SEQ
    assert row["parameters"] == formulas.parameters(config.model)["total"]
    assert (row["tokens_per_step"], row["train_tokens"]) == (tokens, 6 * tokens)
    assert (row["tensor_model_parallel_size"], row["data_parallel_size"], row["micro_batches"]) == (2, 4, 4)
    seconds = tokens * formulas.train_flops_per_token(config.model, tiny.SEQ) / (8 * 989e12 * 0.5)
    assert row["assumed_seconds_per_step"] == pytest.approx(seconds)
    assert row["assumed_hours"] == pytest.approx(6 * seconds / 3600)
    memory = training_memory_bytes(
        config.model, config.parallel, seq_length=tiny.SEQ, micro_batch_size=1, data_parallel_size=4
    )
    assert {part: row[f"{part}_bytes"] for part in memory} == memory


def test_half_the_gpus_take_twice_as_long(tmp_path: Path) -> None:
    rows = [
        written(tmp_path / f"{world}.json", flags(simulate_world_size=world, bf16=True))[0]
        for world in (4, 8)
    ]
    assert rows[0]["assumed_hours"] == pytest.approx(2 * rows[1]["assumed_hours"])
    assert rows[0]["total_bytes"] == rows[1]["total_bytes"]
    assert rows[0]["sent_data_parallel_bytes"] == pytest.approx(
        rows[1]["sent_data_parallel_bytes"] * 6 / 7, abs=1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simulate_world_size": 0}, "--simulate-world-size 0: must be at least 1"),
        ({"simulate_world_size": 6}, "--global-batch-size 16: must be a multiple of"),
        (
            {"simulate_world_size": 7, "tensor_model_parallel_size": 2},
            "--tensor-model-parallel-size 2: must divide",
        ),
        (
            {"tensor_model_parallel_size": 8},
            "--tensor-model-parallel-size 8: must divide --num-attention-heads 4",
        ),
        ({"vocab_size": None}, "--simulate-world-size 8: needs --vocab-size N"),
        ({"simulate_gpu": "A100"}, "--simulate-gpu A100: several are named so"),
        ({"simulate_mfu": 1.5}, "--simulate-mfu 1.5: must be above 0 and at most 1"),
        (
            {"simulate_output": "nowhere/plan.json"},
            "--simulate-output nowhere/plan.json: nowhere is not a folder",
        ),
    ],
)
def test_mistakes(changes: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_sharedproj.pretrain import main

    assert main(flags(**changes)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_not_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process; start it without torchrun"):
        dry_run(build_parser().parse_args(flags()), build=False)


def test_trainer_prints_what_it_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_sharedproj.pretrain", *flags(simulate_world_size=512)]
    command += ["--global-batch-size", "1024"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = done.stdout.partition("Built on meta tensors")[2].splitlines()[4].split()
    assert built[0] == "0" and built[1] == built[2] and built[3] == built[4]
    assert list(tmp_path.iterdir()) == []


def test_plan_tool() -> None:
    tool = ROOT / "tools" / "plan_run.py"
    done = subprocess.run([sys.executable, str(tool), *flags()], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Run: 8 x A100-40GB, DP 8; time at an assumed MFU of 40%")
    bad = subprocess.run(
        [sys.executable, str(tool), *flags(simulate_world_size=None)], capture_output=True, text=True
    )
    assert (bad.returncode, bad.stderr) == (2, "error: --simulate-world-size: required; the number of GPUs\n")
