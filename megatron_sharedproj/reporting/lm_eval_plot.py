"""Accuracies of several models per task, with error bars and the level of guessing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sharedproj.reporting.figures import new_figure, save_figure
from megatron_sharedproj.reporting.lm_eval_table import Scores

# The least distance of two models' points, as a share of the distance of two tasks.
_SPREAD = 0.6


def plot_comparison(models: Sequence[Scores], output: Path) -> None:
    """Draw :func:`comparison_figure` into one PNG, which appears complete.

    Raises:
        ValueError: without a score that has a level of guessing, or without matplotlib.
    """
    save_figure(comparison_figure(models), output)


def comparison_figure(models: Sequence[Scores]) -> Any:
    """The matplotlib figure: one panel per metric and number of shots, tasks along the x axis.

    Points are values, bars one standard error up and down, dashes what guessing scores.

    Raises:
        ValueError: without a score that has a level of guessing, or without matplotlib.
    """
    keys = [key for key, score in models[0].by_key.items() if score["chance"] is not None]
    panels = list(dict.fromkeys((shots, metric) for _, shots, metric, _ in keys))
    if not panels:
        raise ValueError("--output: no accuracy among the scores, so there is nothing to plot")
    figure = new_figure()
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure.set_size_inches(5.0 * columns + 1.0, 3.6 * rows + 0.8)
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (shots, metric) in zip(every, panels, strict=False):
        shown = [key for key in keys if key[1:3] == (shots, metric)]
        for place, key in enumerate(shown):
            chance = models[0].by_key[key]["chance"]
            axes.plot(
                [place - 0.4, place + 0.4], [chance, chance], color="0.35", linestyle="--", linewidth=1.1
            )
        for index, model in enumerate(models):
            offset = _SPREAD * ((index + 0.5) / len(models) - 0.5)
            scores = [model.by_key[key] for key in shown]
            axes.errorbar(
                [place + offset for place in range(len(shown))],
                [score["value"] for score in scores],
                yerr=[score["stderr"] or 0.0 for score in scores],
                fmt="o",
                capsize=3,
                color=f"C{index % 10}",
                label=model.label,
            )
        axes.set_xticks(range(len(shown)), [key[0] for key in shown], rotation=20, ha="right")
        axes.set_ylabel(metric)
        axes.set_title(f"{shots}-shot", fontsize=10)
        axes.grid(True, axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    every[0].plot([], [], color="0.35", linestyle="--", linewidth=1.1, label="guessing")
    every[0].legend(fontsize=9, framealpha=0.9)
    return figure
