"""profile.py memory and plan: rows, notes, and mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.config import PRESETS, ParallelConfig
from megatron_sharedproj.formulas_memory import training_memory_bytes
from scripts import load

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The tool in this process: exit code, stdout, stderr."""
    tool = load("tools/profile.py")

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = tool.main(list(words))
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def rows_of(run: Run, *words: str) -> list[dict[str, Any]]:
    code, out, _ = run(*words, "--format", "json")
    assert code == 0
    return json.loads(out)


def test_memory_is_the_formulas(run: Run) -> None:
    rows = rows_of(run, "memory", "--micro-batch-size", "6", "--no-run")
    assert len(rows) == 8
    for row in rows:
        config = PRESETS["300m"].replace(
            attention_variant=row["variant"], num_query_groups=row["num_query_groups"]
        )
        counts = training_memory_bytes(
            config, ParallelConfig(), seq_length=2048, micro_batch_size=6, low_precision=True
        )
        assert {name: row[f"{name}_bytes"] for name in counts} == counts
        assert row["sent_bytes"] == 0


def test_memory_of_a_layout_sends(run: Run) -> None:
    words = ["memory", "--attention-variant", "qkv,qk_eq_v", "--tensor-model-parallel-size", "2"]
    words += ["--data-parallel-size", "2", "--use-distributed-optimizer", "--sequence-parallel"]
    one, two = rows_of(run, *words), rows_of(run, *words, "--micro-batches", "2")
    for few, many in zip(one, two, strict=True):
        assert many["sent_data_parallel_bytes"] == few["sent_data_parallel_bytes"] > 0
        assert many["sent_parameter_gather_bytes"] == few["sent_parameter_gather_bytes"] > 0
        assert 1.9 < many["sent_tensor_parallel_bytes"] / few["sent_tensor_parallel_bytes"] <= 2
    assert one[1]["total_bytes"] < one[0]["total_bytes"]


def test_memory_says_what_it_leaves_out(run: Run) -> None:
    code, out, _ = run(
        "memory", "--attention-variant", "qk_eq_v", "--recompute-granularity", "full", "--no-run"
    )
    assert code == 0
    assert "not modelled: CUDA context" in out
    assert "not measured" in out
    assert "recompute full" in out


def test_memory_takes_the_trainers_flags_for_stages_and_recompute(run: Run) -> None:
    """More chunks keep more micro batches under way; recompute keeps less."""
    words = ["memory", "--attention-variant", "qk_eq_v", "--pipeline-model-parallel-size", "2"]
    full = [*words, "--recompute-granularity", "full"]
    cases = {
        "chunks": [*words, "--num-virtual-stages-per-pipeline-rank", "5"],
        "plain": words,
        "block": [*full, "--recompute-method", "block", "--recompute-num-layers", "3"],
        "full": full,
    }
    totals = [rows_of(run, *case)[0]["total_bytes"] for case in cases.values()]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)
    every = [*full, "--recompute-method", "block", "--recompute-num-layers", "10"]
    assert rows_of(run, *every)[0]["activations_bytes"] == rows_of(run, *full)[0]["activations_bytes"]
    units = rows_of(run, *full, "--recompute-num-layers", "5")[0]["activations_bytes"]
    assert units < rows_of(run, *full)[0]["activations_bytes"]


def test_context_parallelism_sends_half_for_one_tensor(run: Run) -> None:
    words = ["memory", "--attention-variant", "qkv,qk_eq_v", "--context-parallel-size", "2"]
    qkv, tied = rows_of(run, *words)
    # 20 layers, forward and backward, 1,024 tokens of 1,024 elements in bf16 to the other rank.
    assert tied["sent_context_parallel_bytes"] == 20 * 2 * 1024 * 1024 * 2
    assert qkv["sent_context_parallel_bytes"] == 2 * tied["sent_context_parallel_bytes"]


def test_the_measured_trainer_can_be_built() -> None:
    """What a GPU's peak is measured on, here on the CPU: the shape asked for, and two steps of it."""
    script = """
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.profiling.commands.memory import trainer_of_shape
from megatron_sharedproj.profiling.planner import Layout
config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, padded_vocab_size=96,
                     max_position_embeddings=32, attention_variant="qk_eq_v", num_query_groups=2,
                     activation="gelu", attention_dropout=0.0, scaled_init=False)
for config in (config, config.replace(attention_variant="qkv")):
    with trainer_of_shape(config, Layout(dtype="fp32"), 16, 2) as trainer:
        iterator = trainer._iterator(trainer.train_data, 0)
        trainer.step(iterator)
        trainer.step(iterator)
        print("result", trainer.config.model == config, trainer.iteration)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("result")]
    assert found == ["result True 2"] * 2


def test_plan_says_what_fits_and_by_how_much(run: Run) -> None:
    words = ["plan", "--gpu", "A100-40GB", "--micro-batch-sizes", "1,15,16"]
    rows = rows_of(run, *words)
    assert {row["micro_batch_size"] for row in rows} == {1, 15, 16}
    for row in rows:
        assert row["margin_bytes"] == row["available_bytes"] - row["training_bytes"]
        assert (
            row["fits"]
            == (row["margin_bytes"] >= 0)
            == (row["micro_batch_size"] <= row["largest_micro_batch_size"])
        )
    assert {row["fits"] for row in rows} == {True, False}
    by_name = {row["model"]: row for row in rows}
    assert by_name["Q-K=V"]["concurrent_sequences"] >= 2 * by_name["QKV"]["concurrent_sequences"]
    assert by_name["Q-K=V"]["paper_perplexity"] == 5.27
    code, out, _ = run(*words)
    assert code == 0
    assert "missing" in out and "left" in out
    assert "single seeds in its padded protocol" in out
    assert "examples/quickstart.sh" in out


def test_plan_without_a_known_gpu(run: Run) -> None:
    words = ["plan", "--attention-variant", "qkv", "--context", "512", "--batch", "4"]
    (small,), (large,) = (rows_of(run, *words, "--memory-gib", size) for size in ("8", "24"))
    assert small["available_bytes"] == int(0.9 * 8 * 2**30)
    assert not small["fits"] or small["margin_bytes"] < large["margin_bytes"]
    assert large["concurrent_sequences"] > 2 * small["concurrent_sequences"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("plan", "--gpu: give a GPU's name, or --memory-gib"),
        ("plan --gpu A101", "--gpu A101: unknown; did you mean"),
        ("plan --memory-gib 0", "--memory-gib: '0' is not a number above 0"),
        ("plan --memory-gib 24 --memory-fraction 1.5", "--memory-fraction 1.5: must be at most 1"),
        ("plan --memory-gib 24 --context 4096", "--context 4096: longer than --max-position-embeddings 2048"),
        ("plan --memory-gib 24 --context -1", "--context: '-1' is not a whole number above 0"),
        ("plan --memory-gib 24 --batch 0", "--micro-batch-sizes/--batch: '0' is not a whole number above 0"),
        (
            "plan --memory-gib 24 --attention-variant qk_eq_v --num-query-groups 5",
            "--num-query-groups 5: must divide --num-attention-heads 16",
        ),
        ("memory --seq-length 4096", "--seq-length 4096: longer than --max-position-embeddings 2048"),
        ("memory --micro-batch-size 0", "--micro-batch-size: '0' is not a whole number above 0"),
        ("memory --tensor-model-parallel-size 3", "--tensor-model-parallel-size 3: must divide"),
        ("memory --sequence-parallel", "--sequence-parallel: needs --tensor-model-parallel-size"),
        ("memory --pipeline-model-parallel-size 3", "--pipeline-model-parallel-size 3: must divide"),
        (
            "memory --num-virtual-stages-per-pipeline-rank 2",
            "--num-virtual-stages-per-pipeline-rank 2: needs --pipeline-model-parallel-size",
        ),
        ("memory --context-parallel-size 3", "--seq-length 2048: must be divisible by 6, two chunks"),
        ("memory --recompute-method block", "--recompute-method block: needs --recompute-granularity full"),
    ],
)
def test_a_mistake_is_one_line(run: Run, words: str, message: str) -> None:
    code, out, error = run(*words.split())
    assert code == 2
    assert out == ""
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
