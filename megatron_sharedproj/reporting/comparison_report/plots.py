"""The plots of a comparison: losses (comparison_curves.py), perplexity by seed, changes, costs, recall."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sharedproj.reporting.comparison_report.curves import (
    MARKERS,
    gaps,
    grid,
    last_losses,
    losses,
    styles,
)
from megatron_sharedproj.reporting.comparison_report.reading import Comparison, Model
from megatron_sharedproj.reporting.comparison_report.statistics import changes
from megatron_sharedproj.reporting.figures import new_figure, save_figure, token_formatter


@dataclass(frozen=True)
class Plot:
    """A written PNG: its file name, what it shows for those who don't see it, and its caption."""

    file: str
    alternative: str
    caption: str


def write_plots(comparison: Comparison, folder: Path, prefix: str = "") -> list[Plot]:
    """Draw what the runs allow into ``folder``; file names begin with ``prefix``.

    Raises:
        ValueError: without matplotlib.
    """
    found = []
    for name, draw in (
        ("loss", losses),
        ("loss_end", last_losses),
        ("gap", gaps),
        ("perplexity", _perplexities),
        ("change", _changes),
        ("cost", _costs),
        ("recall", _recalls),
    ):
        figure = new_figure()
        words = draw(figure, comparison)
        if words is not None:
            file = f"{prefix}{name}.png"
            save_figure(figure, folder / file)
            found.append(Plot(file, *words))
    return found


def _perplexities(figure: Any, comparison: Comparison) -> tuple[str, str] | None:
    figures = [f"{protocol}_perplexity" for protocol in ("packed", "padded")]
    models = [m for m in _listed(comparison) if any(m.values(name) for name in figures)]
    if not models:
        return None
    measured = [name for name in figures if any(model.values(name) for model in models)]
    looks, marker_of = styles(comparison), dict(zip(comparison.seeds, itertools.cycle(MARKERS), strict=False))
    figure.set_size_inches(11, 0.42 * len(models) + 1.8)
    every = figure.subplots(1, len(measured), squeeze=False, sharey=True)[0]
    for axes, name in zip(every, measured, strict=True):
        for place, model in enumerate(models):
            values, colour = model.values(name), looks[model.name]["color"]
            look = {"color": colour, "markerfacecolor": "none" if model.matched else colour, "alpha": 0.85}
            for seed, value in values.items():
                axes.plot(value, place, linestyle="", marker=marker_of[seed], markersize=6, **look)
            if values:
                mean = statistics.fmean(values.values())
                axes.plot([mean, mean], [place - 0.32, place + 0.32], linewidth=2, color=colour)
        axes.set_xlabel(name.replace("_", " "))
        grid(axes)
    _name_models(every[0], models)
    for seed, marker in marker_of.items():
        every[0].plot([], [], linestyle="", color="0.3", marker=marker, label=f"seed {seed}")
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    caption = "Perplexity of each seed (hollow: widened to the baseline's parameters), bar the mean."
    return "Dot plot of each model's perplexity by seed", caption


def _listed(comparison: Comparison) -> list[Model]:
    return list({m.name: m for family in comparison.families for m in family.models}.values())


def _name_models(axes: Any, models: Sequence[Model]) -> None:
    axes.set_yticks(range(len(models)), [model.title for model in models])
    axes.set_ylim(len(models) - 0.4, -0.6)


def _changes(figure: Any, comparison: Comparison) -> tuple[str, str] | None:
    found = {
        protocol: {
            name: change
            for family in comparison.families
            for name, change in changes(family, f"{protocol}_perplexity").items()
        }
        for protocol in ("packed", "padded")
    }
    models = [m for m in _listed(comparison) if any(m.name in by_name for by_name in found.values())]
    if not models:
        return None
    looks = styles(comparison)
    figure.set_size_inches(11, 0.5 * len(models) + 1.4)
    axes = figure.subplots()
    for protocol, shift, filled in (("packed", -0.14, True), ("padded", 0.14, False)):
        for place, model in enumerate(models):
            if model.name not in found[protocol]:
                continue
            change, colour = found[protocol][model.name], looks[model.name]["color"]
            one = change.estimate
            if one.count > 1:
                axes.plot(
                    [one.low, one.high], [place + shift] * 2, color=colour, linewidth=1.6 if filled else 1
                )
            values = list(change.by_seed.values())
            axes.plot(values, [place + shift] * len(values), "|", color=colour, markersize=8, alpha=0.7)
            face = colour if filled else "white"
            axes.plot(one.mean, place + shift, "o", color=colour, markerfacecolor=face, markersize=6)
    for protocol, face in (("packed", "0.3"), ("padded", "white")):
        if found[protocol]:
            axes.plot([], [], "o", color="0.3", markerfacecolor=face, label=protocol)
    axes.legend(fontsize=9)
    axes.axvline(0, color="black", linewidth=1)
    _name_models(axes, models)
    axes.set_xlabel(f"change of perplexity against {comparison.baseline.label} (%)")
    grid(axes)
    caption = (
        f"Change of perplexity against {comparison.baseline.label}'s of the same seed: point the mean, ticks "
        "the seeds, line the 95 % interval of the mean (Student's t). Where a line crosses zero, the seeds "
        "do not tell the model from the baseline."
    )
    return "Interval of each model's change against the baseline, packed and padded", caption


def _costs(figure: Any, comparison: Comparison) -> tuple[str, str] | None:
    models = [m for m in _listed(comparison) if m.values("packed_perplexity") and m.config is not None]
    if not models:
        return None
    looks = styles(comparison)
    means = {m.name: statistics.fmean(m.values("packed_perplexity").values()) for m in models}
    figure.set_size_inches(11, 5)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, cost in ((left, "cache_bytes"), (right, "parameters")):
        exact = [float(getattr(model, cost)) for model in models]
        drawn = [2**x for x in _dodged([math.log2(x) for x in exact])] if axes is left else _dodged(exact)
        for model, place in zip(models, drawn, strict=True):
            values, look = list(model.values("packed_perplexity").values()), looks[model.name]
            colour, face = look["color"], "white" if model.matched else look["color"]
            axes.plot([place] * 2, [min(values), max(values)], color=colour, linewidth=1.2)
            marker = {"marker": look["marker"], "markersize": 7, "markerfacecolor": face}
            axes.plot(place, means[model.name], linestyle="", color=colour, label=model.title, **marker)
        axes.set_ylabel("packed perplexity" if axes is left else "")
        grid(axes)
    points = sorted((m.cache_bytes or 0, means[m.name]) for m in models)
    front = [p for i, p in enumerate(points) if all(p[1] < other[1] for other in points[:i])]
    left.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=0, drawstyle="steps-post")
    left.set_xscale("log", base=2)
    ticks = sorted({m.cache_bytes for m in models if m.cache_bytes})
    left.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    left.minorticks_off()
    left.set_xlabel("key/value cache bytes per token (2-byte elements)")
    right.set_xlabel("parameters")
    right.xaxis.set_major_formatter(token_formatter())
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    caption = (
        "Packed perplexity against cache bytes per token and against parameters: marker the mean over "
        "seeds, bar from the lowest seed to the highest, hollow where the MLP was widened to the baseline's "
        "parameters; models of the same cost stand side by side. The grey steps join the models that no "
        "other beats with as small a cache."
    )
    return "Scatter plots of perplexity against cache bytes and against parameters", caption


def _dodged(values: Sequence[float]) -> list[float]:
    """Values apart by a step of the axis, so that no point hides another; close ones keep their middle."""
    step = 0.02 * (max(values) - min(values))
    order = sorted(range(len(values)), key=lambda index: values[index])
    groups: list[list[int]] = []
    for index in order:
        if groups and values[index] - values[groups[-1][-1]] < step:
            groups[-1].append(index)
        else:
            groups.append([index])
    found = list(values)
    for group in groups:
        middle = statistics.fmean(values[index] for index in group)
        for place, index in enumerate(group):
            found[index] = middle + step * (place - (len(group) - 1) / 2)
    return found


def _recalls(figure: Any, comparison: Comparison) -> tuple[str, str] | None:
    models = [m for m in _listed(comparison) if m.values("recall")]
    if not models:
        return None
    looks = styles(comparison)
    figure.set_size_inches(11, 0.42 * len(models) + 1.4)
    axes = figure.subplots()
    for place, model in enumerate(models):
        values, colour = list(model.values("recall").values()), looks[model.name]["color"]
        axes.plot(values, [place] * len(values), "o", color=colour, mfc="none" if model.matched else colour)
        mean = statistics.fmean(values)
        axes.plot([mean, mean], [place - 0.32, place + 0.32], color=colour, linewidth=2)
    chance = statistics.fmean(v for m in models for v in m.values("recall_chance").values())
    axes.axvline(chance, color="0.35", linestyle="--", linewidth=1.2, label="guessing")
    axes.legend(fontsize=9)
    axes.set_xlabel("recall: share of right values among those in the context")
    _name_models(axes, models)
    grid(axes)
    caption = (
        "Recall of each seed, the mean of all loads; bar the mean over seeds, dashes what guessing scores."
    )
    return "Dot plot of each model's recall by seed", caption
