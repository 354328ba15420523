"""Rows in the four formats: raw values for programs, formatted ones for people, files whole or not at all."""

from __future__ import annotations

import argparse
import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.profiling import tables
from megatron_sharedproj.profiling.tables import Column, Section, write_rows, write_sections

ROWS: list[dict[str, Any]] = [
    {"variant": "qkv", "macs": 39_476_789_248, "saved": 0.0, "equal": True, "sizes": [1, 2]},
    {"variant": "a|b", "macs": None, "saved": 6.8, "equal": False, "sizes": [], "extra": "x, y"},
]
COLUMNS = [
    Column("variant", "variant"),
    Column("macs", "GMACs", lambda value: f"{value / 1e9:.3f}"),
    Column("saved", "saved %", ".1f"),
    Column("equal", "equal"),
]


def arguments(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tables.add_output_arguments(parser)
    return parser.parse_args(line)


def test_a_table_is_aligned_with_its_notes_below(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(ROWS, COLUMNS, arguments(), ["full T^2"])
    assert capsys.readouterr().out.splitlines() == [
        "variant   GMACs  saved %  equal",
        "-------  ------  -------  -----",
        "qkv      39.477      0.0  yes",
        "a|b           -      6.8  no",
        "",
        "note: full T^2",
    ]


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(ROWS, COLUMNS, arguments("--format", "markdown"), ["full T^2"])
    assert capsys.readouterr().out.splitlines() == [
        "| variant | GMACs | saved % | equal |",
        "| --- | --: | --: | --- |",
        "| qkv | 39.477 | 0.0 | yes |",
        "| a\\|b | - | 6.8 | no |",
        "",
        "- full T^2",
    ]


def test_json_holds_all_keys_of_all_rows_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(ROWS, COLUMNS[:1], arguments("--format", "json"), ["full T^2"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [list(row) for row in found] == 2 * [["variant", "macs", "saved", "equal", "sizes", "extra"]]
    assert found == [{**ROWS[0], "extra": None}, ROWS[1]]
    assert captured.err == "note: full T^2\n"


def test_json_has_no_number_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": float("-inf")}, "path": Path("x")}
    write_rows([row], [], arguments("--format", "json"))
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == [{"a": None, "b": [None, 1.5], "c": {"d": None}, "path": "x"}]


def test_csv_holds_raw_values(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(ROWS, COLUMNS, arguments("--format", "csv"), ["full T^2"])
    first, second = csv.DictReader(capsys.readouterr().out.splitlines())
    assert list(first) == ["variant", "macs", "saved", "equal", "sizes", "extra"]
    assert list(first.values()) == ["qkv", "39476789248", "0.0", "True", "[1, 2]", ""]
    assert (second["macs"], second["extra"], second["sizes"]) == ("", "x, y", "[]")


def test_sections_show_parts_of_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    sections = [Section("First", ROWS[:1], COLUMNS[:1]), Section("Second", ROWS, COLUMNS[2:3])]
    write_sections(ROWS, sections, arguments())
    assert capsys.readouterr().out.splitlines() == [
        *("First", "", "variant", "-------", "qkv", ""),
        *("Second", "", "saved %", "-------", "    0.0", "    6.8"),
    ]
    write_sections(ROWS, sections, arguments("--format", "json"))
    assert len(json.loads(capsys.readouterr().out)) == 2


@pytest.mark.parametrize(
    "name, start", [("a.json", "["), ("a.csv", "variant,"), ("a.md", "| variant"), ("a.txt", "variant  ")]
)
def test_the_ending_chooses_the_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, start: str
) -> None:
    write_rows(ROWS, COLUMNS, arguments("--output", str(tmp_path / name)))
    assert (tmp_path / name).read_text().startswith(start)
    assert capsys.readouterr().out == f"{tmp_path / name}: 2 rows\n"
    write_rows(ROWS, COLUMNS, arguments("--output", str(tmp_path / name), "--format", "json"))
    assert (tmp_path / name).read_text().startswith("[")


def test_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows([], COLUMNS, arguments("--format", "json"))
    assert json.loads(capsys.readouterr().out) == []
    write_rows([], COLUMNS, arguments())
    assert capsys.readouterr().out.splitlines()[0].split() == ["variant", "GMACs", "saved", "%", "equal"]


def test_a_csv_of_given_columns_replaces_what_there_was(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [{"size": "10m", "note": "a, b"}, {"note": "", "size": "30m"}]
    for count in (1, 2):
        tables.write_csv(path, ("size", "note"), rows[:count])
    assert path.read_bytes() == b'size,note\n10m,"a, b"\n30m,\n'
    with pytest.raises(ValueError, match="other"):
        tables.write_csv(path, ("size", "note"), [{"other": "1"}])
    assert len(path.read_text().splitlines()) == 3


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "rows.json"
    target.write_text("before")

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_rows(ROWS, COLUMNS, arguments("--output", str(target)))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert target.read_text() == "before"


def test_where_nothing_could_be_written_is_an_error_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--output .*missing/rows\.csv: .*missing is not a folder"):
        tables.check_output(arguments("--output", str(tmp_path / "missing" / "rows.csv")))
    with pytest.raises(ValueError, match=r"--output .*: is a folder; give a file"):
        tables.check_output(arguments("--output", str(tmp_path)))
