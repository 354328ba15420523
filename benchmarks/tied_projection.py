#!/usr/bin/env python3
"""Fewer key/value heads than tensor-parallel ranks (MQA): a copy on each rank against gathering the rows.

gathered    the rows of the projection are cut without regard to heads; every rank gathers its output and
            keeps its part (Megatron-Core's way, and this package's with Transformer Engine)
replicated  a rank has its query heads and a copy of its group's keys and values, whose gradient is summed
Both run the same model with the same data in one launch of processes over gloo, in turn, first one then the
other; a round is a turn of each, and what is printed is the median of the rounds' ratios. A time is that of
the slowest rank. Bytes are counted by formula for a ring over NCCL, for the presets on 8 GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj import formulas, formulas_memory
from megatron_sharedproj.command_line import Parser, list_of, positive_int, print_error
from megatron_sharedproj.config import PRESETS, ParallelConfig
from megatron_sharedproj.experiments.jobs import torchrun
from megatron_sharedproj.profiling.attention_results import commit
from megatron_sharedproj.profiling.tables import Column, add_output_arguments, check_output, write_rows

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = """
example:
  python benchmarks/tied_projection.py --output tied_projection.csv
  python benchmarks/tied_projection.py --ranks 2 --rounds 5 --launches 1
  python benchmarks/tied_projection.py --bytes
"""
# name -> variant, groups; measured where the groups are fewer than the ranks.
MODELS = {"MQA": ("qkv", 1), "Q-MQA": ("qk_eq_v", 1), "GQA-2": ("qkv", 2), "Q-GQA-2": ("qk_eq_v", 2)}
# What is timed -> rounds of it in one of --rounds.
CALLS = {"projection": 4, "step": 1, "decoding": 20}
WAYS = ("gathered", "replicated")
TIMES = (
    Column("model", "model"),
    Column("ranks", "TP"),
    Column("what", "what"),
    Column("gathered_ms", "gathered, ms", ".2f"),
    Column("replicated_ms", "replicated, ms", ".2f"),
    Column("speedup", "gathered / replicated", ".2f"),
    Column("speedup_p10", "p10", ".2f"),
    Column("speedup_p90", "p90", ".2f"),
    Column("launch_speedups", "median of each launch"),
    Column("rounds", "rounds"),
    Column("gathered_saved_bytes", "autograd keeps, gathered, bytes", ","),
    Column("replicated_saved_bytes", "replicated, bytes", ","),
)
_MIB = 2**20
BYTES = (
    Column("preset", "preset"),
    Column("model", "model"),
    Column("ranks", "TP"),
    Column("layer_gathered", "a layer and micro batch, gathered, MiB", ".2f"),
    Column("layer_replicated", "replicated, MiB", ".2f"),
    Column("step_gathered", "a step's tensor parallelism, gathered, GiB", ".1f"),
    Column("step_replicated", "replicated, GiB", ".1f"),
    Column("less", "less", ".0%"),
    Column("kept_gathered", "projection and output kept, a layer, gathered, MiB", ".1f"),
    Column("kept_replicated", "replicated, MiB", ".1f"),
    Column("more_parameters", "parameters of a rank more", ","),
)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--bytes", action="store_true", help="count, measure nothing")
    shape = parser.add_argument_group("shape")
    shape.add_argument(
        "--models", type=list_of(str, tuple(MODELS)), default=tuple(MODELS), metavar="NAME,NAME",
        help=f"default: {','.join(MODELS)}",
    )  # fmt: skip
    shape.add_argument(
        "--ranks", type=list_of(positive_int), default=(2, 4), metavar="N,N", help="default 2,4"
    )
    shape.add_argument("--num-layers", type=positive_int, default=2, help="default 2")
    shape.add_argument("--hidden-size", type=positive_int, default=512, help="default 512")
    shape.add_argument("--num-attention-heads", type=positive_int, default=8, help="default 8")
    shape.add_argument("--seq-length", type=positive_int, default=256, help="default 256")
    shape.add_argument("--micro-batch-size", type=positive_int, default=2, help="default 2")
    how = parser.add_argument_group("measurement")
    how.add_argument("--rounds", type=positive_int, default=15, help="of a launch, for steps (default 15)")
    how.add_argument("--launches", type=positive_int, default=3, help="of the processes (default 3)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    add_output_arguments(parser)
    return parser


# --- in the processes ---------------------------------------------------------------------------------


def gathered_linear() -> type:
    """The projection whose rows are cut without regard to heads."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megatron_sharedproj.layers.projection import SharedProjectionMixin

    class GatheredLinear(SharedProjectionMixin, ColumnParallelLinear):
        pass

    return GatheredLinear


def build_trainer_of(way: str, model: str, args: argparse.Namespace, ranks: int) -> Any:
    from megatron_sharedproj import distributed
    from megatron_sharedproj.arguments import build_parser as trainer_parser
    from megatron_sharedproj.layers import specs
    from megatron_sharedproj.pretrain import build_trainer, prepare

    variant, groups = MODELS[model]
    line = (
        f"--attention-variant {variant} --group-query-attention --num-query-groups {groups} --mock-data "
        "--tokenizer-type NullTokenizer --vocab-size 2047 --lr 1e-4 --train-iters 100000 --eval-iters 0 "
        "--num-workers 0 --log-interval 1000000 --attention-dropout 0 --hidden-dropout 0 "
        f"--num-layers {args.num_layers} --hidden-size {args.hidden_size} "
        f"--num-attention-heads {args.num_attention_heads} --seq-length {args.seq_length} "
        f"--max-position-embeddings {args.seq_length} --micro-batch-size {args.micro_batch_size} "
        f"--global-batch-size {args.micro_batch_size} --tensor-model-parallel-size {ranks}"
    )
    linear = gathered_linear() if way == "gathered" else specs.SharedProjectionLinear
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(specs, "SharedProjectionLinear", linear),
    ):
        prepared = prepare(trainer_parser().parse_args(line.split()))
        distributed.seed_all(prepared[0].train.seed)
        return build_trainer(*prepared)


def calls_of(trainer: Any, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed: CALLS by name."""
    import torch

    attention = trainer.bare_model.decoder.layers[0].self_attention
    shape = (args.seq_length, args.micro_batch_size, args.hidden_size)
    hidden, token = torch.randn(shape, requires_grad=True), torch.randn(1, *shape[1:])
    iterator = trainer._iterator(trainer.train_data, 0)

    def projection() -> None:
        tensors = list({id(t): t for t in attention.get_query_key_value_tensors(hidden)}.values())
        torch.autograd.backward(tensors, [torch.ones_like(t) for t in tensors])

    def decoding() -> None:
        with torch.no_grad():
            attention.get_query_key_value_tensors(token)

    return {"projection": projection, "step": lambda: trainer.step(iterator), "decoding": decoding}


def seconds(call: Callable[[], Any]) -> float:
    """Time of a call that all ranks make, on the slowest."""
    import torch.distributed

    torch.distributed.barrier()
    start = time.perf_counter()
    call()
    taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    torch.distributed.all_reduce(taken, op=torch.distributed.ReduceOp.MAX)
    return taken.item()


def saved_bytes(trainer: Any, args: argparse.Namespace) -> int:
    """Bytes that autograd keeps alive of one layer's attention projection, weights aside."""
    import torch

    attention = trainer.bare_model.decoder.layers[0].self_attention
    kept: list[Any] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(weakref.ref(tensor))
        return tensor

    hidden = torch.randn(args.seq_length, args.micro_batch_size, args.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = attention(hidden, None)
    weights = {p.untyped_storage().data_ptr() for p in attention.parameters()}
    alive = [tensor for reference in kept if (tensor := reference()) is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    del output
    return sum(size for place, size in storages.items() if place not in weights)


def work(args: argparse.Namespace) -> None:
    """One launch: every model, both ways in turn."""
    import torch

    from megatron_sharedproj import distributed
    from megatron_sharedproj.device import get_device
    from megatron_sharedproj.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    distributed.initialize(get_device(), tensor_model_parallel_size=ranks)
    found = []
    for model in args.models:
        if MODELS[model][1] >= ranks:
            continue
        trainers = {way: build_trainer_of(way, model, args, ranks) for way in WAYS}
        calls = {way: calls_of(trainer, args) for way, trainer in trainers.items()}
        for what, often in CALLS.items():
            for way in WAYS:
                seconds(calls[way][what])
                seconds(calls[way][what])
            rounds = []
            for index in range(args.rounds * often):
                order = WAYS if index % 2 else WAYS[::-1]
                rounds.append({way: seconds(calls[way][what]) for way in order})
            saved = {way: saved_bytes(trainer, args) for way, trainer in trainers.items()}
            found.append({"model": model, "ranks": ranks, "what": what, "rounds": rounds, "saved": saved})
    losses = {way: trainer.last_loss for way, trainer in trainers.items()}
    assert abs(losses["gathered"] - losses["replicated"]) < 1e-3 * losses["gathered"], losses
    if torch.distributed.get_rank() == 0:
        args.worker.write_text(json.dumps(found))
    distributed.finalize()


# --- the rows -----------------------------------------------------------------------------------------


def measured_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each model, number of ranks and call, from all launches."""
    from megatron_sharedproj.profiling.timing import Machine, Times

    launches: dict[tuple[str, int, str], list[Any]] = {}
    for _ in range(args.launches):
        for ranks in args.ranks:
            for case in launch(args, ranks):
                launches.setdefault((case["model"], case["ranks"], case["what"]), []).append(case)
    rows = []
    for (model, ranks, what), cases in launches.items():
        rounds = [one for case in cases for one in case["rounds"]]
        speedups = Times.of([one["gathered"] / one["replicated"] for one in rounds])
        medians = [statistics.median(r["gathered"] / r["replicated"] for r in c["rounds"]) for c in cases]
        rows.append(
            {
                "model": model, "ranks": ranks, "what": what,
                **{f"{way}_ms": 1e3 * statistics.median(one[way] for one in rounds) for way in WAYS},
                "speedup": speedups.median, "speedup_p10": speedups.p10, "speedup_p90": speedups.p90,
                "launch_speedups": ", ".join(f"{median:.2f}" for median in medians),
                "rounds": len(rounds),
                **{f"{way}_saved_bytes": cases[0]["saved"][way] for way in WAYS},
                "num_layers": args.num_layers, "hidden_size": args.hidden_size,
                "num_attention_heads": args.num_attention_heads, "seq_length": args.seq_length,
                "micro_batch_size": args.micro_batch_size, "device": Machine().name,
                "cores": os.cpu_count(), "commit": commit(ROOT), "date": datetime.now(UTC).date().isoformat(),
            }
        )  # fmt: skip
    return rows


def launch(args: argparse.Namespace, ranks: int) -> list[dict[str, Any]]:
    """What one launch of the processes found. Raises ValueError with the last lines of one that failed."""
    flags = {
        name: getattr(args, name)
        for name in (
            "num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "rounds",
        )
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [*torchrun(ranks, str(Path(__file__).resolve())), "--worker", str(output)]
        command += ["--models", ",".join(args.models)]
        for name, value in flags.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            raise ValueError(f"--ranks {ranks}: {lines[0] if lines else done.stderr[-300:]}")
        return json.loads(output.read_text())


def counted_rows() -> list[dict[str, Any]]:
    """The presets at the paper's micro batches on 8 GPUs in bf16, with sequence parallelism."""
    rows = []
    for preset, micro, batch in (("300m", 6, 1152), ("1b", 2, 576)):
        for model, (variant, groups) in MODELS.items():
            for ranks in (2, 4, 8):
                if groups < ranks:
                    config = replace(PRESETS[preset], attention_variant=variant, num_query_groups=groups)
                    rows.append({"preset": preset, "model": model, **counted(config, ranks, micro, batch)})
    return rows


def counted(config: Any, ranks: int, micro: int, batch: int) -> dict[str, Any]:
    """Bytes of one rank: what each way sends and keeps."""
    replicas, length, width = 8 // ranks, config.max_position_embeddings, 2
    micro_batches = batch // (micro * replicas)
    parallel = ParallelConfig(
        tensor_model_parallel_size=ranks, sequence_parallel=True, use_distributed_optimizer=True
    )
    options = {"seq_length": length, "micro_batch_size": micro, "low_precision": True}
    sent = formulas_memory.communication_bytes(
        config, parallel, micro_batches=micro_batches, data_parallel_size=replicas, **options
    )["tensor_parallel"]
    rows, bias = formulas.projected_rows(config), int(config.add_bias_linear)
    keys = (len(config.variant.projections) - 1) * config.kv_channels
    own = config.num_attention_heads // ranks * config.kv_channels + keys
    tokens, d = length * micro, config.hidden_size
    # Gathered forward, scattered backward; and one all-reduce, which sends twice.
    halves = 2 * (ranks - 1) / ranks * width
    gathered, summed = halves * tokens * rows, halves * config.num_query_groups * keys * (d + bias)
    kept = tokens * (own + d // ranks) * width + own * d * width
    layers = config.num_layers * micro_batches
    return {
        "ranks": ranks,
        "layer_gathered": gathered / _MIB,
        "layer_replicated": summed / _MIB,
        "step_gathered": (sent + layers * (gathered - summed)) / 2**30,
        "step_replicated": sent / 2**30,
        "less": 1 - sent / (sent + layers * (gathered - summed)),
        "kept_gathered": tokens * (rows + d // ranks) * width / _MIB,
        "kept_replicated": kept / _MIB,
        "more_parameters": config.num_layers * (own - rows // ranks) * (d + bias),
    }


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake in the flags (one line), 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        if args.worker is not None:
            work(args)
        elif args.bytes:
            write_rows(counted_rows(), BYTES, args)
        else:
            check_output(args)
            few = min(MODELS[model][1] for model in args.models)
            if max(args.ranks) <= few:
                raise ValueError(f"--ranks {max(args.ranks)}: no model has fewer groups; use more ranks")
            write_rows(measured_rows(args), TIMES, args)
    except ValueError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
