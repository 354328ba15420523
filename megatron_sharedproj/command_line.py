"""What every command line here does alike: a user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class UsageError(ValueError):
    """A mistake of the user: printed as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that shows examples as they are and reports a mistake in one line."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        print_error(f"{message.removeprefix('argument ')}; see --help")
        self.exit(2)


def print_error(message: object) -> None:
    """One line on stderr, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)


def run_distributed(
    parser: argparse.ArgumentParser, run: Callable[[Any], None], argv: list[str] | None
) -> int:
    """``main`` of a tool that works alone or under torchrun: exit code 0, or 2 for a mistake."""
    from megatron_sharedproj import distributed
    from megatron_sharedproj.quiet import quiet_libraries

    quiet_libraries()
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print_error(error)
        return 2
    finally:
        distributed.finalize()
    return 0


def add_tokenizer_flags(group: Any) -> None:
    """The flags of build_tokenizer that tools share; `group` is a parser or a group of one."""
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
