"""Tables of lm-eval scores: one model with its distance from guessing, several models side by side.

Needs neither torch nor lm-eval; matplotlib only to draw (lm_eval_plot.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sharedproj.evaluation.lm_eval_record import RECORD, Score

# Two-sided: below it a difference is marked.
SIGNIFICANT = 0.05

Key = tuple[str, int, str, str]  # task, shots, metric, filter


@dataclass(frozen=True)
class Scores:
    """The figures of one model.

    Attributes:
        label: its column's title; settings: what has to be equal between models that are compared.
        by_key: score (a record's JSON object) of each task, shots, metric and filter.
    """

    label: str
    settings: dict[str, Any]
    by_key: dict[Key, dict[str, Any]]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def score_table(scores: Sequence[Score]) -> str:
    """One model: value, standard error, what guessing scores, and how many standard errors lie between."""
    rows = [["task", "shots", "metric", "value", "stderr", "chance", "from chance"]]
    for score in map(asdict, scores):
        distance = "-"
        if score["chance"] is not None and score["stderr"]:
            distance = f"{(score['value'] - score['chance']) / score['stderr']:+.1f} stderr"
        rows.append(
            [
                _task_name(score),
                str(score["shots"]),
                _metric_name(score),
                _number(score["value"]),
                _number(score["stderr"]),
                _number(score["chance"]),
                distance,
            ]
        )
    return markdown(rows)


def load_scores(files: Sequence[Path]) -> list[Scores]:
    """Read records for a comparison; labels are the models' names, the files' where those are equal.

    Raises:
        ValueError: for a file that is no record, or records of different tasks, shots, limits or seeds.
    """
    records = [_read(file) for file in files]
    if len(files) < 2:
        raise ValueError("compare: give two or more files of `evaluate.py lm-eval --output`")
    names = [str(record["model"]["name"]) for record in records]
    if len(set(names)) < len(names):
        names = [file.stem for file in files]
    if len(set(names)) < len(names):
        names = [str(file) for file in files]
    found = [_scores(record, name) for record, name in zip(records, names, strict=True)]
    first = found[0]
    for file, other in zip(files[1:], found[1:], strict=True):
        for flag, value in first.settings.items():
            if other.settings[flag] != value:
                raise ValueError(
                    f"{file}: was run with {flag} {other.settings[flag]}, {files[0]} with {value}; "
                    "run both with the same"
                )
        if set(other.by_key) != set(first.by_key):
            task, shots, metric, _ = sorted(set(other.by_key) ^ set(first.by_key))[0]
            raise ValueError(f"{file} and {files[0]}: only one has {metric} of {task} ({shots} shots)")
        for key, score in first.by_key.items():
            if other.by_key[key]["documents"] != score["documents"]:
                raise ValueError(
                    f"{file}: {key[0]} has {other.by_key[key]['documents']} documents, {score['documents']} "
                    f"in {files[0]}; evaluate both on the same data"
                )
    return found


def comparison_table(models: Sequence[Scores]) -> str:
    """Several models: value and standard error of each, and each one's difference from the first.

    The p value is of a two-sided z test that takes the models' errors for independent. On the same documents
    they mostly go together, so that the test is careful: it misses differences that a paired one would find.
    """
    first = models[0]
    head = ["task", "shots", "metric", "chance", *(model.label for model in models)]
    rows = [head + [f"{model.label} - {first.label}" for model in models[1:]]]
    for key, base in first.by_key.items():
        scores = [model.by_key[key] for model in models]
        cells = [_task_name(base), str(base["shots"]), _metric_name(base), _number(base["chance"])]
        cells += [_with_error(score) for score in scores]
        cells += [_difference(score, base) for score in scores[1:]]
        rows.append(cells)
    return markdown(rows)


def p_value(first: Mapping[str, Any], second: Mapping[str, Any]) -> float | None:
    """Two-sided p value of equal scores, from independent standard errors; None where one is unknown."""
    if first["stderr"] is None or second["stderr"] is None:
        return None
    difference, error = second["value"] - first["value"], math.hypot(first["stderr"], second["stderr"])
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / error / math.sqrt(2))


def _difference(score: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    text = f"{score['value'] - base['value']:+.4f}"
    p = p_value(base, score)
    return text if p is None else f"{text} (p {p:.2f}){' *' if p < SIGNIFICANT else ''}"


def _with_error(score: Mapping[str, Any]) -> str:
    error = "" if score["stderr"] is None else f" +- {score['stderr']:.4f}"
    return f"{_number(score['value'])}{error}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _task_name(score: Mapping[str, Any]) -> str:
    return f"{score['task']} (group)" if score["is_group"] else str(score["task"])


def _metric_name(score: Mapping[str, Any]) -> str:
    return str(score["metric"]) if score["filter"] == "none" else f"{score['metric']} ({score['filter']})"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give what `evaluate.py lm-eval --output` wrote")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); run the evaluation again") from None
    if not isinstance(record, dict) or record.get("record") != RECORD:
        raise ValueError(f"{file}: not a result of `evaluate.py lm-eval --output`")
    return record


def _scores(record: Mapping[str, Any], label: str) -> Scores:
    settings = {
        "--tasks": ",".join(record["tasks"]),
        "--num-fewshot": ",".join(map(str, record["num_fewshot"])),
        "--limit": record["limit"],
        "--seed": record["seed"],
    }
    by_key = {
        (score["task"], score["shots"], score["metric"], score["filter"]): score for score in record["scores"]
    }
    return Scores(label, settings, by_key)
