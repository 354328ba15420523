"""Variants trained on the same data in the same order with the same seeds, then evaluated alike.

A comparison's folder holds ``comparison.json`` (what was compared, with which command, code and machine),
``jobs/`` (the command, time and log of every step) and ``runs/NAME_SEED/`` (a trainer's folder with
``perplexity.json`` and ``recall.json``). ``tools/report.py`` reads it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_sharedproj.config import write_json
from megatron_sharedproj.experiments.jobs import ROOT, Job, script, steps_share, torchrun
from megatron_sharedproj.experiments.speeches import data_flags, data_jobs, validation_data
from megatron_sharedproj.profiling.attention_results import commit
from megatron_sharedproj.profiling.timing import get_machine
from megatron_sharedproj.variants import get_variant

MANIFEST = "comparison.json"
BASELINE = "qkv"
_LABELS = {"qkv": "QKV", "q_eq_k": "Q=K", "qk_eq_v": "K=V", "q_eq_k_eq_v": "Q=K=V"}
# What a change of would make another comparison; the rest of the manifest says where it was run.
_SAME = ("baseline", "protocol", "steps", "data", "trainer_flags")


@dataclass(frozen=True)
class Model:
    """One of the models that are compared.

    Attributes:
        variant: a key of variants.VARIANTS; groups: key/value heads, 0: as many as heads.
        matched: the MLP is widened to the baseline's number of parameters.
    """

    variant: str
    groups: int = 0
    matched: bool = False

    @property
    def name(self) -> str:
        """Of its runs' folders."""
        shared = f"_g{self.groups}" if self.groups else ""
        return f"{self.variant}{shared}{'_matched' if self.matched else ''}"

    @property
    def label(self) -> str:
        """In tables and plots: K=V, Q-MQA, GQA-2."""
        if not self.groups:
            return _LABELS[self.variant]
        shared = "MQA" if self.groups == 1 else f"GQA-{self.groups}"
        return f"Q-{shared}" if self.variant == "qk_eq_v" else shared

    @property
    def flags(self) -> tuple[str, ...]:
        """The trainer's."""
        shared = ("--group-query-attention", "--num-query-groups", str(self.groups)) if self.groups else ()
        match = ("--match-parameters-of", BASELINE) if self.matched else ()
        return ("--attention-variant", self.variant, *shared, *match)


def parse_model(text: str, *, matched: bool = False) -> Model:
    """The model of ``VARIANT`` or ``VARIANT:GROUPS`` (qk_eq_v:1 is Q-MQA).

    Raises:
        ValueError: for an unknown variant, or one whose heads cannot be shared.
    """
    name, colon, number = text.partition(":")
    variant = get_variant(name)
    if not colon:
        return Model(variant.name, 0, matched)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"{text}: {number!r} is no number of key/value heads; write {variant.name}:1 for one"
        )
    if variant.tied_qk:
        raise ValueError(f"{text}: with query and key tied, heads can't be shared; leave :{number} out")
    return Model(variant.name, int(number), matched)


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        folder: of everything; models: with the baseline among them.
        seeds: of weights and data order; the order is the same for all models of a seed.
        steps: optimizer steps; processes: data-parallel ranks of a run.
        protocol: how documents become rows in training, packed or padded.
        documents: of the default text, speeches or paragraphs.
        own_data: trainer flags of other data, --valid-data-path and --tokenizer-model; empty: default text.
        extra_flags: for the trainer, behind this module's own, so that they win.
    """

    folder: Path
    models: Sequence[Model]
    seeds: Sequence[int]
    steps: int = 400
    processes: int = 1
    protocol: str = "packed"
    documents: str = "speeches"
    title: str = ""
    own_data: Sequence[str] = ()
    extra_flags: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"--models: {', '.join(sorted(twice))} is named twice; once is enough")
        if BASELINE not in names:
            raise ValueError(f"--models: {BASELINE} is missing; the others are compared with it, so add it")
        if self.steps < 10:
            raise ValueError(f"--steps {self.steps}: must be at least 10")

    def run_folder(self, model: Model, seed: int) -> Path:
        return self.folder / "runs" / f"{model.name}_{seed}"

    @property
    def validation(self) -> str:
        """Prefix of the validation data."""
        words = list(self.own_data)
        if words:
            return words[words.index("--valid-data-path") + 1]
        return validation_data(self.folder)

    def trainer_flags(self) -> tuple[str, ...]:
        """Those that all models share: a small GPT-2 as the released code has it, then the user's."""
        micro = max(1, 16 // self.processes)
        return (
            "--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "4",
            "--seq-length", "256", "--max-position-embeddings", "256",
            "--no-bias-gelu-fusion", "--no-scaled-init", "--weight-decay-on-all",
            "--attention-dropout", "0", "--hidden-dropout", "0",
            "--micro-batch-size", str(micro), "--global-batch-size", "16", "--train-iters", str(self.steps),
            # At 3e-3 behind 40 steps one K=V in three leapt and ended at perplexity 134; here at 89.
            "--lr", "2e-3", "--min-lr", "2e-4", "--lr-warmup-iters", str(self.steps // 4),
            "--adam-beta2", "0.95", "--weight-decay", "0.1", "--save-interval", "100",
            "--eval-interval", str(max(1, self.steps // 10)), "--eval-iters", "4", "--log-interval", "10",
            "--num-workers", "0", "--data-protocol", self.protocol, *self.extra_flags,
        )  # fmt: skip

    def jobs(self) -> list[Job]:
        """Data, then training and evaluations of each model; seed by seed, so that a part is a comparison."""
        jobs = [] if self.own_data else data_jobs(self.folder, self.documents)
        data = tuple(self.own_data) or tuple(data_flags(self.folder))
        after = ("data",) if not self.own_data else ()
        for seed in self.seeds:
            for model in self.models:
                run = self.run_folder(model, seed)
                words = (
                    "-m", "megatron_sharedproj.pretrain", *self.trainer_flags(), *model.flags, *data,
                    "--seed", str(seed), "--save", str(run),
                )  # fmt: skip
                share = steps_share(run, self.steps)
                train = torchrun(self.processes, *words)
                jobs.append(Job(run.name, train, cost=self.steps / 5, after=after, share=share))
                measures = {
                    "perplexity": ("--protocol", "both", "--data-path", self.validation),
                    "recall": (),
                }
                for measure, flags in measures.items():
                    output = ("--output", str(run / f"{measure}.json"))
                    command = script("tools/evaluate.py", measure, "--load", str(run), *flags, *output)
                    jobs.append(Job(f"{run.name}_{measure}", command, cost=6.0, after=(run.name,)))
        return jobs

    def manifest(self, command: Sequence[str]) -> dict[str, Any]:
        """What ``comparison.json`` says."""
        return {
            "title": self.title or f"{len(self.models)} models, {self.steps} steps",
            "command": " ".join(command),
            "commit": commit(ROOT),
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": f"{get_machine('cpu').name}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "megatron_core": importlib.metadata.version("megatron-core"),
            "baseline": BASELINE,
            "seeds": list(self.seeds),
            "steps": self.steps,
            "protocol": self.protocol,
            "data": " ".join(self.own_data) or f"State of the Union, {self.documents}",
            "trainer_flags": list(self.trainer_flags()),
            "models": [
                {
                    "name": model.name,
                    "label": model.label,
                    "matched": model.matched,
                    "flags": list(model.flags),
                    "runs": {
                        str(seed): str(self.run_folder(model, seed).relative_to(self.folder))
                        for seed in self.seeds
                    },
                }
                for model in self.models
            ],
        }

    def write_manifest(self, command: Sequence[str]) -> None:
        """Leave ``comparison.json``: what was compared before in this folder stays in it.

        Raises:
            ValueError: where the folder holds a comparison with other settings.
        """
        path, new = self.folder / MANIFEST, self.manifest(command)
        if path.exists():
            old = json.loads(path.read_text())
            differing = [name for name in _SAME if old[name] != new[name]]
            if differing:
                raise ValueError(
                    f"--folder {self.folder}: holds a comparison with another {', '.join(differing)}; give "
                    "another folder, or the same flags"
                )
            new = {**new, **_joined(old, new)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, new)


def _joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Models and seeds of both; where and when the folder was begun."""
    models = {model["name"]: model for model in old["models"]}
    for model in new["models"]:
        runs = {**models.get(model["name"], {}).get("runs", {}), **model["runs"]}
        models[model["name"]] = {**model, "runs": runs}
    begun = {name: old[name] for name in ("commit", "date", "hardware", "torch", "megatron_core")}
    return {**begun, "models": list(models.values()), "seeds": sorted({*old["seeds"], *new["seeds"]})}
