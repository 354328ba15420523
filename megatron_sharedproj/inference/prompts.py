"""Prompts from files, results to files, and the line that shows how far a long run is."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sharedproj.duration import format_duration


@dataclass(frozen=True)
class Prompt:
    """A prompt of the user.

    Attributes:
        text: what to continue; "" for the start of a document.
        where: how an error names it ("--prompt" or the file's line).
        extra: further keys of its JSON line, carried to the result.
    """

    text: str
    where: str
    extra: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a UTF-8 file: one per line, or one {"prompt": ...} per line where it ends in .jsonl.

    Blank lines are skipped, and so is a byte order mark. Lines end in LF or CRLF, at nothing else.

    Raises:
        ValueError: naming the file, and the line where one is wrong.
    """
    path = Path(path)
    name = f"--prompt-file {path}"
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text (byte {error.start}); convert it") from None
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror}); give a text or .jsonl file") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if line.strip():
            where = f"{name}, line {number}"
            parsed = _parse_json(line, where) if path.suffix == ".jsonl" else Prompt(line, where)
            prompts.append(parsed)
    if not prompts:
        raise ValueError(f"{name}: holds no prompt; write one per line")
    return prompts


def check_text(text: str, where: str) -> None:
    """Raise ValueError for half a surrogate pair: it has no UTF-8, so no tokenizer and no file takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start + 1} is not Unicode text ({text[error.start]!a}); give UTF-8"
        ) from None


def _parse_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
        again = json.dumps(record, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where}: not valid JSON ({error}); write {{"prompt": "..."}}') from None
    check_text(again, where)
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'{where}: no "prompt" with a text; write {{"prompt": "..."}}')
    return Prompt(record.pop("prompt"), where, record)


class JsonLines:
    """A .jsonl file that is written line by line, each one whole as soon as it is there.

    Where the disk is full, the half of a line that still fitted is taken back.
    """

    def __init__(self, path: Path):
        self.path = path
        self._size = 0
        self._file = path.open("wb", buffering=0)  # a buffer would be written again when it is closed

    def write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            with contextlib.suppress(OSError):  # what is no regular file cannot be cut
                self._file.truncate(self._size)
            raise
        self._size += written

    def close(self) -> None:
        self._file.close()


class ProgressLine:
    """Texts done, rate and time left: one line on stderr, rewritten; silent where that is no terminal."""

    def __init__(self, total: int):
        self._total, self._shown = total, 0.0
        self._enabled = sys.stderr.isatty()
        self._start = time.monotonic()

    def show(self, done: int, tokens: int) -> None:
        """Rewrite the line, at most twice a second but for the last text."""
        now = time.monotonic()
        if not self._enabled or (done < self._total and now - self._shown < 0.5):
            return
        self._shown = now
        seconds = max(now - self._start, 1e-9)
        left = format_duration((self._total - done) * seconds / done) if done else "?"
        line = f"{done:,}/{self._total:,} texts | {tokens / seconds:,.1f} tokens/s | ETA {left}"
        end = "\n" if done == self._total else ""
        print(f"\r\x1b[K{line}", end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away, for other output."""
        if self._enabled:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def check_output(path: Path | None, flag: str, suffixes: Sequence[str]) -> None:
    """Raise ValueError for an output file that could not be written later."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise ValueError(f"{flag} {path}: must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: {path.parent} is not a folder")
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder; give a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot be written; give another place")
