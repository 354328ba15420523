"""Losses of a comparison while training, a line and a band over seeds for each model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sharedproj.reporting.comparison_report.reading import Comparison, Family
from megatron_sharedproj.reporting.comparison_report.run import SeedRun
from megatron_sharedproj.reporting.figures import token_formatter

# Okabe and Ito's palette, told apart by most colour-blind readers; yellow is too faint on white.
_COLOURS = ("#000000", "#e69f00", "#0072b2", "#cc79a7", "#009e73", "#d55e00", "#56b4e9", "#8c564b", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES = ("-", "--", "-", "--", "-.", "-.", ":", ":")
_LAST_PART = 0.4  # of the training, on the plot of its end

Curve = Callable[[SeedRun], tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Band:
    """Curves of several seeds at the places that all share: their mean, lowest and highest."""

    places: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Band:
    """The band of curves, each its places and its values."""
    found = [dict(zip(places, values, strict=True)) for places, values in curves]
    shared = sorted(set.intersection(*(set(curve) for curve in found))) if found else []
    columns = [[curve[place] for curve in found] for place in shared]
    return Band(
        shared,
        [statistics.fmean(column) for column in columns],
        [min(column) for column in columns],
        [max(column) for column in columns],
    )


def styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Name -> colour, marker and line; a widened model has those of the one that it was made from."""
    order: list[str] = [comparison.baseline.name]
    for model in comparison.models:
        base = model.name.removesuffix("_matched")
        if base not in order:
            order.append(base)
    return {
        model.name: {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": _LINES[index % len(_LINES)],
        }
        for model in comparison.models
        for index in [order.index(model.name.removesuffix("_matched"))]
    }


def _validation(run: SeedRun) -> tuple[list[float], list[float]]:
    assert run.log is not None
    return run.log.validation_curve("consumed_tokens")


def _training(run: SeedRun) -> tuple[list[float], list[float]]:
    assert run.log is not None
    return run.log.training_curve("consumed_tokens")


def _trained_families(comparison: Comparison) -> list[Family]:
    """Those that have more than the baseline to draw; else the first."""
    found = [family for family in comparison.families if any(model.trained for model in family.models[1:])]
    return found or list(comparison.families[:1])


def _bands(family: Family, curve: Curve) -> dict[str, Band]:
    found = {}
    for model in family.models:
        curves = [curve(run) for run in model.runs.values() if run.trained]
        made = band([one for one in curves if one[0]])
        if made.places:
            found[model.name] = made
    return found


def _draw_bands(axes: Any, family: Family, bands: Mapping[str, Band], looks: Mapping[str, Any]) -> None:
    for model in (m for m in family.models if m.name in bands):
        one, style = bands[model.name], looks[model.name]
        marker = style["marker"] if len(one.places) < 15 else ""
        look = {**style, "marker": marker, "markersize": 4, "linewidth": 1.4}
        axes.plot(one.places, one.mean, **look, label=model.label)
        axes.fill_between(one.places, one.low, one.high, color=style["color"], alpha=0.15, linewidth=0)
    axes.xaxis.set_major_formatter(token_formatter())
    grid(axes)


def grid(axes: Any) -> None:
    """Faint lines behind everything."""
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _loss_name(comparison: Comparison) -> str:
    return "loss (nats per token)" + (", padding scored" if comparison.protocol == "padded" else "")


def losses(figure: Any, comparison: Comparison) -> tuple[str, str] | None:
    """Validation and training losses; returns words for those who do not see it and a caption, or None."""
    rows = (("validation", _validation), ("training", _training))
    return _draw_losses(figure, comparison, rows, 0.0, "Loss against training tokens")


def last_losses(figure: Any, comparison: Comparison) -> tuple[str, str] | None:
    """The end of the validation losses; returns as :func:`losses`."""
    share = f"the last {100 * _LAST_PART:.0f} % of training"
    return _draw_losses(
        figure, comparison, (("validation", _validation),), 1 - _LAST_PART, f"Validation loss over {share}"
    )


def _draw_losses(
    figure: Any, comparison: Comparison, rows: Sequence[tuple[str, Curve]], start: float, what: str
) -> tuple[str, str] | None:
    families, looks = _trained_families(comparison), styles(comparison)
    bands = {
        (row, family.key): _bands(family, curve) for row, (_, curve) in enumerate(rows) for family in families
    }
    if not any(bands.values()):
        return None
    last = max(one.places[-1] for found in bands.values() for one in found.values())
    figure.set_size_inches(11, 4.6 * len(rows) + 0.4)
    every = figure.subplots(len(rows), len(families), squeeze=False, sharex=True, sharey="row")
    for row, (name, _) in enumerate(rows):
        for column, family in enumerate(families):
            axes = every[row][column]
            found = {
                model: _from(one, start * last)
                for model, one in bands[row, family.key].items()
                if one.places[-1] >= start * last
            }
            _draw_bands(axes, family, found, looks)
            if row == 0:
                axes.set_title(family.title, fontsize=11)
                if found:
                    axes.legend(fontsize=8, framealpha=0.9, ncols=2)
        every[row][0].set_ylabel(f"{name} {_loss_name(comparison)}")
    for axes in every[-1]:
        axes.set_xlabel("training tokens")
    caption = f"{what}: line the mean over seeds, band from the lowest seed to the highest."
    return f"{what}, a line and band for each model", caption


def _from(one: Band, place: float) -> Band:
    first = next(index for index, value in enumerate(one.places) if value >= place)
    return Band(one.places[first:], one.mean[first:], one.low[first:], one.high[first:])


def gaps(figure: Any, comparison: Comparison) -> tuple[str, str] | None:
    """Validation losses minus the baseline's of the same seed; returns as :func:`losses`."""
    families, looks = _trained_families(comparison), styles(comparison)
    figure.set_size_inches(11, 5)
    every = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    drawn = False
    for axes, family in zip(every, families, strict=True):
        base = {seed: _validation(run) for seed, run in family.models[0].runs.items() if run.trained}
        found = {}
        for model in family.models[1:]:
            shared = {s: _validation(r) for s, r in model.runs.items() if r.trained and s in base}
            made = band([_difference(curve, base[seed]) for seed, curve in shared.items()])
            if made.places:
                found[model.name] = made
        _draw_bands(axes, family, found, looks)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_title(f"{family.title}, against {family.models[0].label}", fontsize=11)
        axes.set_xlabel("training tokens")
        if found:
            axes.legend(fontsize=8, framealpha=0.9, ncols=2)
            drawn = True
    every[0].set_ylabel("difference of the validation " + _loss_name(comparison))
    what = f"Validation loss minus {comparison.baseline.label}'s of the same seed"
    caption = (
        f"{what}, while training: line the mean over seeds, band from the lowest difference to the highest."
    )
    return (what, caption) if drawn else None


def _difference(
    curve: tuple[list[float], list[float]], base: tuple[list[float], list[float]]
) -> tuple[list[float], list[float]]:
    theirs = dict(zip(*base, strict=True))
    points = [(place, loss - theirs[place]) for place, loss in zip(*curve, strict=True) if place in theirs]
    return [place for place, _ in points], [difference for _, difference in points]
