#!/usr/bin/env python3
"""Check token files (.bin/.idx and manifest) and show what is in them."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, UsageError, add_tokenizer_flags, print_error

if TYPE_CHECKING:
    from megatron_sharedproj.data.inspection import Report
    from megatron_sharedproj.data.tokenizers import Tokenizer

EXAMPLE = """
example:
  python tools/inspect_data.py data/slimpajama_train_text_document --seq-length 2048 --plot lengths.png
  python tools/inspect_data.py data/slimpajama_validation_text_document --tokenizer-model gpt2 --samples 3
  python tools/inspect_data.py data/slimpajama_train_text_document --tokenizer-model gpt2 --search Lovelace

PREFIX is the path of a pair without .bin and .idx. Exit code: 0 sound, 1 damaged, 2 a mistake in the flags.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line; tokenizer flags are those of tools/preprocess_slimpajama.py."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="token file, without .bin")
    group = parser.add_argument_group("checks")
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="ids must be below N (default: the manifest's)"
    )
    group.add_argument(
        "--eod", type=int, metavar="ID", help="documents end with ID (default: the manifest's)"
    )
    group.add_argument("--allow-empty", action="store_true", help="documents without tokens are no fault")
    group.add_argument("--no-checksums", action="store_true", help="do not compare sha256 with the manifest")
    group = parser.add_argument_group("what to show")
    group.add_argument("--seq-length", type=int, metavar="N", help="show the share of longer documents")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="histogram of document lengths")
    group.add_argument("--samples", type=int, metavar="N", help="decode N random documents")
    group.add_argument("--seed", type=int, default=0, help="of the random choice (default 0)")
    group.add_argument(
        "--sample-chars", type=int, default=500, metavar="N", help="show N characters each (default 500)"
    )
    group.add_argument("--document", type=int, metavar="I", help="decode document I, whole")
    group.add_argument("--search", metavar="TEXT", help="find documents that hold the text")
    group.add_argument(
        "--max-results", type=int, default=10, metavar="N", help="end the search after N (default 10)"
    )
    group.add_argument("--json", action="store_true", help="print everything as JSON")
    group = parser.add_argument_group("tokenizer, to decode; it must be the one that made the file")
    add_tokenizer_flags(group)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """What needs no file. Raises UsageError with the flag, the value and a remedy."""
    least = {"vocab_size": 1, "eod": 0, "seq_length": 1, "samples": 1, "seed": 0, "sample_chars": 1}
    for name, minimum in {**least, "document": 0, "max_results": 1}.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be {minimum} or more")
    if args.search == "":
        raise UsageError('--search "": no text to look for; give some')
    for index, prefix in enumerate(args.prefixes):
        if prefix in args.prefixes[:index]:
            raise UsageError(f"PREFIX {prefix}: given twice; leave one out")
        if any(Path(prefix + suffix).is_file() for suffix in (".bin", ".idx")):
            continue
        stem = prefix.removesuffix(".bin").removesuffix(".idx").removesuffix(".json")
        hint = f"give {stem}" if stem != prefix else "give the path of a pair without .bin"
        raise UsageError(f"PREFIX {prefix}: neither {prefix}.bin nor {prefix}.idx exists; {hint}")
    if args.plot:
        from megatron_sharedproj.reporting.figures import check_plot

        check_plot(args.plot)


def tokenizer_of(args: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer of the flags, checked against the manifests; None where no flag asks for one.

    Raises:
        ValueError: if it cannot be built, is needed and not given, or made none of the files.
    """
    from megatron_sharedproj.data import manifest
    from megatron_sharedproj.data.inspection import check_tokenizer
    from megatron_sharedproj.data.tokenizers import build_tokenizer

    files = (args.tokenizer_model, args.vocab_file, args.merge_file)
    if not any(files) and args.tokenizer_type == "HuggingFaceTokenizer":
        for flag in ("samples", "document", "search"):
            if getattr(args, flag) is not None:
                raise UsageError(
                    f"--{flag} {getattr(args, flag)}: needs the tokenizer; give --tokenizer-model DIR"
                )
        return None
    tokenizer = build_tokenizer(args.tokenizer_type, *files, args.vocab_size)
    for prefix in args.prefixes:
        try:
            found = manifest.load(prefix)
        except ValueError:
            continue  # a fault of the file, which the inspection reports
        if found is not None:
            check_tokenizer(found, prefix, tokenizer.vocab_size, tokenizer.sha256)
    return tokenizer


def check_document(args: argparse.Namespace) -> None:
    """Raises UsageError for a --document that a readable file does not have."""
    from megatron_sharedproj.data.token_file import open_indexed

    for prefix in args.prefixes if args.document is not None else ():
        try:
            documents = open_indexed(prefix).documents
        except ValueError:
            continue
        if args.document >= documents:
            raise UsageError(
                f"--document {args.document}: {prefix} has documents 0 to {documents - 1}; give one of them"
            )


def texts_of(report: Report, tokenizer: Tokenizer | None, args: argparse.Namespace) -> dict[str, Any]:
    """Samples, the document and search results as JSON values; none of a damaged index."""
    from megatron_sharedproj.data.documents import decode_document, sample_documents, search_documents

    file = report.file
    if tokenizer is None:
        return {}
    if file is None or report.lengths is None:
        report.not_checked.append("text: the index is damaged, so no document is decoded")
        return {}
    found: dict[str, Any] = {}
    if args.samples is not None:
        found["samples"] = [
            {"document": index, "text": decode_document(file, index, tokenizer, args.sample_chars)}
            for index in sample_documents(file, args.samples, args.seed)
        ]
    if args.document is not None:
        text = decode_document(file, args.document, tokenizer)
        found["document"] = {"document": args.document, "text": text}
    if args.search is not None:
        matches = itertools.islice(search_documents(file, args.search, tokenizer), args.max_results)
        found["search"] = {"text": args.search, "matches": [vars(match) for match in matches]}
        found["search"]["complete"] = len(found["search"]["matches"]) < args.max_results
    return found


def run(args: argparse.Namespace) -> int:
    """Check the flags, inspect each file, show. Raises ValueError with the flag, the value and a remedy."""
    from megatron_sharedproj.data.inspection import InspectionOptions, inspect_indexed, report_dict
    from megatron_sharedproj.reporting.data_report import report_lines

    check_flags(args)
    tokenizer = tokenizer_of(args)
    check_document(args)
    sizes = [args.vocab_size, tokenizer.vocab_size if tokenizer is not None else None]
    options = InspectionOptions(
        vocab_size=min((size for size in sizes if size is not None), default=None),
        eod=args.eod,
        allow_empty=args.allow_empty,
        checksums=not args.no_checksums,
        seq_length=args.seq_length,
    )
    reports, results = [], []
    for prefix in args.prefixes:
        report = inspect_indexed(prefix, options)
        texts = texts_of(report, tokenizer, args)
        reports.append(report)
        results.append({**report_dict(report), **texts})
        if not args.json:
            print("\n".join(report_lines(report, texts)))
    sound = all(report.sound for report in reports)
    if args.json:
        print(json.dumps({"sound": sound, "files": results}, indent=2))
    if args.plot:
        draw(reports, args)
    return 0 if sound else 1


def draw(reports: list[Report], args: argparse.Namespace) -> None:
    """The histogram, of the files whose index is sound."""
    from megatron_sharedproj.reporting.length_plot import plot_lengths

    names = {report.prefix: Path(report.prefix).name for report in reports}
    if len(set(names.values())) < len(names):
        names = {prefix: prefix for prefix in names}
    lengths = {names[report.prefix]: report.lengths for report in reports if report.lengths is not None}
    if not any(item.max for item in lengths.values()):
        print_error(f"--plot {args.plot}: not drawn, for no file has a sound index and tokens")
        return
    plot_lengths(lengths, args.plot)
    print(f"{args.plot}: lengths of {len(lengths)} file(s)", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 sound, 1 damaged or unreadable, 2 a mistake in the flags, 130 Ctrl-C."""
    args = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # decoded text on an ASCII terminal
    try:
        return run(args)
    except ValueError as error:
        print_error(error)
        return 2
    except OSError as error:
        print_error(f"{error.filename or ' '.join(args.prefixes)}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
