"""What every command line here does alike: a user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
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


def list_of(kind: Callable[[str], object], choices: Sequence[str] = ()) -> Callable[[str], tuple[Any, ...]]:
    """An argparse type: values of a kind with commas between them, each once."""

    def parse(text: str) -> tuple[Any, ...]:
        values = [kind(part.strip()) for part in text.split(",")]
        for value in values:
            if choices and value not in choices:
                raise argparse.ArgumentTypeError(f"{value!r} is unknown; choose from {', '.join(choices)}")
        return tuple(dict.fromkeys(values))

    return parse


def positive_int(text: str) -> int:
    """An argparse type: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0; give one like 8")
    return int(text)


def positive_float(text: str) -> float:
    """An argparse type: above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0; give one like 2.5")
    return value


def print_error(message: object) -> None:
    """One line on stderr, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)


def run_experiment(
    parser: argparse.ArgumentParser, run: Callable[[Any], None], argv: Sequence[str] | None
) -> int:
    """``main`` of a long measurement in one process: exit code 0, 2 for a mistake or a failed part, 130 after
    Ctrl-C, with what the interrupt says is done."""
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt as interrupt:
        print_error(f"interrupted; {interrupt}")
        return 130
    return 0


def run_distributed(
    parser: argparse.ArgumentParser, run: Callable[[Any], None], argv: list[str] | None
) -> int:
    """``main`` of a tool that works alone or under torchrun: exit code 0, 2 for a mistake, 130 for Ctrl-C."""
    from megatron_sharedproj import distributed
    from megatron_sharedproj.quiet import quiet_libraries

    quiet_libraries()
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt as interrupt:
        print_error(f"interrupted; {interrupt}" if str(interrupt) else "interrupted")
        return 130
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
