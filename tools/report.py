#!/usr/bin/env python3
"""Write one report, HTML and Markdown, of comparisons that examples/compare_variants.sh trained.

Tables, plots and sentences are computed from the runs that are there; those that are missing are named.
Beside the report: its plots, figures.csv and figures.json, and copies of the runs' logs, settings,
evaluations and commands, to which its figures lead. It can be moved or committed as a whole.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, print_error

EXAMPLE = """examples:
  python tools/report.py comparison
  python tools/report.py comparison_packed comparison_padded --output-dir report
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a comparison's; several become chapters"
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where the report goes (default: FOLDER/report)"
    )
    parser.add_argument(
        "--no-records",
        action="store_true",
        help="no copies of the runs' records: link to FOLDER, which must then stay where it is",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Read the comparisons and write the report. ValueError for a mistake, before anything is written."""
    from megatron_sharedproj.reporting.comparison_report.pages import problems, write_report
    from megatron_sharedproj.reporting.comparison_report.reading import COMPARISON, read_comparison
    from megatron_sharedproj.reporting.figures import new_figure

    output: Path = args.output_dir or args.folders[0] / "report"
    places = [folder.resolve() for folder in args.folders]
    if len(set(places)) < len(places):
        raise ValueError(f"FOLDER {args.folders[0]}: a folder is given twice; leave one out")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output-dir {output}: is a file; give a folder")
    if (output / COMPARISON).exists():
        raise ValueError(f"--output-dir {output}: holds the runs themselves; give another folder")
    comparisons = [read_comparison(folder) for folder in args.folders]
    new_figure()  # says so if matplotlib is missing
    try:
        written = write_report(comparisons, output, copies=not args.no_records)
    except OSError as error:
        raise OSError(f"--output-dir {output}: cannot be written ({error}); give another folder") from None
    for comparison in comparisons:
        for line in problems(comparison):
            print(f"note: {line}", file=sys.stderr)
    print(", ".join(str(path) for path in written))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 if a file can't be written, 2 for a mistake in the flags or in comparison.json."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
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
