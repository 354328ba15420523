"""Rows as an aligned table, Markdown, CSV or JSON, on the terminal or in a file.

A row is a mapping. CSV and JSON hold every key of every row as it is (stable names, raw values); a table and
Markdown hold the columns that were chosen, formatted, and notes below.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sharedproj.config import write_text

FORMATS = ("table", "markdown", "csv", "json")
_BY_SUFFIX = {".md": "markdown", ".csv": "csv", ".json": "json"}
_ABSENT = "-"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the row; title: its heading.
        format: a format specification ("," or ".1f"), or a function from the value to text. None is shown
            as "-", True and False as yes and no.
    """

    key: str
    title: str
    format: str | Callable[[Any], str] = ""

    def text(self, row: Row) -> str:
        """What the table shows of a row."""
        value = row.get(self.key)
        if value is None:
            return _ABSENT
        if callable(self.format):
            return self.format(value)
        if isinstance(value, bool):
            return "yes" if value else "no"
        return format(value, "" if isinstance(value, str) else self.format)


@dataclass(frozen=True)
class Section:
    """A table with a title of its own: some columns of some rows."""

    title: str
    rows: Sequence[Row]
    columns: Sequence[Column]


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --format and --output."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--format", choices=FORMATS, help="default: by --output's ending (.json, .csv, .md), else table"
    )
    group.add_argument(
        "--output", type=Path, metavar="FILE", help="write here instead of printing; whole or not at all"
    )


def check_output(args: argparse.Namespace) -> None:
    """Choose the format, and refuse an output file that could not be written later.

    Raises:
        ValueError: naming the flag, the file and what would work.
    """
    path: Path | None = args.output
    args.format = args.format or (_BY_SUFFIX.get(path.suffix, "table") if path else "table")
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--output {path}: is a folder; give a file")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: {path.parent} is not a folder; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--output {path}: cannot be written; give another place")


def write_rows(
    rows: Sequence[Row], columns: Sequence[Column], args: argparse.Namespace, notes: Sequence[str] = ()
) -> None:
    """Print rows, or write them to --output, in --format.

    Args:
        columns: of the table and of Markdown; CSV and JSON have all keys.
        args: with the flags of :func:`add_output_arguments`.
        notes: lines below a table; beside CSV and JSON they go to stderr.
    Raises:
        ValueError: as :func:`check_output`; OSError: if the file cannot be written.
    """
    write_sections(rows, [Section("", rows, columns)], args, notes)


def write_sections(
    rows: Sequence[Row], sections: Sequence[Section], args: argparse.Namespace, notes: Sequence[str] = ()
) -> None:
    """As :func:`write_rows`, with the rows shown as several tables; CSV and JSON hold the rows."""
    check_output(args)
    if args.format == "json":
        text = json.dumps([_plain(row) for row in _complete(rows)], indent=2) + "\n"
    elif args.format == "csv":
        text = _csv(_complete(rows))
    else:
        show = _markdown if args.format == "markdown" else _table
        parts = [(f"{section.title}\n\n" if section.title else "") + show(section) for section in sections]
        parts += ["\n".join(_note(line, args.format) for line in notes) + "\n"] if notes else []
        text = "\n".join(parts)
    if args.format in ("json", "csv"):
        for line in notes:
            print(f"note: {line}", file=sys.stderr)
    if args.output is None:
        sys.stdout.write(text)
        return
    write_text(args.output, text)
    print(f"{args.output}: {len(rows)} rows")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write rows of text under a header of their columns, the file whole or not at all."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, file.getvalue())


def _note(line: str, kind: str) -> str:
    return f"- {line}" if kind == "markdown" else f"note: {line}"


def _complete(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same keys in every row, in the order in which they first appear."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def _plain(value: Any) -> Any:
    """What JSON can hold: it has no infinity and no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        nested = {key: isinstance(value, list | tuple | Mapping) for key, value in row.items()}
        writer.writerow(
            {key: json.dumps(_plain(value)) if nested[key] else value for key, value in row.items()}
        )
    return file.getvalue()


def _cells(section: Section) -> list[list[str]]:
    return [
        [column.title for column in section.columns],
        *([column.text(row) for column in section.columns] for row in section.rows),
    ]


def _numeric(section: Section) -> list[bool]:
    """Columns that are aligned to the right: those whose values are numbers."""
    return [
        any(isinstance(row.get(column.key), int | float) for row in section.rows)
        and not any(isinstance(row.get(column.key), bool | str) for row in section.rows)
        for column in section.columns
    ]


def _table(section: Section) -> str:
    cells, right = _cells(section), _numeric(section)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def _markdown(section: Section) -> str:
    head, *body = [[text.replace("|", "\\|") for text in line] for line in _cells(section)]
    rule = ["--:" if to_right else "---" for to_right in _numeric(section)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *body))
