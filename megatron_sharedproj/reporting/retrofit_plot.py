"""Validation perplexity along distillation runs, beside the levels of models that were trained otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sharedproj.reporting.figures import new_figure, save_figure, token_formatter
from megatron_sharedproj.reporting.plots import X_AXES, Run


def final_perplexity(run: Run) -> float:
    """The last validation's.

    Raises:
        ValueError: if there was none.
    """
    if not run.validation:
        raise ValueError(f"{run.path}: no validation in it; train with --eval-iters above 0")
    return math.exp(min(float(run.validation[-1]["validation_lm_loss"]), 50.0))


def retrofit_figure(
    runs: Mapping[str, Run],
    *,
    levels: Mapping[str, Run] | None = None,
    starts: Mapping[str, float] | None = None,
    x: str = "iteration",
    title: str | None = None,
) -> Any:
    """The matplotlib figure: perplexity on a logarithmic axis, one colour per run, a dashed line per level.

    Args:
        runs: label -> distillation run, drawn in this order.
        levels: label -> run whose last validation is a line.
        starts: label -> perplexity after surgery, drawn at 0; of the same tokens as the run's validation.
        x: one of plots.X_AXES.
    Raises:
        ValueError: without matplotlib, a run, or a validation.
    """
    if not runs:
        raise ValueError("no run to plot; give at least one")
    every = [*runs.values(), *(levels or {}).values()]
    if len({run.padded for run in every}) > 1:
        raise ValueError("runs with padded and with packed validation: their perplexities do not compare")
    finals = {label: final_perplexity(run) for label, run in (levels or {}).items()}
    figure = new_figure()
    axes = figure.subplots()
    for index, (label, run) in enumerate(runs.items()):
        last = final_perplexity(run)
        places, losses = run.validation_curve(x)
        values = [math.exp(min(loss, 50.0)) for loss in losses]
        if starts and label in starts:
            places, values = [0.0, *places], [starts[label], *values]
        axes.plot(
            places, values, color=f"C{index % 10}", marker="o", markersize=4, label=f"{label}, {last:.2f}"
        )
    for index, (label, level) in enumerate(finals.items()):
        axes.axhline(
            level, color="0.25", linestyle=("--", ":", "-.")[index % 3], label=f"{label}, {level:.2f}"
        )
    axes.set_yscale("log")
    axes.set_xlabel(X_AXES[x])
    axes.set_ylabel("validation perplexity" + (" (padded)" if every[0].padded else ""))
    if x == "consumed_tokens":
        axes.xaxis.set_major_formatter(token_formatter())
    axes.grid(True, which="both", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title)
    axes.legend(fontsize=9, framealpha=0.9)
    return figure


def plot_retrofit(runs: Mapping[str, Run], output: Path, **options: Any) -> None:
    """Draw :func:`retrofit_figure` into one PNG, which appears complete. Arguments and errors as there."""
    save_figure(retrofit_figure(runs, **options), output)
