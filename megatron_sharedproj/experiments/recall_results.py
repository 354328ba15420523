"""The recall sweep: its grid, its results as rows and a table, and what they say of the published collapse.

Published, of a task and size that are not known here: with 4 heads K=V recalls 0.35 and Q, K, V 0.9995, a
collapse that perplexity does not show.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sharedproj.experiments.recall import SOLVED, RecallCell
from megatron_sharedproj.experiments.small_models import FORMS, PAPER_NAMES
from megatron_sharedproj.experiments.statistics import mean_and_deviation, spread
from megatron_sharedproj.profiling.tables import Column

PUBLISHED_HEADS = 4
PUBLISHED = {"qkv": 0.9995, "qk_eq_v": 0.35}
# Below it a K=V model is on the collapsed side of what was published.
COLLAPSED = statistics.fmean(PUBLISHED.values())
_SOLVES = 0.9  # above it in every seed, a form solves the task
# The + forms see all tokens.
CAUSAL_FORMS = tuple(form for form in FORMS if not form.endswith("+"))

# Of a cell, that a row repeats.
_SETTINGS = ("task", "pairs", "keys", "heads", "form", "hidden_size", "layers", "length", "batch")

Row = dict[str, Any]
Load = tuple[int, int]  # pairs, keys


@dataclass(frozen=True)
class Grid:
    """What is combined; loads are (pairs, keys)."""

    tasks: tuple[str, ...] = ("mqar",)
    loads: tuple[Load, ...] = ((4, 16),)
    heads: tuple[int, ...] = (1, 2, 4, 8)
    forms: tuple[str, ...] = ("qkv", "qk_eq_v", "q_mqa")
    seeds: tuple[int, ...] = (1, 2, 3)


FULL = Grid(
    tasks=("mqar", "ar"),
    loads=((4, 16), (8, 64), (16, 128), (32, 256)),
    heads=(1, 2, 4, 8, 16),
    forms=CAUSAL_FORMS,
    seeds=(1, 2, 3, 4, 5),
)
FULL_TRAINING = {"hidden_size": 128, "steps": 20_000, "lrs": [3e-3, 1e-3, 3e-4], "batch": 64}


def cells_of(grid: Grid, **training: Any) -> list[RecallCell]:
    """A cell for each combination, seed by seed, so that a sweep that is cut short has all forms.

    An mqar sequence asks for every key, in twice as many places as there are keys.

    Args:
        training: other fields of RecallCell.
    Raises:
        ValueError: for what cannot be combined, as RecallCell says.
    """
    cells = []
    for seed, task, (pairs, keys), heads, form in itertools.product(
        grid.seeds, grid.tasks, grid.loads, grid.heads, grid.forms
    ):
        queries, length = (1, 2 * pairs + 1) if task == "ar" else (pairs, 4 * pairs)
        cell = RecallCell(
            task, form, heads, pairs=pairs, keys=keys, queries=queries, length=length, seed=seed, **training
        )
        cells.append(cell)
    return cells


def settings_of(cell: RecallCell) -> dict[str, Any]:
    """A cell as run_sweep takes it."""
    return {**asdict(cell), "lrs": list(cell.lrs)}


def cost_of(settings: Mapping[str, Any]) -> float:
    """Proportional to the time of a training that does not end early: tokens and a step's fixed part."""
    return float(settings["steps"] * settings["layers"] * (500 + settings["batch"] * settings["length"]))


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row for each task, load, number of heads and form, over its seeds."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        s = record["settings"]
        groups[s["task"], s["pairs"], s["keys"], s["heads"], s["form"]].append(record)
    order = {form: place for place, form in enumerate(FORMS)}
    keys = sorted(groups, key=lambda key: (*key[:-1], order[key[-1]]))
    return [_row(sorted(groups[key], key=lambda record: record["settings"]["seed"])) for key in keys]


def _row(group: Sequence[Mapping[str, Any]]) -> Row:
    results = [record["result"] for record in group]
    settings = group[0]["settings"]
    accuracies = [result["accuracy"] for result in results]
    mean, deviation = mean_and_deviation(accuracies)
    solved = [result["solved_at"] for result in results if result["solved_at"] is not None]
    return {
        **{name: settings[name] for name in _SETTINGS},
        "head_size": settings["hidden_size"] // settings["heads"],
        "parameters": results[0]["parameters"],
        "seeds": [record["settings"]["seed"] for record in group],
        "accuracy": mean,
        "accuracy_deviation": deviation,
        "accuracy_by_seed": accuracies,
        "chance": results[0]["chance"],
        "loss": statistics.fmean(result["loss"] for result in results),
        "solved": len(solved),
        "solved_at": statistics.median(solved) if solved else None,
        "solved_at_by_seed": [result["solved_at"] for result in results],
        # Validation accuracy where only the first learning rate had been tried.
        "first_lr_by_seed": [result["tries"][0]["curve"][-1][1] for result in results],
        "lr_by_seed": [result["lr"] for result in results],
        "most_steps": settings["steps"],
        "lrs": settings["lrs"],
        "seconds": sum(record["seconds"] for record in group),
        "commit": group[0]["commit"],
        "date": max(record["date"] for record in group),
        "device": group[0]["device"],
        "torch": group[0]["torch"],
    }


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Of the table."""
    seeds = max(len(row["seeds"]) for row in rows)
    return [
        Column("task", "task"),
        Column("pairs", "pairs"),
        Column("keys", "keys"),
        Column("heads", "heads"),
        Column("head_size", "head size"),
        Column("form", "form", lambda form: PAPER_NAMES[form]),
        Column("parameters", "parameters", ","),
        Column("accuracy_by_seed", "accuracy", lambda values: spread(values, 3)),
        Column("chance", "chance", ".3f"),
        Column("solved", f"solved, of {seeds}"),
        Column("solved_at", "at step (median)", ",.0f"),
        Column("first_lr_by_seed", "first rate alone, validation", lambda values: spread(values, 3)),
    ]


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """What each task and load says of the published collapse: from its rows with 4 heads, seed by seed.

    Returns:
        ``task``, ``pairs``, ``keys``, ``word``: "confirms" where every K=V seed is below COLLAPSED, "refutes"
        where every one solves the task, "leaves open" between, "cannot test" where Q, K, V itself does not
        solve it in every seed; and ``text``, a sentence. A task or load without both forms has none.
    """
    found = []
    for task, pairs, keys in dict.fromkeys((row["task"], row["pairs"], row["keys"]) for row in rows):
        both = {
            row["form"]: row["accuracy_by_seed"]
            for row in rows
            if (row["task"], row["pairs"], row["keys"], row["heads"]) == (task, pairs, keys, PUBLISHED_HEADS)
        }
        if not PUBLISHED.keys() <= both.keys():
            continue
        plain, tied = both["qkv"], both["qk_eq_v"]
        if min(plain) < _SOLVES:
            word = "cannot test"
        elif max(tied) < COLLAPSED:
            word = "confirms"
        elif min(tied) >= _SOLVES:
            word = "refutes"
        else:
            word = "leaves open"
        text = (
            f"{task}, {pairs} pairs of {keys} keys, {PUBLISHED_HEADS} heads, {min(map(len, (plain, tied)))} "
            f"seed(s): K=V {spread(tied, 3)}, QKV {spread(plain, 3)}; {word} the "
            f"published collapse ({PUBLISHED['qk_eq_v']} against {PUBLISHED['qkv']}) for this task and size"
        )
        found.append({"task": task, "pairs": pairs, "keys": keys, "word": word, "text": text})
    return found


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Lines below the table."""
    first = rows[0]
    lrs = ", ".join(f"{lr:g}" for lr in first["lrs"])
    return [
        f"{first['layers']} layers of {first['hidden_size']}, at most {first['most_steps']:,} steps; rates "
        f"{lrs}, the next where one fails; solved: {SOLVED:g} on a validation set, which ends a training",
        "mean +- standard deviation over seeds; chance: one of the values in the context",
        *(verdict["text"] for verdict in verdicts(rows)),
    ]
