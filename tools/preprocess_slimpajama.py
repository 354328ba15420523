#!/usr/bin/env python3
"""Tokenize SlimPajama, or any JSON-lines or parquet text, into Megatron-Core .bin/.idx files."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone; spawned workers take the same path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, UsageError

EXAMPLE = """
example:
  python tools/preprocess_slimpajama.py --input SlimPajama-627B --output-prefix data/slimpajama \\
      --tokenizer-model gpt2 --workers 16
  writes data/slimpajama_train_text_document.bin, .idx and .json (a manifest); also validation and test.

--input takes a tree ({train,validation,test}/chunkN/*.jsonl.zst), a directory or files: .jsonl, .jsonl.gz,
.jsonl.zst, .parquet. The output is the same for any --workers, and appears only when all of it is complete.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line; names are those of Megatron-LM's tools/preprocess_data.py."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="trees, directories or files"
    )
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys or columns to tokenize"
    )
    group.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="only these splits, of train validation test"
    )
    group.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a bad record (default: stop)"
    )
    group.add_argument(
        "--max-reported-errors", type=int, default=20, metavar="N", help="skipped records to list"
    )
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type",
        choices=("HuggingFaceTokenizer", "GPT2BPETokenizer", "NullTokenizer"),
        default="HuggingFaceTokenizer",
        help="default: HuggingFaceTokenizer",
    )
    group.add_argument(
        "--tokenizer-model", metavar="DIR", help="directory with tokenizer.json, or a Hub name"
    )
    group.add_argument("--vocab-file", metavar="FILE", help="GPT-2's vocab.json or encoder.json")
    group.add_argument("--merge-file", metavar="FILE", help="GPT-2's merges.txt or vocab.bpe")
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="for NullTokenizer, the eod (N-1) included"
    )
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document id (default: yes)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="PREFIX_<split>_<key>_document.bin"
    )
    group.add_argument("--overwrite", action="store_true", help="replace existing output")
    group = parser.add_argument_group("run")
    group.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: the CPU count)",
    )
    group.add_argument(
        "--log-interval", type=float, default=10.0, metavar="SECONDS", help="between progress lines"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Check the flags, then preprocess. Raises UsageError with the flag, the value and a remedy."""
    from megatron_sharedproj.data.preprocess import PreprocessOptions, check_new, output_prefix_of, preprocess
    from megatron_sharedproj.data.sources import SourceError, discover
    from megatron_sharedproj.data.tokenizers import build_tokenizer

    if args.workers < 1:
        raise UsageError(f"--workers {args.workers}: no process to work; use 1 or more")
    if os.path.isdir(args.output_prefix) or args.output_prefix.endswith(os.sep):
        name = os.path.join(args.output_prefix, "slimpajama")
        raise UsageError(f"--output-prefix {args.output_prefix}: is a directory; use a prefix such as {name}")
    try:
        files = discover(args.input)
    except SourceError as error:
        raise UsageError(f"--input {error}") from None
    if args.splits is not None:
        unknown = [split for split in args.splits if split not in files]
        if unknown:
            known = ", ".join(name for name in files if name) or "none"
            raise UsageError(f"--splits {unknown[0]}: no such split in the input; it has {known}")
        files = {split: paths for split, paths in files.items() if split in args.splits}
    tokenizer = {
        "tokenizer_type": args.tokenizer_type,
        "tokenizer_model": args.tokenizer_model,
        "vocab_file": args.vocab_file,
        "merge_file": args.merge_file,
        "vocab_size": args.vocab_size,
    }
    try:
        print(build_tokenizer(**tokenizer).describe(), file=sys.stderr)
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        if not args.overwrite:  # all keys, before the first one is written
            prefixes = [output_prefix_of(args.output_prefix, s, key) for s in files for key in args.json_keys]
            check_new(prefixes)
        for key in args.json_keys:
            options = PreprocessOptions(
                tokenizer=tokenizer,
                text_key=key,
                append_eod=args.append_eod,
                workers=args.workers,
                on_error=args.on_error,
                max_reported_errors=args.max_reported_errors,
                overwrite=args.overwrite,
                log_interval=args.log_interval,
            )
            for summary in preprocess(files, args.output_prefix, options):
                print(summary.line())
    except FileExistsError as error:
        remedy = "use another prefix or --overwrite"
        raise UsageError(f"--output-prefix {args.output_prefix}: {error}; {remedy}") from None
    except SourceError as error:
        remedy = "fix it, or pass --on-error skip to leave bad records out"
        raise UsageError(f"--input {error}; {remedy}") from None


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the machine failed (disk full), 2 a mistake in the flags or input, 130 Ctrl-C."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a scheduler's kill cleans up as Ctrl-C does
    try:
        run(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"error: --output-prefix {args.output_prefix}: {error}; no output was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: no output was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
