"""What every plot here needs: a figure without a display, a file written whole, a check beforehand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT, _DPI = 10.0, 6.0, 100  # inches and dots per inch: 1000 x 600 pixels


def new_figure() -> Any:
    """An empty matplotlib figure of 1000 x 600 pixels.

    Raises:
        ValueError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is not installed; install it with `pip install -e .[plot]`") from None
    # Without pyplot: no display is looked for, and no state is shared with a caller's own plots.
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def token_formatter() -> Any:
    """Ticks as 10k, 3M, 2B, 1T."""
    from matplotlib.ticker import FuncFormatter

    def text(value: float, _: Any = None) -> str:
        for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:g}{unit}"
        return f"{value:g}"

    return FuncFormatter(text)


def save_figure(figure: Any, output: Path, format: str = "png") -> None:
    """Write a figure (``png`` or ``svg``); the file appears complete, its folder is made."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp{os.getpid()}")
    try:
        figure.savefig(temporary, format=format)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def check_plot(output: Path, formats: Sequence[str] = (".png",)) -> None:
    """Whether a plot can be written there, before there is one.

    Raises:
        ValueError: naming --plot, for a file of another format, a missing folder, or without matplotlib.
    """
    if output.suffix.lower() not in formats or output.is_dir():
        raise ValueError(f"--plot {output}: must be a file name that ends in {' or '.join(formats)}")
    if not output.parent.is_dir():
        raise ValueError(f"--plot {output}: {output.parent} is not a folder; make it first")
    try:
        new_figure()
    except ValueError as error:
        raise ValueError(f"--plot {output}: {error}") from None
