"""How the layers of a model lie on pipeline stages, what is recomputed, and which layouts are refused."""

from __future__ import annotations

from megatron_sharedproj.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sharedproj.formulas_memory import check_stages, training_memory_bytes

GRANULARITIES = ("selective", "full")
METHODS = ("uniform", "block")


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def layers_per_stage(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Layers of each pipeline stage.

    Raises:
        ValueError: if the layers do not divide over the stages.
    """
    check_stages(model, parallel.pipeline_model_parallel_size)
    return model.num_layers // parallel.pipeline_model_parallel_size


def resolve_layout(
    config: RunConfig, layers_per_virtual_stage: int | None, recompute_activations: bool
) -> None:
    """Turn Megatron-LM's two spellings of a layout into one, in place.

    Args:
        layers_per_virtual_stage: ``--num-layers-per-virtual-pipeline-stage``.
        recompute_activations: ``--recompute-activations``.
    Raises:
        ValueError: where they contradict the other flags.
    """
    parallel = config.parallel
    if recompute_activations:
        if parallel.recompute_granularity not in ("", "selective"):
            raise ValueError(
                "--recompute-activations: means --recompute-granularity selective, and "
                f"{parallel.recompute_granularity} is given too; give one"
            )
        parallel.recompute_granularity = "selective"
    if parallel.recompute_granularity == "full":
        parallel.recompute_method = parallel.recompute_method or "uniform"
        parallel.recompute_num_layers = parallel.recompute_num_layers or 1
    if layers_per_virtual_stage is None:
        return
    flag = f"--num-layers-per-virtual-pipeline-stage {layers_per_virtual_stage}"
    if parallel.num_virtual_stages_per_pipeline_rank != 1:
        raise ValueError(f"{flag}: --num-virtual-stages-per-pipeline-rank is given too; give one")
    layers = layers_per_stage(config.model, parallel)
    if layers_per_virtual_stage < 1 or layers % layers_per_virtual_stage:
        raise ValueError(
            f"{flag}: must divide the {layers} layers of a pipeline stage; use one of {_divisors(layers)}"
        )
    parallel.num_virtual_stages_per_pipeline_rank = layers // layers_per_virtual_stage


def describe_layout(parallel: ParallelConfig) -> str:
    """The layout in words, for the log."""
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    parts = [
        f"tensor parallel {parallel.tensor_model_parallel_size}"
        + (" with sequence parallel" if parallel.sequence_parallel else "")
    ]
    if parallel.pipeline_model_parallel_size > 1:
        schedule = f"interleaved, {chunks} chunks each" if chunks > 1 else "1F1B"
        parts.append(f"pipeline parallel {parallel.pipeline_model_parallel_size} ({schedule})")
    if parallel.context_parallel_size > 1:
        parts.append(f"context parallel {parallel.context_parallel_size}")
    return ", ".join(parts)


def recompute_note(config: RunConfig, *, fused: bool) -> str:
    """What recompute saves of a rank's activations, counted, in words; empty without recompute."""
    parallel, train = config.parallel, config.train
    if not parallel.recompute_granularity:
        return ""
    kept, all_of_it = (
        training_memory_bytes(
            config.model, parallel, seq_length=train.seq_length, micro_batch_size=train.micro_batch_size,
            low_precision=train.bf16 or train.fp16, fused=fused, recompute=recompute,
        )["activations"]
        for recompute in (parallel.recompute_granularity, "none")
    )  # fmt: skip
    saved = (all_of_it - kept) / all_of_it
    note = f"recompute {parallel.recompute_granularity}: keeps {100 * saved:.1f}% less of the activations"
    if parallel.recompute_granularity == "selective" and saved < 0.02:
        note += (
            "; attention keeps a log-sum-exp and no scores: there is next to nothing to compute again "
            "(drop the flag, or use --recompute-granularity full)"
        )
    return note


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check pipeline, context parallelism and recompute.

    Raises:
        ValueError: naming the flag, the value and what would work.
    """
    layers, stages = layers_per_stage(model, parallel), parallel.pipeline_model_parallel_size
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    flag = f"--num-virtual-stages-per-pipeline-rank {chunks}"
    if chunks < 1 or layers % chunks:
        raise ValueError(
            f"{flag}: must divide the {layers} layers of a pipeline stage; use one of {_divisors(layers)}"
        )
    if chunks > 1 and stages == 1:
        raise ValueError(f"{flag}: needs --pipeline-model-parallel-size of at least 2")
    if parallel.context_parallel_size < 1:
        raise ValueError(f"--context-parallel-size {parallel.context_parallel_size}: must be at least 1")
    _check_recompute(layers // chunks, parallel)


def _check_recompute(layers: int, parallel: ParallelConfig) -> None:
    granularity, method = parallel.recompute_granularity, parallel.recompute_method
    count = parallel.recompute_num_layers
    if granularity not in ("", *GRANULARITIES):
        raise ValueError(f"--recompute-granularity {granularity}: choose {' or '.join(GRANULARITIES)}")
    if granularity != "full":
        for name, value in (("method", method), ("num-layers", count)):
            if value:
                raise ValueError(f"--recompute-{name} {value}: needs --recompute-granularity full")
        return
    if method not in METHODS:
        raise ValueError(f"--recompute-method {method}: choose {' or '.join(METHODS)}")
    if not 1 <= count <= layers:
        raise ValueError(
            f"--recompute-num-layers {count}: must be from 1 to the {layers} layers of a model chunk"
        )
    if method == "uniform" and layers % count:  # Megatron-Core reaches past the last layer then
        raise ValueError(
            f"--recompute-num-layers {count}: with --recompute-method uniform must divide the {layers} "
            f"layers of a model chunk; use one of {_divisors(layers)}, or block"
        )


def check_sequence_length(length: int, parallel: ParallelConfig) -> None:
    """Check that a sequence divides over the context-parallel and sequence-parallel ranks.

    Raises:
        ValueError: naming the flag, the value and what would work.
    """
    tp, ranks = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    flag = f"--context-parallel-size {ranks}"
    if ranks > 1 and length % (2 * ranks):
        raise ValueError(
            f"--seq-length {length}: must be divisible by {2 * ranks}, two chunks for each rank of {flag}"
        )
    if parallel.sequence_parallel and length // ranks % tp:
        with_context = f" x {ranks} ({flag})" if ranks > 1 else ""
        raise ValueError(
            f"--seq-length {length}: must be divisible by {tp}{with_context} with --sequence-parallel"
        )


def check_sequence(config: RunConfig) -> None:
    """:func:`check_sequence_length` of a run, and that no mask of its data needs whole sequences."""
    check_sequence_length(config.train.seq_length, config.parallel)
    ranks = config.parallel.context_parallel_size
    if ranks > 1 and config.data.reset_attention_mask:
        raise ValueError(
            f"--context-parallel-size {ranks}: not with --reset-attention-mask, whose documents end anywhere "
            "in a sequence; use 1, or drop it"
        )


def check_micro_batches(parallel: ParallelConfig, micro_batches: int) -> None:
    """Check that the interleaved schedule can run so many micro batches per step.

    Raises:
        ValueError: naming the flag, the value and what would work.
    """
    chunks, stages = parallel.num_virtual_stages_per_pipeline_rank, parallel.pipeline_model_parallel_size
    if chunks > 1 and micro_batches % stages:
        raise ValueError(
            f"--num-virtual-stages-per-pipeline-rank {chunks}: the interleaved schedule needs a multiple of "
            f"--pipeline-model-parallel-size {stages} micro batches per step, not {micro_batches}; change "
            "--global-batch-size or --micro-batch-size, or use 1"
        )
