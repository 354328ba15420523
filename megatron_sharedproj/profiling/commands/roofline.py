"""Prefill and decode of each variant against a GPU's peak and bandwidth: an upper bound, and what sets it.

    profile.py roofline --gpu H100
    profile.py roofline --gpu A100-80GB --model 1b --batch 1,16,64 --context 512,2048 --plot roofline.png
    profile.py roofline --peak-tflops 100 --bandwidth-gbs 800 --attention-variant qkv,qk_eq_v

Prefill runs whole prompts of --context tokens, decode adds one token to sequences of that length. Each
weight is counted as read once per call, the cache as written once (prefill) or read once (decode).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_sharedproj.command_line import list_of, positive_float, positive_int
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.profiling import planner
from megatron_sharedproj.profiling.commands import layout as flags
from megatron_sharedproj.profiling.commands import models
from megatron_sharedproj.profiling.hardware import Gpu
from megatron_sharedproj.profiling.tables import (
    Column,
    Section,
    add_output_arguments,
    check_output,
    write_sections,
)

PHASES = {"prefill": planner.prefill, "decode": planner.decode}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = flags.add_gpu_arguments(parser)
    group.add_argument(
        "--peak-tflops",
        type=positive_float,
        metavar="X",
        help="dense peak in --dtype, instead of the table's",
    )
    group.add_argument(
        "--bandwidth-gbs", type=positive_float, metavar="X", help="memory bandwidth, 10^9 bytes/s"
    )
    models.add_model_arguments(parser)
    work = parser.add_argument_group("work")
    work.add_argument(
        "--context",
        type=list_of(positive_int),
        metavar="N,M",
        help="tokens of a prompt, and of a sequence in decode (default: all positions)",
    )
    work.add_argument(
        "--batch", type=list_of(positive_int), default=(1, 16, 64), metavar="N,M", help="default 1,16,64"
    )
    work.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="default bf16")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, .png or .svg")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print or write a row per model, phase, batch and context.

    Raises:
        ValueError: naming the flag, its value and what would work.
    """
    check_output(args)
    gpu = flags.gpu_from(args)
    if gpu is None or gpu.peak is None or gpu.bandwidth is None:
        raise ValueError("--gpu: give a GPU's name, or both --peak-tflops and --bandwidth-gbs")
    if args.plot:
        from megatron_sharedproj.reporting.figures import check_plot
        from megatron_sharedproj.reporting.roofline_plot import FORMATS

        check_plot(args.plot, FORMATS)
    found, notes = models.models_and_notes(args)
    for _, config in found:
        for context in args.context or ():
            planner.check_context(config, context, "--context")
    rows = [
        _row(name, config, phase, batch, context, args.dtype, gpu)
        for phase in PHASES
        for batch in args.batch
        for name, config in found
        for context in args.context or (config.max_position_embeddings,)
    ]
    columns = [
        Column("model", "model"),
        Column("batch", "batch", ","),
        Column("context", "context", ","),
        Column("flops", "GFLOP", lambda value: f"{value / 1e9:,.1f}"),
        Column("bytes", "MiB moved", lambda value: f"{value / 2**20:,.1f}"),
        Column("intensity", "FLOP/byte", ",.1f"),
        Column("bound", "bound by"),
        Column("tokens_per_second", "tokens/s at most", ",.0f"),
        Column("over_qkv", "x qkv", ".3f"),
    ]
    sections = [
        Section(f"{phase.capitalize()}, {gpu.name}", [row for row in rows if row["phase"] == phase], columns)
        for phase in PHASES
    ]
    ridge = gpu.peak / gpu.bandwidth
    notes = [
        *notes,
        f"{gpu.name}: {gpu.peak / 1e12:g} TFLOP/s, {gpu.bandwidth / 1e9:g} GB/s (data sheet, not measured); "
        f"above {ridge:.0f} FLOP/byte the peak is the bound",
        "an upper bound: activations, softmax and launches cost nothing here; one GPU",
    ]
    if any(row["fits"] is False for row in rows):
        notes.append(
            "some weights and caches exceed the GPU's memory: `fits` in CSV and JSON, hollow in the plot"
        )
    if args.plot:
        from megatron_sharedproj.reporting.roofline_plot import plot_roofline

        plot_roofline(rows, args.plot, name=gpu.name, peak=gpu.peak, bandwidth=gpu.bandwidth)
        notes.append(f"{args.plot}: the plot")
    write_sections(rows, sections, args, notes)


def _row(
    name: str, config: ModelConfig, phase: str, batch: int, context: int, dtype: str, gpu: Gpu
) -> dict[str, Any]:
    assert gpu.peak is not None and gpu.bandwidth is not None
    work: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "dtype": dtype,
        "peak": gpu.peak,
        "bandwidth": gpu.bandwidth,
    }
    plain = config.replace(
        attention_variant="qkv", num_query_groups=config.num_attention_heads, qk_layernorm=False
    )
    bound, base = PHASES[phase](config, **work), PHASES[phase](plain, **work)
    fits = None
    if gpu.memory is not None:
        held = planner.serving(config, memory=gpu.memory, context=context, dtype=dtype)
        fits = held.sequences >= batch
    return {
        "model": name,
        "variant": config.attention_variant,
        "num_query_groups": config.num_query_groups,
        "phase": phase,
        "batch": batch,
        "context": context,
        "dtype": dtype,
        "gpu": gpu.name,
        "flops": bound.flops,
        "bytes": bound.moved,
        "intensity": bound.intensity,
        "bound": bound.bound,
        "seconds": bound.seconds,
        "tokens_per_second": bound.tokens_per_second,
        "over_qkv": bound.tokens_per_second / base.tokens_per_second,
        "fits": fits,
    }
