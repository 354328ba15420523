"""The synthetic tasks' results as rows and tables, beside the paper's Table 1 and the authors' re-run."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sharedproj.experiments.small_models import PAPER_NAMES
from megatron_sharedproj.experiments.statistics import mean_and_deviation, spread
from megatron_sharedproj.experiments.synthetic import SYNTHETIC_FORMS, TASKS, blind_accuracy
from megatron_sharedproj.profiling.tables import Column, Section

# Token accuracy in the order of TASKS, averaged over the whole grid and three seeds.
_TABLE_1 = {
    "qkv": (0.698, 0.971, 1.0, 0.588, 1.0),
    "q_eq_k": (0.705, 0.967, 1.0, 0.597, 1.0),
    "q_eq_k+": (0.718, 0.963, 1.0, 0.671, 1.0),
    "qk_eq_v": (0.701, 0.958, 1.0, 0.590, 1.0),
    "q_eq_k_eq_v": (0.514, 0.939, 1.0, 0.446, 1.0),
    "q_eq_k_eq_v+": (0.581, 0.957, 1.0, 0.576, 1.0),
}
# synthetic_results.md of the authors' repository, branch synthetics, commit c3aecbd.
_RERUN = {
    "qkv": (0.529, 0.753, 0.992, 0.524, 0.991),
    "q_eq_k": (0.475, 0.691, 0.991, 0.471, 0.994),
    "q_eq_k+": (0.522, 0.770, 0.993, 0.530, 0.991),
    "qk_eq_v": (0.510, 0.747, 0.992, 0.511, 0.994),
    "q_eq_k_eq_v": (0.295, 0.671, 0.991, 0.307, 0.992),
    "q_eq_k_eq_v+": (0.370, 0.770, 0.990, 0.382, 0.990),
}
MEAN = "mean"
_LEVEL = 0.02


def _by_task(table: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """form -> task -> accuracy; the mean over tasks among them."""
    return {
        form: {**dict(zip(TASKS, values, strict=True)), MEAN: statistics.fmean(values)}
        for form, values in table.items()
    }


PAPER, RERUN = _by_task(_TABLE_1), _by_task(_RERUN)
# How the re-run's files spell the forms.
_RERUN_NAMES = {
    "QKV": "qkv", "Q=K!=V": "q_eq_k", "(Q=K!=V)+": "q_eq_k+", "Q!=K=V": "qk_eq_v", "Q=K=V": "q_eq_k_eq_v",
    "(Q=K=V)+": "q_eq_k_eq_v+",
}  # fmt: skip

# task, form, hidden size, layers, heads, length
CellKey = tuple[str, str, int, int, int, int]
Row = dict[str, Any]


@dataclass(frozen=True, order=True)
class Shape:
    """What a column of the tables stands for."""

    hidden_size: int
    length: int

    def __str__(self) -> str:
        return f"d {self.hidden_size}, length {self.length}"


def read_rerun(paths: Iterable[Path]) -> dict[CellKey, float]:
    """Mean accuracy over seeds of each cell of the authors' re-run, from synthetic_results_shard*.csv.

    Raises:
        ValueError: naming --rerun and the file that is none of them.
    """
    found: dict[CellKey, list[float]] = defaultdict(list)
    for path in paths:
        try:
            with path.open(newline="") as stream:
                for row in csv.DictReader(stream):
                    shape = (int(row[name]) for name in ("n_embd", "n_layer", "n_head", "seq_len"))
                    key = (row["task"].lower(), _RERUN_NAMES[row["variant"]], *shape)
                    found[key].append(float(row["accuracy"]))  # type: ignore[index]
        except (OSError, KeyError, ValueError, AttributeError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a file of the re-run's results"
            raise ValueError(f"--rerun {path}: {reason}; give synthetic_results_shard*.csv") from None
    return {key: statistics.fmean(values) for key, values in found.items()}


def rows_of(records: Iterable[Mapping[str, Any]], rerun: Mapping[CellKey, float] | None = None) -> list[Row]:
    """A row for each task, form and Shape, and for the mean over tasks where all five are there.

    Averages go over the layers and heads that were run; the deviation is that of the seeds' averages.

    Args:
        records: of run_sweep, of one grid with the same seeds everywhere.
        rerun: of read_rerun; its average over the same cells is a row's ``rerun_same_cells``.
    """
    groups: dict[tuple[str, str, Shape], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        s = record["settings"]
        groups[s["task"], s["form"], Shape(s["hidden_size"], s["length"])].append(record)
    rows = [_row(*key, group, rerun or {}) for key, group in groups.items()]
    by_form: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        by_form[row["form"], row["hidden_size"], row["length"]].append(row)
    rows += [_mean_row(group) for group in by_form.values() if {row["task"] for row in group} == set(TASKS)]
    order = {task: place for place, task in enumerate((*TASKS, MEAN))}
    forms = {form: place for place, form in enumerate(SYNTHETIC_FORMS)}
    rows.sort(key=lambda r: (order[r["task"]], r["hidden_size"], r["length"], forms[r["form"]]))
    return rows


def _row(
    task: str, form: str, shape: Shape, group: list[Mapping[str, Any]], rerun: Mapping[CellKey, float]
) -> Row:
    settings = [record["settings"] for record in group]
    seeds = sorted({s["seed"] for s in settings})

    def by_seed(figure: str) -> list[float]:
        return [
            statistics.fmean(r["result"][figure] for r in group if r["settings"]["seed"] == seed)
            for seed in seeds
        ]

    accuracies = by_seed("token_accuracy")
    mean, deviation = mean_and_deviation(accuracies)
    keys = {(task, form, s["hidden_size"], s["layers"], s["heads"], s["length"]) for s in settings}
    same = [rerun[key] for key in keys if key in rerun]
    return {
        "task": task,
        "form": form,
        "hidden_size": shape.hidden_size,
        "length": shape.length,
        "layers": sorted({s["layers"] for s in settings}),
        "heads": sorted({s["heads"] for s in settings}),
        "seeds": seeds,
        "cells": len(group),
        "parameters": sorted({record["result"]["parameters"] for record in group}),
        "steps": sorted({record["result"]["steps"] for record in group}),
        "token_accuracy": mean,
        "token_accuracy_deviation": deviation,
        "token_accuracy_by_seed": accuracies,
        "sequence_accuracy": statistics.fmean(by_seed("sequence_accuracy")),
        "test_loss": statistics.fmean(by_seed("test_loss")),
        "blind_accuracy": blind_accuracy(task, shape.length),
        "rerun_same_cells": statistics.fmean(same) if len(same) == len(keys) else None,
        "paper": PAPER[form][task],
        "rerun": RERUN[form][task],
        **{
            name: ", ".join(sorted({str(record.get(name) or "") for record in group}))
            for name in ("commit", "device", "torch")
        },
        "seconds": sum(record["seconds"] for record in group),
    }


def _mean_row(group: list[Row]) -> Row:
    """Over tasks, seed by seed."""
    first, form = group[0], group[0]["form"]
    accuracies = [
        statistics.fmean(values)
        for values in zip(*(row["token_accuracy_by_seed"] for row in group), strict=True)
    ]
    mean, deviation = mean_and_deviation(accuracies)
    same = [row["rerun_same_cells"] for row in group]
    averaged = ("sequence_accuracy", "test_loss", "blind_accuracy")
    return {
        **first,
        "task": MEAN,
        "cells": sum(row["cells"] for row in group),
        "token_accuracy": mean,
        "token_accuracy_deviation": deviation,
        "token_accuracy_by_seed": accuracies,
        **{name: statistics.fmean(row[name] for row in group) for name in averaged},
        "rerun_same_cells": None if None in same else statistics.fmean(same),
        "paper": PAPER[form][MEAN],
        "rerun": RERUN[form][MEAN],
        "seconds": sum(row["seconds"] for row in group),
    }


def shapes_of(rows: Iterable[Mapping[str, Any]]) -> list[Shape]:
    """The shapes of some rows, small ones first."""
    return sorted({Shape(row["hidden_size"], row["length"]) for row in rows})


def sections_of(rows: Sequence[Row]) -> list[Section]:
    """A table for each task: forms down, ours per shape, then the paper's averages over its whole grid."""
    sections = []
    for task in (*TASKS, MEAN):
        here = [row for row in rows if row["task"] == task]
        if not here:
            continue
        lines: dict[str, Row] = {}
        columns = [Column("form", "form")]
        for shape in shapes_of(here):
            these = [row for row in here if Shape(row["hidden_size"], row["length"]) == shape]
            columns.append(Column(str(shape), str(shape)))
            if any(row["rerun_same_cells"] is not None for row in these):
                columns.append(Column(f"{shape} rerun", "their re-run", ".3f"))
            for row in these:
                line = lines.setdefault(row["form"], {"form": PAPER_NAMES[row["form"]]})
                line[str(shape)] = spread(row["token_accuracy_by_seed"], 3)
                line[f"{shape} rerun"] = row["rerun_same_cells"]
                line["paper"], line["rerun"] = row["paper"], row["rerun"]
            blind = lines.setdefault("blind", {"form": "a guess by position"})
            blind[str(shape)] = f"{these[0]['blind_accuracy']:.3f}"
        lines["blind"] = lines.pop("blind")
        columns += [
            Column("paper", "the paper, its grid", ".3f"),
            Column("rerun", "their re-run, its grid", ".3f"),
        ]
        title = "Mean over the five tasks" if task == MEAN else task.upper()
        sections.append(Section(title, list(lines.values()), columns))
    return sections


def told_apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether every seed of one is above every seed of the other, at the three digits of the tables."""
    return min(round(value, 3) for value in one) > max(round(value, 3) for value in other)


def order_of(rows: Sequence[Row]) -> str:
    """The forms of one task and shape by their means: "A > B" where every seed of A is above every seed of B.

    Says how many of all pairs are told apart so, and how many of these stand as in the paper, whose figures
    have no deviation: those that are closer than 0.02 count as level.
    """
    ranked = sorted(rows, key=lambda row: -row["token_accuracy"])
    seeds = {row["form"]: row["token_accuracy_by_seed"] for row in ranked}
    pairs = list(itertools.combinations(ranked, 2))
    apart = [(a, b) for a, b in pairs if told_apart(seeds[a["form"]], seeds[b["form"]])]
    if not apart:
        return "no form is told from another"
    text = PAPER_NAMES[ranked[0]["form"]]
    for upper, lower in itertools.pairwise(ranked):
        sign = ">" if told_apart(seeds[upper["form"]], seeds[lower["form"]]) else "~"
        text += f" {sign} {PAPER_NAMES[lower['form']]}"
    gaps = [a["paper"] - b["paper"] for a, b in apart]
    same, against = (sum(sign * gap >= _LEVEL for gap in gaps) for sign in (1, -1))
    text += f"; {len(apart)} of {len(pairs)} pairs told apart: {same} as in the paper"
    text += f", {against} against it" if against else ""
    level = len(apart) - same - against
    return text + (f", {level} within {_LEVEL} there" if level else "")


def notes_of(rows: Sequence[Row]) -> list[str]:
    """What the tables' figures are, and the order of the forms for each task and shape."""
    single = [row for row in rows if row["task"] != MEAN]
    seeds, steps = single[0]["seeds"], sorted({step for row in single for step in row["steps"]})
    notes = [
        f"token accuracy on the test lists, mean +- standard deviation over {len(seeds)} seed(s); "
        f"{'/'.join(map(str, steps))} steps"
    ]
    for shape in shapes_of(single):
        these = [row for row in single if Shape(row["hidden_size"], row["length"]) == shape]
        layers, heads = (sorted({n for row in these for n in row[axis]}) for axis in ("layers", "heads"))
        average = f"layers {'/'.join(map(str, layers))} and heads {'/'.join(map(str, heads))}"
        notes.append(f"{shape}: averages over {average}")
    notes.append(
        "averages of the paper and the re-run: d 32/64/256, layers 2/4, heads 2/4, lengths 16/64/128; their "
        "size is not comparable to a column of ours, the order of the forms is"
    )
    if len(seeds) > 1:
        chance = 2 / math.comb(2 * len(seeds), len(seeds))
        notes.append(
            "order by means: A > B where every seed of A is above every seed of B, ~ where not; by chance "
            f"{100 * chance:.0f}% of the pairs that are alike look told apart so"
        )
        for task in (*TASKS, MEAN):
            for shape in shapes_of(rows):
                here = [
                    row
                    for row in rows
                    if (row["task"], Shape(row["hidden_size"], row["length"])) == (task, shape)
                ]
                if len(here) > 1:
                    notes.append(f"{task}, {shape}: {order_of(here)}")
    else:
        notes.append("one seed: no order of the forms follows")
    return notes
