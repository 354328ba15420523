"""tools/compare_variants.py: a whole small comparison, gone on with, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import scripts
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.experiments import speeches
from megatron_sharedproj.experiments.jobs import run_jobs

tool = scripts.load("tools/compare_variants.py")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of real data: the speeches' paragraphs, 512 token ids."""
    folder = tmp_path_factory.mktemp("text")
    jobs = speeches.data_jobs(folder, "paragraphs")
    small = [tuple("512" if word == "2048" else word for word in job.command) for job in jobs]
    run_jobs([replace(job, command=words) for job, words in zip(jobs, small, strict=True)], folder)
    return speeches.data_flags(folder)


def test_a_comparison_is_trained_evaluated_and_gone_on_with(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "comparison"
    small = [
        "--", "--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2",
        "--max-position-embeddings", "64", "--seq-length", "64", "--micro-batch-size", "4",
        "--global-batch-size", "4",
    ]  # fmt: skip
    words = ["--folder", str(folder), *text, "--models", "qkv", "--seeds", "1", "--steps", "10"]
    assert tool.main([*words, "--matched", "none", *small]) == 0
    assert tool.main([*words, "--matched", "qk_eq_v:1", *small]) == 0
    said = capsys.readouterr().out
    assert "3 of 6 jobs are done already" in said
    manifest = json.loads((folder / "comparison.json").read_text())
    assert [model["label"] for model in manifest["models"]] == ["QKV", "Q-MQA"]
    runs = [folder / model["runs"]["1234"] for model in manifest["models"]]
    configs = [files.checkpoint_config(run) for run in runs]
    assert configs[1].model.num_query_groups == 1
    assert configs[1].model.ffn_hidden_size > configs[0].model.ffn_hidden_size
    for run in runs:
        figures = json.loads((run / "perplexity.json").read_text())
        assert figures["packed"]["perplexity"] > 1 and figures["padded"]["perplexity"] > 1
        assert (run / "recall.json").exists() and (run / "log.jsonl").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        ("--models qkv,kv", "--models kv: "),
        ("--models qk_eq_v", "--models: qkv is missing"),
        ("--matched q_eq_k:1", "--matched q_eq_k:1: "),
        ("--steps 3", "--steps 3: must be at least 10"),
        ("--processes 3", "--processes 3: must divide"),
        ("--train-data-path x", "--valid-data-path: needed beside --train-data-path"),
        ("--train-data-path x --valid-data-path x --tokenizer-model x", "--train-data-path x: not found"),
        ("--seeds 0", "--seeds: '0'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "comparison"
    try:
        code = tool.main(["--folder", str(folder), *words.split()])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.count("\n") == 1
    assert not folder.exists()
