#!/usr/bin/env python3
"""What each --kv-rotary costs in perplexity: small Llama-shaped models on real text, the same seeds and data.

Every model has the same shape (RMSNorm, SwiGLU, no biases), steps, batches and seeds; only positions and
projections differ. learned: learned absolute positions, as in the paper. The models are small and see 1.2 M
tokens, each once: an order among schemes that lie within a deviation of each other says nothing.

Interrupted, the same command goes on. Needs a source tree (text, tokenizer and data are made by its tools).
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, positive_int, run_experiment
from megatron_sharedproj.experiments.jobs import ROOT, Job, run_jobs, script, steps_share, torchrun
from megatron_sharedproj.experiments.speeches import data_flags, data_jobs, validation_data
from megatron_sharedproj.experiments.statistics import mean_and_deviation, spread
from megatron_sharedproj.profiling.attention_results import commit
from megatron_sharedproj.profiling.tables import Column, write_rows
from megatron_sharedproj.reporting.figures import check_plot, new_figure, save_figure

EXAMPLE = """
example:
  python benchmarks/rotary_schemes.py --folder rotary_schemes --output rotary_schemes.md
  python benchmarks/rotary_schemes.py --folder trial --steps 20 --seeds 1
"""
_TIED = ("--attention-variant", "qk_eq_v")
_ROPE = ("--position-embedding-type", "rope")
# name -> flags
MODELS: dict[str, tuple[str, ...]] = {
    "qkv, rope": ("--attention-variant", "qkv", *_ROPE),
    "K=V, rotate_keys": (*_TIED, *_ROPE, "--kv-rotary", "rotate_keys"),
    "K=V, rotate_values": (*_TIED, *_ROPE, "--kv-rotary", "rotate_values"),
    "K=V, partial 0.5": (*_TIED, *_ROPE, "--kv-rotary", "partial", "--rotary-percent", "0.5"),
    "K=V, separate_rope_head 0.5": (
        *_TIED, *_ROPE, "--kv-rotary", "separate_rope_head", "--rotary-percent", "0.5",
    ),
    "qkv, learned": ("--attention-variant", "qkv"),
    "K=V, learned": _TIED,
}  # fmt: skip
COLUMNS = (
    Column("model", "model"),
    Column("parameters", "parameters", ","),
    Column("cache_bytes_per_token", "cache B/token", ","),
    Column("perplexity", "packed perplexity"),
    Column("against_qkv", "against qkv, rope"),
    Column("bits_per_byte", "bits per byte"),
    Column("seeds", "seeds"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--folder", type=Path, required=True, help="of data, runs and records")
    parser.add_argument("--steps", type=positive_int, default=300, help="of 4,096 tokens (default 300)")
    parser.add_argument("--seeds", type=positive_int, default=3, help="1234, 1235, ... (default 3)")
    parser.add_argument("--processes", type=positive_int, default=1, help="data-parallel (default 1)")
    parser.add_argument("--at-once", type=positive_int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the table: .md, .csv or .json")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="each seed's perplexity, and the mean")
    return parser


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Data, then a training and an evaluation for each model and seed; seed by seed."""
    folder = args.folder.absolute()
    jobs = data_jobs(folder)
    for seed in range(1234, 1234 + args.seeds):
        for name, flags in MODELS.items():
            run = folder / run_name(name, seed)
            words = (
                "-m", "megatron_sharedproj.pretrain", *flags,
                "--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "4",
                "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
                "--attention-dropout", "0", "--hidden-dropout", "0",
                "--seq-length", "256", "--max-position-embeddings", "256",
                "--micro-batch-size", str(16 // args.processes), "--global-batch-size", "16",
                "--train-iters", str(args.steps), "--lr", "3e-3", "--min-lr", "3e-4",
                "--lr-warmup-iters", str(args.steps // 10), "--adam-beta2", "0.95", "--weight-decay", "0.1",
                "--seed", str(seed), *data_flags(folder), "--save", str(run), "--save-interval", "100",
                "--eval-interval", str(args.steps), "--eval-iters", "1", "--log-interval", "10",
                "--num-workers", "0",
            )  # fmt: skip
            command = torchrun(args.processes, *words)
            share = steps_share(run, args.steps)
            jobs.append(Job(run.name, command, cost=args.steps / 7, after=("data",), share=share))
            evaluation = script(
                "tools/evaluate.py", "perplexity", "--load", str(run),
                "--data-path", validation_data(folder), "--output", str(run / "perplexity.json"),
            )  # fmt: skip
            jobs.append(Job(f"{run.name}_perplexity", evaluation, cost=6.0, after=(run.name,)))
    return jobs


def run_name(model: str, seed: int) -> str:
    """Folder of a run."""
    return f"{model.replace(', ', '_').replace(' ', '_').replace('=', '_eq_').lower()}_{seed}"


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each model, from what its runs left."""
    from megatron_sharedproj import formulas
    from megatron_sharedproj.checkpointing import files

    rows: list[dict[str, Any]] = []
    for name in MODELS:
        runs = [args.folder / run_name(name, seed) for seed in range(1234, 1234 + args.seeds)]
        found = [json.loads((run / "perplexity.json").read_text())["packed"] for run in runs]
        config = files.checkpoint_config(runs[0]).model
        values = [one["perplexity"] for one in found]
        first = rows[0]["perplexities"] if rows else values
        # Seed by seed: a seed's data order is the same for both.
        changes = [100 * (mine / theirs - 1) for mine, theirs in zip(values, first, strict=True)]
        rows.append(
            {
                "model": name,
                "parameters": formulas.parameters(config)["total"],
                "cache_bytes_per_token": formulas.kv_cache_bytes_per_token(config),
                "perplexity": spread(values),
                "against_qkv": f"{spread(changes, 1)} %" if rows else None,
                "bits_per_byte": spread([one["bits_per_byte"] for one in found], 4),
                "seeds": args.seeds,
                "perplexities": values,
                "perplexity_mean": mean_and_deviation(values)[0],
                "steps": args.steps,
                "commit": commit(ROOT),
                "date": datetime.now(UTC).date().isoformat(),
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], output: Path) -> None:
    """A row of dots for each model, one per seed, and a bar at their mean."""
    figure = new_figure()
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        values = row["perplexities"]
        axes.plot(values, [place] * len(values), "o", color="C0")
        axes.plot([row["perplexity_mean"]], [place], "|", color="C1", markersize=24, markeredgewidth=3)
    axes.set_yticks(range(len(rows)), [row["model"] for row in reversed(rows)])
    axes.set_xlabel("packed perplexity (lower is better); dots: seeds, bar: their mean")
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(f"{rows[0]['steps']} steps of 4,096 tokens, {rows[0]['parameters']:,} parameters (qkv)")
    save_figure(figure, output)


def run(args: argparse.Namespace) -> None:
    """Train what is not there yet, and write the table. ValueError for a mistake, before anything is run."""
    args.format = None
    if args.steps < 10:
        raise ValueError(f"--steps {args.steps}: must be at least 10")
    if args.processes not in (1, 2, 4, 8, 16):
        raise ValueError(f"--processes {args.processes}: must divide 16")
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: {args.output.parent} is not a folder")
    if args.plot:
        check_plot(args.plot)
    run_jobs(jobs_of(args), args.folder, at_once=args.at_once)
    rows = rows_of(args)
    if args.plot:
        plot(rows, args.plot)
    write_rows(rows, COLUMNS, args, [f"{args.steps} steps of 4,096 tokens; mean +- deviation"])


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake or a failed run, 130 after Ctrl-C (the same command goes on)."""
    return run_experiment(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
