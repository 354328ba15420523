#!/usr/bin/env python3
"""Print what a training run would be: steps, tokens, time at an assumed MFU, memory and traffic per GPU."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.arguments import build_parser
from megatron_sharedproj.dry_run import dry_run

EXAMPLE = """
example:
  python tools/plan_run.py --simulate-world-size 8 --vocab-size 50257 --num-layers 20 --hidden-size 1024 \\
      --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 6 \\
      --global-batch-size 1152 --train-iters 4238 --lr 2e-4 --bf16 --attention-variant qk_eq_v

All flags are the trainer's. By formulas only: the trainer itself, with --simulate-world-size, also builds the
rank's shard and counts its collectives.
"""


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the machine failed (disk full), 2 a mistake in the flags."""
    parser = build_parser()
    parser.prog, parser.usage = "plan_run.py", "plan_run.py --simulate-world-size N [flags of the trainer]"
    parser.description, parser.epilog = __doc__, EXAMPLE
    args = parser.parse_args(argv)
    try:
        if args.simulate_world_size is None:
            raise ValueError("--simulate-world-size: required; the number of GPUs")
        dry_run(args, build=False)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --simulate-output {args.simulate_output}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
