"""The table of runs: figures that were not measured, and limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sharedproj.config import ModelConfig, RunConfig, to_dict
from megatron_sharedproj.reporting.compare import summarize, table

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_runs.py"


def run_folder(folder: Path, variant: str, perplexity: float | None, loss: float = 4.0) -> Path:
    folder.mkdir()
    config = RunConfig(ModelConfig(2, 32, 4, 96, 32, attention_variant=variant))
    (folder / "run_config.json").write_text(json.dumps(to_dict(config)))
    (folder / "log.jsonl").write_text(
        json.dumps({"iteration": 1, "lm_loss": 1.0, "tokens_per_second": 7.0}) + "\n"
    )
    if perplexity is not None:
        packed = {"perplexity": perplexity, "loss": loss, "unigram_entropy": 5.0, "bits_per_byte": 1.5}
        (folder / "perplexity.json").write_text(json.dumps({"packed": packed}))
    return folder


def compare(*words: object) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, TOOL, *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    figures = summarize(run_folder(tmp_path / "a", "qk_eq_v", None))
    assert "perplexity" not in figures and figures["train_tokens_per_second"] == 7.0
    assert table([figures]).splitlines()[-1].count("| -  ") >= 3


@pytest.mark.parametrize(
    ("second", "limits", "code", "expected"),
    [
        (102.0, ["--max-loss-ratio", 0.9, "--max-perplexity-change", 5], 0, ""),
        (106.0, ["--max-perplexity-change", 5], 1, "qk_eq_v: perplexity is more than 5.0% above qkv's"),
        (102.0, ["--max-loss-ratio", 0.7], 1, "qkv: loss is 0.800 of the entropy, above 0.7"),
        (None, [], 0, ""),
        (None, ["--max-loss-ratio", 0.9], 2, "not evaluated, so no limit can be checked"),
    ],
)
def test_limits(tmp_path: Path, second: float | None, limits: list[object], code: int, expected: str) -> None:
    base = run_folder(tmp_path / "a", "qkv", 100.0)
    other = run_folder(tmp_path / "b", "qk_eq_v", second)
    found, out, error = compare(base, other, *limits)
    assert found == code, error
    assert expected in error
    assert "| qk_eq_v |" in out


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    code, _, error = compare(tmp_path)
    assert code == 2 and error.startswith("error: ") and "run_config.json" in error
    assert len(error.splitlines()) == 1
