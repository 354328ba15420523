"""benchmarks/tied_projection.py: its bytes add up, its rounds run, and a mistake is one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from scripts import load

SMALL = ["--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16"]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load("benchmarks/tied_projection.py")


def test_bytes(benchmark: Any, tmp_path: Path) -> None:
    assert benchmark.main(["--bytes", "--output", str(tmp_path / "bytes.json")]) == 0
    rows = json.loads((tmp_path / "bytes.json").read_text())
    assert {(row["preset"], row["ranks"]) for row in rows} == {
        (p, n) for p in ("300m", "1b") for n in (2, 4, 8)
    }
    for row in rows:
        assert row["layer_replicated"] < 0.1 * row["layer_gathered"]
        assert 0.1 < row["less"] < 0.25
        assert row["less"] == pytest.approx(1 - row["step_replicated"] / row["step_gathered"])
    [row] = [r for r in rows if (r["preset"], r["model"], r["ranks"]) == ("300m", "Q-MQA", 2)]
    # Half of [12288, 17 * 64] forward and again backward; half of [64, 1025], twice; bf16.
    assert row["layer_gathered"] == 12288 * 17 * 64 * 2 / 2**20
    assert row["layer_replicated"] == 64 * 1025 * 2 / 2**20


def test_mistakes(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--models", "GQA-2", "--ranks", "2"]) == 2
    assert capsys.readouterr().err == "error: --ranks 2: no model has fewer groups; use more ranks\n"


@pytest.mark.slow
def test_rounds(benchmark: Any, tmp_path: Path) -> None:
    flags = [*SMALL, "--models", "Q-MQA", "--ranks", "2", "--rounds", "2", "--launches", "2"]
    assert benchmark.main([*flags, "--output", str(tmp_path / "rows.csv")]) == 0
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == list(benchmark.CALLS)
    for row in rows:
        assert int(row["rounds"]) == 2 * 2 * benchmark.CALLS[row["what"]]
        assert float(row["speedup_p10"]) <= float(row["speedup"]) <= float(row["speedup_p90"])
