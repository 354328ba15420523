"""benchmarks/gpu_all.sh goes through its stages, keeps what is done and names what is not.

A shell script takes the place of the Python on the GPU machine: what the stages run has tests of its own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# Answers the script's questions about torch; the rest succeeds, fails or runs out of time as the test says.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *get_device_name*) echo some-gpu ;;
  *"import megatron.core"*) exit 0 ;;
  -c*) exit 0 ;;
  *benchmark_attention*) echo "$*" >> calls; sleep "${BENCH_SECONDS:-0}" ;;
  *train_throughput*) echo "$*" >> calls; exit "${TRAIN_EXIT:-0}" ;;
  *) echo "$*" >> calls ;;
esac
"""


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    # The calls land in the script's folder, a copy: it changes into the repository's root.
    script = folder / "benchmarks" / "gpu_all.sh"
    script.parent.mkdir(exist_ok=True)
    script.write_bytes((REPO / "benchmarks" / "gpu_all.sh").read_bytes())
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=folder, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHON": str(python), **environment},
    )  # fmt: skip


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.split()[0] if not line.startswith("-m") else line.split()[1] for line in lines]


def test_a_failed_stage_is_named_and_run_again(tmp_path: Path) -> None:
    limits = {"STAGE_SECONDS": "1", "BENCH_SECONDS": "9", "TRAIN_EXIT": "3"}
    done = run(tmp_path, "--output", "out", "bench", "train", "generate", **limits)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: bench (out of time after STAGE_SECONDS=1)",
        "error: train (exit code 3)",
    ]
    # Training stopped at its first error, before the memory table.
    assert calls(tmp_path) == [
        "tools/benchmark_attention.py", "benchmarks/train_throughput.py", "benchmarks/generation.py"
    ]  # fmt: skip
    done = run(tmp_path, "--output", "out", "bench", "train", "generate")
    assert done.returncode == 0, done.stderr
    assert "generate: done before" in done.stdout
    assert calls(tmp_path) == [
        "tools/benchmark_attention.py", "benchmarks/train_throughput.py", "tools/profile.py"
    ]  # fmt: skip


@pytest.mark.parametrize("argument", ["bnech", "--output"])
def test_a_mistake_is_one_line(tmp_path: Path, argument: str) -> None:
    done = run(tmp_path, argument)
    assert done.returncode != 0 and not calls(tmp_path)
    assert len(done.stderr.splitlines()) == 1 and argument in done.stderr
