"""Raw documents: find input files and read them as a stream, in bounded memory.

A file is read as blocks (about 1 MB of whole JSON lines, or a batch of parquet rows). The reader only
decompresses and cuts; parsing is a function of one block, so that any number of processes can share it.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.zst", ".zst", ".parquet")
UNKNOWN_SOURCE = "unknown"
_SPLITS = dict(train="train", validation="validation", valid="validation", val="validation", test="test")
# Hugging Face Hub's shard names (train-00000-of-00048.parquet) carry the split where no directory does.
_SHARD_NAME = re.compile(r"^(train|validation|valid|val|test)-\d+-of-\d+\b")
_BLOCK_BYTES = 1 << 20
_MAX_LINE_BYTES = 1 << 28
_PARQUET_ROWS = 256
_SET_NAME = "redpajama_set_name"


class SourceError(ValueError):
    """An input that cannot be found or read; the message names the file (and line or row)."""


@dataclass(frozen=True)
class BadRecord:
    """A record without a usable document. `record` is the 1-based line or parquet row."""

    path: str
    record: int
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.record}: {self.reason}"


@dataclass(frozen=True)
class Block:
    """A cut of one file: whole JSON lines (bytes) or rows (a pyarrow RecordBatch), pickled to workers.

    `first_record` is the 1-based line or row of its start, `position` the file bytes consumed up to its end.
    """

    path: str
    data: Any
    first_record: int
    position: int


@dataclass
class Documents:
    """What a block holds: texts, the source of each, and the 1-based record of each, then the bad records."""

    texts: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)


def discover(inputs: Sequence[str | Path]) -> dict[str, list[Path]]:
    """Find the input files of each split, in natural order (chunk2 before chunk10) within each input.

    The split is the first path component named train, validation (valid, val) or test, from the input
    directory's own name on; else that of a Hub shard name (train-00000-of-00048.parquet); else "" (none).

    Raises SourceError for a missing input, one without readable files, a file given twice, or a mix of files
    with and without a split.
    """
    splits: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for path in (Path(item) for item in inputs):
        if path.is_dir():
            found = sorted(_walk(path), key=lambda file: _natural_key(file.relative_to(path)))
            if not found:
                raise SourceError(f"{path}: no {', '.join(EXTENSIONS)} file in this directory")
        elif path.is_file():
            if not path.name.endswith(EXTENSIONS):
                raise SourceError(f"{path}: unknown extension; use {', '.join(EXTENSIONS)}")
            found = [path]
        else:
            raise SourceError(f"{path}: no such file or directory")
        for file in found:
            identity = os.path.realpath(file)
            if identity in seen:
                raise SourceError(f"{file}: given twice; remove one of the two inputs")
            seen.add(identity)
            splits.setdefault(_split_of(path, file), []).append(file)
    if "" in splits and len(splits) > 1:
        raise SourceError(
            f"{splits[''][0]}: outside of any split directory, while other inputs are in"
            f" {', '.join(sorted(name for name in splits if name))}; move it or run them separately"
        )
    return splits


def read_documents(
    path: str | Path, text_key: str = "text", on_error: Callable[[BadRecord], None] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (text, source) of each document of a file, in order.

    `source` is meta.redpajama_set_name, else a directory named RedPajama*, else "unknown".
    A bad record raises SourceError with `file:line: reason`, or goes to `on_error` and is skipped. A missing,
    unreadable or truncated file always raises SourceError.
    """
    for block in read_blocks(path, text_key):
        documents = parse_block(block, text_key)
        for bad in documents.bad:
            if on_error is None:
                raise SourceError(str(bad))
            on_error(bad)
        yield from zip(documents.texts, documents.sources, strict=True)


def read_blocks(path: str | Path, text_key: str = "text") -> Iterator[Block]:
    """Yield the blocks of a file in order. Raises SourceError naming the file if it cannot be read whole."""
    name = str(path)
    try:
        with open(path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise SourceError(f"{name}: file is empty (0 bytes)")
            if name.endswith(".parquet"):
                yield from _parquet_blocks(name, stream, text_key)
            else:
                yield from _line_blocks(name, stream)
    except OSError as error:  # gzip.BadGzipFile is one too
        raise SourceError(f"{name}: cannot be read: {error.strerror or error}") from error


def parse_block(block: Block, text_key: str = "text") -> Documents:
    """Parse a block's records; those without a usable document are listed in `bad`, not raised."""
    documents = Documents()
    default_source = _source_of_path(block.path)
    is_lines = isinstance(block.data, bytes)
    records: Iterable[Any] = block.data.split(b"\n") if is_lines else _rows(block.data, text_key)
    for number, raw in enumerate(records, start=block.first_record):
        if is_lines and not raw.strip():
            continue
        try:
            record = _load_line(raw) if is_lines else raw
            text = _text_of(record, text_key)
        except _Unusable as problem:
            documents.bad.append(BadRecord(block.path, number, problem.kind, str(problem)))
            continue
        documents.texts.append(text)
        documents.sources.append(_set_name(record) or default_source)
        documents.records.append(number)
    return documents


class _Unusable(ValueError):
    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _load_line(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Unusable("invalid_utf8", f"invalid UTF-8 at byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        raise _Unusable("invalid_json", f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        raise _Unusable("invalid_json", f"not a JSON object but a {type(record).__name__}")
    return record


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
    name = meta.get(_SET_NAME) if isinstance(meta, dict) else None
    return name if isinstance(name, str) and name else None


def _source_of_path(path: str) -> str:
    named = [part for part in Path(path).parts[:-1] if part.startswith("RedPajama")]
    return named[-1] if named else UNKNOWN_SOURCE


def _line_blocks(name: str, stream: IO[bytes]) -> Iterator[Block]:
    if name.endswith(".zst"):
        chunks = _zstd_chunks(name, stream)
    elif name.endswith(".gz"):
        chunks = _gzip_chunks(name, stream)
    else:
        chunks = iter(lambda: stream.read(_BLOCK_BYTES), b"")
    held: list[bytes] = []
    first, held_bytes = 1, 0
    for chunk in chunks:
        if first == 1 and not held:
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is not part of the JSON
        end = chunk.rfind(b"\n") + 1
        if held_bytes + len(chunk) < _BLOCK_BYTES or not end:
            held.append(chunk)
            held_bytes += len(chunk)
            if held_bytes > _MAX_LINE_BYTES:
                raise SourceError(f"{name}:{first}: line over {_MAX_LINE_BYTES >> 20} MiB; is it JSON lines?")
            continue
        data = b"".join([*held, chunk[:end]])
        yield Block(name, data, first, stream.tell())
        first += data.count(b"\n")
        held, held_bytes = [chunk[end:]], len(chunk) - end
    if held_bytes:
        yield Block(name, b"".join(held), first, stream.tell())


def _gzip_chunks(name: str, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=stream) as file:
            yield from iter(lambda: file.read(_BLOCK_BYTES), b"")
    except EOFError:
        raise SourceError(f"{name}: truncated gzip file; fetch it again") from None
    except zlib.error as error:
        raise SourceError(f"{name}: damaged gzip file ({error}); fetch it again") from None


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise SourceError(f"{name}: reading it needs {package}; install the [data] extra") from None


def _zstd_chunks(name: str, stream: IO[bytes]) -> Iterator[bytes]:
    zstandard = _library("zstandard", name)
    # stream_reader() ends quietly in the middle of a frame; only decompressobj() can tell a truncated file.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    try:
        while data := stream.read(_BLOCK_BYTES // 8):
            while data:
                frame = frame or decompressor.decompressobj()
                output = frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
                if output:
                    yield output
    except zstandard.ZstdError as error:
        raise SourceError(f"{name}: damaged zstd file ({error}); fetch it again") from None
    if frame is not None:
        raise SourceError(f"{name}: truncated zstd file; fetch it again")


def _parquet_blocks(name: str, stream: IO[bytes], text_key: str) -> Iterator[Block]:
    pa, pq = _library("pyarrow", name), _library("pyarrow.parquet", name)
    size = os.fstat(stream.fileno()).st_size
    try:
        file = pq.ParquetFile(stream)
        columns = _parquet_columns(name, file.schema_arrow, text_key)
        total, done = max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            yield Block(name, batch, done + 1, size * (done + batch.num_rows) // total)
            done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"{name}: damaged or truncated parquet file ({reason}); fetch it again") from None


def _parquet_columns(name: str, schema: Any, text_key: str) -> list[str]:
    """The text column and, where there is one, the column (or only the field) of the set name."""
    import pyarrow as pa

    if text_key not in schema.names:
        raise SourceError(f"{name}: no column {text_key!r}; it has {', '.join(schema.names)}")
    kind = schema.field(text_key).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise SourceError(f"{name}: column {text_key!r} is {kind}, not a string")
    if _SET_NAME in schema.names:
        return [text_key, _SET_NAME]
    if "meta" not in schema.names:
        return [text_key]
    meta = schema.field("meta").type
    if not pa.types.is_struct(meta):
        return [text_key, "meta"]
    return [text_key, f"meta.{_SET_NAME}"] if meta.get_field_index(_SET_NAME) >= 0 else [text_key]


def _rows(batch: Any, text_key: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    column = batch.column(text_key)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # As bytes: pyarrow raises for the whole batch where one string is not UTF-8.
    texts = column.cast(pa.large_binary()).to_pylist()
    others = batch.drop_columns([text_key]).to_pylist() if batch.num_columns > 1 else [{}] * len(texts)
    for text, other in zip(texts, others, strict=True):
        yield {text_key: text, **other}


def _walk(root: Path) -> Iterator[Path]:
    """Input files under root; hidden ones are skipped, links followed once (Hub caches are links)."""
    visited: set[str] = set()
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        identity = os.path.realpath(directory)
        if identity in visited:
            subdirectories.clear()
            continue
        visited.add(identity)
        subdirectories[:] = [item for item in subdirectories if not item.startswith(".")]
        for name in names:
            if name.endswith(EXTENSIONS) and not name.startswith("."):
                yield Path(directory, name)


def _natural_key(path: Path) -> list[list[tuple[int, int, str]]]:
    pieces = [re.split(r"(\d+)", part) for part in path.parts]
    return [[(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in piece if p] for piece in pieces]


def _split_of(root: Path, file: Path) -> str:
    """Split of a file found under the input `root` (or of a file given by itself)."""
    inside = file.relative_to(root).parts[:-1]
    for part in () if file == root else (Path(os.path.abspath(root)).name, *inside):
        if part in _SPLITS:
            return _SPLITS[part]
    shard = _SHARD_NAME.match(file.name)
    return _SPLITS[shard.group(1)] if shard else ""
