"""benchmarks/generation.py: its rows add up, and a mistake is one line."""

from __future__ import annotations

import csv
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SMALL = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--vocab-size", "128"]


COMMAND = [sys.executable, str(REPO / "benchmarks" / "generation.py"), *SMALL]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def benchmark(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *flags], env=ENVIRONMENT, capture_output=True, text=True, cwd=folder, timeout=200
    )


@pytest.mark.slow
def test_rows_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    cases = ["--contexts", "128,300", "--batch-sizes", "1,3", "--budget-seconds", "0.2", "--threads", "1"]
    done = benchmark(tmp_path, *cases, "--output", "g.csv", "--plot", "g.png")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "g.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 5
    assert (tmp_path / "g.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for case in (rows[index : index + 5] for index in range(0, 20, 5)):
        of = {row["contender"]: row for row in case}
        tied, plain = of["ours qk_eq_v"], of["ours qkv"]
        assert 2 * int(tied["cache_bytes_held"]) == int(plain["cache_bytes_held"])
        shared, dynamic = of["transformers, SharedProjCache"], of["transformers, DynamicCache"]
        assert int(dynamic["cache_bytes_held"]) >= int(dynamic["cache_bytes_read"])
        static = of["transformers, StaticCache"]
        assert int(static["cache_bytes_read"]) == int(dynamic["cache_bytes_read"])
        assert int(shared["cache_bytes_read"]) * 2 == int(dynamic["cache_bytes_read"])
        assert int(tied["weight_bytes"]) == int(shared["weight_bytes"]) < int(plain["weight_bytes"])
        for row in case:
            assert int(row["repeats"]) >= 1 and float(row["ms_p10"]) <= float(row["ms_median"])
            rate = int(row["batch"]) * 1e3 / float(row["ms_median"])
            assert float(row["tokens_per_second"]) == pytest.approx(rate, rel=1e-4)
            ratio = float(plain["ms_median"]) / float(row["ms_median"])
            assert float(row["ratio_vs_qkv"]) == pytest.approx(ratio, rel=1e-3)


@pytest.mark.slow
def test_rotary_schemes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    cases = ["--contexts", "128", "--batch-sizes", "2", "--budget-seconds", "0.2", "--threads", "1"]
    done = benchmark(tmp_path, "--rotary", *cases, "--output", "g.csv", "--plot", "g.png")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "g.csv", newline="") as file:
        read = {row["contender"]: int(row["cache_bytes_read"]) for row in csv.DictReader(file)}
    whole = read.pop("ours qkv")
    # A head has 16 elements, 4 heads; the separate one 8.
    wanted = {"rotate_keys, both stored": 1.0, "separate_rope_head 0.5": 0.5 + 8 / 128}
    assert {name: count / whole for name, count in read.items()} == {
        name: wanted.get(name, 0.5) for name in read
    }
    assert len(read) == 5


@pytest.mark.slow
def test_ctrl_c_keeps_finished_cases(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    batches = [str(size) for size in range(1, 101)]
    cases = ["--contexts", "128", "--batch-sizes", ",".join(batches), "--budget-seconds", "0.2"]
    started = subprocess.Popen(
        [*COMMAND, *cases, "--output", "g.csv"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        # What a shell starts in the background ignores Ctrl-C, and so would this.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (tmp_path / "g.csv").exists():
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, stderr = started.communicate(timeout=60)
    assert started.returncode == 130, stderr
    assert stderr.endswith("error: interrupted; finished cases are kept\n") and "Traceback" not in stderr
    with open(tmp_path / "g.csv", newline="") as file:
        kept = [row["batch"] for row in csv.DictReader(file)]
    finished = len(kept) // 5
    assert 1 <= finished < 100 and kept == [size for size in batches[:finished] for _ in range(5)]
    assert [path.name for path in tmp_path.iterdir()] == ["g.csv"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contexts", "0"], "error: --contexts: '0' is not a whole number above 0"),
        (["--output", "no/g.csv"], "error: --output no/g.csv: no is not a folder"),
    ],
)
def test_mistakes(tmp_path: Path, flags: list[str], message: str) -> None:
    done = benchmark(tmp_path, *flags)
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
