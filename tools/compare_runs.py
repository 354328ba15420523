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

from megatron_sharedproj.reporting.compare import summarize, table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--save folders; the first is the baseline")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a mistake in the flags (one line on stderr)."""
    args = build_parser().parse_args(argv)
    try:
        rows = [summarize(run) for run in args.runs]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    base = rows[0]
    if "unigram_entropy" in base:
        print(f"\nunigram entropy of the validation text: {base['unigram_entropy']:.4f} nats per token")
        for row in rows:
            ratio = row["loss"] / row["unigram_entropy"]
            line = f"{row['variant']}: validation loss {row['loss']:.4f} = {ratio:.3f} of it"
            if row is not base:
                change = 100 * (row["perplexity"] / base["perplexity"] - 1)
                line += f"; perplexity {change:+.2f}% against {base['variant']}"
            print(line)
    for row in rows:
        if "sample" in row:
            print(f"\n{row['variant']} writes:\n  " + row["sample"].strip().replace("\n", "\n  "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
