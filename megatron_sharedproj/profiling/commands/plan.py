"""Which variants, groups and micro batches fit on a GPU, for training and for serving, and what they cost.

    profile.py plan --gpu A100-40GB --model 1b
    profile.py plan --memory-gib 24 --context 1024 --micro-batch-sizes 4,8,16,32
    profile.py plan --gpu H100 --attention-variant qkv,qk_eq_v --num-query-groups 16,4,1 \\
        --data-parallel-size 8 --use-distributed-optimizer

Training keeps --context tokens per sequence. A server holds weights and cache in --dtype, sequences of
--context tokens each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from megatron_sharedproj.command_line import list_of, positive_int
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.formulas_memory import NOT_MODELLED
from megatron_sharedproj.profiling import quality
from megatron_sharedproj.profiling.commands import layout as flags
from megatron_sharedproj.profiling.commands import models
from megatron_sharedproj.profiling.hardware import GIB
from megatron_sharedproj.profiling.planner import Layout, check_context, largest_micro_batch, serving
from megatron_sharedproj.profiling.tables import (
    Column,
    Section,
    add_output_arguments,
    check_output,
    write_sections,
)

_MICRO_BATCHES = (1, 2, 4, 8, 16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_memory_arguments(flags.add_gpu_arguments(parser))
    models.add_model_arguments(parser)
    work = parser.add_argument_group("work")
    work.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help="tokens in a sequence, for training and serving (default: all positions)",
    )
    work.add_argument(
        "--micro-batch-sizes",
        "--batch",
        dest="micro_batch_sizes",
        type=list_of(positive_int),
        default=_MICRO_BATCHES,
        metavar="N,M",
        help=f"to try (default {','.join(map(str, _MICRO_BATCHES))})",
    )
    flags.add_layout_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print or write a row per model and micro batch.

    Raises:
        ValueError: naming the flag, its value and what would work.
    """
    check_output(args)
    gpu = flags.gpu_from(args)
    if gpu is None:
        raise ValueError("--gpu: give a GPU's name, or --memory-gib")
    memory = flags.planned_memory(gpu, args.memory_fraction)
    layout = flags.layout_from(args)
    found, notes = models.models_and_notes(args)
    for _, config in found:
        check_context(config, args.context or 1, "--context")
        layout.check(config, args.context or config.max_position_embeddings)
    rows, training, served = [], [], []
    for name, config in found:
        context = args.context or config.max_position_embeddings
        fixed = _model(name, config, context, layout, memory)
        sizes = _sizes(config, layout, context, memory, args.micro_batch_sizes)
        rows += [{**fixed, **size} for size in sizes]
        cells = {str(size["micro_batch_size"]): _verdict(size["margin_bytes"]) for size in sizes}
        training.append({**fixed, **cells})
        served.append(fixed)
    head = [Column("model", "model")]
    context = served[0]["context"]
    title = f"{gpu.name}, {memory / GIB:.1f} GiB to plan with"
    sections = [
        Section(
            f"Training, {title}, {context} tokens, {args.dtype}: GiB left, or missing, by micro batch",
            training,
            [
                *head,
                Column("fixed_bytes", "weights and states", _gib),
                *(Column(str(size), str(size)) for size in args.micro_batch_sizes),
                Column("largest_micro_batch_size", "largest that fits", ","),
            ],
        ),
        Section(
            f"Serving, {title}, {context} tokens, {args.dtype} weights and cache",
            served,
            [
                *head,
                Column("serving_weights_bytes", "weights, GiB", _gib),
                Column("kv_cache_bytes_per_token", "cache bytes per token", ","),
                Column("cache_bytes_per_sequence", "MiB per sequence", lambda value: f"{value / 2**20:.1f}"),
                Column("concurrent_sequences", "sequences at once", ","),
                Column("sequences_over_qkv", "x qkv", ".2f"),
            ],
        ),
        Section(
            "Cost in perplexity",
            served,
            [
                *head,
                Column("paper_perplexity", "paper's (padded)", ".3f"),
                Column("paper_change", "paper's change", "+.1%"),
                Column("our_change", "our change (packed)", "+.1%"),
            ],
        ),
    ]
    notes = [
        *notes,
        f"planned with {args.memory_fraction:.0%} of the memory (--memory-fraction); not modelled: "
        + "; ".join(NOT_MODELLED),
        "serving counts weights and cache only: activations and workspace come from the share that is left",
        *quality.notes({quality.paper_size(config) for _, config in found}),
    ]
    write_sections(rows, sections, args, notes)


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"


def _verdict(margin: int) -> str:
    if margin >= 0:
        return f"fits, {margin / GIB:.1f} left"
    return f"no, {-margin / GIB:.1f} missing"


def _sizes(
    config: ModelConfig, layout: Layout, context: int, memory: int, micro_batches: Sequence[int]
) -> list[dict[str, Any]]:
    found = []
    for size in micro_batches:
        needed = layout.training_bytes(config, context, size)["total"]
        found.append(
            {
                "micro_batch_size": size,
                "training_bytes": needed,
                "fits": needed <= memory,
                "margin_bytes": memory - needed,
            }
        )
    return found


def _model(name: str, config: ModelConfig, context: int, layout: Layout, memory: int) -> dict[str, Any]:
    counts = layout.training_bytes(config, context, 1)
    held = serving(config, memory=memory, context=context, dtype=layout.dtype, tensor=layout.tensor)
    plain = config.replace(attention_variant="qkv", num_query_groups=config.num_attention_heads)
    base = serving(plain, memory=memory, context=context, dtype=layout.dtype, tensor=layout.tensor)
    paper = quality.paper_figure(config)
    return {
        "model": name,
        "variant": config.attention_variant,
        "num_query_groups": config.num_query_groups,
        "context": context,
        "dtype": layout.dtype,
        "available_bytes": memory,
        "fixed_bytes": counts["weights"] + counts["gradients"] + counts["optimizer"],
        "largest_micro_batch_size": largest_micro_batch(config, layout, context, memory),
        "serving_weights_bytes": held.weights,
        "kv_cache_bytes_per_token": held.per_token,
        "cache_bytes_per_sequence": held.per_sequence,
        "concurrent_sequences": held.sequences,
        "sequences_over_qkv": held.sequences / base.sequences if base.sequences else None,
        "paper_size": paper.size if paper else None,
        "paper_perplexity": paper.perplexity if paper else None,
        "paper_change": paper.change if paper else None,
        "our_change": quality.our_change(config),
    }
