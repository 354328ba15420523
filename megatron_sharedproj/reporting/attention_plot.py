"""The plot of an attention benchmark's CSV rows: a panel per kind of case, a line per implementation.

Needs neither torch nor the extension; matplotlib only to draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sharedproj.reporting.figures import new_figure, save_figure

Row = Mapping[str, str]

# The same in every panel and every plot. SDPA's two often lie on each other: one is a ring around the other.
_STYLES: dict[str, dict[str, Any]] = {
    "extension": {"color": "C0", "marker": "o", "markersize": 4},
    "extension_separate": {"color": "C9", "marker": "v", "markersize": 4},
    "sdpa_alias": {"color": "C1", "marker": "s", "markersize": 3},
    "sdpa_separate": {"color": "C3", "marker": "o", "markersize": 8, "markerfacecolor": "none"},
    "reference": {"color": "0.55", "marker": "x", "markersize": 5},
}
_ROOF: dict[str, Any] = {"color": "0.3", "linestyle": "--", "linewidth": 1.0}
_TITLES = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward", "decode": "decode"}
_PANEL = ("op", "dtype", "layout", "heads", "groups", "head_size", "causal", "page_size")
_WIDTH, _HEIGHT = 3.6, 2.8  # inches of a panel
_MOST_COLUMNS = 6


def plot_attention(rows: Sequence[Row], output: Path) -> None:
    """Draw :func:`attention_figure` into one PNG, which appears complete.

    Raises:
        ValueError: without a row, or without matplotlib.
    """
    save_figure(attention_figure(rows), output)


def attention_figure(rows: Sequence[Row]) -> Any:
    """The matplotlib figure: TFLOP/s over length, milliseconds over context for decode, by kind of case.

    Dashed is what the machine's roofline allows (with one key/value tensor); the number at a point of the
    extension is how many times faster than SDPA with separate tensors it is. Of two rows of one measurement
    the last is drawn.

    Args:
        rows: columns of the benchmark's CSV.
    Raises:
        ValueError: without a row, or without matplotlib.
    """
    if not rows:
        raise ValueError("no row to plot; measure at least one case")
    machines = list(dict.fromkeys(_machine(row) for row in rows))
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        batch = row["batch"] if row["op"] == "decode" else ""
        key = (*(row[name] for name in _PANEL), batch, _machine(row))
        panels.setdefault(key, []).append(row)
    columns = min(_MOST_COLUMNS, max(2, math.ceil(math.sqrt(len(panels)))))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure()
    figure.set_size_inches(_WIDTH * columns, _HEIGHT * lines + 1.0)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axes, own in zip(grid, panels.values(), strict=False):
        handles |= _panel(axes, own, _machine(own[0]) if len(machines) > 1 else "")
    for axes in grid[len(panels) :]:
        axes.axis("off")
    figure.suptitle("; ".join(machines), fontsize=10)
    order = [*(name for name in _STYLES if name in handles), "roofline"]
    figure.legend(
        [handles[name] for name in order],
        order,
        loc="outside lower center",
        ncols=min(len(order), 2 * columns),  # two fit below a panel
        fontsize=9,
    )
    return figure


def _machine(row: Row) -> str:
    cuda = f", CUDA {row['cuda']}" if row["cuda"] else ""
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}{cuda}"


def _panel(axes: Any, rows: Sequence[Row], machine: str) -> dict[str, Any]:
    first = rows[0]
    decode = first["op"] == "decode"
    column = "ms_median" if decode else "tflops"
    handles: dict[str, Any] = {}
    for name, style in _STYLES.items():
        own = {int(row["seq_k"]): row for row in rows if row["implementation"] == name}
        if not own:
            continue
        points = {length: float(own[length][column]) for length in sorted(own)}
        (handles[name],) = axes.plot(list(points), list(points.values()), linewidth=1.3, **style)
        if name == "extension":
            ratios = {length: own[length]["ratio_vs_sdpa_separate"] for length in points}
            _annotate(axes, points, ratios)
    handles["roofline"] = _roofline(axes, rows, decode)
    lengths = sorted({int(row["seq_k"]) for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_length(x) for x in lengths], fontsize=8)
    axes.minorticks_off()
    axes.margins(0.12)
    if decode:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.set_ylabel("ms, lower is better" if decode else "TFLOP/s", fontsize=8)
    axes.set_xlabel("tokens in the cache" if decode else "sequence length", fontsize=8)
    axes.set_title(_title(first, machine), fontsize=8)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    return handles


def _roofline(axes: Any, rows: Sequence[Row], decode: bool) -> Any:
    # Any row tells its own floor; those of one tensor agree, and the extension has one.
    tied = [row for row in rows if not row["implementation"].endswith("separate")] or rows
    points = {}
    for row in tied:
        part = float(row["percent_of_roofline"]) / 100
        points[int(row["seq_k"])] = float(row["ms_median"]) * part if decode else float(row["tflops"]) / part
    marker = "_" if len(points) == 1 else ""  # a point, which a line alone would not show
    lengths = sorted(points)
    (line,) = axes.plot(lengths, [points[x] for x in lengths], marker=marker, markersize=20, **_ROOF)
    return line


def _annotate(axes: Any, points: Mapping[int, float], ratios: Mapping[int, str]) -> None:
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 7}
    style["bbox"] = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.3}
    for length, value in points.items():
        if ratios[length]:
            axes.annotate(f"{float(ratios[length]):.3g}x", (length, value), (0, 5), **style)


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _title(row: Row, machine: str) -> str:
    title = (
        f"{_TITLES[row['op']]}, {row['dtype']}, {row['heads']}/{row['groups']} heads of {row['head_size']}"
    )
    details = [row["layout"]]
    if row["op"] == "decode":
        details.append(f"batch {row['batch']}")
        if row["page_size"] != "0":
            details.append(f"pages of {row['page_size']}")
    elif row["causal"] != "true":
        details.append("full")
    return "\n".join([title, ", ".join(details), *([machine] if machine else [])])
