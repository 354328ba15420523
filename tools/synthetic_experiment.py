#!/usr/bin/env python3
"""The paper's five synthetic tasks with six forms of attention: a sweep, a table beside Table 1, a plot.

Without shape flags a reduced grid runs, about 40 minutes on one core, all with 2 layers and three seeds: size
32 with 4 heads and size 64 with 2 and with 4 heads on lists of 16, size 64 with 4 heads on lists of 64
(reverse, sort and swap only). --full is the paper's grid, for many cores. A shape flag (--hidden-sizes,
--layers, --heads, --lengths) replaces that axis; without --full the others are then size 64, 2 layers, 2
and 4 heads, lists of 16.

Every result is kept as it comes: interrupted, the same command goes on, and another one into the same folder
adds to it. A table holds the cells of its own command.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, list_of, positive_float, positive_int, run_experiment
from megatron_sharedproj.duration import format_duration
from megatron_sharedproj.profiling.tables import add_output_arguments, check_output, write_sections

EXAMPLE = """examples:
  python tools/synthetic_experiment.py --folder synthetic --plot synthetic.png
  python tools/synthetic_experiment.py --folder synthetic --tasks reverse,swap --hidden-sizes 256 --seeds 0
  python tools/synthetic_experiment.py --folder synthetic_full --full --at-once 32 --output synthetic.md
"""
_AXES = ("hidden_sizes", "layers", "heads", "lengths")
_TRAINING = (
    "epochs", "train_lists", "test_lists", "batch_size", "lr", "warmup", "position_std", "term_std",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    from megatron_sharedproj.experiments.synthetic import SYNTHETIC_FORMS, TASKS

    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where results are kept")
    parser.add_argument("--at-once", type=positive_int, default=1, metavar="N", help="cells at a time (1)")
    group = parser.add_argument_group("the grid, lists with commas between")
    group.add_argument("--full", action="store_true", help="the paper's shapes: 36 for each task and form")
    group.add_argument(
        "--tasks", type=list_of(str, tuple(TASKS)), default=tuple(TASKS), help=f"of {', '.join(TASKS)} (all)"
    )
    group.add_argument(
        "--forms",
        type=list_of(str, SYNTHETIC_FORMS),
        default=SYNTHETIC_FORMS,
        help=f"of {', '.join(SYNTHETIC_FORMS)} (all)",
    )
    group.add_argument("--hidden-sizes", type=list_of(positive_int), metavar="N,N")
    group.add_argument("--layers", type=list_of(positive_int), metavar="N,N")
    group.add_argument("--heads", type=list_of(positive_int), metavar="N,N")
    group.add_argument("--lengths", type=list_of(positive_int), metavar="N,N", help="digits of a list")
    group.add_argument("--seeds", type=list_of(int), default=(0, 1, 2), metavar="N,N", help="default 0,1,2")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=2, metavar="N", help="default 2")
    group.add_argument("--train-lists", type=positive_int, default=10_000, metavar="N", help="default 10000")
    group.add_argument("--test-lists", type=positive_int, default=2_000, metavar="N", help="default 2000")
    group.add_argument("--batch-size", type=positive_int, default=128, metavar="N", help="default 128")
    group.add_argument("--lr", type=positive_float, default=1e-3, metavar="X", help="peak, default 1e-3")
    group.add_argument(
        "--warmup", type=float, default=0.05, metavar="X", help="share of the steps, default 0.05"
    )
    group.add_argument(
        "--position-std", type=float, default=1.0, metavar="X", help="of learned positions at the start (1)"
    )
    group.add_argument(
        "--term-std", type=float, default=0.02, metavar="X",
        help="of a + form's weights at the start (0.02); 0: all even, as the layer has them",
    )  # fmt: skip
    add_output_arguments(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--rerun", type=Path, nargs="+", default=(), metavar="FILE",
        help="the authors' synthetic_results_shard0.csv and 1.csv: adds their figures for the same cells",
    )  # fmt: skip
    group.add_argument("--plot", type=Path, metavar="PNG", help="tasks and forms with error bars")
    return parser


def run(args: argparse.Namespace) -> None:
    from megatron_sharedproj.experiments.sweep import run_sweep
    from megatron_sharedproj.experiments.synthetic import FULL, REDUCED, Grid, cells_of, run_cell, seconds_of
    from megatron_sharedproj.experiments.synthetic_results import notes_of, read_rerun, rows_of, sections_of
    from megatron_sharedproj.reporting.figures import check_plot
    from megatron_sharedproj.reporting.synthetic_plot import plot_synthetic

    check_output(args)
    if args.plot:
        check_plot(args.plot)
    rerun = read_rerun(args.rerun)
    given = {axis: getattr(args, axis) for axis in _AXES if getattr(args, axis)}
    grids = [replace(FULL if args.full else Grid(), **given)] if given or args.full else REDUCED
    training = {name: getattr(args, name) for name in _TRAINING}
    cells = cells_of(grids, args.tasks, args.forms, args.seeds, **training)
    settings = [asdict(cell) for cell in cells]
    estimate = format_duration(sum(map(seconds_of, settings)) / args.at_once)
    print(f"{len(cells)} cells, about {estimate} in all, {args.at_once} at a time (estimate)", flush=True)
    rows = rows_of(run_sweep(settings, run_cell, args.folder, cost=seconds_of, at_once=args.at_once), rerun)
    if args.plot:
        plot_synthetic(rows, args.plot)
        print(args.plot)
    write_sections(rows, sections_of(rows), args, notes_of(rows))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake or a failed cell (one line on stderr), 130 after Ctrl-C."""
    return run_experiment(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
