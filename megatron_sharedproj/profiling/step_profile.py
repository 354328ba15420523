"""A profile of real training steps: the trainer built from its own flags or a run's, measured, and saved.

Times are seconds per step unless a name ends in ``_ms``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_sharedproj import distributed, formulas
from megatron_sharedproj.arguments import build_parser
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.config import CheckpointConfig, LogConfig, ModelConfig, RunConfig, from_dict, to_dict
from megatron_sharedproj.profiling import step_parts
from megatron_sharedproj.profiling.attention_results import commit
from megatron_sharedproj.profiling.roofline import measure_roofline
from megatron_sharedproj.profiling.timing import get_machine

KIND = "megatron_sharedproj step profile"
FORMAT = 1
_ROOT = Path(__file__).resolve().parents[2]
_OPERATORS = 40  # kept in a saved profile

Progress = Callable[[str], None]


def arguments_of(config: RunConfig) -> argparse.Namespace:
    """The trainer's parsed flags that would give this configuration, whatever the number of processes."""
    args = build_parser().parse_args([])
    for part in (config.parallel, config.train, config.data, config.checkpoint, config.log, config.model):
        for name, value in vars(part).items():
            if hasattr(args, name):
                setattr(args, name, value)
    model = config.model
    args.lr_warmup_fraction = None  # it has become lr_warmup_iters
    args.group_query_attention = model.num_query_groups != model.num_attention_heads
    args.num_query_groups = model.num_query_groups if args.group_query_attention else None
    args.swiglu = model.activation == "swiglu"
    args.no_bias_gelu_fusion = model.activation == "gelu"
    args.disable_bias_linear = not model.add_bias_linear
    args.norm_epsilon = model.layernorm_epsilon
    args.no_scaled_init = not model.scaled_init
    # Whatever the tokenizer has, padded to a multiple of this it is this.
    args.make_vocab_size_divisible_by = model.padded_vocab_size
    return args


def training_arguments(words: Sequence[str], steps: int) -> argparse.Namespace:
    """The trainer's parsed flags for a profile: as given, but nothing is saved, loaded, logged or validated.

    Args:
        words: the trainer's flags, or one run folder.
        steps: steps that will be taken; --train-iters is raised to them.
    Raises:
        ValueError: for a folder that is not a run.
    """
    if len(words) == 1 and not words[0].startswith("-"):
        folder = Path(words[0])
        if not (folder / files.RUN_CONFIG).is_file():
            raise ValueError(
                f"RUN {folder}: not a run folder ({files.RUN_CONFIG} is missing); give a trainer's --save "
                "folder, or -- and the trainer's flags"
            )
        args = arguments_of(files.checkpoint_config(folder))
    else:
        args = build_parser().parse_args(list(words))
    for part in (CheckpointConfig(), LogConfig(log_interval=sys.maxsize)):
        for name, value in vars(part).items():
            setattr(args, name, value)
    args.eval_iters = 0
    args.train_iters = args.train_iters and max(args.train_iters, steps)
    return args


@contextlib.contextmanager
def trainer_of(args: argparse.Namespace) -> Iterator[Any]:
    """A Trainer of parsed flags, as pretrain builds it; leaves the process group at the end.

    Raises:
        ValueError: what is wrong with the flags, before anything is built.
    """
    from megatron_sharedproj.pretrain import build_trainer, prepare

    prepared = prepare(args)
    config, device = prepared[0], prepared[3]
    try:
        distributed.initialize_for(config, device)
        with contextlib.redirect_stdout(sys.stderr):  # what the trainer says of itself is not the table
            trainer = build_trainer(*prepared)
        trainer.model.train()
        with device.keep_freed_memory():  # as in the trainer's loop
            yield trainer
    finally:
        distributed.finalize()


def _wait(trainer: Any) -> None:
    if trainer.torch_device.type == "cuda":
        torch.cuda.synchronize()


def timed_steps(trainer: Any, iterator: Any, count: int) -> list[float]:
    """Seconds of each of `count` steps."""
    seconds = []
    for _ in range(count):
        _wait(trainer)
        start = time.perf_counter()
        trainer.step(iterator)
        _wait(trainer)
        seconds.append(time.perf_counter() - start)
    return seconds


def _silent(text: str) -> None:
    pass


def profile_steps(
    trainer: Any,
    *,
    steps: int,
    warm_up: int,
    trace: Path | None = None,
    peak: float | None = None,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Profile training steps.

    `warm_up` steps first, half of the steps without the profiler, the steps with it, and the other half.

    Args:
        trace: write a Chrome trace of the profiled steps here (rank 0).
        peak: FLOP/s that MFU is a fraction of; None: the GPU's by its data sheet, or on a CPU the fastest
            matrix product measured here.
        progress: told what is going on.
    Returns:
        JSON-ready figures; ``parts`` has milliseconds per step.
    """
    on_gpu = trainer.torch_device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    iterator = step_parts.Ranged(trainer._iterator(trainer.train_data, trainer.consumed_samples))
    progress(f"{warm_up} steps to warm up")
    timed_steps(trainer, iterator, warm_up)
    progress(f"{steps} steps without the profiler, {steps} with it")
    plain = timed_steps(trainer, iterator, (steps + 1) // 2)
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with step_parts.ranges(trainer):
        with torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
            timed_steps(trainer, iterator, 1)
            profiler.step()
            profiled = timed_steps(trainer, iterator, steps)
    memory = torch.cuda.max_memory_allocated() if on_gpu else None
    plain += timed_steps(trainer, iterator, max(1, steps // 2))
    progress("reading the trace")
    parts, operators = step_parts.breakdown(profiler.events(), steps, on_gpu=on_gpu)
    if trace is not None and distributed.is_rank_0():
        _export(profiler, trace)
    return {
        **_run_figures(trainer, plain, profiled, memory, peak, progress),
        "parts": _part_rows(parts, statistics.fmean(profiled)),
        "operators": [
            {"operator": one.name, "ms": 1e3 * one.seconds, "calls": one.calls}
            for one in operators[:_OPERATORS]
        ],
        "ranks": _gather(plain, parts),
    }


def _export(profiler: Any, trace: Path) -> None:
    temporary = trace.with_name(f".{trace.name}.tmp.json")
    try:
        profiler.export_chrome_trace(str(temporary))
        temporary.replace(trace)
    finally:
        temporary.unlink(missing_ok=True)


def _part_rows(parts: dict[str, step_parts.PartTime], step: float) -> list[dict[str, Any]]:
    """Milliseconds of each part, what no part accounts for (a GPU's idle time), and their sum, the step."""
    rows: list[dict[str, Any]] = [
        {
            "part": name,
            "forward_ms": 1e3 * part.forward,
            "backward_ms": 1e3 * part.backward,
            "ms": 1e3 * part.total,
            "percent": 100 * part.total / step,
            "products_ms": 1e3 * part.products,
            "host_ms": 1e3 * part.host,
        }
        for name, part in parts.items()
    ]
    left = step - sum(part.total for part in parts.values())
    rows.append({**dict.fromkeys(rows[0]), "part": "idle", "ms": 1e3 * left, "percent": 100 * left / step})
    numbers = [key for key in rows[0] if key != "part"]
    rows.append({"part": "step", **{key: sum(row[key] or 0.0 for row in rows) for key in numbers}})
    return rows


def _gather(plain: Sequence[float], parts: dict[str, step_parts.PartTime]) -> list[dict[str, float]]:
    """Of each rank: its step, and the part of a profiled one that is not spent on gradient communication."""
    busy = sum(part.total for name, part in parts.items() if name != step_parts.COMMUNICATION)
    own = {"step_ms": 1e3 * statistics.median(plain), "busy_ms": 1e3 * busy}
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


def _run_figures(
    trainer: Any,
    plain: Sequence[float],
    profiled: Sequence[float],
    memory: int | None,
    peak: float | None,
    progress: Progress,
) -> dict[str, Any]:
    config: RunConfig = trainer.config
    train, world = config.train, torch.distributed.get_world_size()
    dtype = getattr(torch, train.params_dtype)
    machine = get_machine(trainer.torch_device.type)
    tokens = train.global_batch_size * train.seq_length
    per_token = formulas.train_flops_per_token(config.model, train.seq_length)
    rate = tokens / statistics.median(plain)
    peak_is = "given"
    if peak is None:
        peak, peak_is = formulas.peak_flops(trainer.device.describe()), "data sheet, dense bf16"
    if peak is None:
        progress("measuring the fastest matrix product")
        # All ranks at once, as in a step: they share the machine's memory and clock.
        torch.distributed.barrier()
        # Twice: a shared machine may be half as fast at one moment, and a peak is the best.
        peak = max(measure_roofline([dtype], machine).flops[dtype] for _ in range(2))
        peak_is = "measured matrix product"
    return {
        "kind": KIND,
        "format": FORMAT,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(_ROOT),
        "device": machine.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processes": world,
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "dtype": train.params_dtype,
        "model": to_dict(config.model),
        "parameters": formulas.parameters(config.model)["total"],
        "seq_length": train.seq_length,
        "micro_batch_size": train.micro_batch_size,
        "global_batch_size": train.global_batch_size,
        "steps": len(profiled),
        "step_ms": [1e3 * seconds for seconds in plain],
        "profiled_step_ms": [1e3 * seconds for seconds in profiled],
        "tokens_per_second": rate,
        "tokens_per_second_profiled": tokens / statistics.median(profiled),
        "flops_per_token": per_token,
        "flops_per_second_per_process": rate * per_token / world,
        "peak_flops": peak,
        "peak_is": peak_is,
        "mfu": rate * per_token / world / peak,
        "peak_memory_bytes": memory,
    }


def load_profile(path: Path) -> dict[str, Any]:
    """A profile that ``profile.py step --save-profile`` wrote.

    Raises:
        ValueError: naming the file, if it is not one.
    """
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ValueError(
            f"{path}: cannot be read ({reason}); give a file that step --save-profile wrote"
        ) from None
    if not isinstance(profile, dict) or profile.get("kind") != KIND:
        raise ValueError(f"{path}: not a saved profile; give a file that step --save-profile wrote")
    if profile["format"] != FORMAT:
        raise ValueError(f"{path}: saved by another version (format {profile['format']}, not {FORMAT})")
    return profile


def model_of(profile: dict[str, Any]) -> ModelConfig:
    """The model that a loaded profile is of."""
    return from_dict(ModelConfig, profile["model"])
