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
from layouts_worker import LAYOUTS, MODELS, SAVED_AT, STEPS

TESTS = Path(__file__).resolve().parents[1]
# fp32 sums in another order: the largest difference seen over all models and steps was 3e-6 of the value.
TOLERANCE = 2e-5
OTHERS = [name for name in LAYOUTS if name != "TP1"]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layouts")
    tiny.write_data(folder)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += [str(TESTS / "distributed" / "layouts_worker.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_one_process_learns(losses: dict[str, Any], model: str) -> None:
    first, last = losses["TP1"][model][0][0], losses["TP1"][model][-1][0]
    assert len(losses["TP1"][model]) == STEPS
    assert last < 0.8 * first


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", OTHERS)
def test_layout_equals_one_process(losses: dict[str, Any], layout: str, model: str) -> None:
    for found, expected in zip(losses[layout][model], losses["TP1"][model], strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", ["TP2", "TP2xDP2", "TP4"])
def test_checkpoint_of_one_process_goes_on_elsewhere(losses: dict[str, Any], layout: str, model: str) -> None:
    expected = losses["TP1"][model][SAVED_AT:]
    for found, wanted in zip(losses[layout][f"{model} resumed"], expected, strict=True):
        assert found == pytest.approx(wanted, rel=TOLERANCE)
