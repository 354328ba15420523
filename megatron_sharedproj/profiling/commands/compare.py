"""Two saved profiles (step --save-profile), or two run folders, side by side.

Profiles: tokens/s, MFU, and every part of the step. Run folders: the medians of log.jsonl, the first record
left out where there are others. Both must be of one shape and batch; variant, groups, dropout, machine and
dtype may differ, and are named where they do.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from megatron_sharedproj.profiling.tables import Column, add_output_arguments, write_rows

# Fields that a comparison is about; all others of the model have to be equal.
_FREE = ("attention_variant", "num_query_groups", "attention_dropout", "hidden_dropout")
_SETTINGS = ("seq_length", "global_batch_size")
_NAMED = (
    *_FREE, "micro_batch_size", "device", "threads", "processes",
    "tensor_model_parallel_size", "dtype", "torch", "commit",
)  # fmt: skip
_LOGGED = {
    "tokens_per_second": "tokens/s",
    "elapsed_ms_per_iteration": "ms per step",
    "tflops_per_rank": "TFLOP/s per process",
    "mfu": "MFU",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-command's flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name in ("a", "b"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="a saved profile, or a run folder")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print both side by side. Raises ValueError for what cannot be compared."""
    if args.a.is_dir() != args.b.is_dir():
        folder, file = (args.a, args.b) if args.a.is_dir() else (args.b, args.a)
        raise ValueError(
            f"B {args.b}: a run folder ({folder}) and a saved profile ({file}) have no figure that was "
            "measured alike; give two of a kind"
        )
    read = _read_run if args.a.is_dir() else _read_profile
    (a, rows_a), (b, rows_b) = read(args.a), read(args.b)
    check_comparable(a, b, args.a, args.b)
    rows = [
        {"quantity": name, "a": first, "b": rows_b.get(name), "b_over_a": _ratio(first, rows_b.get(name))}
        for name, first in rows_a.items()
    ]
    if args.a.is_dir():
        rows = [row for row in rows if row["a"] is not None or row["b"] is not None]
    columns = (
        Column("quantity", "per step"),
        Column("a", f"A: {_label(a)}", _figure),
        Column("b", f"B: {_label(b)}", _figure),
        Column("b_over_a", "B / A", ".3f"),
    )
    notes = [f"A {args.a}", f"B {args.b}"]
    notes += [f"{name}: {a[name]} and {b[name]}" for name in _NAMED if name in a and a[name] != b[name]]
    write_rows(rows, columns, args, notes)


def check_comparable(a: dict[str, Any], b: dict[str, Any], name_a: Path, name_b: Path) -> None:
    """Refuse two runs whose steps do not the same work, variant, groups and dropout aside.

    Args:
        a, b: with ``model`` and the settings of a run.
    Raises:
        ValueError: naming the files and what differs.
    """
    different = [f"{name} {a[name]} and {b[name]}" for name in _SETTINGS if a[name] != b[name]]
    fields = {**a["model"], **b["model"]}
    different += [
        f"{name} {a['model'].get(name)} and {b['model'].get(name)}"
        for name in fields
        if name not in _FREE and a["model"].get(name) != b["model"].get(name)
    ]
    if different:
        raise ValueError(
            f"B {name_b}: not comparable with {name_a}: {', '.join(different)}; only variant, groups, "
            "dropout, machine and dtype may differ"
        )


def _ratio(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None else None


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _label(run: dict[str, Any]) -> str:
    model = run["model"]
    shared = model["num_query_groups"] != model["num_attention_heads"]
    return model["attention_variant"] + (f", {model['num_query_groups']} groups" if shared else "")


def _read_profile(path: Path) -> tuple[dict[str, Any], dict[str, float | None]]:
    from megatron_sharedproj.profiling.step_parts import MODEL_PARTS
    from megatron_sharedproj.profiling.step_profile import load_profile

    profile = load_profile(path)
    rows: dict[str, float | None] = {
        "tokens/s": profile["tokens_per_second"],
        "tokens/s, profiled": profile["tokens_per_second_profiled"],
        "MFU": profile["mfu"],
        "ms": statistics.median(profile["step_ms"]),
    }
    for row in profile["parts"]:
        directions = ("forward", "backward") if row["part"] in MODEL_PARTS else ()
        for name in directions:
            rows[f"{row['part']}, {name}, ms profiled"] = row[f"{name}_ms"]
        if not directions:
            rows[f"{row['part']}, ms profiled"] = row["ms"]
    return {**profile, **profile["model"]}, rows


def _read_run(path: Path) -> tuple[dict[str, Any], dict[str, float | None]]:
    from megatron_sharedproj.checkpointing import files
    from megatron_sharedproj.config import to_dict
    from megatron_sharedproj.reporting.plots import load_run

    if not (path / files.RUN_CONFIG).is_file():
        raise ValueError(f"{path}: not a run folder ({files.RUN_CONFIG} is missing); give a --save folder")
    config = files.checkpoint_config(path)
    records = load_run(path).training
    records = records[1:] or records  # the first has compilation, caches and the loader's start in it
    rows: dict[str, float | None] = {}
    for key, title in _LOGGED.items():
        values = [record[key] for record in records if record.get(key) is not None]
        rows[title] = statistics.median(values) if values else None
    if not any(rows.values()):
        raise ValueError(f"{path}: its log has no speeds yet; wait for the first --log-interval")
    model = to_dict(config.model)
    run = {"model": model, **model, **to_dict(config.train), "dtype": config.train.params_dtype}
    return {**run, "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size}, rows
