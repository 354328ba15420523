"""Token files in Megatron-Core's .bin/.idx format: bulk writing.

The bytes are those of Megatron-LM's tools/preprocess_data.py: one sequence per document. Megatron-Core's
IndexedDatasetBuilder takes one document at a time, holds Python lists (about 80 bytes a document) and needs
seconds to import; this writer takes flat arrays and holds none of them. A test compares their bytes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
# The two dtype codes of a token file.
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
_INDEX_DOCUMENTS = 1 << 20
_LENGTHS = ".lengths"
_NOTHING = np.empty(0, np.int32)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 below 65500 ids, else int32: Megatron-Core's DType.optimal_dtype."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Write `<prefix>.bin/.idx`; nothing is left under those names unless `publish` is reached.

    Used as a context manager: `add` documents, `close`, then `publish`. Leaving the context earlier, by an
    exception or not, removes the temporary files, which stand beside the target so that a rename is enough;
    unless a `folder` is given for them: then they stay, and a later writer can `resume` them.

    Attributes:
        documents, tokens: added so far.
        checksums: sha256 in hex of ".bin" and ".idx", once closed.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, folder: Path | None = None) -> None:
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.documents = 0
        self.tokens = 0
        self.checksums: dict[str, str] = {}
        self._folder = folder
        self._digest = hashlib.sha256()
        self._extra: list[str] = []
        self._streams: list[IO[bytes]] = []  # tokens, and the length of each document as int32

    def __enter__(self) -> IndexedWriter:
        self._streams = [open(self._temporary(suffix), "wb") for suffix in (".bin", _LENGTHS)]
        return self

    def resume(self, documents: int, tokens: int) -> IndexedWriter:
        """Go on behind the first `documents` documents of an earlier writer in the same folder.

        Raises ValueError if that writer's files hold less.
        """
        for suffix, size in ((".bin", tokens * self.dtype.itemsize), (_LENGTHS, documents * 4)):
            path = self._temporary(suffix)
            if not os.path.isfile(path) or os.path.getsize(path) < size:
                raise ValueError(f"{path}: shorter than the {size} bytes that were written to it")
            stream = open(path, "r+b")  # noqa: SIM115  closed by __exit__
            stream.truncate(size)
            self._streams.append(stream)
        while data := self._streams[0].read(1 << 22):
            self._digest.update(data)
        self._streams[1].seek(0, os.SEEK_END)
        self.documents, self.tokens = documents, tokens
        return self

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.int32]) -> None:
        """Append documents: `tokens` is their ids back to back, `lengths` int32 [documents].

        Raises ValueError if the two disagree or an id is outside the vocabulary.
        """
        assert self._streams, "IndexedWriter is used as a context manager"
        if int(lengths.sum(dtype=np.int64)) != tokens.size or (lengths.size and int(lengths.min()) < 1):
            raise ValueError(f"document lengths do not add up to {tokens.size} tokens")
        if tokens.size and not (0 <= int(tokens.min()) and int(tokens.max()) < self.vocab_size):
            raise ValueError(f"token id {int(tokens.max())} is outside the vocabulary of {self.vocab_size}")
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._streams[0].write(data)
        self._digest.update(data)
        self._streams[1].write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        self.documents += lengths.size
        self.tokens += tokens.size

    def sync(self) -> None:
        """Bring what was added to the disk, so that `resume` finds it even after a power cut."""
        for stream in self._streams:
            if not stream.closed:
                stream.flush()
                os.fsync(stream.fileno())

    def close(self) -> None:
        """Write the index and flush both files to disk, still under temporary names."""
        assert self._streams, "IndexedWriter is used as a context manager"
        self.sync()
        for stream in self._streams:
            stream.close()
        self.checksums = {".bin": self._digest.hexdigest(), ".idx": self._write_index()}
        if self._folder is None:  # else a saved state may still want to resume behind them
            os.unlink(self._temporary(_LENGTHS))

    def _write_index(self) -> str:
        digest = hashlib.sha256()
        lengths = np.memmap(self._temporary(_LENGTHS), np.int32, "r") if self.documents else _NOTHING
        with open(self._temporary(".idx"), "wb") as idx:

            def write(data: Any) -> None:
                idx.write(data)
                digest.update(data)

            code = next(code for code, dtype in _DTYPES.items() if dtype == self.dtype)
            write(_HEADER.pack(_MAGIC, 1, code, self.documents, self.documents + 1))
            starts = range(0, self.documents, _INDEX_DOCUMENTS)
            for start in starts:
                write(lengths[start : start + _INDEX_DOCUMENTS].data)
            end = 0
            for start in starts:  # the byte offset of each document
                sizes = lengths[start : start + _INDEX_DOCUMENTS].astype(np.int64) * self.dtype.itemsize
                ends = end + np.cumsum(sizes)
                write((ends - sizes).data)
                end = int(ends[-1])
            for start in range(0, self.documents + 1, _INDEX_DOCUMENTS):  # document i is sequence i
                write(
                    np.arange(start, min(start + _INDEX_DOCUMENTS, self.documents + 1), dtype=np.int64).data
                )
            idx.flush()
            os.fsync(idx.fileno())
        return digest.hexdigest()

    def write_extra(self, suffix: str, text: str) -> None:
        """Write a text file (a manifest) that is published with the pair as `<prefix><suffix>`."""
        self._extra.append(suffix)
        Path(self._temporary(suffix)).write_text(text, encoding="utf-8")

    def publish(self) -> None:
        """Rename to the final names, .idx last: a pair is complete when its .idx exists."""
        Path(self.prefix + ".idx").unlink(missing_ok=True)  # an old index must never meet a new .bin
        for suffix in (".bin", *self._extra, ".idx"):
            os.replace(self._temporary(suffix), self.prefix + suffix)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            with suppress(OSError):  # of a full disk, which was told already
                stream.close()
        if self._folder is None:
            for suffix in (".bin", _LENGTHS, *self._extra, ".idx"):
                Path(self._temporary(suffix)).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> str:
        if self._folder is not None:
            return str(self._folder / (Path(self.prefix).name + suffix))
        return f"{self.prefix}{suffix}.{os.getpid()}.tmp"
