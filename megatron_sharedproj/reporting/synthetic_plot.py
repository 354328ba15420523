"""Token accuracy of the synthetic tasks: ours with error bars, the paper's averages as hollow marks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sharedproj.experiments.small_models import PAPER_NAMES
from megatron_sharedproj.experiments.synthetic import SYNTHETIC_FORMS
from megatron_sharedproj.experiments.synthetic_results import MEAN, Shape, shapes_of
from megatron_sharedproj.reporting.figures import new_figure, save_figure

_WIDTH, _ROW = 10.0, 2.7  # inches
_BETWEEN = 0.13  # forms of a task, where tasks are 1 apart


def synthetic_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The matplotlib figure: a panel for each shape, tasks along it, a colour for each form.

    Args:
        rows: of synthetic_results.rows_of.
    Raises:
        ValueError: without matplotlib.
    """
    figure = new_figure()
    shapes = shapes_of(rows)
    across = 1 if len(shapes) <= 3 else math.ceil(len(shapes) / 3)
    down = math.ceil(len(shapes) / across)
    figure.set_size_inches(_WIDTH * (1 if across == 1 else 1.8), _ROW * down + 1.2)
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes in panels[len(shapes) :]:
        axes.set_visible(False)
    for axes, shape in zip(panels, shapes, strict=False):
        _panel(axes, [row for row in rows if Shape(row["hidden_size"], row["length"]) == shape])
        axes.set_title(str(shape), fontsize=10, loc="left")
        axes.set_ylabel("token accuracy")
    _legend(figure, panels[0], rows)
    return figure


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    forms = [form for form in SYNTHETIC_FORMS if any(row["form"] == form for row in rows)]
    for row in rows:
        place = tasks.index(row["task"]) + _BETWEEN * (forms.index(row["form"]) - (len(forms) - 1) / 2)
        color, deviation = _color(row["form"]), row["token_accuracy_deviation"]
        bar = None if math.isnan(deviation) else deviation
        axes.errorbar(place, row["token_accuracy"], bar, fmt="o", color=color, markersize=5, capsize=2.5)
        axes.plot(place, row["paper"], "D", color=color, markersize=6, markerfacecolor="none")
        if row["rerun_same_cells"] is not None:
            axes.plot(place, row["rerun_same_cells"], "_", color="black", markersize=9, markeredgewidth=1.5)
    for index, task in enumerate(tasks):
        blind = next(row["blind_accuracy"] for row in rows if row["task"] == task)
        axes.plot([index - 0.42, index + 0.42], [blind, blind], ":", color="0.4", linewidth=1)
        if index:
            axes.axvline(index - 0.5, color="0.85", linewidth=0.8)
    axes.set_xticks(range(len(tasks)), ["mean" if task == MEAN else task for task in tasks])
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(0, 1.1)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _color(form: str) -> str:
    return f"C{SYNTHETIC_FORMS.index(form)}"


def _legend(figure: Any, axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    def mark(label: str, marker: str, color: str, **options: Any) -> Any:
        return Line2D(
            [], [], **{"linestyle": "none", "marker": marker, "color": color, **options}, label=label
        )

    seeds = len(rows[0]["seeds"])
    present = {row["form"] for row in rows}
    marks = [mark(PAPER_NAMES[form], "o", _color(form)) for form in SYNTHETIC_FORMS if form in present]
    bars = f", bar: standard deviation of {seeds} seeds" if seeds > 1 else ", one seed"
    marks.append(mark(f"mean{bars}", "o", "0.4"))
    marks.append(mark("the paper's average over its whole grid", "D", "0.4", markerfacecolor="none"))
    if any(row["rerun_same_cells"] is not None for row in rows):
        marks.append(mark("the authors' re-run, the same cells", "_", "black"))
    marks.append(mark("a guess by position alone", "", "0.4", linestyle=":"))
    figure.legend(handles=marks, loc="outside lower center", ncols=5, fontsize=9, frameon=False)


def plot_synthetic(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Draw :func:`synthetic_figure` into one PNG, which appears complete. Arguments and errors as there."""
    save_figure(synthetic_figure(rows), output)
