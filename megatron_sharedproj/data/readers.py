"""Reading a file in units, in bounded memory, so that processes can share it and a run can resume.

A unit is about 32 MiB of text: the lines that start within it, or as many row groups, batches or rows. Units
depend on the file alone, so the tokens do not depend on who reads which. A compressed file is decompressed by
each process that shares it, forwards and once: that costs less than passing its text between processes.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_sharedproj.data.hub import HubShard
from megatron_sharedproj.data.records import SET_NAME, BadRecord, Block, SourceError, parse_block

UNIT_BYTES = 32 << 20
BLOCK_BYTES = 2 << 20
MAX_LINE_BYTES = 1 << 28
_READ_BYTES = 1 << 18
_BLOCK_ROWS = 256

Input = Path | HubShard


class FileProblem(SourceError):
    """A file that cannot be read (any further); `kind` is what it is counted under."""

    def __init__(self, kind: str, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.kind = kind
        self.reason = reason


class UnitReader(ABC):
    """Reads units of one file in ascending order.

    Attributes:
        ended: the file is known to hold nothing behind the unit that was read last.
        problem: why it ended before its end, or None.
        overlong: (record, reason) of lines of the last unit that were passed over.
        records: lines or rows of the last unit so far, bad ones included.
        position: bytes of the file consumed so far, for progress.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.ended = False
        self.problem: FileProblem | None = None
        self.overlong: list[tuple[int, str]] = []
        self.records = 0

    def unit(self, index: int) -> Iterator[Block]:
        """The blocks of a unit; `index` is at least the one after the last. May be empty."""
        self.records, self.overlong = 0, []
        try:
            for data, count in self._unit(index):
                yield Block(self.path, data, self.records + 1)
                self.records += count
        except FileProblem as problem:
            self.problem, self.ended = problem, True
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            self.problem, self.ended = FileProblem("unreadable_file", self.path, reason), True

    def blocks(self) -> Iterator[Block]:
        """All blocks of the file, numbered through. Raises what is wrong with it."""
        first, index = 0, 0
        while not self.ended:
            for block in self.unit(index):
                yield Block(block.path, block.data, first + block.first_record)
            for record, reason in self.overlong:
                raise SourceError(f"{self.path}:{first + record}: {reason}")
            first += self.records
            index += 1
        if self.problem is not None:
            raise self.problem

    @abstractmethod
    def _unit(self, index: int) -> Iterator[tuple[Any, int]]:
        """Blocks of data and their number of records; sets `ended`."""

    @property
    @abstractmethod
    def position(self) -> int: ...

    def sha256(self) -> str | None:
        """Digest of the file if it was read from its first byte to its last, in order; else None."""
        return None

    def close(self) -> None:  # noqa: B027  a shard of a streamed data set has nothing to close
        """Give the file back."""


def open_reader(source: Input, text_key: str = "text", unit_bytes: int = UNIT_BYTES) -> UnitReader:
    """The reader of a file by its name. Raises FileProblem where it cannot even be opened."""
    if isinstance(source, HubShard):
        return _RowReader(source, unit_bytes)
    try:
        if source.stat().st_size == 0:
            raise FileProblem("empty_file", str(source), "file is empty (0 bytes)")
        if source.name.endswith(".parquet"):
            return _ParquetReader(source, text_key, unit_bytes)
        if source.name.endswith(".arrow"):
            return _ArrowReader(source, text_key, unit_bytes)
        return _LineReader(source, unit_bytes)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        raise FileProblem("unreadable_file", str(source), reason) from error


def read_documents(
    path: str | Path, text_key: str = "text", on_error: Callable[[BadRecord], None] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (text, source) of each document of a file, in order.

    `source` is meta.redpajama_set_name, else a directory named RedPajama*, else "unknown".
    A bad record raises SourceError with `file:line: reason`, or goes to `on_error` and is skipped. A missing,
    unreadable or truncated file always raises SourceError.
    """
    reader = open_reader(Path(path), text_key)
    try:
        for block in reader.blocks():
            documents = parse_block(block, text_key)
            for bad in documents.bad:
                if on_error is None:
                    raise SourceError(str(bad))
                on_error(bad)
            yield from zip(documents.texts, documents.sources, strict=True)
    finally:
        reader.close()


def sha256_of(path: Path) -> str:
    """Digest of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _LineReader(UnitReader):
    """JSON lines, plain or compressed. Unit k holds the lines that start at bytes [k, k + 1) x unit_bytes."""

    def __init__(self, path: Path, unit_bytes: int) -> None:
        super().__init__(str(path))
        self._unit_bytes = unit_bytes
        self._stream = open(path, "rb")  # noqa: SIM115  closed by close()
        self._size = os.fstat(self._stream.fileno()).st_size
        self._digest = hashlib.sha256()
        self._digested = 0
        self._compressed = path.name.endswith((".zst", ".gz"))
        if path.name.endswith(".zst"):
            self._chunks = _zstd_chunks(self.path, self._read)
        elif path.name.endswith(".gz"):
            self._chunks = _gzip_chunks(self.path, self._read)
        else:
            self._chunks = iter(lambda: self._read(_READ_BYTES), b"")
        self._buffer = b""
        self._offset = 0  # of the buffer's first byte in the text; a line starts there
        self._exhausted = False
        self._failure: FileProblem | None = None

    @property
    def position(self) -> int:
        return self._stream.tell() - (0 if self._compressed else len(self._buffer))

    def sha256(self) -> str | None:
        return self._digest.hexdigest() if self._digested == self._size else None

    def close(self) -> None:
        self._stream.close()

    def _read(self, size: int) -> bytes:
        start = self._stream.tell()
        data = self._stream.read(size)
        if start == self._digested:
            self._digest.update(data)
            self._digested += len(data)
        return data

    def _chunk(self) -> bytes:
        try:
            data = next(self._chunks, b"")
        except FileProblem as problem:  # told when the whole lines before it have been read
            self._failure, data = problem, b""
        self._exhausted = not data
        return data

    def _unit(self, index: int) -> Iterator[tuple[bytes, int]]:
        self._skip_to(index * self._unit_bytes)
        end = (index + 1) * self._unit_bytes
        while data := self._lines(end):
            yield data, data.count(b"\n") + (not data.endswith(b"\n"))
        if not self._buffer and not self._exhausted:
            self._buffer = self._chunk()
        self.ended = self._exhausted and not self._buffer
        if self.ended and self._failure is not None:
            raise self._failure

    def _skip_to(self, start: int) -> None:
        """To the first line that starts at `start` or behind."""
        if self._offset >= start:
            return
        before = start - 1  # a line starts behind the first newline from here on
        if not self._compressed and before > self._offset + len(self._buffer):
            self._stream.seek(before)
            self._buffer, self._offset = b"", before
        while True:
            newline = self._buffer.find(b"\n", max(0, before - self._offset))
            if newline >= 0:
                self._drop(newline + 1)
                return
            self._drop(len(self._buffer))
            self._buffer = self._chunk()
            if self._exhausted:
                return

    def _drop(self, count: int) -> None:
        self._buffer = self._buffer[count:]
        self._offset += count

    def _lines(self, end: int) -> bytes:
        """The next whole lines that start before `end`, about BLOCK_BYTES; empty where there are none."""
        pieces, size = [self._buffer], len(self._buffer)
        while self._offset < end:
            last = end - 1 - self._offset  # the newline at this byte or the first one behind it ends the unit
            if size > last or size >= BLOCK_BYTES:
                data = b"".join(pieces)
                cut = data.find(b"\n", last) if size > last else -1
                cut = cut + 1 if cut >= 0 else data.rfind(b"\n", 0, last + 1) + 1
                if cut:
                    self._buffer, self._offset = data[cut:], self._offset + cut
                    return self._block(data[:cut])
                if size > MAX_LINE_BYTES:
                    self._pass_over(data)
                    pieces, size = [self._buffer], len(self._buffer)
                    continue
                pieces = [data]
            # A line longer than a block is read in ever larger steps: joining it would take quadratic time.
            more: list[bytes] = []
            wanted = max(_READ_BYTES, size)
            while wanted > 0 and (chunk := self._chunk()):
                more.append(chunk)
                wanted -= len(chunk)
            pieces += more
            size += sum(map(len, more))
            if self._exhausted:
                data = b"".join(pieces)
                if self._failure is not None:  # half a line is none
                    data = data[: data.rfind(b"\n") + 1]
                self._buffer = data
                if not data:
                    break
                newline = data.find(b"\n", max(0, end - 1 - self._offset))
                cut = newline + 1 if newline >= 0 else len(data)
                self._buffer, self._offset = data[cut:], self._offset + cut
                return self._block(data[:cut])
        else:
            self._buffer = b"".join(pieces)
        return b""

    def _block(self, data: bytes) -> bytes:
        """Lines without a byte-order mark, which is no JSON; an overlong one leaves an empty line behind."""
        if self._offset == len(data):
            data = data.removeprefix(b"\xef\xbb\xbf")
        if len(data) > MAX_LINE_BYTES:
            lines = data.split(b"\n")
            for index, line in enumerate(lines):
                if len(line) > MAX_LINE_BYTES:
                    self._note_overlong(self.records + index + 1)
                    lines[index] = b"" if index + 1 < len(lines) else b"\n"
            data = b"\n".join(lines)
        return data

    def _pass_over(self, data: bytes) -> None:
        """Drop the line that starts the buffer, which is too long to be one."""
        self._offset += len(data)
        while (newline := (data := self._chunk()).find(b"\n")) < 0 and not self._exhausted:
            self._offset += len(data)
        self._buffer = data
        self._drop(newline + 1)
        if newline >= 0 or self._failure is None:  # half a line is none
            self.records += 1
            self._note_overlong(self.records)

    def _note_overlong(self, record: int) -> None:
        self.overlong.append((record, f"line over {MAX_LINE_BYTES >> 20} MiB; is it JSON lines?"))


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise SourceError(f"{name}: reading it needs {package}; install the [data] extra") from None


def _zstd_chunks(name: str, read: Callable[[int], bytes]) -> Iterator[bytes]:
    zstandard = _library("zstandard", name)
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    try:
        # stream_reader() ends quietly in the middle of a frame; decompressobj() can tell a truncated file.
        yield from _frames(name, "zstd", read, decompressor.decompressobj)
    except zstandard.ZstdError as error:
        raise FileProblem("damaged_file", name, f"damaged zstd file ({error}); fetch it again") from None


def _gzip_chunks(name: str, read: Callable[[int], bytes]) -> Iterator[bytes]:
    try:
        # GzipFile gives nothing of its last read of a truncated file. Zeros may follow a member.
        yield from _frames(name, "gzip", read, lambda: zlib.decompressobj(31), padding=b"\0")
    except zlib.error as error:
        raise FileProblem("damaged_file", name, f"damaged gzip file ({error}); fetch it again") from None


def _frames(
    name: str, kind: str, read: Callable[[int], bytes], start: Callable[[], Any], padding: bytes = b""
) -> Iterator[bytes]:
    """The text of the frames of a file, each by a decompressor of its own."""
    frame = None
    while data := read(_READ_BYTES // 4):
        while data := data if frame else data.lstrip(padding):
            frame = frame or start()
            output = frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
            if output:
                yield output
    if frame is not None:
        raise FileProblem("truncated_file", name, f"truncated {kind} file; fetch it again")


class _TableReader(UnitReader):
    """Parquet and Arrow: rows in record batches."""

    def __init__(self, path: Path, text_key: str, unit_bytes: int) -> None:
        super().__init__(str(path))
        self._pa = _library("pyarrow", self.path)
        self._text_key, self._unit_bytes = text_key, unit_bytes
        self._stream: IO[bytes] = open(path, "rb")  # noqa: SIM115  closed by close()
        self._size = os.fstat(self._stream.fileno()).st_size
        self._done = 0.0
        with self._named():
            self._open()

    @abstractmethod
    def _open(self) -> None: ...

    @property
    def position(self) -> int:
        return int(self._size * min(1.0, self._done))

    def close(self) -> None:
        self._stream.close()

    def _named(self) -> Any:
        return _DamagedAs(self.path, Path(self.path).suffix[1:], self._pa.ArrowException)

    def _columns(self, schema: Any) -> list[str]:
        return table_columns(self.path, schema, self._text_key)


class _DamagedAs:
    """Turns pyarrow's errors into FileProblem."""

    def __init__(self, path: str, kind: str, error: type[Exception]) -> None:
        self._path, self._kind, self._errors = path, kind, (error, OSError)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, self._errors):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            text = f"damaged or truncated {self._kind} file ({reason}); fetch it again"
            raise FileProblem("damaged_file", self._path, text) from None


class _ParquetReader(_TableReader):
    def _open(self) -> None:
        parquet = _library("pyarrow.parquet", self.path)
        self._file = parquet.ParquetFile(self._stream)
        self._names = self._columns(self._file.schema_arrow)
        metadata = self._file.metadata
        self._rows = max(1, metadata.num_rows)
        self._units: list[list[int]] = [[]]
        size = 0
        for group in range(metadata.num_row_groups):
            if size >= self._unit_bytes:
                self._units.append([])
                size = 0
            self._units[-1].append(group)
            size += metadata.row_group(group).total_byte_size

    def _unit(self, index: int) -> Iterator[tuple[Any, int]]:
        self.ended = index + 1 >= len(self._units)
        groups = self._units[index] if index < len(self._units) else []
        if not groups:
            return
        metadata = self._file.metadata
        done = sum(metadata.row_group(group).num_rows for group in range(groups[0]))
        with self._named():
            for batch in self._file.iter_batches(_BLOCK_ROWS, groups, self._names):
                done += batch.num_rows
                self._done = done / self._rows
                yield batch, batch.num_rows


class _ArrowReader(_TableReader):
    """A file of `datasets.save_to_disk` (a stream of batches) or of the Arrow file format."""

    def _open(self) -> None:
        ipc = _library("pyarrow.ipc", self.path)
        source = self._pa.memory_map(self.path)
        self._count, self._read = 0, 0  # batches; those of a stream are not known
        try:
            self._batches: Iterator[Any] = iter(reader := ipc.open_stream(source))
        except self._pa.ArrowInvalid:
            source.seek(0)
            file = reader = ipc.open_file(source)
            self._count = file.num_record_batches
            self._batches = (file.get_batch(index) for index in range(self._count))
        self._source = source
        self._names = self._columns(reader.schema)
        self._unit_of_next, self._bytes = 0, 0
        self._waiting: Any = None

    def _unit(self, index: int) -> Iterator[tuple[Any, int]]:
        with self._named():
            while (batch := self._next()) is not None and self._unit_of_next <= index:
                wanted = self._unit_of_next == index
                self._waiting = None
                self._bytes += batch.get_total_buffer_size()
                if self._bytes >= self._unit_bytes:
                    self._bytes, self._unit_of_next = 0, self._unit_of_next + 1
                self._read += 1
                self._done = self._read / self._count if self._count else self._source.tell() / self._size
                if wanted:
                    chosen = batch.select(self._names)
                    for start in range(0, batch.num_rows, _BLOCK_ROWS):
                        piece = chosen.slice(start, _BLOCK_ROWS)
                        yield piece, piece.num_rows
            self.ended = batch is None
            self._done = 1.0 if self.ended else self._done  # a stream ends with a mark

    def _next(self) -> Any:
        if self._waiting is None:
            self._waiting = next(self._batches, None)
        return self._waiting


class _RowReader(UnitReader):
    """Rows of a shard of a streamed data set; a unit is about unit_bytes of their text."""

    def __init__(self, shard: HubShard, unit_bytes: int) -> None:
        super().__init__(str(shard))
        self._shard, self._unit_bytes = shard, unit_bytes
        self._rows = shard.rows()
        self._unit_of_next, self._bytes = 0, 0
        self._waiting: Any = None

    @property
    def position(self) -> int:
        return 0

    def _unit(self, index: int) -> Iterator[tuple[Any, int]]:
        rows: list[dict[str, Any]] = []
        while (row := self._next()) is not None and self._unit_of_next <= index:
            wanted = self._unit_of_next == index
            self._waiting = None
            self._bytes += sum(len(value) for value in row.values() if isinstance(value, str))
            if self._bytes >= self._unit_bytes:
                self._bytes, self._unit_of_next = 0, self._unit_of_next + 1
            if wanted:
                rows.append(row)
                if len(rows) == _BLOCK_ROWS:
                    yield rows, len(rows)
                    rows = []
        if rows:
            yield rows, len(rows)
        self.ended = row is None

    def _next(self) -> Any:
        if self._waiting is None:
            try:
                self._waiting = next(self._rows, None)
            except Exception as error:  # the network, the server, the files: its loaders raise many types
                reason = f"cannot be read: {type(error).__name__}: {error}"
                raise FileProblem("unreadable_file", self.path, reason) from error
        return self._waiting


def table_columns(name: str, schema: Any, text_key: str) -> list[str]:
    """The text column and, where there is one, the column (or only the field) of the set name.

    Raises SourceError for a missing column or one that holds no strings.
    """
    import pyarrow as pa

    if text_key not in schema.names:
        raise SourceError(f"{name}: no column {text_key!r}; it has {', '.join(schema.names)}")
    kind = schema.field(text_key).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise SourceError(f"{name}: column {text_key!r} is {kind}, not a string")
    if SET_NAME in schema.names:
        return [text_key, SET_NAME]
    if "meta" not in schema.names:
        return [text_key]
    meta = schema.field("meta").type
    if not pa.types.is_struct(meta) or not name.endswith(".parquet"):
        return [text_key, "meta"]
    return [text_key, f"meta.{SET_NAME}"] if meta.get_field_index(SET_NAME) >= 0 else [text_key]
