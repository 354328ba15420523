"""Token files in Megatron-Core's .bin/.idx format: bulk writing, and checks before training.

The bytes are those of Megatron-LM's tools/preprocess_data.py: one sequence per document. Megatron-Core's
IndexedDatasetBuilder takes one document at a time, holds Python lists (about 80 bytes a document) and needs
seconds to import; this writer takes flat arrays and holds 4 bytes a document. A test compares their bytes.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
# The two dtype codes of a token file.
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
_SCAN_TOKENS = 1 << 24


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 below 65500 ids, else int32: Megatron-Core's DType.optimal_dtype."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Write `<prefix>.bin/.idx`; nothing is left under those names unless `publish` is reached.

    Used as a context manager: `add` documents, `close`, then `publish`. Leaving the context earlier, by an
    exception or not, removes the temporary files, which stand beside the target so that a rename is enough.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.documents = 0
        self.tokens = 0
        self._lengths: list[NDArray[np.int32]] = []
        self._extra: list[str] = []
        self._bin: IO[bytes] | None = None

    def __enter__(self) -> IndexedWriter:
        self._bin = open(self._temporary(".bin"), "wb")
        return self

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.int32]) -> None:
        """Append documents: `tokens` is their ids back to back, `lengths` int32 [documents].

        Raises ValueError if the two disagree or an id is outside the vocabulary.
        """
        assert self._bin is not None, "IndexedWriter is used as a context manager"
        if int(lengths.sum(dtype=np.int64)) != tokens.size or (lengths.size and int(lengths.min()) < 1):
            raise ValueError(f"document lengths do not add up to {tokens.size} tokens")
        if tokens.size and not (0 <= int(tokens.min()) and int(tokens.max()) < self.vocab_size):
            raise ValueError(f"token id {int(tokens.max())} is outside the vocabulary of {self.vocab_size}")
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        if lengths.size:
            self._lengths.append(np.ascontiguousarray(lengths, dtype=np.int32))
        self.documents += lengths.size
        self.tokens += tokens.size

    def close(self) -> None:
        """Write the index and flush both files to disk, still under temporary names."""
        assert self._bin is not None, "IndexedWriter is used as a context manager"
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        with open(self._temporary(".idx"), "wb") as idx:
            code = next(code for code, dtype in _DTYPES.items() if dtype == self.dtype)
            idx.write(_HEADER.pack(_MAGIC, 1, code, self.documents, self.documents + 1))
            idx.writelines(lengths.data for lengths in self._lengths)
            end = 0
            for lengths in self._lengths:  # the byte offset of each document
                ends = end + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
                idx.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).data)
                end = int(ends[-1])
            for start in range(0, self.documents + 1, _SCAN_TOKENS):  # document i is sequence i
                idx.write(
                    np.arange(start, min(start + _SCAN_TOKENS, self.documents + 1), dtype=np.int64).data
                )
            idx.flush()
            os.fsync(idx.fileno())

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
        if self._bin is not None:
            self._bin.close()
        for suffix in (".bin", *self._extra, ".idx"):
            Path(self._temporary(suffix)).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> str:
        return f"{self.prefix}{suffix}.{os.getpid()}.tmp"


def validate_indexed(prefix: str | Path, vocab_size: int, max_tokens: int | None = None) -> tuple[int, int]:
    """Check a token file before training; returns (documents, tokens).

    Both files exist, the index is sound and agrees with the size of the .bin, and every id (of the first
    `max_tokens`, if given) is below `vocab_size`. Raises ValueError with a one-line remedy. Reads the .bin
    once, in chunks; imports no Megatron, whose reader reports the same faults as bare assertions.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, data):
        if not path.is_file():
            raise ValueError(f"no such file: {path}; give the prefix (no .bin/.idx), or run the preprocessor")
    remedy = "preprocess the data again"
    with open(idx, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{idx} is not a Megatron-Core index; {remedy}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise ValueError(f"{idx} has version {version} and dtype code {code}, not token ids; {remedy}")
    expected = _HEADER.size + sequences * 12 + boundaries * 8
    if idx.stat().st_size != expected:
        raise ValueError(f"{idx} is {idx.stat().st_size} bytes, not the {expected} of its header; {remedy}")
    if sequences == 0 or boundaries == 0:
        raise ValueError(f"{prefix} holds no documents; {remedy}")
    dtype = _DTYPES[code]
    index = np.memmap(idx, mode="r", dtype=np.uint8)
    lengths = index[_HEADER.size :][: sequences * 4].view(np.int32)
    pointers = index[_HEADER.size + sequences * 4 :][: sequences * 8].view(np.int64)
    documents = index[_HEADER.size + sequences * 12 :].view(np.int64)
    tokens = int(lengths.sum(dtype=np.int64))
    if (
        int(documents[-1]) != sequences
        or int(lengths.min()) < 0
        or int(pointers[0]) != 0
        or int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize != tokens * dtype.itemsize
    ):
        raise ValueError(f"{idx} contradicts itself; {remedy}")
    if data.stat().st_size != tokens * dtype.itemsize:
        raise ValueError(
            f"{data} is {data.stat().st_size} bytes, but its index says {tokens * dtype.itemsize}"
            f" ({tokens} {dtype.name} tokens): truncated copy? Copy it again, or {remedy}"
        )
    _check_ids(data, dtype, min(tokens, max_tokens) if max_tokens is not None else tokens, vocab_size)
    return boundaries - 1, tokens


def _check_ids(data: Path, dtype: np.dtype[Any], count: int, vocab_size: int) -> None:
    with open(data, "rb") as stream:
        for start in range(0, count, _SCAN_TOKENS):
            ids = np.fromfile(stream, dtype=dtype, count=min(_SCAN_TOKENS, count - start))
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"{data} holds token id {high if high >= vocab_size else low}, outside the vocabulary of"
                    f" {vocab_size}; train with the tokenizer that made it, or preprocess with this one"
                )
