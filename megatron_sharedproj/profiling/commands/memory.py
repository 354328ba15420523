"""What a training run needs per GPU, by component, and what a step sends; measured beside it on a GPU.

    profile.py memory --model 300m --micro-batch-size 6
    profile.py memory --model 1b --attention-variant qkv,qk_eq_v --tensor-model-parallel-size 2 \\
        --sequence-parallel --data-parallel-size 4 --use-distributed-optimizer \\
        --recompute-granularity selective

Counts are of the rank that needs most. Where a GPU is present and the layout is one process, a trainer with
random weights and synthetic data takes two steps and its largest allocation is shown beside the count.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

from megatron_sharedproj.command_line import positive_int
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.formulas_memory import NOT_MODELLED, communication_bytes
from megatron_sharedproj.profiling.commands import layout as flags
from megatron_sharedproj.profiling.commands import models
from megatron_sharedproj.profiling.hardware import GIB
from megatron_sharedproj.profiling.planner import DTYPE_BYTES, Layout, check_context
from megatron_sharedproj.profiling.progress import ProgressBar
from megatron_sharedproj.profiling.tables import Column, add_output_arguments, check_output, write_rows

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary", "total")
_SENT = ("tensor_parallel", "context_parallel", "data_parallel", "parameter_gather", "pipeline")


def gib(value: float) -> str:
    """Bytes as GiB."""
    return f"{value / GIB:.3f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    run_flags = parser.add_argument_group("training step")
    run_flags.add_argument(
        "--seq-length", type=positive_int, metavar="N", help="tokens in a sequence (default: all positions)"
    )
    run_flags.add_argument(
        "--micro-batch-size", type=positive_int, default=1, metavar="N", help="sequences (default 1)"
    )
    run_flags.add_argument(
        "--micro-batches",
        type=positive_int,
        default=1,
        metavar="N",
        help="micro batches that a rank accumulates in a step (default 1)",
    )
    run_flags.add_argument("--no-run", action="store_true", help="count only, on a GPU too")
    flags.add_layout_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print or write one row per model.

    Raises:
        ValueError: naming the flag, its value and what would work.
    """
    check_output(args)
    found, notes = models.models_and_notes(args)
    layout = flags.layout_from(args)
    for _, config in found:
        check_context(config, args.seq_length or 1, "--seq-length")
        layout.check(config, args.seq_length or config.max_position_embeddings)
    why_not = _not_measured(args, layout)
    rows = []
    progress = ProgressBar(len(found))
    for index, (name, config) in enumerate(found):
        row = _row(name, config, layout, args)
        if not why_not:
            progress.show(index, f"two steps of {name}")
            row["measured_peak_bytes"] = measured_peak(
                config, layout, row["seq_length"], args.micro_batch_size
            )
            row["counted_over_measured"] = row["total_bytes"] / row["measured_peak_bytes"]
        rows.append(row)
    progress.clear()
    columns = [Column("model", "model"), *(Column(f"{part}_bytes", part, gib) for part in COMPONENTS)]
    if not why_not:
        columns += [
            Column("measured_peak_bytes", "measured", gib),
            Column("counted_over_measured", "counted / measured", ".3f"),
        ]
    if any(row["sent_bytes"] for row in rows):
        columns.append(Column("sent_bytes", "sent per step", gib))
    first = rows[0]
    notes = [
        f"GiB per GPU, {args.dtype}, {args.micro_batch_size} x {first['seq_length']} tokens"
        + (f", recompute {args.recompute_granularity}" if args.recompute_granularity != "none" else ""),
        *notes,
        f"not modelled: {'; '.join(NOT_MODELLED)}",
        why_not or "measured: torch.cuda.max_memory_allocated over a trainer's second step, on this GPU",
    ]
    write_rows(rows, columns, args, notes)


def _not_measured(args: argparse.Namespace, layout: Layout) -> str:
    """Why no peak is measured; empty where one is."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU: not measured"
    if args.no_run:
        return "not measured: --no-run"
    if layout.ranks > 1:
        return "not measured: one process cannot run this layout"
    return ""


def _row(name: str, config: ModelConfig, layout: Layout, args: argparse.Namespace) -> dict[str, Any]:
    seq_length = args.seq_length or config.max_position_embeddings
    counts = layout.training_bytes(config, seq_length, args.micro_batch_size)
    sent = max(
        (
            communication_bytes(
                config,
                layout.parallel,
                seq_length=seq_length,
                micro_batch_size=args.micro_batch_size,
                micro_batches=args.micro_batches,
                data_parallel_size=layout.data,
                low_precision=DTYPE_BYTES[layout.dtype] == 2,
                pipeline_stage=stage,
            )
            for stage in range(layout.pipeline)
        ),
        key=lambda counts: counts["total"],
    )
    return {
        "model": name,
        "variant": config.attention_variant,
        "num_query_groups": config.num_query_groups,
        "seq_length": seq_length,
        "micro_batch_size": args.micro_batch_size,
        "dtype": layout.dtype,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "data_parallel_size": layout.data,
        "num_virtual_stages_per_pipeline_rank": layout.chunks,
        "recompute": layout.recompute,
        **{f"{part}_bytes": counts[part] for part in COMPONENTS},
        **{f"sent_{part}_bytes": sent[part] for part in _SENT},
        "sent_bytes": sent["total"],
        "measured_peak_bytes": None,
        "counted_over_measured": None,
    }


def measured_peak(config: ModelConfig, layout: Layout, seq_length: int, micro_batch: int) -> int:
    """Bytes of torch.cuda.max_memory_allocated over the second step of a real trainer (a GPU only)."""
    import torch

    with trainer_of_shape(config, layout, seq_length, micro_batch) as trainer:
        iterator = trainer._iterator(trainer.train_data, 0)
        trainer.step(iterator)  # Adam's state is made here
        torch.cuda.reset_peak_memory_stats()
        trainer.step(iterator)
        peak = torch.cuda.max_memory_allocated()
        del iterator
    del trainer
    gc.collect()  # Megatron's modules and hooks refer to each other: the next model's peak would count them
    torch.cuda.empty_cache()
    return peak


def trainer_of_shape(config: ModelConfig, layout: Layout, seq_length: int, micro_batch: int) -> Any:
    """A context manager with a Trainer of a model in one process: random weights, synthetic data."""
    from megatron_sharedproj.config import DataConfig, LogConfig, RunConfig, TrainConfig
    from megatron_sharedproj.profiling.step_profile import arguments_of, trainer_of

    train = TrainConfig(
        seq_length=seq_length,
        micro_batch_size=micro_batch,
        global_batch_size=2 * micro_batch,
        train_iters=2,
        eval_iters=0,
        lr=1e-4,
        bf16=layout.dtype == "bf16",
        fp16=layout.dtype == "fp16",
    )
    data = DataConfig(
        mock_data=True, tokenizer_type="NullTokenizer", vocab_size=config.padded_vocab_size - 1, num_workers=0
    )
    run = RunConfig(config, parallel=layout.parallel, train=train, data=data, log=LogConfig(log_interval=10))
    return trainer_of(arguments_of(run))
