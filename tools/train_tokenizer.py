#!/usr/bin/env python3
"""Train a byte-level BPE on the train split of some text; writes a Hugging Face tokenizer directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser

EXAMPLE = """
example:
  python tools/train_tokenizer.py --input corpus --vocab-size 8192 --output tokenizer
  then pass --tokenizer-model tokenizer to tools/preprocess_slimpajama.py.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="trees, directories or files"
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="ids, EOS included (257 or more)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key or column of the text")
    parser.add_argument("--max-documents", type=int, metavar="N", help="stop reading after N documents")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    return parser


def documents(paths: list[Path], text_key: str, limit: int | None) -> Iterator[str]:
    """Texts of the files, the first `limit` of them. Raises SourceError at a bad record."""
    from megatron_sharedproj.data.readers import read_documents

    count = 0
    for path in paths:
        for text, _ in read_documents(path, text_key):
            if limit is not None and count >= limit:
                return
            count += 1
            yield text


def run(args: argparse.Namespace) -> str | None:
    """Train; returns the error line of a mistake in the flags or input, or None."""
    from megatron_sharedproj.data.records import SourceError
    from megatron_sharedproj.data.sources import discover
    from megatron_sharedproj.data.tokenizers import train_bpe

    if args.vocab_size < 257:
        return f"--vocab-size {args.vocab_size}: below 256 bytes and EOS; use 257 or more"
    if (Path(args.output) / "tokenizer.json").exists() and not args.overwrite:
        return f"--output {args.output}: holds a tokenizer.json; use another directory or --overwrite"
    try:
        splits = discover(args.input)
        paths = splits.get("train") or splits.get("")
        if not paths:
            return f"--input {args.input[0]}: no train split (it has {', '.join(splits)}); add one"
        tokenizer = train_bpe(
            documents(paths, args.json_key, args.max_documents), args.vocab_size, args.output
        )
    except SourceError as error:
        return f"--input {error}; fix or remove it"
    print(tokenizer.describe())
    return None


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the machine failed (disk full), 2 a mistake in the flags or input, 130 Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        problem = run(args)
    except OSError as error:
        print(f"error: --output {args.output}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: no tokenizer was written", file=sys.stderr)
        return 130
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
    return 0 if problem is None else 2


if __name__ == "__main__":
    sys.exit(main())
