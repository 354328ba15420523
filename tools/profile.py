#!/usr/bin/env python3
"""What a model costs: the paper's tables, memory, cache, and the time of a training step."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent
# Python puts a script's folder first in sys.path, where this file would be everybody's `profile`: cProfile
# imports that, and torch imports cProfile.
_ELSEWHERE = [entry for entry in sys.path if Path(entry).resolve() != _FOLDER]
if __name__ == "profile":
    # Another tool of this folder was started, and something imported Python's module: here it is.
    _spec = PathFinder.find_spec(__name__, _ELSEWHERE)
    assert _spec is not None and _spec.loader is not None
    sys.modules[__name__] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
elif __name__ in ("__main__", "__mp_main__"):
    sys.path[:] = _ELSEWHERE

COMMANDS = {
    "paper": "the paper's analytical tables, beside the released figures",
    "kv-cache": "bytes of the key/value cache, beside those of a live cache",
    "memory": "what a training run needs per GPU",
    "plan": "which variants, groups and batches fit on a GPU, and what they cost",
    "step": "where the time of a training step goes, with a Chrome trace",
    "compare": "two saved runs of step side by side",
    "roofline": "prefill and decode against a GPU's peak and bandwidth",
}


def build_parser(command: str = "") -> Any:
    """The command line.

    Args:
        command: the one whose flags are wanted, so that the others' libraries are not loaded; empty: all.
    """
    from megatron_sharedproj.command_line import Parser

    parser = Parser(prog="profile.py", description=__doc__, epilog="profile.py COMMAND --help: its flags")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        own = commands.add_parser(name, help=summary)
        if command in ("", name):
            module = _module(name)
            own.description = module.__doc__
            module.add_arguments(own)
    return parser


def _module(command: str) -> Any:
    name = command.replace("-", "_")
    return importlib.import_module(f"megatron_sharedproj.profiling.commands.{name}")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 if a file could not be written, 2 for a mistake in the flags, 130 when interrupted."""
    try:
        import megatron_sharedproj  # noqa: F401
    except ModuleNotFoundError:  # a bare clone
        sys.path.insert(0, str(_FOLDER.parent))
    from megatron_sharedproj.command_line import print_error
    from megatron_sharedproj.profiling.tables import check_output
    from megatron_sharedproj.quiet import quiet_libraries

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages; read when torch is imported
    quiet_libraries()
    argv = sys.argv[1:] if argv is None else argv
    # Anything but a command loads none of them: the list, or an error, comes at once.
    parser = build_parser(argv[0] if argv else "-")
    args = parser.parse_args(argv)
    try:
        if hasattr(args, "output"):
            check_output(args)
        _module(args.command).run(args)
    except ValueError as error:
        print_error(error)
        return 2
    except OSError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
