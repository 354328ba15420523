"""A comparison's folder as examples/compare_variants.sh leaves it, with the trainer's own dataclasses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    to_dict,
    write_json,
)

STEPS, TOKENS_PER_STEP = 40, 16 * 64
_SHAPE = ModelConfig(
    num_layers=2, hidden_size=64, num_attention_heads=4, padded_vocab_size=512, max_position_embeddings=64
)
# name -> label, shape, widened, loss above the baseline's (nats per token) for each of three seeds.
MODELS: dict[str, tuple[str, dict[str, Any], bool, tuple[float, ...]]] = {
    "qkv": ("QKV", {}, False, (0.0, 0.0, 0.0)),
    "qk_eq_v": ("K=V", {"attention_variant": "qk_eq_v"}, False, (0.020, 0.022, 0.018)),
    "q_eq_k_eq_v": ("Q=K=V", {"attention_variant": "q_eq_k_eq_v"}, False, (0.10, 0.12, 0.11)),
    "qkv_g1": ("MQA", {"num_query_groups": 1}, False, (0.004, -0.006, 0.003)),
    "qk_eq_v_matched": (
        "K=V", {"attention_variant": "qk_eq_v", "ffn_hidden_size": 288}, True, (0.009, 0.004, -0.002)
    ),
}  # fmt: skip
SEEDS = (1234, 1235, 1236)
BASE_LOSS = (4.30, 4.34, 4.27)


def write_run(folder: Path, model: str, seed: int, *, protocol: str = "packed", steps: int = STEPS) -> None:
    """A finished run's folder and job records in a comparison's folder; with fewer steps it stopped there."""
    _, shape, matched, above = MODELS[model]
    index = SEEDS.index(seed)
    loss = BASE_LOSS[index] + above[index]
    run = folder / "runs" / f"{model}_{seed}"
    run.mkdir(parents=True)
    data = DataConfig(train_data_path=[str(folder / "data" / "train_text")], data_protocol=protocol)
    train = TrainConfig(
        seq_length=64, global_batch_size=16, train_iters=STEPS, seed=seed, lr=3e-3, min_lr=3e-4,
        match_parameters_of="qkv" if matched else "",
    )  # fmt: skip
    config = RunConfig(
        replace(_SHAPE, **shape), train=train, data=data, checkpoint=CheckpointConfig(save=str(run))
    )
    write_json(run / files.RUN_CONFIG, to_dict(config))
    records: list[dict[str, Any]] = []
    for step in range(5, steps + 1, 5):
        now = loss + 3 * math.exp(-step / 8)
        records.append(
            {
                "iteration": step, "train_iters": STEPS, "consumed_tokens": step * TOKENS_PER_STEP,
                "tokens_per_second": 1000.0 + step + 10 * index, "lm_loss": now - 0.05,
            }
        )  # fmt: skip
        if step % 10 == 0:
            records.append(
                {"iteration": step, "validation_lm_loss": now, "validation_perplexity": math.exp(now)}
            )
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    names = {"": [f"-m megatron_sharedproj.pretrain --seed {seed} --save {run}"]}
    if steps == STEPS:
        _write_evaluations(run, loss)
        names = {**names, "_perplexity": ["/elsewhere/tools/evaluate.py", "perplexity", "--load", str(run)]}
    for suffix, words in names.items():
        record = {"command": " ".join(words).split(" "), "seconds": 12.5}
        write_json(folder / "jobs" / f"{run.name}{suffix}.json", record)


def _write_evaluations(run: Path, loss: float) -> None:
    def part(protocol: str, nats: float, real: int) -> dict[str, Any]:
        tokens = 2000 if protocol == "padded" else 1500
        found = {"protocol": protocol, "loss": nats, "perplexity": math.exp(nats), "tokens": tokens}
        return {**found, "real_tokens": real, "seq_length": 64}

    checkpoint = str(files.iteration_dir(run, STEPS))
    packed = {**part("packed", loss, 1500), "bits_per_byte": loss / math.log(2) / 4}
    padded = part("padded", 0.4 * loss, 800)
    write_json(run / "perplexity.json", {"checkpoint": checkpoint, "packed": packed, "padded": padded})
    cell = {"queries": 400, "accuracy": 2 - loss / 3, "stderr": 0.02, "argmax_accuracy": 0.1, "keys": 64}
    cells = [{**cell, "pairs": 4, "chance": 0.25}, {**cell, "pairs": 16, "chance": 0.0625}]
    mean = {"accuracy": cell["accuracy"], "argmax_accuracy": 0.1, "chance": 0.15625, "margin": 0.5}
    recall = {"pattern": "KEY VALUE,", "seed": 1234, "sequences": 100, "mean": mean, "cells": cells}
    write_json(run / "recall.json", {"checkpoint": checkpoint, **recall})


Writer = Callable[..., Path]


@pytest.fixture
def write_comparison(tmp_path: Path) -> Writer:
    """Writes a comparison's folder and returns it."""

    def write(
        name: str = "comparison",
        *,
        models: Sequence[str] = tuple(MODELS),
        seeds: Sequence[int] = SEEDS,
        missing: Sequence[str] = (),
        protocol: str = "packed",
    ) -> Path:
        folder = tmp_path / name
        (folder / "jobs").mkdir(parents=True)
        for model in models:
            for seed in seeds:
                if f"{model}_{seed}" not in missing:
                    write_run(folder, model, seed, protocol=protocol)
        entries = [
            {
                "name": model,
                "label": MODELS[model][0],
                "matched": MODELS[model][2],
                "flags": ["--attention-variant", "qkv"],
                "runs": {str(seed): f"runs/{model}_{seed}" for seed in seeds},
            }
            for model in models
        ]
        content = {
            "title": f"Five models, {name}",
            "command": f"python /elsewhere/tools/compare_variants.py --folder {folder}/data",
            "commit": "0123456789ab",
            "date": "2026-11-30",
            "hardware": "a CPU, 2 cores",
            "torch": "2.13.0",
            "megatron_core": "0.16.1",
            "baseline": "qkv",
            "seeds": list(seeds),
            "protocol": protocol,
            "data": "speeches",
            "models": entries,
        }
        write_json(folder / "comparison.json", content)
        return folder

    return write
