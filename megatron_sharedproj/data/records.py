"""Records of an input: what a usable document is, and what is wrong with the others.

A block is a cut of a file: whole JSON lines (bytes) or rows (a pyarrow RecordBatch). Parsing is a function of
one block, so that any number of processes can share a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

try:
    import orjson
except ImportError:  # ten times the time, the same documents
    orjson = None  # type: ignore[assignment]

UNKNOWN_SOURCE = "unknown"
SET_NAME = "redpajama_set_name"


class SourceError(ValueError):
    """An input that cannot be found or read; the message names the file (and line or row)."""


@dataclass(frozen=True)
class BadRecord:
    """A record without a usable document. `record` is the 1-based line or row; 0: the file as a whole."""

    path: str
    record: int
    kind: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.record}" if self.record else self.path
        return f"{place}: {self.reason}"


@dataclass(frozen=True)
class Block:
    """A cut of one file; `first_record` is the 1-based line or row of its start within what is being read."""

    path: str
    data: Any
    first_record: int


@dataclass
class Documents:
    """What a block holds: texts, the source of each, and the 1-based record of each, then the bad records."""

    texts: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)


class _Unusable(ValueError):
    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def parse_block(block: Block, text_key: str = "text") -> Documents:
    """Parse a block's records; those without a usable document are listed in `bad`, not raised."""
    documents = Documents()
    default_source = source_of_path(block.path)
    load: Callable[[Any], Any] = _load_line
    records: Iterable[Any]
    if isinstance(block.data, bytes):
        records = block.data.split(b"\n")
    else:
        records, load = _rows(block.data, text_key), lambda row: row
    for number, raw in enumerate(records, start=block.first_record):
        if not raw or (isinstance(raw, bytes) and raw.isspace()):
            continue
        try:
            record = load(raw)
            text = _text_of(record, text_key)
        except _Unusable as problem:
            documents.bad.append(BadRecord(block.path, number, problem.kind, str(problem)))
            continue
        documents.texts.append(text)
        documents.sources.append(_set_name(record) or default_source)
        documents.records.append(number)
    return documents


def source_of_path(path: str) -> str:
    """The source that a directory named RedPajama* gives, else "unknown"."""
    named = [part for part in PurePath(path).parts[:-1] if part.startswith("RedPajama")]
    return named[-1] if named else UNKNOWN_SOURCE


def _load_line(line: bytes) -> dict[str, Any]:
    record: Any
    try:
        record = orjson.loads(line)
    except (AttributeError, ValueError):
        # No orjson, or a line that it refuses: the standard library takes some (NaN) and says why not.
        record = _load_slowly(line)
    if not isinstance(record, dict):
        raise _Unusable("invalid_json", f"not a JSON object but a {type(record).__name__}")
    return record


def _load_slowly(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Unusable("invalid_utf8", f"invalid UTF-8 at byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        raise _Unusable("invalid_json", f"invalid JSON: {error}") from None


def _text_of(record: dict[str, Any], text_key: str) -> str:
    text = record.get(text_key)
    if text is None:
        raise _Unusable("missing_text", f"no {text_key!r} value (keys: {', '.join(list(record)[:8])})")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if not isinstance(text, str):
            raise _Unusable("non_string_text", f"{text_key!r} is a {type(text).__name__}, not a string")
        if not text.isascii():
            text.encode("utf-8")  # JSON can spell half of a surrogate pair, which no UTF-8 text holds
    except UnicodeError as error:
        raise _Unusable("invalid_utf8", f"{text_key!r} is not valid UTF-8 text: {error.args[-1]}") from None
    if not text:
        raise _Unusable("empty_document", f"{text_key!r} is empty")
    return text


def _set_name(record: dict[str, Any]) -> str | None:
    meta = record.get("meta", record)
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            return None
    name = meta.get(SET_NAME) if isinstance(meta, dict) else None
    return name if isinstance(name, str) and name else None


def _rows(batch: Any, text_key: str) -> Iterator[dict[str, Any]]:
    if isinstance(batch, list):  # of a streamed data set
        yield from batch
        return
    import pyarrow as pa

    column = batch.column(text_key)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # As bytes: pyarrow raises for the whole batch where one string is not UTF-8.
    texts = column.cast(pa.large_binary()).to_pylist()
    others = batch.drop_columns([text_key]).to_pylist() if batch.num_columns > 1 else [{}] * len(texts)
    for text, other in zip(texts, others, strict=True):
        yield {text_key: text, **other}
