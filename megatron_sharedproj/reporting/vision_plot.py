"""Accuracy of the forms of attention on image tasks, a panel per data set, beside the paper's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sharedproj.experiments.small_models import FORMS, PAPER_NAMES
from megatron_sharedproj.reporting.figures import new_figure, save_figure

# The least distance of two shapes' points, as a share of the distance of two forms.
_SPREAD = 0.5

Row = Mapping[str, Any]


def plot_vision(rows: Sequence[Row], output: Path) -> None:
    """Draw :func:`vision_figure` into one PNG, which appears complete. Errors as there."""
    save_figure(vision_figure(rows), output)


def vision_figure(rows: Sequence[Row]) -> Any:
    """The matplotlib figure: a panel per task and data set, forms along the x axis, a colour per model shape.

    Points are means over seeds, bars one standard deviation up and down, small dots the seeds; diamonds are
    the paper's accuracies, of the data set that the panel names.

    Args:
        rows: of vision_results.rows_of.
    Raises:
        ValueError: without a row, or without matplotlib.
    """
    panels = list(dict.fromkeys((row["task"], row["dataset"]) for row in rows))
    if not panels:
        raise ValueError("no result to plot")
    figure = new_figure()
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure.set_size_inches(4.6 * columns + 0.8, 4.2 * lines + 0.6)
    every = figure.subplots(lines, columns, squeeze=False).flatten()
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    colours = {shape: f"C{index % 10}" for index, shape in enumerate(shapes)}
    for axes, panel in zip(every, panels, strict=False):
        _draw(axes, [row for row in rows if (row["task"], row["dataset"]) == panel], colours)
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    every[0].set_ylabel("test accuracy")
    handles, labels = every[0].get_legend_handles_labels()
    for axes in every[1 : len(panels)]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9)
    return figure


def _draw(axes: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    forms = [form for form in FORMS if any(row["form"] == form for row in rows)]
    shapes = [shape for shape in colours if any(_shape(row) == shape for row in rows)]
    for index, shape in enumerate(shapes):
        here = [row for row in rows if _shape(row) == shape]
        offset = _SPREAD * ((index + 0.5) / len(shapes) - 0.5)
        places = [forms.index(row["form"]) + offset for row in here]
        for place, row in zip(places, here, strict=True):
            seeds = row["accuracies"]
            axes.plot([place + 0.09] * len(seeds), seeds, ".", color=colours[shape], markersize=4, alpha=0.6)
        axes.errorbar(
            places,
            [row["accuracy"] for row in here],
            yerr=[0.0 if math.isnan(row["deviation"]) else row["deviation"] for row in here],
            fmt="o",
            capsize=3,
            color=colours[shape],
            label=f"{shape}: mean, +- deviation, seeds",
        )
    known = {row["form"]: row["paper"] for row in rows if row["paper"] is not None}
    if known:
        axes.plot(
            [forms.index(form) - 0.25 for form in known],
            list(known.values()),
            "D",
            color="0.3",
            markersize=5,
            markerfacecolor="none",
            label="the paper",
        )
    first = rows[0]
    beside = next((row["paper_dataset"] for row in rows if row["paper_dataset"]), None)
    axes.set_title(
        f"{first['task']}: {first['dataset']}" + (f"\n(paper: {beside})" if beside else ""), fontsize=10
    )
    axes.set_xticks(range(len(forms)), [PAPER_NAMES[form] for form in forms], rotation=20, ha="right")
    axes.set_xlim(-0.6, len(forms) - 0.4)
    axes.grid(True, axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _shape(row: Row) -> str:
    return f"d {row['hidden_size']}, {row['layers']} layers, {row['heads']} heads"
