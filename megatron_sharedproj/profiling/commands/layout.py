"""Flags that sub-commands share: the GPU, and how a training run is laid out over several."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_sharedproj.command_line import positive_float, positive_int
from megatron_sharedproj.formulas_memory import RECOMPUTE
from megatron_sharedproj.profiling.hardware import GIB, GPUS, Gpu, find_gpu
from megatron_sharedproj.profiling.planner import DTYPE_BYTES, Layout


def add_gpu_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add --gpu; returns the group, to which the figures of an unlisted GPU are added."""
    group = parser.add_argument_group("GPU")
    group.add_argument(
        "--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)}, or the name that its driver tells"
    )
    return group


def add_memory_arguments(group: Any) -> None:
    """Add --memory-gib and --memory-fraction."""
    group.add_argument(
        "--memory-gib", type=positive_float, metavar="GIB", help="memory of a GPU that is not listed"
    )
    group.add_argument(
        "--memory-fraction",
        type=positive_float,
        default=0.9,
        metavar="X",
        help="share of it to plan with; the rest is for what is not modelled (default 0.9)",
    )


def gpu_from(args: argparse.Namespace) -> Gpu | None:
    """The GPU of --gpu, changed by the figures that are given; None without any of them.

    Raises:
        ValueError: for an unknown name.
    """
    given = {
        "memory": _scaled(args, "memory_gib", GIB),
        "peak": _scaled(args, "peak_tflops", 1e12),
        "bandwidth": _scaled(args, "bandwidth_gbs", 1e9),
    }
    given = {name: value for name, value in given.items() if value is not None}
    known = find_gpu(args.gpu) if args.gpu else None
    if known is None and not given:
        return None
    fields = {"name": "given", **(vars(known) if known else {}), **given}
    if known and given:
        fields["name"] = f"{known.name}, changed"
    return Gpu(**fields)


def planned_memory(gpu: Gpu, fraction: float) -> int:
    """Bytes of a GPU to plan with. Raises ValueError for a fraction above 1, or a GPU without memory."""
    if fraction > 1:
        raise ValueError(f"--memory-fraction {fraction:g}: must be at most 1")
    if gpu.memory is None:
        raise ValueError("--gpu: give it, or --memory-gib")
    return int(gpu.memory * fraction)


def _scaled(args: argparse.Namespace, name: str, unit: float) -> Any:
    value = getattr(args, name, None)
    return None if value is None else int(value * unit) if name == "memory_gib" else value * unit


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :func:`layout_from`, with Megatron's names."""
    group = parser.add_argument_group("training layout")
    for name, text in (
        ("tensor", "ranks that share a layer's weights"),
        ("pipeline", "stages that the layers are divided into"),
    ):
        group.add_argument(
            f"--{name}-model-parallel-size", type=positive_int, default=1, metavar="N", help=text
        )
    group.add_argument(
        "--data-parallel-size", type=positive_int, default=1, metavar="N", help="replicas of the model"
    )
    group.add_argument(
        "--context-parallel-size",
        type=positive_int,
        default=1,
        metavar="N",
        help="ranks that share a sequence",
    )
    group.add_argument("--sequence-parallel", action="store_true", help="split norms and residuals as well")
    group.add_argument(
        "--use-distributed-optimizer", action="store_true", help="divide optimizer state over the replicas"
    )
    group.add_argument(
        "--recompute-granularity", choices=RECOMPUTE, default="none", help="of activations (default none)"
    )
    group.add_argument("--recompute-method", default="", metavar="NAME", help="of full: uniform or block")
    group.add_argument(
        "--recompute-num-layers",
        type=positive_int,
        default=0,
        metavar="N",
        help="layers in a unit, or of a stage",
    )
    group.add_argument(
        "--num-virtual-stages-per-pipeline-rank",
        type=positive_int,
        default=1,
        metavar="N",
        help="chunks of a stage; above 1: interleaved schedule",
    )
    group.add_argument("--dtype", choices=tuple(DTYPE_BYTES), default="bf16", help="default bf16")


def layout_from(args: argparse.Namespace) -> Layout:
    """The layout that the flags give; Layout.check tells whether a model divides so."""
    full = args.recompute_granularity == "full"
    return Layout(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        data=args.data_parallel_size,
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
        dtype=args.dtype,
        recompute=args.recompute_granularity,
        context=args.context_parallel_size,
        chunks=args.num_virtual_stages_per_pipeline_rank,
        recompute_method=args.recompute_method or ("uniform" if full else ""),
        recompute_num_layers=args.recompute_num_layers or int(full),
    )
