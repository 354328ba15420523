"""The histogram of document lengths, on a logarithmic axis, of one or more token files.

Needs neither torch nor Megatron; matplotlib only to draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sharedproj.data.token_file import LengthStatistics
from megatron_sharedproj.reporting.figures import new_figure, save_figure, token_formatter

_MOST_BINS = 60


def plot_lengths(lengths: Mapping[str, LengthStatistics], output: Path) -> None:
    """Draw :func:`length_figure` into one PNG, which appears complete.

    Raises:
        ValueError: without a file that has a document with tokens, or without matplotlib.
    """
    save_figure(length_figure(lengths), output)


def length_figure(lengths: Mapping[str, LengthStatistics]) -> Any:
    """The matplotlib figure: above, the share of documents by length; below, the share of tokens.

    The same bins for all files; documents without tokens have no place on the axis. The dashed line is the
    sequence length, where the statistics know one.

    Args:
        lengths: label -> statistics, drawn in this order.
    Raises:
        ValueError: without a file that has a document with tokens, or without matplotlib.
    """
    shown = {label: item for label, item in lengths.items() if item.max > 0}
    if not shown:
        raise ValueError("no document with tokens to plot")
    least = min(int(item.values[item.values > 0][0]) for item in shown.values())
    edges = _bins(least, max(item.max for item in shown.values()))
    figure = new_figure()
    upper, lower = figure.subplots(2, 1, sharex=True)
    for index, (label, item) in enumerate(shown.items()):
        style: dict[str, Any] = {"color": f"C{index % 10}", "fill": len(shown) == 1, "linewidth": 1.3}
        for axes, weights in ((upper, item.counts), (lower, item.counts * item.values)):
            bars, _ = np.histogram(item.values, edges, weights=weights)
            axes.stairs(100 * bars / weights.sum(), edges, label=label, **style)
    for length in dict.fromkeys(item.seq_length for item in shown.values() if item.seq_length):
        for axes in (upper, lower):
            axes.axvline(
                length, color="0.3", linestyle="--", linewidth=1.0, label=f"sequence length {length}"
            )
    for axes, what in ((upper, "documents"), (lower, "tokens")):
        axes.set_ylabel(f"% of {what} per bin")
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    lower.set_xscale("log")
    lower.set_xlim(edges[0], edges[-1])
    lower.xaxis.set_major_formatter(token_formatter())
    lower.set_xlabel("document length (tokens)")
    upper.legend(fontsize=9, framealpha=0.9)
    return figure


def _bins(least: int, most: int) -> Any:
    # Between whole numbers, and only once each: short lengths would otherwise leave empty bins.
    edges = np.geomspace(least, most + 1, _MOST_BINS + 1)
    return np.unique(np.append(np.floor(edges), most + 1)) - 0.5
