#!/usr/bin/env python3
"""Compare the starts of a retrofit on a 1M-parameter model: a table, a CSV file and a plot.

For each seed: a Q, K, V teacher on the quickstart's text (State of the Union speeches), surgery by each of
the four starts, distillation of each, and K=V from scratch over as many steps as teacher and distillation.

What is known beforehand, of the paper's 300M model after 500M tokens (CE + KL, T 2, alpha 0.5), surgery ->
distilled: mean 6430 -> 22.87 is best, then keep V 7347 -> 27.00, then keep K 13345 -> 29.00; K=V from scratch
21.28. least_squares is not in the paper. A model of this size need not repeat that order.

Run it again after an interruption: what is finished is skipped, a training resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, list_of, positive_float, positive_int, run_experiment

EXAMPLE = """examples:
  python tools/retrofit_experiment.py --output retrofit
  python tools/retrofit_experiment.py --output try --seeds 1 --steps 20 --distill-steps 20
"""
_HELP = {
    "steps": "of the teacher",
    "distill_steps": "of each distillation",
    "layers": "transformer layers",
    "hidden_size": "hidden size",
    "heads": "attention heads",
    "lr": "of teacher and K=V from scratch",
    "distill_lr": "of distillation",
    "temperature": "--distill-temperature",
    "alpha": "--distill-alpha",
    "calibration_tokens": "of least_squares",
    "eval_tokens": "validation tokens that perplexity is measured on",
    "processes": "of torchrun (1, 2, 4, 8 or 16)",
}


def build_parser() -> argparse.ArgumentParser:
    from megatron_sharedproj.experiments.retrofit_starts import Settings

    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("--seeds", type=list_of(int), default=(1, 2, 3), metavar="N,N", help="default 1,2,3")
    parser.add_argument("--at-once", type=positive_int, default=2, help="trainings at a time (default 2)")
    default = Settings()
    for name in (field.name for field in fields(Settings) if field.name != "seeds"):
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive_int if isinstance(value, int) else positive_float,
            default=value,
            metavar="N" if isinstance(value, int) else "X",
            help=f"{_HELP[name]} (default {value})",
        )
    return parser


def run(args: argparse.Namespace) -> None:
    from megatron_sharedproj.experiments.retrofit_starts import Comparison, Settings, report

    if 16 % args.processes:
        raise ValueError(
            f"--processes {args.processes}: must divide the batch of 16 sequences; use 1, 2, 4, 8, 16"
        )
    values = {name: value for name, value in vars(args).items() if name not in ("output", "seeds", "at_once")}
    comparison = Comparison(Settings(seeds=list(args.seeds), **values), args.output)
    comparison.run(args.at_once)
    print(f"\n{report(comparison)}\n{comparison.output}/results.csv, results.md, retrofit.png")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake in the flags or a failed stage (one line on stderr), 130 for Ctrl-C."""
    return run_experiment(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
