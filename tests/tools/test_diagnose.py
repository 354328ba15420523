"""tools/diagnose.py: what it prints, writes and draws, and one line for each mistake."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from scripts import load

REPO = Path(__file__).resolve().parents[2]
SEQ = tiny.SEQ


@pytest.fixture(scope="module")
def folder(parallel_state: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, two seeds of qkv with two groups, and a K=V model, each trained for two steps."""
    folder = tmp_path_factory.mktemp("diagnose")
    data = tiny.write_data(folder)
    runs = {"a": ("qkv", 2, 1), "b": ("qkv", 2, 2), "c": ("qk_eq_v", 0, 1)}
    for name, (variant, groups, seed) in runs.items():
        line = tiny.flags(
            data, variant, groups, save=folder / name, seed=seed, train_iters=2, lr_warmup_iters=0
        )
        assert len(tiny.losses(line)) == 2
    return folder


Tool = Callable[..., str]


@pytest.fixture
def tool(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tool:
    """The tool's work in this process group: its stdout; mistakes are raised."""
    diagnose = load("tools/diagnose.py")
    monkeypatch.chdir(folder)

    def call(*args: Any) -> str:
        capsys.readouterr()
        diagnose.run(diagnose.build_parser().parse_args(list(map(str, args))))
        return capsys.readouterr().out

    return call


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


DATA = ("--data-path", "tiny_text_document")


def test_runs_are_compared(tool: Tool, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    printed = tool(
        "--load", "a", "b", "c", "--labels", "qkv,qkv,K=V", *DATA, "--tokens", 300, "--output-dir", out
    )
    plots = ["diagnostics.png", "heads_a.png", "heads_b.png", "heads_c.png"]
    assert sorted(path.name for path in out.iterdir()) == ["diagnostics.csv", "diagnostics.jsonl", *plots]
    assert all(min(png_size(path)) > 500 for path in out.glob("*.png"))
    rows = [json.loads(line) for line in (out / "diagnostics.jsonl").read_text().splitlines()]
    assert [(row["label"], row["run"], row["layer"], row["head"]) for row in rows] == [
        (label, run, layer, head)
        for label, run in (("qkv", "a"), ("qkv", "b"), ("K=V", "c"))
        for layer in range(2)
        for head in (None, 0, 1, 2, 3)
    ]
    assert {(row["tokens"], row["seq_length"]) for row in rows} == {(9 * SEQ, SEQ)}
    assert {row["cka_key_value"] for row in rows if row["run"] == "c"} == {"tied"}
    assert all(0 < row["cka_key_value"] < 1 for row in rows if row["run"] != "c")
    text = (out / "diagnostics.csv").read_text()
    for row, line in zip(rows, csv.DictReader(text.splitlines()), strict=True):
        assert line["head"] == ("" if row["head"] is None else str(row["head"]))
        assert float(line["entropy"]) == pytest.approx(row["entropy"], rel=1e-5)
        assert line["cka_key_value"] == ("tied" if row["run"] == "c" else f"{row['cka_key_value']:.6g}")
    # The table has the layers and their mean.
    first = [row for row in rows if row["run"] == "a" and row["head"] is None]
    lines = [line.split() for line in printed.splitlines()]
    means = next(line for line in lines if line[:1] == ["mean"])
    assert means[1] == f"{np.mean([row['cka_key_value'] for row in first]):.3f}"
    assert means[-1] == f"{np.mean([row['self'] for row in first]):.3f}"
    assert sum(line[:2] == ["mean", "tied"] for line in lines) == 1
    assert f"perplexity {math.exp(rows[0]['loss']):.2f}" in printed
    # 288 tokens for 32 features.
    assert printed.count("cka_*_unbiased is not") == 3


def test_a_text_file_and_no_plots(tool: Tool, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i % 90) for i in range(100)))
    printed = tool(
        "--load", "a/iter_0000002", "--text", text, "--seq-length", 8, "--tokens", 50, "--no-plots",
        "--output-dir", tmp_path,
    )  # fmt: skip
    assert "48 tokens in rows of 8, perplexity" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "diagnostics.csv",
        "diagnostics.jsonl",
        "text.txt",
    ]
    assert '"label": "a_iter_0000002"' in (tmp_path / "diagnostics.jsonl").read_text()


def test_a_hugging_face_directory_is_the_model_it_holds(tool: Tool, folder: Path, tmp_path: Path) -> None:
    """Attention weights of transformers' own GPT-2, averaged by hand."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=16, attn_implementation="eager"
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "gpt2")
    ids = torch.arange(64) * 7 % 90
    (tmp_path / "ids.txt").write_text(" ".join(map(str, [*ids.tolist(), 1])))
    tool("--load", tmp_path / "gpt2", "--text", tmp_path / "ids.txt", "--no-plots", "--output-dir", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]
    with torch.no_grad():
        weights = model(ids.view(4, 16), output_attentions=True).attentions
    for row in rows:
        if row["head"] is not None:
            own = weights[row["layer"]][:, row["head"]]
            assert row["first_token"] == pytest.approx(own[:, 1:, 0].mean().item(), rel=1e-4)
            assert row["self"] == pytest.approx(own.diagonal(dim1=1, dim2=2)[:, 1:].mean().item(), rel=1e-4)


def test_what_is_measured_stays_when_a_later_run_fails(tool: Tool, folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder / "c", tmp_path / "damaged")
    shard = next((tmp_path / "damaged").glob("iter_*/*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        tool(
            "--load", "a", tmp_path / "damaged", *DATA, "--tokens", 100, "--no-plots", "--output-dir",
            tmp_path / "out",
        )  # fmt: skip
    assert len((tmp_path / "out" / "diagnostics.jsonl").read_text().splitlines()) == 10


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "no text": (("--load", "a"), "--data-path, --text: give one of them"),
    "two texts": (("--load", "a", *DATA, "--text", "x"), "--data-path, --text: give one of them"),
    "no file": (("--load", "a", "--text", "x.txt"), "--text x.txt: is not a file"),
    "no data": (("--load", "a", "--data-path", "x"), "--data-path x: x.bin does not exist"),
    "no run": (("--load", "a", "x", *DATA), "--load x: no checkpoint there"),
    "twice": (("--load", "a", "a", *DATA), "--load a a: a run is given twice"),
    "labels": (("--load", "a", "b", *DATA, "--labels", "one"), "--labels one: give 2, one per RUN"),
    "empty": (("--load", "a", *DATA, "--labels", " "), "--labels  : give 1"),
    "mixed": (("--load", "a", "c", *DATA, "--labels", "x,x"), "--labels x: names models of different shapes"),
    "short": (("--load", "a", *DATA, "--tokens", "20"), "--tokens: 21 tokens are too few for a row of 32"),
    "long": (("--load", "a", *DATA, "--seq-length", "33"), "--seq-length 33: must be from 2"),
    "negative": (("--load", "a", *DATA, "--seq-length", "-1"), "--seq-length -1: must not be negative"),
    "a file": (("--load", "a", *DATA, "--output-dir", "tiny_text_document.bin"), "is not a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes(tool: Tool, tmp_path: Path, name: str) -> None:
    words, message = BAD[name]
    with pytest.raises(ValueError) as error:
        tool("--output-dir", tmp_path / "out", *words)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_one_line_and_exit_code_2(folder: Path) -> None:
    command = [
        sys.executable,
        str(REPO / "tools" / "diagnose.py"),
        "--load",
        "nothing",
        *DATA,
        "--output-dir",
        "out",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: --load nothing: no checkpoint there") and done.stderr.count("\n") == 1
    )


# --- the figures -----------------------------------------------------------------------------------------


def row(label: str, run: str, layer: int, head: int | None, value: Any, **changes: Any) -> dict[str, Any]:
    keys = (
        "cka_key_value", "cka_key_value_heads", "effective_rank_key", "effective_rank_value",
        "score_symmetry", "score_symmetry_centred", "entropy_share", "first_token", "self",
    )  # fmt: skip
    return {"label": label, "run": run, "layer": layer, "head": head, **dict.fromkeys(keys, value), **changes}


def test_lines_are_means_of_runs_and_bands_their_deviation() -> None:
    from megatron_sharedproj.reporting.diagnostics_plot import comparison_figure

    tied = {"cka_key_value": "tied", "cka_key_value_heads": "tied"}
    rows = [
        row(label, run, layer, head, 0.1 * layer + shift, **changes)
        for label, run, shift, changes in (("A", "a", 0.2, {}), ("A", "b", 0.4, {}), ("B", "c", 0.3, tied))
        for layer in range(3)
        for head in (None, 0, 1)
    ]
    figure = comparison_figure(rows, uniform=0.05, title="some title")
    cka, _, symmetry, entropy, first, _ = figure.axes
    assert cka.get_xlabel() == "layer (tied, 1 by construction: B)"
    assert symmetry.get_xlabel() == "layer"
    drawn = [list(line.get_ydata()) for line in cka.lines if len(line.get_ydata())]
    assert len(drawn) == 2  # of the heads and of the layer, of A alone
    assert drawn[0] == pytest.approx([0.3, 0.4, 0.5])
    band = cka.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.3 - 0.02**0.5, 0.5 + 0.02**0.5))
    assert len(entropy.collections) == 1  # one run of B has no deviation
    dots = [line for line in entropy.lines if line.get_linestyle() == "None"]
    assert [len(line.get_ydata()) for line in dots] == [12, 6]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A (2 runs)", "B"]
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["uniform attention"]
    with pytest.raises(ValueError, match="no diagnostics to plot"):
        comparison_figure([])


def test_maps_of_heads() -> None:
    from megatron_sharedproj.reporting.diagnostics_plot import heads_figure

    rows = [
        row("A", "a", layer, head, layer + 0.1 * head, cka_key_value="tied")
        for layer in range(2)
        for head in range(3)
    ]
    figure = heads_figure(rows)
    tied, rank = figure.axes[:2]
    assert not tied.images and tied.texts[0].get_text() == "tied: 1 by construction"
    np.testing.assert_allclose(rank.images[0].get_array(), [[0.0, 0.1, 0.2], [1.0, 1.1, 1.2]])
    with pytest.raises(ValueError, match="no heads to plot"):
        heads_figure([row("A", "a", 0, None, 0.0)])
