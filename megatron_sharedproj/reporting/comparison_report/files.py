"""What stands beside a comparison's report: copies of the runs' records, and the raw figures."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.config import write_json, write_text
from megatron_sharedproj.reporting.compare import EVALUATION
from megatron_sharedproj.reporting.comparison_report.reading import COMPARISON, Comparison
from megatron_sharedproj.reporting.comparison_report.run import RECALL, TRAINING, SeedRun
from megatron_sharedproj.reporting.comparison_report.statistics import changes, ordering
from megatron_sharedproj.reporting.comparison_report.tables import Chapter
from megatron_sharedproj.training.log import JSON_LOG

COMMAND = "command.json"
_RECORDS = {"log": JSON_LOG, "config": files.RUN_CONFIG, "perplexity": EVALUATION, "recall": RECALL}
_FACTS = ("commit", "date", "hardware", "torch", "megatron_core")
_FIGURES = (
    "packed_perplexity", "packed_loss", "bits_per_byte", "padded_perplexity", "padded_loss", "recall",
    "recall_argmax", "recall_chance", "recall_stderr", "validation_loss", "train_tokens_per_second",
)  # fmt: skip


def copy_records(comparison: Comparison, output: Path, place: str) -> dict[str, dict[str, str]]:
    """Copies beside the report, the log as it is, the others with portable paths; run -> kind -> place."""
    found: dict[str, dict[str, str]] = {}
    (output / place).mkdir(parents=True, exist_ok=True)
    content = (comparison.folder / COMPARISON).read_text(encoding="utf-8")
    write_text(output / place / COMPARISON, comparison.portable(content))
    for _, run in comparison.runs():
        folder, links = output / place / run.name, found.setdefault(run.name, {})
        for name in (*_RECORDS.values(), COMMAND):
            (folder / name).unlink(missing_ok=True)  # of an earlier report
        if not run.folder.is_dir() and not run.jobs:
            continue
        folder.mkdir(exist_ok=True)
        for kind, name in _RECORDS.items():
            if not (run.folder / name).is_file():
                continue
            links[kind] = f"{place}/{run.name}/{name}"
            if kind == "log":
                shutil.copyfile(run.folder / name, folder / name)
            else:
                text = (run.folder / name).read_bytes().decode("utf-8", errors="replace")
                write_text(folder / name, comparison.portable(text))
        jobs = {
            kind: {**job, "command": [comparison.portable(word) for word in job["command"]]}
            for kind, job in run.jobs.items()
        }
        facts = {key: comparison.facts[key] for key in _FACTS if key in comparison.facts}
        write_json(folder / COMMAND, {**facts, "jobs": jobs})
        links["command"] = f"{place}/{run.name}/{COMMAND}"
    return found


def link_records(comparison: Comparison, output: Path) -> dict[str, dict[str, str]]:
    """Where the records are, seen from the report; run -> kind -> place."""
    found: dict[str, dict[str, str]] = {}
    for _, run in comparison.runs():
        paths = {kind: run.folder / name for kind, name in _RECORDS.items()}
        paths["command"] = comparison.folder / "jobs" / f"{run.name}.json"
        found[run.name] = {
            kind: os.path.relpath(path.resolve(), output.resolve())
            for kind, path in paths.items()
            if path.is_file()
        }
    return found


def run_rows(chapter: Chapter) -> list[dict[str, Any]]:
    """Every run with its raw figures and where they come from."""
    comparison = chapter.comparison
    return [
        {
            "comparison": comparison.title,
            "protocol": comparison.protocol,
            "model": model.name,
            "label": model.label,
            "matched": model.matched,
            "seed": run.seed,
            "state": run.status,
            "parameters": model.parameters,
            "cache_bytes_per_token": model.cache_bytes,
            "steps": run.steps,
            **{name: run.values.get(name) for name in _FIGURES},
            **{f"{kind}_seconds": run.jobs.get(kind, {}).get("seconds") for kind in (TRAINING, "perplexity")},
            **{key: comparison.facts.get(key) for key in _FACTS},
            "command": _command(comparison, run),
            "log": chapter.records.get(run.name, {}).get("log"),
        }
        for model, run in comparison.runs()
    ]


def _command(comparison: Comparison, run: SeedRun) -> str | None:
    words = run.jobs.get(TRAINING, {}).get("command")
    return " ".join(comparison.portable(word) for word in words) if words else None


def model_rows(chapter: Chapter) -> list[dict[str, Any]]:
    """Changes against the baseline, for each family, model and protocol."""
    return [
        {
            "comparison": chapter.comparison.title,
            "family": family.key,
            "model": name,
            "figure": figure,
            "unit": "percent" if percent_ else "difference",
            "by_seed": dict(change.by_seed),
            **asdict(change.estimate),
            "p_holm": change.adjusted,
            "verdict": change.verdict,
        }
        for family in chapter.comparison.families
        for figure, percent_ in (("packed_perplexity", True), ("padded_perplexity", True), ("recall", False))
        for name, change in changes(family, figure, percent=percent_).items()
    ]


def pair_rows(chapter: Chapter) -> list[dict[str, Any]]:
    """Every two models of a family by packed perplexity."""
    return [
        {
            "comparison": chapter.comparison.title,
            "family": family.key,
            "low": pair.low.name,
            "high": pair.high.name,
            "by_seed": dict(pair.change.by_seed),
            **asdict(pair.change.estimate),
            "seeds_in_this_order": pair.agreeing,
            "told_apart": bool(pair.change.estimate.sign),
        }
        for family in chapter.comparison.families
        if (found := ordering(family, "packed_perplexity"))
        for pair in found.pairs
    ]


def plain(value: Any) -> Any:
    """What JSON can hold: NaN becomes null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
