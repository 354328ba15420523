"""The results of the vision and anomaly tasks as rows and a table, beside the paper's Table 2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_sharedproj.experiments.small_models import FORMS, PAPER_NAMES
from megatron_sharedproj.experiments.statistics import estimate, spread
from megatron_sharedproj.profiling.tables import Column

IMAGES, ANOMALY = "images", "anomaly"
# What of arXiv 2606.04032's Table 2 is known here: (task, data set of the paper) -> form -> accuracy.
PAPER: dict[tuple[str, str], dict[str, float]] = {
    (IMAGES, "mnist"): {"qkv": 0.981, "qk_eq_v": 0.976},
    (IMAGES, "fashion_mnist"): {"qkv": 0.887, "qk_eq_v": 0.883},
    (IMAGES, "cifar10"): {"qkv": 0.663, "qk_eq_v": 0.659},
    (IMAGES, "cifar100"): {"qkv": 0.363, "qk_eq_v": 0.358},
    (IMAGES, "tiny_imagenet"): {"qkv": 0.229, "q_eq_k": 0.236, "q_eq_k_eq_v": 0.266},
    (ANOMALY, "cifar100"): {"qkv": 0.942, "qk_eq_v": 0.949},
}
# The paper's data set that a set of ours stands beside, where it is not the same.
_NEAREST = {(IMAGES, "mnist_5k"): "mnist"}
_NEAREST_ANOMALY = "cifar100"
BASELINE = "qkv"

Row = dict[str, Any]

COLUMNS = (
    Column("task", "task"),
    Column("dataset", "data"),
    Column("hidden_size", "d"),
    Column("layers", "layers"),
    Column("heads", "heads"),
    Column("form", "form", lambda form: PAPER_NAMES[form]),
    Column("parameters", "parameters", ","),
    Column("accuracy_text", "accuracy"),
    Column("difference_text", "against QKV, points"),
    Column("loss", "test loss", ".3f"),
    Column("paper", "paper", ".3f"),
    Column("paper_dataset", "paper's data"),
)


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row for each task, data set, shape and form, over its seeds; forms in the order of FORMS.

    ``difference`` is the mean of accuracy minus QKV's, seed by seed, in percentage points, with the ends of
    its 95% t interval; None without QKV with the same seeds.

    Args:
        records: of run_sweep, over vision.run_vision_cell or anomaly.run_anomaly_cell.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        s = record["settings"]
        shape = tuple((key, s[key]) for key in s if key not in ("form", "seed"))
        groups.setdefault((shape, s["form"]), []).append(record)
    order = {form: place for place, form in enumerate(FORMS)}
    shapes = list(dict.fromkeys(shape for shape, _ in groups))
    found = []
    for shape in shapes:
        baseline = _by_seed(groups.get((shape, BASELINE), []))
        for form in sorted((form for other, form in groups if other == shape), key=order.__getitem__):
            found.append(_row(dict(shape), form, groups[shape, form], baseline))
    return found


def _by_seed(records: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    return {record["settings"]["seed"]: record["result"]["accuracy"] for record in records}


def _row(
    settings: Mapping[str, Any], form: str, records: list[Mapping[str, Any]], baseline: dict[int, float]
) -> Row:
    accuracies, first = _by_seed(records), records[0]["result"]
    values = list(accuracies.values())
    task, dataset = (ANOMALY if "features" in settings else IMAGES), settings["dataset"]
    nearest = _NEAREST_ANOMALY if task == ANOMALY else _NEAREST.get((task, dataset), dataset)
    paper = PAPER.get((task, nearest), {})
    row: Row = {
        "task": task,
        **{key: settings[key] for key in ("dataset", "hidden_size", "layers", "heads")},
        "form": form,
        "parameters": first["parameters"],
        "seeds": list(accuracies),
        "accuracy": estimate(values).mean,
        "deviation": estimate(values).deviation,
        "accuracies": values,
        "accuracy_text": spread(values, 4),
        "difference": None,
        "difference_low": None,
        "difference_high": None,
        "difference_text": None,
        "loss": estimate([record["result"]["loss"] for record in records]).mean,
        "train_loss": estimate([record["result"]["train_loss"] for record in records]).mean,
        "paper": paper.get(form),
        "paper_dataset": nearest if form in paper else None,
        **{key: value for key, value in settings.items() if key != "path"},
        "steps": first["steps"],
        "train_images": first["train_images"],
        "test_images": first["test_images"],
        **({"features_accuracy": first["features_accuracy"]} if task == ANOMALY else {}),
        "seconds": sum(record["seconds"] for record in records),
        "device": records[0]["device"] if first["device"] == "cpu" else first["device"],
        **{key: ", ".join(sorted({str(record[key]) for record in records})) for key in ("commit", "torch")},
        "date": max(record["date"] for record in records),
    }
    if form != BASELINE and baseline and set(accuracies) <= set(baseline):
        points = [100 * (accuracies[seed] - baseline[seed]) for seed in accuracies]
        change = estimate(points)
        row |= {"difference": change.mean, "difference_low": change.low, "difference_high": change.high}
        row["difference_text"] = spread(points, 2) + (" *" if change.sign else "")
    return row


def notes_of(rows: Iterable[Row]) -> list[str]:
    """What has to be said below the table."""
    found = list(rows)
    notes = [
        "mean +- standard deviation over seeds; against QKV seed by seed; *: its 95% interval (Student's t) "
        "leaves zero out, not corrected for the number of comparisons"
    ]
    for task, dataset in dict.fromkeys((row["task"], row["dataset"]) for row in found):
        row = next(row for row in found if (row["task"], row["dataset"]) == (task, dataset))
        tests = row["test_images"] if task == IMAGES else row["test_sets"]
        what = "images" if task == IMAGES else "sets"
        share = row["accuracy"]
        error = 196 * (share * (1 - share) / tests) ** 0.5  # half of the 95% interval of a share
        known = f"one model's accuracy is known to {error:.1f} points"
        line = f"{task}, {dataset}: {tests:,} test {what}: {known}"
        if row.get("features_accuracy") is not None:
            right = f"{100 * row['features_accuracy']:.1f}% of the test images"
            line += f"; the network that made the features classifies {right} right"
        notes.append(line)
    return notes
