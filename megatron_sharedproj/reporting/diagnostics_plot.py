"""Diagnostics of attention drawn: models compared layer by layer, and one model's heads.

Needs neither torch nor Megatron. Rows are those of evaluation/diagnostics.py with a ``label`` (a line) and a
``run`` (what a line is the mean of).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sharedproj.experiments.statistics import mean_and_deviation
from megatron_sharedproj.reporting.figures import new_figure, save_figure

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Panel:
    """A measure over layers.

    Attributes:
        title: above it; lines: key of a row, line style, what the style says.
        range: of the y axis, its lower end at the data where they are below; None: as the data are.
        heads: the heads are drawn as dots.
        one_token: a share of attention, which uniform attention has too.
    """

    title: str
    lines: tuple[tuple[str, str, str], ...]
    range: tuple[float | None, float | None]
    heads: bool = False
    one_token: bool = False


_PANELS = (
    _Panel(
        "linear CKA of keys and values",
        (("cka_key_value_heads", "-", "mean of the heads"), ("cka_key_value", ":", "whole layer")),
        (0.0, 1.0),
    ),
    _Panel(
        "effective rank of activations",
        (("effective_rank_key", "-", "key"), ("effective_rank_value", "--", "value")),
        (0.0, None),
    ),
    _Panel(
        "symmetry of the scores",
        (
            ("score_symmetry_centred", "-", "without row and column means"),
            ("score_symmetry", ":", "as they are"),
        ),
        (0.0, 1.0),
    ),
    _Panel("attention entropy / log(tokens seen)", (("entropy_share", "-", ""),), (None, None), heads=True),
    _Panel(
        "attention to the first token", (("first_token", "-", ""),), (0.0, None), heads=True, one_token=True
    ),
    _Panel("attention to itself", (("self", "-", ""),), (0.0, None), heads=True, one_token=True),
)

# Key, title, ends of the colours (None: as the data are).
_HEAD_MAPS = (
    ("cka_key_value", "linear CKA of keys and values", (0.0, 1.0)),
    ("effective_rank_key", "effective rank of the key", (None, None)),
    ("score_symmetry_centred", "symmetry of the scores, centred", (-1.0, 1.0)),
    ("entropy_share", "entropy / log(tokens seen)", (None, 1.0)),
    ("first_token", "attention to the first token", (0.0, None)),
    ("self", "attention to itself", (0.0, None)),
)


def comparison_figure(rows: Sequence[Row], *, uniform: float | None = None, title: str = "") -> Any:
    """The matplotlib figure: a panel per measure, layers along the x axis, a colour per label.

    Lines are means over a label's runs, bands one standard deviation up and down where there are several,
    dots the heads. What a variant ties is not drawn: the panel names it.

    Args:
        rows: layers and heads of any number of runs.
        uniform: the weight of one token where all weigh alike, drawn as a line.
    Raises:
        ValueError: without a row, or without matplotlib.
    """
    if not rows:
        raise ValueError("no diagnostics to plot; give at least one run")
    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure = new_figure()
    figure.set_size_inches(13.0, 7.6)
    every = figure.subplots(2, 3).flatten()
    for axes, panel in zip(every, _PANELS, strict=True):
        _draw(axes, panel, rows, labels, uniform if panel.one_token else None)
    _legend(figure, rows, labels)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw(
    axes: Any, panel: _Panel, rows: Sequence[Row], labels: Sequence[str], uniform: float | None
) -> None:
    tied = []
    for index, label in enumerate(labels):
        own, color = [row for row in rows if row["label"] == label], f"C{index % 10}"
        if not any([_line(axes, own, key, style, color) for key, style, _ in panel.lines]):
            tied.append(label)
        if panel.heads:
            # Side by side, so that one model's heads do not hide another's.
            offset = 0.5 * ((index + 0.5) / len(labels) - 0.5)
            key = panel.lines[0][0]
            heads = [row for row in own if row["head"] is not None and _measured(row[key])]
            places = [row["layer"] + offset for row in heads]
            axes.plot(places, [row[key] for row in heads], ".", color=color, alpha=0.35, markersize=4)
    handles = [
        axes.plot([], [], color="0.3", linestyle=style, label=says)[0]
        for _, style, says in panel.lines
        if says
    ]
    if uniform is not None:
        handles.append(axes.axhline(uniform, color="0.35", linestyle="--", label="uniform attention"))
    low, high = panel.range
    axes.set_ylim(None if low is None else min(low, 1.05 * axes.dataLim.y0), high)
    if handles:
        if panel.range[1] is None:  # room for the legend above the lines
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.2 * (high - low))
        axes.legend(handles=handles, fontsize=8, framealpha=0.9)
    axes.set_title(panel.title, fontsize=10)
    says_tied = f" (tied, 1 by construction: {', '.join(tied)})" if tied else ""
    axes.set_xlabel(f"layer{says_tied}", fontsize=9)
    axes.set_xlim(-0.4, max(row["layer"] for row in rows) + 0.4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Any, rows: Sequence[Row], labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    runs = {label: len({row["run"] for row in rows if row["label"] == label}) for label in labels}
    texts = [f"{label} ({runs[label]} runs)" if runs[label] > 1 else label for label in labels]
    handles = [
        Line2D([], [], color=f"C{index % 10}", marker="o", markersize=4) for index in range(len(labels))
    ]
    says = "dots: heads"
    if max(runs.values()) > 1:
        says = "lines: mean over runs; bands: one standard deviation; " + says
    figure.legend(
        handles,
        texts,
        loc="outside lower center",
        ncols=min(len(labels), 6),
        fontsize=9,
        title=says,
        title_fontsize=9,
    )


def _measured(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _line(axes: Any, rows: Sequence[Row], key: str, style: str, color: str) -> bool:
    """One label's line in a panel; False where there is nothing to draw."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["head"] is None and _measured(row[key]):
            values.setdefault(row["layer"], []).append(row[key])
    if not values:
        return False
    layers = sorted(values)
    spread = [mean_and_deviation(values[layer]) for layer in layers]
    means = [mean for mean, _ in spread]
    axes.plot(layers, means, style, color=color, marker="o", markersize=4)
    if all(len(values[layer]) > 1 for layer in layers):
        low, high = ([mean + sign * deviation for mean, deviation in spread] for sign in (-1, 1))
        axes.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
    return True


def heads_figure(rows: Sequence[Row], *, title: str = "") -> Any:
    """The matplotlib figure of one run: a map of layers and heads for each measure.

    Raises:
        ValueError: without a head, or without matplotlib.
    """
    heads = [row for row in rows if row["head"] is not None]
    if not heads:
        raise ValueError("no heads to plot")
    shape = max(row["layer"] for row in heads) + 1, max(row["head"] for row in heads) + 1
    figure = new_figure()
    figure.set_size_inches(13.0, 7.6)
    for axes, (key, name, limits) in zip(figure.subplots(2, 3).flatten(), _HEAD_MAPS, strict=True):
        axes.set_title(name, fontsize=10)
        grid = [[math.nan] * shape[1] for _ in range(shape[0])]
        for row in heads:
            if _measured(row[key]):
                grid[row["layer"]][row["head"]] = row[key]
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if all(math.isnan(value) for line in grid for value in line):
            axes.set_xlim(-0.5, shape[1] - 0.5)
            axes.set_ylim(-0.5, shape[0] - 0.5)
            axes.text(0.5, 0.5, "tied: 1 by construction", transform=axes.transAxes, ha="center", va="center")
            continue
        low, high = limits
        colors = "RdBu_r" if low == -1.0 else "viridis"
        image = axes.imshow(grid, aspect="auto", origin="lower", cmap=colors, vmin=low, vmax=high)
        figure.colorbar(image, ax=axes)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def plot_comparison(rows: Sequence[Row], output: Path, **options: Any) -> None:
    """Draw :func:`comparison_figure` into one PNG, which appears complete. Arguments and errors as there."""
    save_figure(comparison_figure(rows, **options), output)


def plot_heads(rows: Sequence[Row], output: Path, **options: Any) -> None:
    """Draw :func:`heads_figure` into one PNG, which appears complete. Arguments and errors as there."""
    save_figure(heads_figure(rows, **options), output)
