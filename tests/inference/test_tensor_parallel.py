"""Two tensor-parallel ranks generate what one process does; each caches its own groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tp_worker

TESTS = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("parallel_state")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found, in one launch."""
    folder = tmp_path_factory.mktemp("tp")
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS / "inference")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, str(TESTS / "inference" / "tp_worker.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", tp_worker.MODELS)
def test_two_ranks_equal_one(two_ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (ranks[name] for ranks in two_ranks)
    assert first == second
    alone = tp_worker.results(name, 1)
    for way in tp_worker.WAYS:
        assert first[way] == alone[way]
    assert first["contiguous"] == first["none"] != first["paged"]  # greedy twice, and sampled
    assert alone["none bytes"] == [0, 0, 0]
    for way in ("paged", "contiguous"):
        one, over_one, formula = alone[f"{way} bytes"]
        each, over_both, formula_of_two = first[f"{way} bytes"]
        assert one == over_one == formula == formula_of_two > 0
        assert each == over_both / 2
        # One group cannot be split: each rank has a copy. A rotary head of 4 elements (of 8) all ranks have.
        groups = tp_worker.MODELS[name][1]
        head = Fraction(4, 4 + 8 * groups) if "separate" in name else 0
        assert each == one * ((1 - head) / min(groups, 2) + head)
