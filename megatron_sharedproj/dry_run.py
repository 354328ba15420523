"""``--simulate-world-size``: what a run on so many GPUs would be, without them, data or a tokenizer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_sharedproj.arguments import run_config
from megatron_sharedproj.config import RunConfig
from megatron_sharedproj.matching import describe_match
from megatron_sharedproj.profiling import run_plan
from megatron_sharedproj.profiling.hardware import GIB, Gpu, find_gpu
from megatron_sharedproj.profiling.tables import Column, Section, check_output, write_sections


def planned(args: argparse.Namespace) -> tuple[RunConfig, int, Gpu]:
    """The run that the flags describe, its number of processes and their GPU.

    Raises:
        ValueError: naming the flag, its value and what would work.
    """
    world = args.simulate_world_size
    if world < 1:
        raise ValueError(f"--simulate-world-size {world}: must be at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--simulate-world-size {world}: runs in one process; start it without torchrun")
    if not 0 < args.simulate_mfu <= 1:
        raise ValueError(f"--simulate-mfu {args.simulate_mfu}: must be above 0 and at most 1")
    try:
        gpu = find_gpu(args.simulate_gpu)
    except ValueError as error:
        known = str(error).partition("; for others")[0]
        raise ValueError(known.replace("--gpu", "--simulate-gpu", 1)) from None
    return run_config(args, _vocab_size(args), world), world, gpu


def _vocab_size(args: argparse.Namespace) -> int:
    if args.vocab_size:
        return int(args.vocab_size)
    if not (args.tokenizer_model or args.vocab_file):
        raise ValueError(
            f"--simulate-world-size {args.simulate_world_size}: needs --vocab-size N, or a tokenizer's flags"
        )
    from megatron_sharedproj.data.tokenizers import build_tokenizer

    files = (args.tokenizer_model or None, args.vocab_file or None, args.merge_file or None)
    return build_tokenizer(args.tokenizer_type, *files, None).vocab_size


def dry_run(args: argparse.Namespace, *, build: bool) -> None:
    """Print the plan of a run, or write it to ``--simulate-output``.

    Args:
        build: also build the shards of the first rank and of the last pipeline stage, and count what their
            step sends; else formulas only.
    Raises:
        ValueError: naming the flag, its value and what would work.
    """
    path = Path(args.simulate_output) if args.simulate_output else None
    output = argparse.Namespace(format=None, output=path)
    try:
        check_output(output)
    except ValueError as error:
        raise ValueError(str(error).replace("--output", "--simulate-output", 1)) from None
    config, world, gpu = planned(args)
    rows = run_plan.plan(config, world, gpu, args.simulate_mfu)
    sections = run_plan.sections(rows)
    if build:
        rows, counted = _built(config, world, rows)
        sections += counted
    notes = run_plan.notes(rows)
    if config.train.match_parameters_of:
        train = config.train
        notes.insert(0, describe_match(config.model, train.match_parameters_of, train.width_before_match))
    write_sections(rows, sections, output, notes)


def _built(
    config: RunConfig, world: int, rows: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[Section]]:
    """The rows with what a simulation counted, and its tables."""
    from megatron_sharedproj.training.simulation import simulate

    found, calls = [], []
    for row, rank in zip(rows, simulate(config, world), strict=True):
        kinds = [
            {
                "purpose": c.purpose, "kind": c.kind, "ranks": c.ranks, "calls": c.calls,
                "tensor_bytes": c.tensor_bytes, "sent_bytes": c.sent_bytes,
            }
            for c in rank.collectives
        ]  # fmt: skip
        counted = {f"counted_{part}_bytes": rank.sent_bytes(part) for part in run_plan.SENT[:-1]}
        counted["counted_total_bytes"] = rank.sent_bytes()
        found.append(
            {**row, "rank": rank.rank, "built_parameters": rank.parameters, **counted, "collectives": kinds}
        )
        calls += [{"rank": rank.rank, **kind} for kind in kinds]
    gib = _gib
    return found, [
        Section(
            "Built on meta tensors over Megatron-Core's groups: counted, and by the formulas above",
            found,
            [
                Column("rank", "rank"),
                Column("built_parameters", "parameters built", ","),
                Column("rank_parameters", "by formula", ","),
                Column("counted_total_bytes", "sent in a step, counted", gib),
                Column("sent_total_bytes", "by formula", gib),
            ],
        ),
        Section(
            "Collectives of a step",
            calls,
            [
                Column("rank", "rank"),
                Column("purpose", "purpose", lambda text: text.replace("_", " ")),
                Column("kind", "collective"),
                Column("ranks", "ranks"),
                Column("calls", "calls", ","),
                Column("tensor_bytes", "tensors, GiB", gib),
                Column("sent_bytes", "sent, GiB", gib),
            ],
        ),
    ]


def _gib(value: float) -> str:
    return f"{value / GIB:.3f}"
