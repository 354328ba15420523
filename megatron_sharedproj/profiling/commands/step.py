"""Where the time of a training step goes: the trainer's own steps, by its own flags.

    profile.py step RUN                        the flags of a run folder
    profile.py step --steps 5 -- [flags]       the flags of python -m megatron_sharedproj.pretrain

Alone, or under torchrun (rank 0 reports). Weights are random; nothing is saved, loaded or logged, and no
run folder is written to. --mock-data needs no data set.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from megatron_sharedproj.command_line import positive_float, positive_int
from megatron_sharedproj.profiling.tables import Column, Section, add_output_arguments, write_sections

_PARTS = (
    Column("part", "part"),
    Column("forward_ms", "forward ms", ".2f"),
    Column("backward_ms", "backward ms", ".2f"),
    Column("ms", "ms", ".2f"),
    Column("percent", "%", ".1f"),
    Column("products_ms", "in matrix products", ".2f"),
)
_HOST = Column("host_ms", "host ms", ".2f")
_OPERATORS = (
    Column("operator", "operator"),
    Column("ms", "ms", ".2f"),
    Column("percent", "%", ".1f"),
    Column("calls", "calls", ".0f"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-command's flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "run_or_flags", nargs="*", metavar="RUN | -- FLAGS", help="a run folder, or the trainer's flags"
    )
    how = parser.add_argument_group("measurement")
    how.add_argument("--steps", type=positive_int, default=5, metavar="N", help="profiled (default 5)")
    how.add_argument("--warm-up", type=positive_int, default=3, metavar="N", help="steps before (default 3)")
    how.add_argument(
        "--peak-tflops", type=positive_float, metavar="X",
        help="of one process, for MFU (default: the GPU's data sheet; a CPU's measured matrix product)",
    )  # fmt: skip
    how.add_argument("--top", type=positive_int, default=12, metavar="N", help="operators shown (default 12)")
    made = parser.add_argument_group("files")
    made.add_argument("--trace", type=Path, metavar="JSON", help="Chrome trace (chrome://tracing, Perfetto)")
    made.add_argument("--save-profile", type=Path, metavar="JSON", help="all figures, for compare")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Profile, print and write. Raises ValueError for a mistake in the flags."""
    from megatron_sharedproj import distributed
    from megatron_sharedproj.config import write_json
    from megatron_sharedproj.profiling import step_profile
    from megatron_sharedproj.quiet import quiet_libraries

    for flag, path in (("--trace", args.trace), ("--save-profile", args.save_profile)):
        _check_file(flag, path)
    if not args.run_or_flags:
        raise ValueError("RUN: give a run folder, or -- and the trainer's flags (--mock-data needs no data)")
    quiet_libraries()
    taken = args.warm_up + 2 * args.steps + 2
    training = step_profile.training_arguments(args.run_or_flags, taken)
    with step_profile.trainer_of(training) as trainer:
        profile = step_profile.profile_steps(
            trainer,
            steps=args.steps,
            warm_up=args.warm_up,
            trace=args.trace,
            peak=args.peak_tflops and args.peak_tflops * 1e12,
            progress=_progress,
        )
        if not distributed.is_rank_0():
            return
    if args.save_profile:
        write_json(args.save_profile, profile)
    _show(profile, args)


def _check_file(flag: str, path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder; give a file")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: {path.parent} is not a folder; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot be written; give another place")


def _progress(text: str) -> None:
    from megatron_sharedproj import distributed

    if distributed.is_rank_0():
        print(f"{text} ...", file=sys.stderr, flush=True)


def _show(profile: dict[str, Any], args: argparse.Namespace) -> None:
    step = statistics.fmean(profile["profiled_step_ms"])
    operators = [{**row, "percent": 100 * row["ms"] / step} for row in profile["operators"][: args.top]]
    # A part that a model does not have, or that takes no time here, is left to CSV and JSON.
    parts = [row for row in profile["parts"] if abs(row["percent"]) >= 0.05]
    on_gpu = profile["peak_memory_bytes"] is not None
    notes = notes_of(profile)
    sections = [
        Section("one training step, the profiler on", parts, (*_PARTS, _HOST) if on_gpu else _PARTS),
        Section("operators, by their own time", operators, _OPERATORS),
    ]
    rows = [{"section": "part", **row} for row in profile["parts"]]
    rows += [{"section": "operator", "part": None, **row} for row in operators]
    write_sections(rows, sections, args, notes)


def notes_of(profile: dict[str, Any]) -> list[str]:
    """What a profile's figures are, in lines."""
    plain, profiled = profile["tokens_per_second"], profile["tokens_per_second_profiled"]
    model, ranks = profile["model"], profile["ranks"]
    spread = profile["step_ms"]
    notes = [
        f"{profile['device']}, {profile['processes']} process(es) with {profile['threads']} thread(s), "
        f"torch {profile['torch']}, {profile['dtype']}, {profile['date'][:10]}, commit "
        f"{profile['commit'] or 'unknown'}",
        f"{model['attention_variant']}, {model['num_query_groups']} groups: {profile['parameters']:,} "
        f"parameters, sequences of {profile['seq_length']}, micro batch {profile['micro_batch_size']}, "
        f"global batch {profile['global_batch_size']}",
        f"{plain:,.0f} tokens/s without the profiler (median of {len(spread)} steps, "
        f"{min(spread):.1f} to {max(spread):.1f} ms), {profiled:,.0f} with it: its overhead is "
        f"{100 * (plain / profiled - 1):.1f}%",
        f"{profile['flops_per_second_per_process'] / 1e12:.4g} TFLOP/s per process, MFU "
        f"{100 * profile['mfu']:.1f}% of {profile['peak_flops'] / 1e12:.4g} TFLOP/s "
        f"({profile['peak_is']}); FLOPs: 6 per multiply-accumulate of the forward pass, causal scores only",
    ]
    if len(ranks) > 1:
        slow = max(range(len(ranks)), key=lambda rank: ranks[rank]["busy_ms"])
        fast = min(range(len(ranks)), key=lambda rank: ranks[rank]["busy_ms"])
        notes.append(
            f"ranks: the slowest is {slow} ({ranks[slow]['busy_ms']:.1f} ms of a step outside gradient "
            f"communication), the fastest {fast} ({ranks[fast]['busy_ms']:.1f} ms); the table is rank 0's"
        )
    if profile["peak_memory_bytes"] is not None:
        notes.append(f"peak memory allocated: {profile['peak_memory_bytes'] / 2**30:.2f} GiB")
        notes.append("times are those of kernels; idle: no kernel ran, or several at once where negative")
    return notes
