"""The benchmark's command line: its CSV, continuing it, the plot, and its messages."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sharedproj.ops import extension
from megatron_sharedproj.profiling.attention_results import COLUMNS
from scripts import load

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "benchmark_attention.py"
TINY = [
    "--device", "cpu", "--layouts", "strided", "--heads", "4", "--head-sizes", "16", "--seq-lengths", "32",
    "--tokens", "64", "--decode-batches", "2", "--decode-contexts", "256", "--budget-seconds", "0.02",
    "--threads", "1",
]  # fmt: skip
PLAIN = ["sdpa_alias", "sdpa_separate", "reference"]
ALL = ["extension", "extension_separate", *PLAIN]

Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """The tool's main() in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    benchmark_attention = load("tools/benchmark_attention.py")

    def call(*args: str) -> tuple[int, str, str]:
        try:
            code = benchmark_attention.main(list(args))
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return call


def read(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_without_the_extension_the_rest_runs(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / "megatron_sharedproj").mkdir(parents=True)
    for entry in (REPO / "megatron_sharedproj").iterdir():
        if not entry.name.startswith("_C"):
            (clone / "megatron_sharedproj" / entry.name).symlink_to(entry)
    # Where the package is installed, its own extension would be found after the clone's missing one.
    (clone / "megatron_sharedproj" / "_C.py").write_text("raise ModuleNotFoundError\n")
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    line = [*TINY, "--dtype", "bf16", "--output", "out.csv", "--plot", "out.png"]
    done = subprocess.run(
        [sys.executable, str(TOOL), *line],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    out = done.stdout.splitlines()
    assert any(line.startswith("measured roofline: ") and "bfloat16 matrix product" in line for line in out)
    missing = "extension           left out: the compiled extension is not installed"
    assert sum(line.strip() == missing for line in out) == 4
    assert out[-2:] == ["out.csv: 12 rows", "out.png: the plot"]
    rows = read(tmp_path / "out.csv")
    ops = ("fwd", "fwdbwd", "bwd", "decode")
    assert [(row["op"], row["implementation"]) for row in rows] == [(op, x) for op in ops for x in PLAIN]
    assert all(tuple(row) == COLUMNS for row in rows)
    # Nothing beats what was measured in the same run, some noise aside.
    assert all(0 < float(row["percent_of_roofline"]) < 150 for row in rows)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(os.listdir(tmp_path)) == ["clone", "out.csv", "out.png"]


def test_rows_and_table_of_every_implementation(tool: Tool) -> None:
    code, out, err = tool(*TINY, "--ops", "fwd,decode", "--output", "out.csv")
    assert (code, err) == (0, "")
    expected = PLAIN if extension.MISSING else ALL
    rows = read("out.csv")
    assert [row["implementation"] for row in rows] == 2 * expected
    for row, line in zip(rows, (x for x in out.splitlines() if x.split()[0] in expected), strict=True):
        assert line.split()[0] == row["implementation"]
        assert float(line.split()[1]) == pytest.approx(float(row["ms_median"]), rel=1e-3)
    assert "[1/2, ETA ?] fwd bf16 strided, batch 2, length 32, causal, 4/4 heads of 16; SDPA: " in out


def test_a_file_is_continued_and_never_overwritten(tool: Tool) -> None:
    command = [*TINY, "--ops", "fwd", "--dtype", "fp32", "--output", "out.csv"]
    assert tool(*command, "--implementations", "sdpa_alias")[0] == 0
    before = Path("out.csv").read_bytes()
    code, _, err = tool(*command)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error: --output out.csv: exists; add --resume")
    code, out, _ = tool(*command, "--implementations", "sdpa_alias", "--resume", "--plot", "out.png")
    assert code == 0 and out == "1 of 1 cases are in out.csv\nout.csv: 1 rows\nout.png: the plot\n"
    assert Path("out.csv").read_bytes() == before
    # A row that a killed run left incomplete is measured again; what is there stays.
    Path("out.csv").write_bytes(before + before.splitlines()[1][:40])
    code, _, err = tool(*command, "--implementations", "sdpa_alias,reference", "--resume")
    assert (code, err) == (0, "")
    assert Path("out.csv").read_bytes().startswith(before)
    # A case that lacks an implementation is measured as a whole: ratios are of one run.
    assert [row["implementation"] for row in read("out.csv")] == ["sdpa_alias", "sdpa_alias", "reference"]
    # Another thread count is another measurement.
    Path("out.csv").write_text(Path("out.csv").read_text().replace(",1,fwd", ",63,fwd"))
    assert tool(*command, "--implementations", "sdpa_alias", "--resume")[0] == 0
    assert [row["threads"] for row in read("out.csv")] == ["63", "63", "63", "1"]


def test_a_file_of_something_else_is_left_alone(tool: Tool) -> None:
    Path("out.csv").write_text("a,b\n1,2\n")
    code, _, err = tool(*TINY, "--output", "out.csv", "--resume")
    assert code == 2 and "--output out.csv: has other columns" in err
    assert Path("out.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--ops", "fwd,train"], ["--ops", "'train' is unknown", "decode"]),
        (["--heads", "8,0"], ["--heads", "'0' is not a whole number above 0"]),
        (["--groups", "3"], ["--groups 3", "divides none of the heads 8"]),
        (["--page-size", "96"], ["--page-size 96", "multiples of 64"]),
        (["--page-size", "64", "--decode-contexts", "100"], ["--page-size 64", "does not divide", "100"]),
        (["--budget-seconds", "0"], ["--budget-seconds", "'0' is not a number above 0"]),
        (["--batch", "2", "--tokens", "64"], ["--tokens", "--batch"]),
        (["--resume"], ["--resume", "give --output"]),
        (["--output", "none/out.csv"], ["--output none/out.csv", "not a folder"]),
        (["--plot", "out.pdf"], ["--plot out.pdf", "ends in .png"]),
        (["--plot", "none/out.png"], ["--plot none/out.png", "not a folder"]),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tool: Tool, args: list[str], expected: list[str]) -> None:
    code, out, err = tool(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in expected:
        assert part in err
    assert os.listdir() == []


def test_what_is_missing_is_said_before_any_work(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        code, out, err = tool("--device", "cuda")
        assert (code, out) == (2, "") and "--device cuda" in err and "use --device cpu" in err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = tool(*TINY, "--plot", "out.png")
    assert (code, out) == (2, "")
    assert err.startswith("error: --plot out.png: matplotlib is not installed; install it with")
