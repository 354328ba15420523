"""A comparison of trained variants over seeds, read from the folder that examples/compare_variants.sh leaves.

A run that is missing, unfinished or damaged is named in its ``problems`` and left out of the figures; the
seeds that are there still count. Needs neither torch nor Megatron.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sharedproj import formulas
from megatron_sharedproj.config import DATA_PROTOCOLS, ModelConfig, RunConfig, to_dict
from megatron_sharedproj.reporting.comparison_report.run import (
    MEASURED,
    SeedRun,
    entry_of,
    measured_on,
    read_object,
    read_run,
)

COMPARISON = "comparison.json"

# Settings in which the runs of a comparison differ on purpose, or without a meaning for the result.
_FREE = re.compile(
    r"model\.(attention_variant|num_query_groups|kv_rotary)|train\.(seed|match_parameters_of|width_before_match)"
    r"|(checkpoint|log|parallel)\..*"
)
_TOOL = re.compile(r"(?<!\S)/\S*/((?:tools|examples|benchmarks)/[\w/]+\.(?:py|sh))(?!\S)")


@dataclass(frozen=True)
class Model:
    """A variant of the comparison: name, label, whether its parameters match the baseline's, runs by seed."""

    name: str
    label: str
    matched: bool
    flags: tuple[str, ...]
    runs: dict[int, SeedRun]

    @property
    def title(self) -> str:
        """Its label where models of both families stand side by side."""
        return f"{self.label}, wider MLP" if self.matched else self.label

    @property
    def config(self) -> ModelConfig | None:
        """Its shape, from the first run that says it."""
        return next((run.config.model for run in self.runs.values() if run.config), None)

    @property
    def parameters(self) -> int | None:
        """All of them."""
        return None if self.config is None else formulas.parameters(self.config)["total"]

    @property
    def cache_bytes(self) -> int | None:
        """Key/value cache bytes per token with two bytes per element."""
        return None if self.config is None else formulas.kv_cache_bytes_per_token(self.config)

    @property
    def trained(self) -> bool:
        """Whether a run of it went to its end."""
        return any(run.trained for run in self.runs.values())

    def values(self, figure: str) -> dict[int, float]:
        """Seed -> a figure of SeedRun.values, of the runs that have it."""
        return {seed: run.values[figure] for seed, run in self.runs.items() if figure in run.values}


@dataclass(frozen=True)
class Family:
    """Models that are compared with each other, the baseline first."""

    key: str
    title: str
    models: tuple[Model, ...]


@dataclass(frozen=True)
class Comparison:
    """comparison.json and its runs; ``facts`` are its plain entries (commit, date, hardware, ...)."""

    folder: Path
    title: str
    protocol: str
    seeds: tuple[int, ...]
    facts: dict[str, str]
    baseline: Model
    models: tuple[Model, ...]

    @property
    def families(self) -> tuple[Family, ...]:
        """Same architecture, and same number of parameters where a model was widened for it."""
        base, others = self.baseline, [model for model in self.models if model is not self.baseline]
        same = tuple(model for model in others if not model.matched)
        matched = tuple(model for model in others if model.matched)
        found = [Family("architecture", "Same architecture", (base, *same))] if same or not matched else []
        if matched:
            found.append(Family("parameters", "Same number of parameters", (base, *matched)))
        return tuple(found)

    def runs(self) -> Iterator[tuple[Model, SeedRun]]:
        """Every run with its model."""
        yield from ((model, run) for model in self.models for run in model.runs.values())

    def portable(self, text: str) -> str:
        """A command's word or a record's text without this machine's paths, where they are ours.

        What lies in the comparison's folder is relative to it, a repository's scripts to the repository.
        """
        for root in dict.fromkeys((self.folder.resolve(), self.folder.absolute())):
            text = text.replace(f"{root}/", "")
            text = re.sub(rf"{re.escape(str(root))}(?![\w.-])", root.name, text)
        return _TOOL.sub(r"\1", text)


def read_comparison(folder: Path) -> Comparison:
    """Read comparison.json and every run that it names.

    Raises:
        ValueError: naming the file and the entry, if comparison.json is missing or not what it should be.
    """
    path = folder / COMPARISON
    if not path.is_file():
        raise ValueError(f"{folder}: no {COMPARISON} there; give a folder of examples/compare_variants.sh")
    content = read_object(path)
    models = []
    for entry in entry_of(content, "models", list, path):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: models holds {entry!r}, not an object; run compare_variants.sh again")
        runs: dict[int, SeedRun] = {}
        for seed, place in entry_of(entry, "runs", dict, path).items():
            if not (seed.isdecimal() and isinstance(place, str)):
                raise ValueError(f"{path}: runs has {seed!r}: {place!r}; give a seed and its folder")
            runs[int(seed)] = read_run(folder / place, int(seed), folder / "jobs")
        name, label = entry_of(entry, "name", str, path), entry_of(entry, "label", str, path)
        flags = tuple(map(str, entry.get("flags", ())))
        models.append(Model(name, label, bool(entry.get("matched")), flags, runs))
    baseline = entry_of(content, "baseline", str, path)
    by_name = {model.name: model for model in models}
    if baseline not in by_name:
        raise ValueError(f"{path}: baseline {baseline!r} is not among the models {', '.join(by_name)}")
    if len(by_name) < len(models):
        raise ValueError(f"{path}: two models have the same name; names must differ")
    protocol = content.get("protocol", DATA_PROTOCOLS[0])
    if protocol not in DATA_PROTOCOLS:
        raise ValueError(f"{path}: protocol {protocol!r}; must be one of {', '.join(DATA_PROTOCOLS)}")
    seeds = tuple(sorted({seed for model in models for seed in model.runs}))
    facts = {key: value for key, value in content.items() if isinstance(value, str)}
    title = entry_of(content, "title", str, path)
    comparison = Comparison(folder, title, protocol, seeds, facts, by_name[baseline], tuple(models))
    _note_settings(comparison)
    _drop_other_text(comparison)
    return comparison


def _note_settings(comparison: Comparison) -> None:
    """Note the settings that make a run no fair part of the comparison."""
    reference = next((run for run in comparison.baseline.runs.values() if run.config), None)
    for model, run in comparison.runs():
        if run.config is None or reference is None or reference.config is None:
            continue
        if run.config.train.seed != run.seed:
            run.problems.append(f"its configuration says seed {run.config.train.seed}")
        if run.config.data.data_protocol != comparison.protocol:
            run.problems.append(f"trained with --data-protocol {run.config.data.data_protocol}")
        mine, theirs = _flat(run.config), _flat(reference.config)
        meant = {flag.removeprefix("--").replace("-", "_") for flag in model.flags}
        meant |= {"ffn_hidden_size"} if model.matched else set()
        for key in (key for key in theirs if mine.get(key) != theirs[key]):
            if not _FREE.fullmatch(key) and key.partition(".")[2] not in meant:
                run.problems.append(f"{key} is {mine.get(key)}, {reference.name}'s is {theirs[key]}")


def _drop_other_text(comparison: Comparison) -> None:
    """Leave out figures that were measured on something else than most runs' were, and say so."""
    for kind, figures in MEASURED.items():
        runs = [run for _, run in comparison.runs() if figures[0] in run.values]
        usual = Counter(measured_on(run, kind) for run in runs).most_common(1)
        for run in runs:
            basis = measured_on(run, kind)
            if basis == usual[0][0]:
                continue
            run.problems.append(
                f"{kind}: measured on {basis}, others on {usual[0][0]}; left out, evaluate again"
            )
            for figure in figures:
                run.values.pop(figure, None)
            if kind == "packed":
                run.status = "not evaluated"


def _flat(config: RunConfig) -> dict[str, Any]:
    parts = to_dict(config)
    return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
