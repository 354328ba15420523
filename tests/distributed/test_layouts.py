"""Every layout trains as one process does: losses and gradient norms of 20 steps, and across a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from layouts_worker import GATHERED, MODELS, SAVED_AT, STEPS

TESTS = Path(__file__).resolve().parents[1]
# fp32 sums in another order: the largest difference seen over all of these was 6e-7 of the value.
TOLERANCE = 5e-6
QUICK = ["TP2", "TP2+SP", "DP2", "DP2+overlap", "TP2xDP2"]


def launch(folder: Path, layouts: list[str]) -> dict[str, Any]:
    """Train under the layouts in one torchrun launch: layout -> model -> [loss, gradient norm] per step."""
    tiny.write_data(folder)
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += [str(TESTS / "distributed" / "layouts_worker.py"), str(folder), *layouts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("layouts"), ["TP1", *QUICK, "gathered"])


@pytest.mark.parametrize("model", MODELS)
def test_one_process_learns(losses: dict[str, Any], model: str) -> None:
    first, last = losses["TP1"][model][0][0], losses["TP1"][model][-1][0]
    assert len(losses["TP1"][model]) == STEPS
    assert last < 0.8 * first


def assert_equal(found: list[list[float]], expected: list[list[float]]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", QUICK)
def test_layout_equals_one_process(losses: dict[str, Any], layout: str, model: str) -> None:
    assert_equal(losses[layout][model], losses["TP1"][model])


@pytest.mark.parametrize("model", MODELS)
def test_checkpoint_of_one_process_goes_on_under_tp2(losses: dict[str, Any], model: str) -> None:
    assert_equal(losses["TP2"][f"{model} resumed"], losses["TP1"][model][SAVED_AT:])


@pytest.mark.parametrize("model", GATHERED)
def test_checkpoint_of_four_processes_goes_on_in_one(losses: dict[str, Any], model: str) -> None:
    assert_equal(losses["gathered"][model], losses["TP1"][model][SAVED_AT:])


def test_random_streams(losses: dict[str, Any]) -> None:
    """Residual dropout is equal on the ranks of a replica, attention dropout differs on every rank."""
    for layout, replicas in {"TP2": [[0, 1]], "DP2": [[0], [1]], "TP2xDP2": [[0, 1], [2, 3]]}.items():
        rows = losses[layout]["streams"]
        defaults = [{rows[rank][0] for rank in replica} for replica in replicas]
        assert all(len(values) == 1 for values in defaults)
        assert len(set.union(*defaults)) == len(replicas)
        assert len({row[1] for row in rows}) == len(rows)


@pytest.mark.slow
def test_four_tensor_parallel_ranks(tmp_path: Path) -> None:
    found = launch(tmp_path, ["TP1", "TP4"])
    for model in MODELS:
        assert_equal(found["TP4"][model], found["TP1"][model])
        assert_equal(found["TP4"][f"{model} resumed"], found["TP1"][model][SAVED_AT:])
