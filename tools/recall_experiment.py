#!/usr/bin/env python3
"""Associative recall by heads, form of attention and load, in small transformers: a sweep, a table, a plot.

Does a tied key and value (K=V) lose recall where there are several heads, as published (0.35 against
0.9995 for Q, K, V at 4 heads)? Every cell trains a 2-layer causal model from scratch on lists of pairs and
queries, with each learning rate in turn until one solves it: late is not taken for never.

Without flags a reduced grid runs, about 5 minutes on one core; --full is a larger one, for many cores. Every
result is kept as it comes: interrupted, the same command goes on; another one into the same folder adds to
it. A table holds the cells of its own command.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, list_of, positive_float, positive_int, run_experiment
from megatron_sharedproj.profiling.tables import add_output_arguments, check_output, write_rows

EXAMPLE = """examples:
  python tools/recall_experiment.py --folder recall --plot recall.png --output recall.csv
  python tools/recall_experiment.py --folder recall --loads 8:32 --heads 4 --forms qkv,qk_eq_v --steps 4000
  python tools/recall_experiment.py --folder recall_full --full --at-once 32 --plot recall_full.png
"""
_GRID = ("tasks", "loads", "heads", "forms", "seeds")
_TRAINING = ("hidden_size", "layers", "mlp_size", "steps", "lrs", "batch")


def load(text: str) -> tuple[int, int]:
    """An argparse type: PAIRS:KEYS."""
    pairs, colon, keys = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not a load; give PAIRS:KEYS, like 4:16")
    return positive_int(pairs), positive_int(keys)


def build_parser() -> argparse.ArgumentParser:
    from megatron_sharedproj.experiments.recall import TASKS, RecallCell
    from megatron_sharedproj.experiments.recall_results import CAUSAL_FORMS, FULL_TRAINING, Grid

    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where results are kept")
    parser.add_argument("--at-once", type=positive_int, default=1, metavar="N", help="cells at a time (1)")
    group = parser.add_argument_group("the grid, lists with commas between")
    group.add_argument("--full", action="store_true", help="the larger grid and training as defaults")
    default = Grid()

    def words(values: object) -> str:
        return ",".join(map(str, values))  # type: ignore[call-overload]

    group.add_argument(
        "--tasks",
        type=list_of(str, TASKS),
        help=f"mqar: several queries; ar: one, at the end (default {words(default.tasks)})",
    )
    group.add_argument(
        "--loads",
        type=list_of(load),
        metavar="P:K,P:K",
        help="pairs in a sequence, and distinct keys that they are drawn from (default "
        f"{words(f'{pairs}:{keys}' for pairs, keys in default.loads)})",
    )
    group.add_argument(
        "--heads", type=list_of(positive_int), metavar="N,N", help=f"default {words(default.heads)}"
    )
    group.add_argument(
        "--forms",
        type=list_of(str, CAUSAL_FORMS),
        help=f"of {', '.join(CAUSAL_FORMS)} (default {words(default.forms)})",
    )
    group.add_argument("--seeds", type=list_of(int), metavar="N,N", help=f"default {words(default.seeds)}")
    group = parser.add_argument_group("models and training (default; with --full)")
    plain = RecallCell()
    helps = {
        "hidden_size": "hidden size",
        "layers": "of attention and MLP",
        "mlp_size": "width of an MLP; 0: 4 times the hidden size",
        "steps": "at most, for each learning rate",
        "batch": "sequences per step",
    }
    for name, text in helps.items():
        value = getattr(plain, name)
        kind = int if name == "mlp_size" else positive_int
        both = f"{value}; {FULL_TRAINING.get(name, value)}"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{text} ({both})")
    group.add_argument(
        "--lrs",
        type=list_of(positive_float),
        metavar="X,X",
        help="peak learning rates, the next where one does not solve it "
        f"({words(plain.lrs)}; {words(FULL_TRAINING['lrs'])})",
    )
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="accuracy by heads, with error bars")
    return parser


def run(args: argparse.Namespace) -> None:
    from megatron_sharedproj.experiments.recall import run_cell
    from megatron_sharedproj.experiments.recall_results import (
        FULL,
        FULL_TRAINING,
        Grid,
        cells_of,
        columns_of,
        cost_of,
        notes_of,
        rows_of,
        settings_of,
    )
    from megatron_sharedproj.experiments.sweep import run_sweep
    from megatron_sharedproj.reporting.figures import check_plot
    from megatron_sharedproj.reporting.recall_plot import plot_recall

    check_output(args)
    if args.plot:
        check_plot(args.plot)
    given = {name: getattr(args, name) for name in _GRID if getattr(args, name) is not None}
    training = dict(FULL_TRAINING) if args.full else {}
    training.update({name: getattr(args, name) for name in _TRAINING if getattr(args, name) is not None})
    cells = cells_of(replace(FULL if args.full else Grid(), **given), **training)
    settings = [settings_of(cell) for cell in cells]
    print(f"{len(cells)} cells, {args.at_once} at a time", flush=True)
    rows = rows_of(run_sweep(settings, run_cell, args.folder, cost=cost_of, at_once=args.at_once))
    if args.plot:
        plot_recall(rows, args.plot)
        print(args.plot)
    write_rows(rows, columns_of(rows), args, notes_of(rows))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake or a failed cell (one line on stderr), 130 after Ctrl-C."""
    return run_experiment(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
