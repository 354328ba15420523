"""The recall figure: what is drawn, from rows as the sweep has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from megatron_sharedproj.reporting.recall_plot import plot_recall, recall_figure  # noqa: E402


def row(form: str, heads: int, values: list[float], **changes: Any) -> dict[str, Any]:
    mean = sum(values) / len(values)
    return {
        "task": "mqar", "pairs": 4, "keys": 16, "length": 16, "form": form, "heads": heads, "hidden_size": 64,
        "head_size": 64 // heads, "layers": 2, "most_steps": 1500, "lrs": [3e-3, 1e-3], "chance": 0.25,
        "accuracy": mean, "accuracy_by_seed": values, "seeds": list(range(len(values))),
        "solved": len(values) - 1, "solved_at": 400.0,
        "solved_at_by_seed": [None, *range(400, 399 + len(values))],
        "first_lr_by_seed": [0.3, *values[1:]],
        "accuracy_deviation": 0.02 if len(values) > 1 else math.nan, **changes,
    }  # fmt: skip


ROWS = [
    row(form, heads, [value, value - 0.02, value + 0.01])
    for form, value in (("qkv", 0.98), ("qk_eq_v", 0.4), ("q_mqa", 0.7))
    for heads in (1, 4)
]


def texts(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_each_panel_has_every_seed_and_a_verdict() -> None:
    other = [{**one, "pairs": 8, "keys": 32, "accuracy_by_seed": [0.99] * 3} for one in ROWS]
    figure = recall_figure([*ROWS, *other])
    first, steps, second, _ = figure.axes
    assert "4 pairs of 16 keys" in first.get_title(loc="left")
    assert "confirms the published collapse here" in first.get_title(loc="left")
    assert "refutes" in second.get_title(loc="left")
    dots = [line for line in first.get_lines() if line.get_marker() == "o"]
    assert sorted(value for line in dots for value in line.get_ydata()) == sorted(
        value for one in ROWS for value in one["accuracy_by_seed"]
    )
    crosses = [line for line in first.get_lines() if line.get_marker() == "x"]
    failed = sum(value < 0.99 for one in ROWS for value in one["first_lr_by_seed"])
    assert sum(len(line.get_ydata()) for line in crosses) == failed > 0
    solved = sorted(
        value for line in steps.get_lines() if line.get_marker() == "o" for value in line.get_ydata()
    )
    assert solved == sorted(step for one in ROWS for step in one["solved_at_by_seed"] if step is not None)
    published = [line for line in first.get_lines() if line.get_marker() == "D"]
    assert sorted(value for line in published for value in line.get_ydata()) == [0.35, 0.9995]
    labels = texts(figure)
    assert "K=V" in labels and "Q-MQA" in labels and any("standard deviation" in label for label in labels)


def test_without_the_claims_heads_nothing_is_said_of_it() -> None:
    figure = recall_figure([one for one in ROWS if one["heads"] == 1])
    assert not any("published" in label for label in texts(figure))
    assert "published" not in figure.axes[0].get_title(loc="left")


def test_one_seed_has_no_bar(tmp_path: Path) -> None:
    plot_recall([row("qkv", 1, [0.9]), row("qkv", 2, [0.8])], tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no result to plot"):
        recall_figure([])
