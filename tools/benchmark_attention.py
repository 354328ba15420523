#!/usr/bin/env python3
"""Measure attention: the extension beside SDPA with two tensors, SDPA with one, and the reference."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import (
    Parser,
    UsageError,
    list_of,
    positive_float,
    positive_int,
    print_error,
)

ROOT = Path(__file__).resolve().parents[1]

EXAMPLE = """
example:
  python tools/benchmark_attention.py
  python tools/benchmark_attention.py --preset cpu --output attention.csv --plot attention.png
  python tools/benchmark_attention.py --ops decode --heads 32 --groups 8 --head-sizes 128 --threads 1

A flag replaces the preset's choice, for all its cases. The table shows the time of one operation in ms, and
  TFLOP/s     4 b h s t e in the forward, half of it when causal; 2.5 times that backward, 3.5 times for both
  GB/s        bytes that any algorithm has to move (a tied key/value once) per second
  % of roof   of the rate of a matrix product or of memory, whichever bounds it, measured in the run
  x separate  time of SDPA with separate key and value / this time: above 1 is faster; x alias: with one
  error       largest, against float64 on a small shape of the kind; x plain's: in units of plain PyTorch's
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    from megatron_sharedproj.profiling.attention_bench import IMPLEMENTATIONS
    from megatron_sharedproj.profiling.attention_cases import DTYPES, LAYOUTS, MASKS, OPS, PRESETS

    parser = Parser(description=__doc__, epilog=EXAMPLE)
    numbers = list_of(positive_int)

    def names(choices: Sequence[str]) -> dict:
        return {"type": list_of(str, tuple(choices)), "metavar": "A,B", "help": ", ".join(choices)}

    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="quick", help="cases (default quick)")
    cases = parser.add_argument_group("cases, instead of the preset's; lists have commas between values")
    cases.add_argument("--ops", **names(OPS))
    cases.add_argument("--dtype", dest="dtypes", **names(tuple(DTYPES)))
    cases.add_argument("--layouts", **names(LAYOUTS))
    cases.add_argument("--masks", **names(MASKS))
    cases.add_argument("--heads", type=numbers, metavar="N,M", help="query heads")
    cases.add_argument(
        "--groups", type=numbers, metavar="N,M", help="key/value heads (with --heads: as many)"
    )
    cases.add_argument("--head-sizes", type=numbers, metavar="N,M")
    cases.add_argument("--seq-lengths", type=numbers, metavar="N,M", help="of fwd, bwd and fwdbwd")
    size = cases.add_mutually_exclusive_group()
    size.add_argument("--batch", type=positive_int, metavar="N", help="sequences of fwd, bwd and fwdbwd")
    size.add_argument("--tokens", type=positive_int, metavar="N", help="the same as batch x length")
    cases.add_argument("--decode-batches", type=numbers, metavar="N,M")
    cases.add_argument("--decode-contexts", type=numbers, metavar="N,M", help="tokens in the cache")
    cases.add_argument(
        "--page-size", type=positive_int, metavar="N", help="page the extension's decode cache"
    )
    how = parser.add_argument_group("measurement")
    how.add_argument("--implementations", **names(tuple(IMPLEMENTATIONS)))
    how.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's)")
    how.add_argument(
        "--budget-seconds", type=positive_float, metavar="S", help="per case (default: the preset's)"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--output", type=Path, metavar="CSV", help="one row per implementation and case")
    files.add_argument("--resume", action="store_true", help="skip what --output has already, and add to it")
    files.add_argument("--plot", type=Path, metavar="PNG", help="draw all rows of --output, or of this run")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises ValueError with the flag, the value and a remedy before any work."""
    import torch

    from megatron_sharedproj.profiling.attention_bench import IMPLEMENTATIONS
    from megatron_sharedproj.profiling.attention_cases import PRESETS, Choices
    from megatron_sharedproj.profiling.attention_results import ResultFile, benchmark, environment
    from megatron_sharedproj.profiling.timing import get_machine
    from megatron_sharedproj.reporting.attention_plot import plot_attention
    from megatron_sharedproj.reporting.figures import check_plot

    if args.resume and not args.output:
        raise UsageError("--resume: there is nothing to continue; give --output too")
    if args.output and not args.output.parent.is_dir():
        raise UsageError(f"--output {args.output}: {args.output.parent} is not a folder; make it first")
    if args.plot:
        check_plot(args.plot)
    preset = PRESETS[args.preset]
    choices = Choices(**{field.name: getattr(args, field.name) for field in fields(Choices)})
    cases = choices.cases(preset.grids)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = get_machine(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    file = ResultFile(args.output, args.resume) if args.output else None
    names = args.implementations or tuple(IMPLEMENTATIONS)
    budget = args.budget_seconds or preset.budget_seconds
    rows = benchmark(cases, names, machine, budget, environment(machine, ROOT), file)
    if args.output:
        print(f"{args.output}: {len(rows)} rows")
    if args.plot:
        plot_attention(rows, args.plot)
        print(f"{args.plot}: the plot")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 if a file could not be written, 2 for a mistake in the flags, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print_error(error)
        return 2
    except OSError as error:
        print_error(f"{error}; rows written before are kept")
        return 1
    except KeyboardInterrupt:
        print_error(
            f"interrupted; continue with --resume --output {args.output}" if args.output else "interrupted"
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
