"""Prompts and results in files: what a line is, and what a full disk leaves."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from megatron_sharedproj.inference.prompts import JsonLines, read_prompts


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_lines_end_in_lf_or_crlf_and_at_nothing_else(tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path / "a.txt", "one\r\n\n a\rb\u2028c\x85d \nlast".encode()))
    assert [prompt.text for prompt in found] == ["one", " a\rb\u2028c\x85d ", "last"]
    assert [prompt.where[-6:] for prompt in found] == ["line 1", "line 3", "line 4"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (found,) = read_prompts(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\n"))
    assert found.text == "one"
    (found,) = read_prompts(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"prompt": "one", "id": 3}\n'))
    assert (found.text, found.extra) == ("one", {"id": 3})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ' + "[" * 100_000, "line 2: not valid JSON"),
        ('{"prompt": "a", "id": ' + "1" * 5000 + "}", "line 2: not valid JSON"),
        ('{"prompt": "a\\ud800"}', "line 2: character 14 is not Unicode text"),
        ('{"prompt": "a", "id": ["\\udc00"]}', "line 2: character 25 is not Unicode text"),
        ('{"prompt": 3}', 'line 2: no "prompt" with a text'),
        ("null", 'line 2: no "prompt" with a text'),
    ],
    ids=["deep", "digits", "prompt", "other key", "number", "null"],
)
def test_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"prompt": "a"}}\n{line}\n'.encode())
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    lines = JsonLines(path)
    lines.write({"text": "\u65e5" * 10})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(OSError):
            lines.write({"text": "y" * 1000})
        lines.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert json.loads(before) == {"text": "\u65e5" * 10}
