"""profile.py roofline: rows, plot and mistakes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.command_line import Parser
from megatron_sharedproj.config import PRESETS
from megatron_sharedproj.profiling import planner
from megatron_sharedproj.profiling.commands import roofline
from megatron_sharedproj.reporting.roofline_plot import roofline_figure


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser()
    roofline.add_arguments(parser)
    return parser.parse_args(words)


def rows_of(tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    path = tmp_path / "rows.json"
    roofline.run(parsed(*words, "--output", str(path)))
    return json.loads(path.read_text())


def test_rows_are_the_planners(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "--gpu", "A100-40GB", "--batch", "1,64", "--context", "512,2048")
    assert len(rows) == 2 * 2 * 2 * 8
    for row in rows:
        config = PRESETS["300m"].replace(
            attention_variant=row["variant"], num_query_groups=row["num_query_groups"]
        )
        bound = roofline.PHASES[row["phase"]](
            config, batch=row["batch"], context=row["context"], dtype="bf16", peak=312e12, bandwidth=1555e9
        )
        assert (row["flops"], row["bytes"], row["bound"]) == (bound.flops, bound.moved, bound.bound)
        assert row["tokens_per_second"] == pytest.approx(bound.tokens_per_second)
        if row["model"] == "QKV":
            assert row["over_qkv"] == 1
        else:
            assert row["over_qkv"] > 1


def test_decode_approaches_the_ratio_of_the_caches(tmp_path: Path) -> None:
    words = ["--gpu", "A100-40GB", "--attention-variant", "qk_eq_v", "--batch", "1,1000"]
    one, many = (row for row in rows_of(tmp_path, *words) if row["phase"] == "decode")
    assert 1 < one["over_qkv"] < 1.5
    assert 1.95 < many["over_qkv"] < 2
    assert one["fits"] and not many["fits"]


def test_a_gpu_by_its_figures(tmp_path: Path) -> None:
    words = ["--peak-tflops", "100", "--bandwidth-gbs", "800", "--attention-variant", "qkv", "--batch", "2"]
    rows = rows_of(tmp_path, *words)
    bound = planner.decode(PRESETS["300m"], batch=2, context=2048, dtype="bf16", peak=100e12, bandwidth=800e9)
    assert rows[1]["seconds"] == pytest.approx(bound.seconds)
    assert rows[1]["fits"] is None


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_plot_is_written_whole(tmp_path: Path, suffix: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"roof{suffix}"
    rows_of(tmp_path, "--gpu", "H100", "--plot", str(plot), "--batch", "1,8")
    assert plot.read_bytes().startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == [plot.name, "rows.json"]


def test_points_lie_on_the_ceiling(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = rows_of(tmp_path, "--gpu", "H100", "--batch", "1,1000", "--attention-variant", "qkv,qk_eq_v")
    figure = roofline_figure(rows, name="H100", peak=989e12, bandwidth=3350e9)
    roof, rates = figure.axes
    points = [line for line in roof.lines if len(line.get_xdata()) == 1]
    assert len(points) == len(rows)
    for point in points:
        (x,), (y,) = point.get_xdata(), point.get_ydata()
        assert y == pytest.approx(min(989.0, x * 3.35), rel=1e-6)
    # Batches of 1000 full sequences exceed 80 GB for qkv.
    assert any(point.get_markerfacecolor() == "none" for point in points)
    assert [text.get_text() for text in rates.get_legend().get_texts()] == ["QKV", "Q-K=V"]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--gpu: give a GPU's name, or both --peak-tflops and --bandwidth-gbs"),
        (["--peak-tflops", "100"], "--gpu: give a GPU's name, or both"),
        (["--gpu", "B2000"], "--gpu B2000: unknown"),
        (
            ["--gpu", "H100", "--context", "4096"],
            "--context 4096: longer than --max-position-embeddings 2048",
        ),
        (
            ["--gpu", "H100", "--plot", "roof.gif"],
            "--plot roof.gif: must be a file name that ends in .png or .svg",
        ),
        (["--gpu", "H100", "--plot", "no/roof.png"], "--plot no/roof.png: no is not a folder"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roofline.run(parsed(*words))


@pytest.mark.parametrize("flag, value", [("--batch", "0"), ("--context", "-5"), ("--peak-tflops", "0")])
def test_sizes_are_above_zero(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("--gpu", "H100", flag, value)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {flag}: '{value}' is not a")
