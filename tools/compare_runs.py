#!/usr/bin/env python3
"""Print a table of training runs: parameters, packed perplexity, cache bytes per token, speeds, samples.

Reads what the runs left behind: run_config.json and log.jsonl (the trainer), perplexity.json
(tools/evaluate.py --output RUN/perplexity.json) and generation.json (tools/generate.py --output ...).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, print_error
from megatron_sharedproj.reporting.compare import summarize, table


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--save folders; the first is the baseline")
    parser.add_argument("--max-loss-ratio", type=float, help="fail if loss / unigram entropy is above this")
    parser.add_argument(
        "--max-perplexity-change",
        type=float,
        help="fail if perplexity is this many percent above the first run's",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 if a run is beyond a given limit, 2 for a mistake in the flags."""
    args = build_parser().parse_args(argv)
    try:
        rows = [summarize(run) for run in args.runs]
    except ValueError as error:
        print_error(error)
        return 2
    print(table(rows))
    base, failed = rows[0], []
    evaluated = [row for row in rows if "unigram_entropy" in row]
    limited = args.max_loss_ratio is not None or args.max_perplexity_change is not None
    if limited and len(evaluated) < len(rows):
        missing = next(row["run"] for row in rows if row not in evaluated)
        print_error(f"RUN {missing}: not evaluated, so no limit can be checked; run tools/evaluate.py first")
        return 2
    if base in evaluated:
        print(f"\nunigram entropy of the validation text: {base['unigram_entropy']:.4f} nats per token")
        for row in evaluated:
            ratio = row["loss"] / row["unigram_entropy"]
            line = f"{row['variant']}: validation loss {row['loss']:.4f} = {ratio:.3f} of it"
            if row is not base:
                change = 100 * (row["perplexity"] / base["perplexity"] - 1)
                line += f"; perplexity {change:+.2f}% against {base['variant']}"
            print(line)
            if args.max_loss_ratio is not None and ratio > args.max_loss_ratio:
                failed.append(
                    f"{row['variant']}: loss is {ratio:.3f} of the entropy, above {args.max_loss_ratio}"
                )
            limit = args.max_perplexity_change
            if limit is not None and row["perplexity"] > base["perplexity"] * (1 + limit / 100):
                failed.append(f"{row['variant']}: perplexity is more than {limit}% above {base['variant']}'s")
    for row in rows:
        if "sample" in row:
            print(f"\n{row['variant']} writes:\n  " + row["sample"].strip().replace("\n", "\n  "))
    for line in failed:
        print_error(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
