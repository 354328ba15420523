"""The plot of a roofline: a GPU's ceiling, and the variants' prefill and decode on it.

Needs no torch; matplotlib only to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sharedproj.reporting.figures import new_figure, save_figure

FORMATS = (".png", ".svg")
_MARKERS = {"prefill": "s", "decode": "o"}


def plot_roofline(
    rows: Sequence[Mapping[str, Any]], output: Path, *, name: str, peak: float, bandwidth: float
) -> None:
    """Draw :func:`roofline_figure` into one PNG or SVG, which appears complete.

    Raises:
        ValueError: without a row, or without matplotlib.
    """
    figure = roofline_figure(rows, name=name, peak=peak, bandwidth=bandwidth)
    save_figure(figure, output, output.suffix.lower().removeprefix("."))


def roofline_figure(rows: Sequence[Mapping[str, Any]], *, name: str, peak: float, bandwidth: float) -> Any:
    """The matplotlib figure: FLOP/s over FLOP/byte under the ceiling, and decode's tokens/s by batch.

    Squares are prefill, circles decode; hollow where weights and cache exceed the memory. A line joins the
    batches of one model and context.

    Args:
        rows: of `profile.py roofline`.
        name: the GPU's; peak: FLOP/s; bandwidth: bytes/s.
    Raises:
        ValueError: without a row, or without matplotlib.
    """
    if not rows:
        raise ValueError("no row to plot")
    figure = new_figure()
    figure.set_size_inches(11.5, 5.0)
    roof, rates = figure.subplots(1, 2)
    models = list(dict.fromkeys(row["model"] for row in rows))
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    least = min(row["intensity"] for row in rows) / 2
    most = max(max(row["intensity"] for row in rows), peak / bandwidth) * 2
    ridge = peak / bandwidth
    roof.plot(
        [least, ridge, most],
        [least * bandwidth / 1e12, peak / 1e12, peak / 1e12],
        color="0.3",
        linewidth=1.2,
        label=f"{name}: {peak / 1e12:g} TFLOP/s, {bandwidth / 1e9:g} GB/s",
    )
    for index, model in enumerate(models):
        colour = f"C{index % 10}"
        for context in contexts:
            dash = ("-", "--", ":", "-.")[contexts.index(context) % 4]
            for phase, marker in _MARKERS.items():
                chosen = [
                    row
                    for row in rows
                    if (row["model"], row["context"], row["phase"]) == (model, context, phase)
                ]
                chosen.sort(key=lambda row: row["batch"])
                for row in chosen:
                    shape: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 5}
                    if row["fits"] is False:
                        shape["markerfacecolor"] = "none"
                    reached = row["flops"] / row["seconds"] / 1e12
                    roof.plot(row["intensity"], reached, linestyle="none", **shape)
                    if phase == "decode":
                        rates.plot(row["batch"], row["tokens_per_second"], linestyle="none", **shape)
                if phase == "decode":
                    label = model if len(contexts) == 1 else f"{model}, {context} tokens"
                    batches = [row["batch"] for row in chosen]
                    bounds = [row["tokens_per_second"] for row in chosen]
                    rates.plot(batches, bounds, color=colour, linestyle=dash, linewidth=1.1, label=label)
    for phase, marker in _MARKERS.items():
        roof.plot([], [], color="0.3", marker=marker, linestyle="none", label=phase)
    for axes in (roof, rates):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, framealpha=0.9)
    roof.set_xlabel("FLOP per byte moved")
    roof.set_ylabel("TFLOP/s at most")
    batches = sorted({row["batch"] for row in rows})
    rates.set_xticks(batches, [str(batch) for batch in batches])
    rates.set_xticks([], minor=True)
    rates.set_xlabel("sequences in a batch")
    rates.set_ylabel("decoded tokens/s at most")
    return figure
