"""The command line of the synthetic tasks, on a grid of seconds."""

from __future__ import annotations

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import scripts

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--tasks", "sub,reverse", "--forms", "qkv,q_eq_k+", "--hidden-sizes", "16", "--layers", "1", "--heads",
    "2", "--lengths", "6", "--seeds", "0,1", "--epochs", "1", "--train-lists", "200", "--test-lists", "50",
]  # fmt: skip


def test_interrupted_gone_on_with_and_written(tmp_path: Path) -> None:
    """Ctrl-C behind the first result, then the same command to its end."""
    pytest.importorskip("matplotlib")
    folder, table, plot = tmp_path / "runs", tmp_path / "table.csv", tmp_path / "plot.png"
    command = [sys.executable, str(ROOT / "tools/synthetic_experiment.py"), "--folder", str(folder), *TINY]
    command += ["--plot", str(plot), "--output", str(table), "--epochs", "20"]
    results = folder / "results.jsonl"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not (results.exists() and results.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and said.startswith("8 cells, about ")
    assert "cells are done; the same command goes on" in errors and not table.exists()
    before = results.read_text()
    done = len(before.splitlines())
    assert 1 <= done < 8

    process = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert process.returncode == 0, process.stderr
    assert f"{done} of 8 cells are done already" in process.stdout
    assert results.read_text().startswith(before) and len(results.read_text().splitlines()) == 8
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["task"], row["form"]) for row in rows] == [
        (task, form) for task in ("reverse", "sub") for form in ("qkv", "q_eq_k+")
    ]
    assert all(json.loads(row["seeds"]) == [0, 1] and row["steps"] == "[40]" for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_table_of_what_a_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = scripts.load("tools/synthetic_experiment.py")
    rerun = tmp_path / "0.csv"
    rerun.write_text("variant,task,n_embd,n_layer,n_head,seq_len,seed,accuracy\nQKV,SUB,16,1,2,6,0,0.75\n")
    command = ["--folder", str(tmp_path / "runs"), *TINY, "--format", "markdown", "--rerun", str(rerun)]
    assert tool.main(command) == 0
    said = capsys.readouterr().out
    assert "| form | d 16, length 6 | their re-run | the paper, its grid | their re-run, its grid |" in said
    assert "REVERSE\n" in said and "SUB\n" in said and "| 0.750 | 1.000 | 0.992 |" in said
    assert "- sub, d 16, length 6: " in said
    assert tool.main(command) == 0
    again = capsys.readouterr().out
    assert again.split("REVERSE")[1] == said.split("REVERSE")[1] and "8 of 8 cells are done" in again


def test_the_shapes_that_flags_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sharedproj.experiments import sweep

    asked: list[list[dict[str, object]]] = []

    def stop(cells: list[dict[str, object]], *_: object, **__: object) -> None:
        asked.append(cells)
        raise ValueError("enough")

    monkeypatch.setattr(sweep, "run_sweep", stop)
    tool = scripts.load("tools/synthetic_experiment.py")
    for flags, count in (
        ([], 324),
        (["--full"], 3240),
        (["--full", "--heads", "2", "--seeds", "5"], 540),
        (["--lengths", "32"], 180),
        (["--tasks", "copy", "--forms", "qkv"], 9),
    ):
        assert tool.main(["--folder", str(tmp_path), *flags]) == 2
        assert len(asked[-1]) == count
    assert {cell["length"] for cell in asked[3]} == {32} and {cell["heads"] for cell in asked[3]} == {2, 4}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "add"], "error: --tasks: 'add' is unknown; choose from reverse, sort, sub, swap, copy"),
        (["--forms", "mqa"], "error: --forms: 'mqa' is unknown; choose from qkv, "),
        (["--heads", "3"], "error: --heads 3: must divide --hidden-sizes 64"),
        (["--lengths", "7"], "error: --lengths 7: swap needs an even one"),
        (["--lengths", "4"], "error: --lengths 4: too few lists of that length for 10,000"),
        (["--seeds", "-1"], "error: --seeds -1: must be 0 or more"),
        (["--at-once", "0"], "error: --at-once: '0' is not a whole number above 0"),
        (["--plot", "a.pdf"], "error: --plot a.pdf: must be a file name that ends in .png"),
        (["--output", "no/where.md"], "error: --output no/where.md: no is not a folder"),
        (["--rerun", "none.csv"], "error: --rerun none.csv: No such file"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    tool = scripts.load("tools/synthetic_experiment.py")
    try:
        code = tool.main(["--folder", str(tmp_path / "runs"), *flags])
    except SystemExit as leaving:
        code = leaving.code
    errors = capsys.readouterr().err
    assert code == 2 and errors.startswith(message) and errors.count("\n") == 1
    assert not (tmp_path / "runs").exists()
