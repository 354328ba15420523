"""Recall by number of heads: accuracy, and steps until it is learned; two panels for each task and load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sharedproj.experiments.recall import SOLVED
from megatron_sharedproj.experiments.recall_results import (
    CAUSAL_FORMS,
    PUBLISHED,
    PUBLISHED_HEADS,
    verdicts,
)
from megatron_sharedproj.experiments.small_models import PAPER_NAMES
from megatron_sharedproj.reporting.figures import new_figure, save_figure

_WIDTH, _ROW = 10.0, 4.2  # inches
_BETWEEN = 0.1  # forms, where numbers of heads are 1 apart
_WORDS = {
    "confirms": "confirms the published collapse here",
    "refutes": "refutes the published collapse here",
    "leaves open": "leaves the published collapse open",
    "cannot test": "QKV itself fails: says nothing on the collapse",
}


def recall_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The matplotlib figure.

    Args:
        rows: of recall_results.rows_of.
    Raises:
        ValueError: without matplotlib, or rows.
    """
    if not rows:
        raise ValueError("no result to plot; run at least one cell")
    figure = new_figure()
    loads = list(dict.fromkeys((row["task"], row["pairs"], row["keys"]) for row in rows))
    words = {(v["task"], v["pairs"], v["keys"]): v["word"] for v in verdicts([dict(row) for row in rows])}
    figure.set_size_inches(_WIDTH, _ROW * len(loads) + 1.3)
    panels = figure.subplots(len(loads), 2, squeeze=False)
    for (left, right), (task, pairs, keys) in zip(panels, loads, strict=True):
        mine = [row for row in rows if (row["task"], row["pairs"], row["keys"]) == (task, pairs, keys)]
        _accuracies(left, mine)
        _steps(right, mine)
        title = f"{task}, {pairs} pairs of {keys} keys, {mine[0]['length']} tokens"
        word = words.get((task, pairs, keys))
        left.set_title(f"{title}\n{_WORDS[word]}" if word else title, fontsize=10, loc="left")
    _legend(figure, rows)
    first = rows[0]
    figure.suptitle(
        f"Associative recall: {first['layers']} layers of {first['hidden_size']}, at most "
        f"{first['most_steps']:,} steps for each of {len(first['lrs'])} learning rate(s)",
        fontsize=11,
    )
    return figure


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]], list[float]]]:
    """Each form with its rows and their places on the axis."""
    heads = sorted({row["heads"] for row in rows})
    forms = [form for form in CAUSAL_FORMS if any(row["form"] == form for row in rows)]
    for index, form in enumerate(forms):
        shift = _BETWEEN * (index - (len(forms) - 1) / 2)
        mine = [row for row in rows if row["form"] == form]
        yield form, mine, [heads.index(row["heads"]) + shift for row in mine]


def _accuracies(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for form, mine, places in _lines(rows):
        means = [row["accuracy"] for row in mine]
        bars = [0.0 if math.isnan(row["accuracy_deviation"]) else row["accuracy_deviation"] for row in mine]
        axes.errorbar(places, means, bars, fmt="-_", color=_color(form), capsize=3, linewidth=1.2)
        for place, row in zip(places, mine, strict=True):
            count = len(row["accuracy_by_seed"])
            axes.plot([place] * count, row["accuracy_by_seed"], "o", color=_color(form), markersize=4)
            failed = [value for value in row["first_lr_by_seed"] if value < SOLVED]
            if len(row["lrs"]) > 1:
                axes.plot([place] * len(failed), failed, "x", color=_color(form), markersize=5)
    axes.axhline(rows[0]["chance"], linestyle=":", color="0.4", linewidth=1)
    heads = _heads_axis(axes, rows)
    if PUBLISHED_HEADS in heads:
        for form, value in PUBLISHED.items():
            place = heads.index(PUBLISHED_HEADS) + 0.32
            axes.plot(place, value, "D", color=_color(form), markersize=6, markerfacecolor="none")
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("accuracy of the queries")


def _steps(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    highest = 1
    for form, mine, places in _lines(rows):
        for place, row in zip(places, mine, strict=True):
            solved = [step for step in row["solved_at_by_seed"] if step is not None]
            axes.plot([place] * len(solved), solved, "o", color=_color(form), markersize=4)
            highest = max(highest, *solved, 0)
            if len(solved) < len(row["seeds"]):
                highest = max(highest, row["most_steps"])
                axes.plot(place, row["most_steps"], "^", color=_color(form), markerfacecolor="none")
        found = [(place, row["solved_at"]) for place, row in zip(places, mine, strict=True) if row["solved"]]
        if found:
            axes.plot(*zip(*found, strict=True), "-", color=_color(form), linewidth=1.2)
    _heads_axis(axes, rows)
    axes.set_ylim(0, 1.08 * highest)
    axes.set_ylabel("steps to solve it, at the rate that did")


def _heads_axis(axes: Any, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    sizes = {row["heads"]: row["head_size"] for row in rows}
    heads = sorted(sizes)
    axes.set_xticks(range(len(heads)), [f"{number}\n(size {sizes[number]})" for number in heads])
    axes.set_xlim(-0.5, len(heads) - 0.5)
    axes.set_xlabel("heads (size of a head)")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    return heads


def _color(form: str) -> str:
    return f"C{CAUSAL_FORMS.index(form)}"


def _legend(figure: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    def mark(label: str, marker: str, color: str, **options: Any) -> Any:
        return Line2D(
            [], [], **{"linestyle": "none", "marker": marker, "color": color, **options}, label=label
        )

    present = {row["form"] for row in rows}
    marks = [mark(PAPER_NAMES[form], "o", _color(form)) for form in CAUSAL_FORMS if form in present]
    marks.append(mark("seeds; left: mean, standard deviation; right: median", "o", "0.4", linestyle="-"))
    lrs = rows[0]["lrs"]
    if len(lrs) > 1 and any(min(row["first_lr_by_seed"]) < SOLVED for row in rows):
        marks.append(mark(f"a seed that failed at rate {lrs[0]:g}, where it ended then", "x", "0.4"))
    if any(row["solved"] < len(row["seeds"]) for row in rows):
        marks.append(mark("a seed or more that solved it at no rate", "^", "0.4", markerfacecolor="none"))
    marks.append(mark("chance: any value of the context", "", "0.4", linestyle=":"))
    if any(row["heads"] == PUBLISHED_HEADS for row in rows):
        values = ", ".join(f"{PAPER_NAMES[form]} {value}" for form, value in PUBLISHED.items())
        marks.append(
            mark(f"published, {PUBLISHED_HEADS} heads, of another set-up: {values}", "D", "0.4",
                 markerfacecolor="none")
        )  # fmt: skip
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def plot_recall(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Draw :func:`recall_figure` into one PNG, which appears complete. Arguments and errors as there."""
    save_figure(recall_figure(rows), output)
