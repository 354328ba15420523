"""Runs that are killed with SIGKILL at random moments end as one that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kill_harness
from megatron_sharedproj.variants import VARIANTS

HARNESS = Path(kill_harness.__file__)
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {"ranks": 2},
    "DP2, async save": {"ranks": 2, "async_save": True},
    "DP2, distributed optimizer": {"ranks": 2, "use_distributed_optimizer": True},
    "TP2, sequence parallel": {"ranks": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"ranks": 2, "pipeline_model_parallel_size": 2},
    "TP2 x PP2, Q-MQA": {
        "ranks": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "groups": 1,
    },
}  # fmt: skip


def killed(kills: int, options: dict[str, Any]) -> int:
    """The kills of a harness that was to make so many, in a process that forks before it starts a thread."""
    paths = [str(HARNESS.parents[1]), str(HARNESS.parents[2])]
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(kills), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stderr.splitlines()[-1].split()[0])


def test_a_few_kills() -> None:
    assert killed(4, {}) >= 4


def test_a_few_kills_of_two_ranks() -> None:
    assert killed(4, {"ranks": 2, "tensor_model_parallel_size": 2}) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True], ids=["save", "async save"])
def test_a_hundred_kills(async_save: bool) -> None:
    assert killed(100, {"async_save": async_save}) >= 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, groups",
    [(name, 0) for name in VARIANTS] + [(name, groups) for name in ("qkv", "qk_eq_v") for groups in (2, 1)],
)
def test_kills_of_every_variant(variant: str, groups: int) -> None:
    assert killed(10, {"variant": variant, "groups": groups}) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=list(LAYOUTS))
def test_kills_of_several_ranks(layout: str) -> None:
    assert killed(25, LAYOUTS[layout]) >= 25
