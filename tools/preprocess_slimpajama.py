#!/usr/bin/env python3
"""Tokenize SlimPajama, or any JSON-lines or parquet text, into Megatron-Core .bin/.idx files."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

# Before numpy is imported: its own threads would keep the workers from being forked.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone; spawned workers take the same path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, UsageError, add_tokenizer_flags

EXAMPLE = """
example:
  python tools/preprocess_slimpajama.py --input SlimPajama-627B --output-prefix data/slimpajama \\
      --tokenizer-model gpt2 --workers 16
  writes data/slimpajama_train_text_document.bin, .idx and .json (a manifest); also validation and test.

--input takes a tree ({train,validation,test}/chunkN/*.jsonl.zst), one split by source, a save_to_disk folder,
a directory or files: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow. The output is the same for any number
of --workers, and appears only when all of it is complete. After an interruption the same command goes on.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line; names are those of Megatron-LM's tools/preprocess_data.py."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    group = parser.add_argument_group("input")
    group.add_argument("--input", nargs="+", metavar="PATH", help="trees, directories or files")
    group.add_argument("--dataset-id", metavar="ID", help="stream a data set of the Hugging Face Hub instead")
    group.add_argument("--dataset-config", metavar="NAME", help="its configuration")
    group.add_argument("--dataset-revision", metavar="REV", help="its branch, tag or commit")
    group.add_argument("--list-datasets", action="store_true", help="print the ids that are known, and exit")
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys or columns to tokenize"
    )
    group.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="only these splits, of train validation test"
    )
    group.add_argument(
        "--exclude-source", nargs="+", default=[], metavar="NAME", help="leave out, such as RedPajamaBook"
    )
    group.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a bad record or file (default: stop)"
    )
    group.add_argument(
        "--max-reported-errors", type=int, default=20, metavar="N", help="skipped records to list here"
    )
    group = parser.add_argument_group("tokenizer")
    add_tokenizer_flags(group)
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="for NullTokenizer, the eod (N-1) included"
    )
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document id (default: yes)",
    )
    group.add_argument(
        "--engine",
        choices=("auto", "fastokens", "gigatoken", "tokenizers"),
        default="auto",
        help="library that encodes (default: the fastest installed one that gives the same ids)",
    )
    group.add_argument(
        "--verify",
        type=int,
        default=10,
        metavar="N",
        help="encode about N random documents, at least one of every 32 MiB of a file, again with HF"
        " tokenizers, and stop at a difference (default: 10; 0: none)",
    )
    group.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="let text that spells a special token become it, as Megatron-LM does (default: plain text)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", metavar="PREFIX", help="PREFIX_<split>_<key>_document.bin")
    group.add_argument(
        "--split-by-source", action="store_true", help="a pair per source, and a blend file for --data-path"
    )
    group.add_argument(
        "--target-tokens", type=int, metavar="N", help="only the first N tokens of each output, exactly"
    )
    group.add_argument(
        "--shard-size", metavar="SIZE", help="start a new .bin at this size, such as 10GB, and a blend file"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace existing output, or another unfinished run"
    )
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
    group.add_argument(
        "--dry-run", action="store_true", help="show input and estimated output, write nothing"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Check the flags, then preprocess. Raises UsageError with the flag, the value and a remedy."""
    from megatron_sharedproj.data.hub import dataset_table
    from megatron_sharedproj.data.sources import describe_layout

    if args.list_datasets:
        print(dataset_table())
        return
    check_flags(args)
    files = find_files(args)
    print(describe_layout(files), file=sys.stderr)

    from megatron_sharedproj.data.engines import choose_engine
    from megatron_sharedproj.data.estimate import estimate
    from megatron_sharedproj.data.preprocess import PreprocessOptions, preprocess
    from megatron_sharedproj.data.records import SourceError
    from megatron_sharedproj.data.tokenizers import build_tokenizer

    tokenizer_arguments = {
        "tokenizer_type": args.tokenizer_type,
        "tokenizer_model": args.tokenizer_model,
        "vocab_file": args.vocab_file,
        "merge_file": args.merge_file,
        "vocab_size": args.vocab_size,
    }
    try:
        tokenizer = build_tokenizer(**tokenizer_arguments)
        engine = choose_engine(tokenizer, args.engine, args.parse_special_tokens)
    except ValueError as error:
        raise UsageError(str(error)) from None
    passed = "".join(f" ({reason})" for reason in engine.reasons)
    print(f"{tokenizer.describe()}; engine {engine.name}{passed}", file=sys.stderr)
    try:
        guess = estimate(
            files, tokenizer, engine, args.output_prefix, thorough=args.dry_run, text_key=args.json_keys[0]
        )
        print(guess.line(), file=sys.stderr)
        if args.dry_run:
            return
        for key in args.json_keys:
            options = PreprocessOptions(
                tokenizer=tokenizer_arguments,
                text_key=key,
                engine=args.engine,
                parse_special_tokens=args.parse_special_tokens,
                append_eod=args.append_eod,
                by_source=args.split_by_source,
                exclude_sources=tuple(args.exclude_source),
                target_tokens=args.target_tokens,
                shard_bytes=parse_size(args.shard_size),
                verify=args.verify,
                workers=args.workers,
                on_error=args.on_error,
                max_reported_errors=args.max_reported_errors,
                overwrite=args.overwrite,
                log_interval=args.log_interval,
            )
            for summary in preprocess(files, args.output_prefix, options, (tokenizer, engine)):
                print(summary.line())
    except FileExistsError as error:
        remedy = "use another prefix or --overwrite"
        raise UsageError(f"--output-prefix {args.output_prefix}: {error}; {remedy}") from None
    except SourceError as error:
        remedy = "fix it, or pass --on-error skip to leave bad records out"
        raise UsageError(f"{source_flag(args)} {error}; {remedy}") from None
    except ValueError as error:
        prefix = "" if str(error).startswith("--") else f"--output-prefix {args.output_prefix}: "
        raise UsageError(f"{prefix}{error}") from None


def source_flag(args: argparse.Namespace) -> str:
    """The flag that named the input."""
    return "--dataset-id" if args.dataset_id is not None else "--input"


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for values that no run can use."""
    if (args.input is None) == (args.dataset_id is None):
        raise UsageError("--input: give this or --dataset-id, one of the two; see --help")
    if args.output_prefix is None:
        raise UsageError("--output-prefix: required, such as data/slimpajama; see --help")
    for flag, value, least in (
        ("--workers", args.workers, 1),
        ("--verify", args.verify, 0),
        ("--target-tokens", args.target_tokens, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{flag} {value}: use {least} or more")
    parse_size(args.shard_size)
    if os.path.isdir(args.output_prefix) or args.output_prefix.endswith(os.sep):
        name = os.path.join(args.output_prefix, "slimpajama")
        raise UsageError(f"--output-prefix {args.output_prefix}: is a directory; use a prefix such as {name}")


def parse_size(size: str | None) -> int | None:
    """Bytes of `10GB`, `512MB` or a plain number. Raises UsageError for anything else."""
    if size is None:
        return None
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", size.strip(), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise UsageError(f"--shard-size {size}: not a size; use one such as 10GB or 512MB")
    return int(found[1]) * units[found[2].upper()]


def find_files(args: argparse.Namespace) -> dict[str, Any]:
    """The input files of each split. Raises UsageError."""
    from megatron_sharedproj.data.hub import discover_hub
    from megatron_sharedproj.data.records import SourceError
    from megatron_sharedproj.data.sources import discover

    files: dict[str, Any]
    try:
        if args.dataset_id is not None:
            files = dict(discover_hub(args.dataset_id, args.dataset_config, args.dataset_revision))
        else:
            files = dict(discover(args.input))
    except SourceError as error:
        raise UsageError(f"{source_flag(args)} {error}") from None
    if args.splits is not None:
        unknown = [split for split in args.splits if split not in files]
        if unknown:
            known = ", ".join(name for name in files if name) or "none"
            raise UsageError(f"--splits {unknown[0]}: no such split in the input; it has {known}")
        files = {split: paths for split, paths in files.items() if split in args.splits}
    return files


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the machine failed (disk full), 2 a mistake in the flags or input, 130 Ctrl-C."""
    args = build_parser().parse_args(argv)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # a scheduler's kill saves the state as Ctrl-C does
    kept = "what is done is kept: the same command goes on from there"
    try:
        run(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"error: --output-prefix {args.output_prefix}: {error}; {kept}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: {kept}", file=sys.stderr)
        return 130
    except SystemExit:
        print(f"\nterminated: {kept}", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
