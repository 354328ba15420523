#!/usr/bin/env python3
"""Generate text from a checkpoint, with a cache that holds a tied key/value once (bytes printed)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj import distributed
from megatron_sharedproj.command_line import Parser, run_distributed
from megatron_sharedproj.config import write_json
from megatron_sharedproj.inference.loading import add_loading_args, load_model

EXAMPLE = """example:
  python tools/generate.py --load runs/k_eq_v --prompt "The state of the Union" --top-p 0.9
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    add_loading_args(parser)
    group = parser.add_argument_group("generation")
    group.add_argument("--prompt", default="", help="text to continue (default: start of a document)")
    group.add_argument("--num-samples", type=int, default=1, help="continuations of the prompt")
    group.add_argument("--max-new-tokens", type=int, default=64)
    group.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    group.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens (0: all)")
    group.add_argument("--top-p", type=float, default=1.0, help="keep the most likely tokens of this mass")
    group.add_argument("--seed", type=int, default=1234)
    group.add_argument("--no-cache", action="store_true", help="recompute the prefix at every step")
    group.add_argument("--output", type=Path, metavar="FILE", help="also write text and figures as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: {args.output.parent} is not a folder")
    if args.num_samples < 1:
        raise ValueError(f"--num-samples {args.num_samples}: must be at least 1")
    loaded = load_model(args, parallel_output=False)
    from megatron_sharedproj.inference.generate import Sampling, generate

    result = generate(
        loaded,
        [args.prompt] * args.num_samples,
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        use_cache=not args.no_cache,
    )
    if not distributed.is_rank_0():
        return
    for index, text in enumerate(result.text):
        print(text if len(result.text) == 1 else f"--- sample {index + 1}\n{text}")
    rate = result.tokens_per_second
    cached = ", ".join(loaded.config.model.variant.cached)
    note = (
        f"cache: {result.cache_bytes} bytes measured ({cached}), {result.cache_formula_bytes} by the formula"
    )
    if args.no_cache:
        note = "no cache"
    elif args.tensor_model_parallel_size > 1:
        note += f" over all {args.tensor_model_parallel_size} ranks"
    print(
        f"{loaded.folder}: {loaded.config.model.attention_variant}; {rate:.1f} tokens/s decoding; {note}",
        file=sys.stderr,
    )
    if args.output:
        figures = {
            "checkpoint": str(loaded.folder),
            "text": result.text,
            "tokens_per_second": rate,
            "cache_bytes": result.cache_bytes,
            "cache_formula_bytes": result.cache_formula_bytes,
            "cache_tokens": args.num_samples * result.cache_tokens,
        }
        write_json(args.output, figures)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a mistake in the flags (one line on stderr)."""
    return run_distributed(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
