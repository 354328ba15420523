"""Runs that are killed with SIGKILL at random moments end as one that was left alone, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kill_harness

HARNESS = Path(kill_harness.__file__)


def harness(kills: int, options: str) -> str:
    """In a process of its own: runs are forked from one that has started no thread."""
    paths = [str(HARNESS.parents[1]), str(HARNESS.parents[2])]
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(kills), options],
        env={**os.environ, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_a_few_kills() -> None:
    assert "kills in 1 runs" in harness(4, "{}")


@pytest.mark.slow
@pytest.mark.parametrize("options", ["{}", '{"async_save": true}'], ids=["save", "async save"])
def test_a_hundred_kills(options: str) -> None:
    last = harness(100, options).splitlines()[-1]
    assert int(last.split()[0]) >= 100
