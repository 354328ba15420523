"""What a run will be: steps, tokens, time at an assumed MFU, memory and traffic of its ranks.

Everything is counted by the formulas from a RunConfig and a number of processes; nothing is measured. Bytes,
tokens, seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sharedproj import formulas
from megatron_sharedproj.config import RunConfig
from megatron_sharedproj.formulas_memory import (
    NOT_MODELLED,
    communication_bytes,
    parameters_per_rank,
    training_memory_bytes,
)
from megatron_sharedproj.profiling.hardware import GIB, Gpu
from megatron_sharedproj.profiling.tables import Column, Section

MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "temporary", "total")
_SIZES = ("tensor_model", "pipeline_model", "context", "data")
SENT = ("tensor_parallel", "context_parallel", "data_parallel", "parameter_gather", "pipeline", "total")


def sizes(config: RunConfig, world_size: int) -> dict[str, int]:
    """Parallel sizes of a run, and the micro batches that a rank accumulates in a step."""
    parallel, train = config.parallel, config.train
    found = {name: getattr(parallel, f"{name}_parallel_size") for name in _SIZES[:-1]}
    found["data"] = world_size // (found["tensor_model"] * found["pipeline_model"] * found["context"])
    found["micro_batches"] = train.global_batch_size // (train.micro_batch_size * found["data"])
    return found


def stages_shown(config: RunConfig, world_size: int) -> tuple[int, ...]:
    """The pipeline stages of a plan: the first, and where there are several the last."""
    last = sizes(config, world_size)["pipeline_model"] - 1
    return (0, last) if last else (0,)


def plan(config: RunConfig, world_size: int, gpu: Gpu, mfu: float) -> list[dict[str, Any]]:
    """One JSON-ready row per pipeline stage of :func:`stages_shown`; what concerns the run is in each.

    Args:
        config: resolved for ``world_size`` processes (arguments.run_config).
        gpu: with memory and peak.
        mfu: model FLOP/s over the GPUs' peak that the time is computed with: an assumption.
    """
    assert gpu.memory is not None and gpu.peak is not None
    model, train = config.model, config.train
    layout = sizes(config, world_size)
    tokens = train.global_batch_size * train.seq_length
    flops = tokens * formulas.train_flops_per_token(model, train.seq_length)
    seconds = flops / (world_size * gpu.peak * mfu)
    run = {
        "world_size": world_size,
        "variant": model.attention_variant,
        "num_query_groups": model.num_query_groups,
        **{f"{name}_parallel_size": layout[name] for name in _SIZES},
        "micro_batch_size": train.micro_batch_size,
        "micro_batches": layout["micro_batches"],
        "parameters": formulas.parameters(model)["total"],
        "tokens_per_step": tokens,
        "train_iters": train.train_iters,
        "train_tokens": train.train_iters * tokens,
        "flops_per_step": flops,
        "gpu": gpu.name,
        "gpu_memory_bytes": gpu.memory,
        "gpu_peak_flops": gpu.peak,
        "assumed_mfu": mfu,
        "assumed_seconds_per_step": seconds,
        "assumed_hours": train.train_iters * seconds / 3600,
    }
    return [{**run, **_rank(config, layout, stage)} for stage in stages_shown(config, world_size)]


def _rank(config: RunConfig, layout: dict[str, int], stage: int) -> dict[str, Any]:
    model, parallel, train = config.model, config.parallel, config.train
    step: dict[str, Any] = {
        "seq_length": train.seq_length,
        "micro_batch_size": train.micro_batch_size,
        "data_parallel_size": layout["data"],
        "low_precision": train.bf16 or train.fp16,
        "pipeline_parallel_size": layout["pipeline_model"],
        "pipeline_stage": stage,
        "micro_batches": layout["micro_batches"],
    }
    memory = training_memory_bytes(model, parallel, **step)
    sent = communication_bytes(model, parallel, **step)
    return {
        "pipeline_stage": stage,
        "rank_parameters": parameters_per_rank(
            model,
            layout["tensor_model"],
            pipeline_parallel_size=layout["pipeline_model"],
            pipeline_stage=stage,
        ),
        **{f"{part}_bytes": memory[part] for part in MEMORY},
        **{f"sent_{part}_bytes": sent[part] for part in SENT},
    }


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"


def sections(rows: Sequence[dict[str, Any]]) -> list[Section]:
    """The tables of :func:`plan`: the run, then memory and traffic of each rank shown."""
    first = rows[0]
    assumed = f"at an assumed MFU of {first['assumed_mfu']:.0%}"
    return [
        Section(
            f"Run: {first['world_size']} x {first['gpu']}, {layout_words(first)}; time {assumed}",
            rows[:1],
            [
                Column("parameters", "parameters", ","),
                Column("tokens_per_step", "tokens/step", ","),
                Column("train_iters", "steps", ","),
                Column("train_tokens", "tokens", ","),
                Column("assumed_seconds_per_step", "s/step", ".2f"),
                Column("assumed_hours", "hours", ".1f"),
            ],
        ),
        Section(
            f"Memory per GPU, GiB ({_gib(first['gpu_memory_bytes'])} there)",
            rows,
            [
                Column("pipeline_stage", "stage"),
                Column("rank_parameters", "parameters", ","),
                *(Column(f"{part}_bytes", part, _gib) for part in MEMORY),
            ],
        ),
        Section(
            f"Sent per GPU and step, GiB, {first['micro_batches']} micro batches",
            rows,
            [
                Column("pipeline_stage", "stage"),
                *(Column(f"sent_{part}_bytes", part.replace("_", " "), _gib) for part in SENT),
            ],
        ),
    ]


def layout_words(row: dict[str, Any]) -> str:
    """TP 2, PP 4, DP 8 of a row."""
    names = {"TP": "tensor_model", "PP": "pipeline_model", "CP": "context", "DP": "data"}
    found = {short: row[f"{name}_parallel_size"] for short, name in names.items()}
    return ", ".join(f"{short} {size}" for short, size in found.items() if size > 1) or "one process"


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the counts leave out, and whether they fit."""
    first, most = rows[0], max(row["total_bytes"] for row in rows)
    share = most / first["gpu_memory_bytes"]
    fits = "fits" if share <= 0.9 else "tight" if share <= 1 else "does not fit"
    return [
        f"{fits}: {share:.0%} of the memory of {first['gpu']}; not modelled: {'; '.join(NOT_MODELLED)}",
        "counted by formula, not measured; the time has no evaluation, saving or waiting in it",
    ]
