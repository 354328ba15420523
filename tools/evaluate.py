#!/usr/bin/env python3
"""Evaluate a checkpoint. ``perplexity``: packed (real tokens only) and the paper's padded protocol."""

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
from megatron_sharedproj.data.inspection import validate_indexed
from megatron_sharedproj.inference.loading import add_loading_args, load_model

EXAMPLE = """example:
  python tools/evaluate.py perplexity --load runs/k_eq_v --data-path data/slimpajama_validation_text_document
  torchrun --nproc-per-node 2 tools/evaluate.py perplexity ...   (data parallel; or with
      --tensor-model-parallel-size 2)
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    perplexity = commands.add_parser("perplexity", help="perplexity and bits per byte over indexed data")
    add_loading_args(perplexity)
    group = perplexity.add_argument_group("data")
    group.add_argument("--data-path", required=True, metavar="PREFIX", help="indexed data (without .bin)")
    group.add_argument(
        "--protocol",
        choices=("packed", "padded", "both"),
        default="packed",
        help="packed: real tokens only (default); padded: the paper's, padding scored",
    )
    group.add_argument("--seq-length", type=int, default=0, help="tokens per row (default: the run's)")
    group.add_argument("--micro-batch-size", type=int, default=8, help="rows per forward pass")
    group.add_argument("--max-tokens", type=int, default=0, help="use the first N tokens (default: all)")
    group.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: {args.output.parent} is not a folder")
    from megatron_sharedproj.evaluation.perplexity import PROTOCOLS, evaluate_perplexity

    for suffix in (".bin", ".idx"):
        if not Path(args.data_path + suffix).is_file():
            raise ValueError(f"--data-path {args.data_path}: {args.data_path}{suffix} does not exist")
    loaded = load_model(args, parallel_output=True)
    validate_indexed(args.data_path, loaded.tokenizer.vocab_size)
    chosen = PROTOCOLS if args.protocol == "both" else (args.protocol,)
    first = distributed.is_rank_0()
    results = {
        protocol: evaluate_perplexity(
            loaded,
            args.data_path,
            protocol=protocol,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            max_tokens=args.max_tokens,
            show_progress=first and sys.stderr.isatty(),
        )
        for protocol in chosen
    }
    if not first:
        return
    print(f"{loaded.folder}: {loaded.config.model.attention_variant}, {args.data_path}")
    for protocol, r in results.items():
        real = "all real" if r["real_tokens"] == r["tokens"] else f"{r['real_tokens']} real"
        line = f"{protocol}: perplexity {r['perplexity']:.4f}, loss {r['loss']:.6f} nats per token"
        if "bits_per_byte" in r:
            line += f", {r['bits_per_byte']:.4f} bits per byte"
        print(f"{line}, over {r['tokens']} tokens ({real}), {r['tokens_per_second']:.0f} tokens/s")
    print(
        f"unigram entropy of the data: {next(iter(results.values()))['unigram_entropy']:.6f} nats per token"
    )
    if args.output:
        write_json(args.output, {"checkpoint": str(loaded.folder), "data": args.data_path, **results})


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a mistake in the flags (one line on stderr)."""
    return run_distributed(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
