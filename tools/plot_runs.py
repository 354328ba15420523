#!/usr/bin/env python3
"""Plot training and validation loss of runs into one PNG."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, UsageError

EXAMPLE = """
example:
  python tools/plot_runs.py runs/qkv runs/k_eq_v --labels "qkv,K=V" --output curves.png
  python tools/plot_runs.py runs/* --x consumed_tokens --smoothing 0.9 --y-range 3,5 --output curves.png

RUN is the --save folder of a training run, or its log.jsonl; a run that is still going can be plotted.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--save folder or log.jsonl")
    parser.add_argument("--output", required=True, metavar="FILE", help="the PNG to write")
    parser.add_argument("--labels", metavar="A,B", help="one per RUN (default: the folder's name)")
    parser.add_argument(
        "--x",
        choices=("iteration", "consumed_tokens"),
        default="iteration",
        help="horizontal axis (default iteration)",
    )
    parser.add_argument(
        "--unigram-entropy", type=float, metavar="NATS", help="a dashed line at this loss, nats per token"
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        default=0.0,
        metavar="X",
        help="moving average of the training loss, as TensorBoard's: weight of the past (default 0)",
    )
    parser.add_argument(
        "--y-range",
        type=_y_range,
        metavar="LOW,HIGH",
        help="losses shown, to leave the steep start out",
    )
    parser.add_argument("--title", help="text above the plot")
    return parser


def _y_range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two losses; give them like 3.2,5") from None
    return low, high


def labels_of(runs: list[str], labels: str | None) -> list[str]:
    """One distinct label per run: the given ones, else folder names, else the paths as typed."""
    if labels is not None:
        given = [label.strip() for label in labels.split(",")]
        if len(given) != len(runs):
            counts = f"{len(given)} label(s) for {len(runs)} run(s)"
            raise UsageError(f"--labels {labels}: {counts}; give one each")
        if len(set(given)) < len(given) or "" in given:
            raise UsageError(f"--labels {labels}: labels must be distinct and not empty")
        return given
    paths = [Path(run).resolve() for run in runs]
    names = [path.parent.name if path.suffix == ".jsonl" else path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    if len(set(paths)) < len(paths):
        twice = next(run for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1)
        raise UsageError(f"RUN {twice}: given twice; leave one out")
    return runs


def run(args: argparse.Namespace) -> None:
    """Read the runs and write the plot. Raises UsageError with the flag, the value and a remedy."""
    from megatron_sharedproj.reporting.plots import load_run, plot_loss_curves

    output = Path(args.output)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UsageError(f"--output {args.output}: must be a file name that ends in .png")
    labels = labels_of(args.runs, args.labels)
    try:
        runs = {label: load_run(path) for label, path in zip(labels, args.runs, strict=True)}
        plot_loss_curves(
            runs, output, x=args.x, unigram_entropy=args.unigram_entropy, title=args.title,
            smoothing=args.smoothing, y_range=args.y_range,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(f"{output}: {len(runs)} run(s)")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the machine failed (disk full), 2 a mistake in the flags or a log."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --output {args.output}: {error}; no plot was written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
