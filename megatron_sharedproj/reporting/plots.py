"""Loss curves from the JSON lines of one or more runs.

Needs neither torch nor Megatron; matplotlib only to draw, so a log can be read without it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sharedproj.reporting.figures import new_figure, save_figure, token_formatter
from megatron_sharedproj.training.log import JSON_LOG

X_AXES = {"iteration": "iteration", "consumed_tokens": "consumed tokens"}


@dataclass(frozen=True)
class Run:
    """The records of one run, in order of iteration, one per iteration.

    Attributes:
        path: the JSON-lines file.
        training: records with ``iteration``, ``lm_loss`` (nats per token), ``consumed_tokens``, ...
        validation: records with ``iteration``, ``validation_lm_loss``, ``validation_perplexity``, ...
    """

    path: Path
    training: tuple[dict[str, Any], ...]
    validation: tuple[dict[str, Any], ...]

    def training_curve(self, x: str = "iteration") -> tuple[list[float], list[float]]:
        """x values and training losses."""
        return self._positions(self.training, x), [float(r["lm_loss"]) for r in self.training]

    def validation_curve(self, x: str = "iteration") -> tuple[list[float], list[float]]:
        """x values and validation losses."""
        return self._positions(self.validation, x), [float(r["validation_lm_loss"]) for r in self.validation]

    @property
    def padded(self) -> bool:
        """Whether validation scored padding (``--data-protocol padded``): not comparable with packed runs."""
        return any("validation_padded_perplexity" in record for record in self.validation)

    def _positions(self, records: tuple[dict[str, Any], ...], x: str) -> list[float]:
        if x not in X_AXES:
            raise ValueError(f"--x {x}: choose one of {', '.join(X_AXES)}")
        if x == "iteration" or not records:
            return [float(record["iteration"]) for record in records]
        counted = (r for r in self.training if _number(r.get("consumed_tokens")))
        known = [(record["iteration"], record["consumed_tokens"]) for record in counted]
        if not known:
            raise ValueError(f"--x {x}: {self.path} has no record with {x}; use --x iteration")
        return [_interpolate(record["iteration"], known) for record in records]


def _interpolate(iteration: int, known: list[tuple[int, float]]) -> float:
    # A validation record has no token count: it lies on the line through the training records around it,
    # which starts at (0, 0) and keeps its last slope.
    points = [(0, 0.0), *((i, float(tokens)) for i, tokens in known if i > 0)]
    if len(points) == 1:
        return float(known[-1][1])
    right = next((k for k in range(1, len(points)) if points[k][0] >= iteration), len(points) - 1)
    (i0, y0), (i1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (iteration - i0) / (i1 - i0)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def load_run(path: str | Path) -> Run:
    """Read a run's log.

    A resumed run appends. Where it goes back, what was written after that point is dropped: the run was
    redone from there, perhaps with other flags. A last line that a killed run left incomplete is ignored,
    with a note on stderr.

    Args:
        path: a ``--save`` folder, or its log.jsonl.
    Raises:
        ValueError: if there is no log, a line is not a record (naming file:line), or there is no loss yet.
    """
    log = Path(path)
    if log.is_dir():
        log = log / JSON_LOG
    if not log.is_file():
        raise ValueError(f"{path}: no {JSON_LOG} there; give the --save folder of a run, or the file")
    training: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the writer was killed in the middle
                print(f"note: {log}:{number}: incomplete last line ignored", file=sys.stderr)
                continue
            raise ValueError(f"{log}:{number}: not JSON ({error}); remove the line") from None
        _check_record(record, f"{log}:{number}")
        iteration = record["iteration"]
        if "lm_loss" in record:
            for records in (training, validation):
                for later in [i for i in records if i >= iteration]:
                    del records[later]
            if record["lm_loss"] is not None:  # no step of the interval had a finite loss
                training[iteration] = record
        if "validation_lm_loss" in record:
            validation[iteration] = record
    if not training and not validation:
        raise ValueError(f"{log}: no loss in it yet; wait for the first --log-interval")
    return Run(log, *(tuple(records[i] for i in sorted(records)) for records in (training, validation)))


def _check_record(record: Any, where: str) -> None:
    if not isinstance(record, dict) or type(record.get("iteration")) is not int:
        raise ValueError(f"{where}: not a record of the trainer (no integer iteration); remove the line")
    for name in ("lm_loss", "validation_lm_loss"):
        all_bad = name == "lm_loss" and record.get(name) is None and record.get("nan_iterations")
        if name in record and not _number(record[name]) and not all_bad:
            raise ValueError(f"{where}: {name} is {record[name]!r}, not a number; remove the line")


def plot_loss_curves(
    runs: Mapping[str, Run],
    output: str | Path,
    *,
    x: str = "iteration",
    unigram_entropy: float | None = None,
    title: str | None = None,
    smoothing: float = 0.0,
    y_range: tuple[float, float] | None = None,
) -> None:
    """Draw :func:`loss_figure` into one PNG, which appears complete: it has a temporary name first.

    Args:
        runs: label -> run, drawn in this order.
        output: the PNG file; its folder is made where it is missing.
        The others are those of :func:`loss_figure`.
    Raises:
        ValueError: without matplotlib, without a run, or for an x axis that a run does not have.
    """
    figure = loss_figure(
        runs, x=x, unigram_entropy=unigram_entropy, title=title, smoothing=smoothing, y_range=y_range
    )
    save_figure(figure, Path(output))


def smoothed(losses: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, without the bias towards a start value; TensorBoard's smoothing.

    Args:
        weight: of the past, in [0, 1). Losses that are not finite are left out of the average.
    """
    average, total, found = 0.0, 0.0, []
    for loss in losses:
        if math.isfinite(loss):
            average = weight * average + (1 - weight) * loss
            total = weight * total + (1 - weight)
        found.append(average / total if total else math.nan)
    return found


def loss_figure(
    runs: Mapping[str, Run],
    *,
    x: str = "iteration",
    unigram_entropy: float | None = None,
    title: str | None = None,
    smoothing: float = 0.0,
    y_range: tuple[float, float] | None = None,
) -> Any:
    """The matplotlib figure of the losses: training a thin line, validation marked, one colour per run.

    Args:
        runs: label -> run, drawn in this order.
        x: ``iteration`` or ``consumed_tokens``.
        unigram_entropy: nats per token, a dashed line: the loss of a model that knows word frequencies only.
        title: text above the axes.
        smoothing: weight of the past in the training line; the losses themselves are faint behind it.
        y_range: lowest and highest loss shown; None: all.
    Raises:
        ValueError: without matplotlib, without a run, or for an x axis that a run does not have.
    """
    if not runs:
        raise ValueError("no run to plot; give at least one")
    if not 0 <= smoothing < 1:
        raise ValueError(f"--smoothing {smoothing:g}: must be in [0, 1)")
    if y_range is not None and not y_range[0] < y_range[1]:
        raise ValueError(f"--y-range {y_range[0]:g},{y_range[1]:g}: give the lower loss first")
    curves = {label: (run.training_curve(x), run.validation_curve(x)) for label, run in runs.items()}
    figure = new_figure()
    axes = figure.subplots()
    for index, (label, (training, validation)) in enumerate(curves.items()):
        colour = f"C{index % 10}"
        if training[0]:
            # One record is a point, which a line alone would not show.
            marker = "." if len(training[0]) == 1 else ""
            thin: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.7, "marker": marker}
            if smoothing:
                axes.plot(*training, color=colour, **{**thin, "alpha": 0.25})
                training = (training[0], smoothed(training[1], smoothing))
                thin |= {"alpha": 1.0, "linewidth": 1.2}
            axes.plot(*training, color=colour, label=f"{label}, training", **thin)
        if validation[0]:
            marked: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 5}
            name = "validation (padded)" if runs[label].padded else "validation"
            axes.plot(*validation, color=colour, label=f"{label}, {name}", **marked)
    if unigram_entropy is not None:
        axes.axhline(
            unigram_entropy,
            color="0.35",
            linestyle="--",
            linewidth=1.2,
            label=f"unigram entropy, {unigram_entropy:.3f}",
        )
    if y_range is not None:
        axes.set_ylim(*y_range)
    axes.set_xlabel(X_AXES[x])
    axes.set_ylabel("lm loss (nats per token)")
    if x == "consumed_tokens":
        axes.xaxis.set_major_formatter(token_formatter())
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title)
    axes.legend(fontsize=9, framealpha=0.9)
    return figure
