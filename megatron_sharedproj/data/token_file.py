"""Reading a token file: its index memory-mapped, where documents lie, and how long they are.

numpy only: neither Megatron, whose reader reports damage as bare assertions, nor torch.
"""

from __future__ import annotations

import bisect
import dataclasses
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sharedproj.data.indexed import _DTYPES, _HEADER, _MAGIC
from megatron_sharedproj.duration import format_duration

HEADER_BYTES = _HEADER.size
SCAN_SEQUENCES = 1 << 22  # of an index, at a time
_SHORT_LENGTHS = 1 << 16
_REMEDY = "preprocess the data again"


@dataclass(frozen=True)
class TokenFile:
    """A .bin/.idx pair whose header is sound; the arrays are memory-mapped from the .idx.

    Attributes:
        lengths: int32 [sequences], tokens of each sequence.
        pointers: int64 [sequences], byte of the .bin where each starts.
        boundaries: int64 [documents + 1]; document i is the sequences boundaries[i] to boundaries[i + 1] - 1.
    """

    prefix: str
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    boundaries: NDArray[np.int64]
    tokens: int

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def documents(self) -> int:
        return len(self.boundaries) - 1

    def offsets(self, first: int, last: int) -> NDArray[np.int64]:
        """Token offsets where documents first to last start, int64 [last - first + 1]; sound files only.

        The offset of document `documents` is the end of the file.
        """
        sequence = np.asarray(self.boundaries[first : last + 1])
        starts = np.asarray(self.pointers[np.minimum(sequence, self.sequences - 1)]) // self.dtype.itemsize
        return np.where(sequence < self.sequences, starts, self.tokens)

    def end(self, document: int) -> int:
        """Token offset behind a document."""
        return int(self.offsets(document + 1, document + 1)[0])

    def document_at(self, token: int) -> int:
        """The document that holds the token at this offset."""
        return bisect.bisect_right(range(self.documents), token, key=self.end)

    def ids(self, start: int, end: int) -> list[int]:
        """Token ids at offsets start to end - 1."""
        with open(f"{self.prefix}.bin", "rb") as stream:
            stream.seek(start * self.dtype.itemsize)
            ids: list[int] = np.fromfile(stream, dtype=self.dtype, count=end - start).tolist()
        return ids


def open_indexed(prefix: str | Path) -> TokenFile:
    """Map the index of a token file.

    Raises:
        ValueError: in one line, for a missing file, a wrong header, or an index without documents.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, data):
        if not path.is_file():
            raise ValueError(f"no such file: {path}; give the prefix (no .bin/.idx), or run the preprocessor")
    with open(idx, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{idx} is not a Megatron-Core index; {_REMEDY}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise ValueError(f"{idx} has version {version} and dtype code {code}, not token ids; {_REMEDY}")
    expected = _HEADER.size + sequences * 12 + boundaries * 8
    if idx.stat().st_size != expected:
        raise ValueError(f"{idx} is {idx.stat().st_size} bytes, not the {expected} of its header; {_REMEDY}")
    if sequences == 0 or boundaries <= 1:
        raise ValueError(f"{prefix} holds no documents; {_REMEDY}")
    index = np.memmap(idx, mode="r", dtype=np.uint8)
    lengths = index[_HEADER.size :][: sequences * 4].view(np.int32)
    pointers = index[_HEADER.size + sequences * 4 :][: sequences * 8].view(np.int64)
    documents = index[_HEADER.size + sequences * 12 :].view(np.int64)
    tokens = int(lengths.sum(dtype=np.int64))
    return TokenFile(str(prefix), _DTYPES[code], lengths, pointers, documents, tokens)


@dataclass(frozen=True)
class LengthStatistics:
    """Document lengths in tokens. median and p95 are nearest-rank: lengths that occur.

    Attributes:
        seq_length, longer_share: the share of documents longer than `seq_length`, or None, None.
        values, counts: int64 [distinct lengths], ascending, and how often each occurs.
    """

    min: int
    median: int
    mean: float
    p95: int
    max: int
    seq_length: int | None
    longer_share: float | None
    values: NDArray[np.int64]
    counts: NDArray[np.int64]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all but the arrays."""
        names = [item.name for item in dataclasses.fields(self) if item.name not in ("values", "counts")]
        return {name: getattr(self, name) for name in names}


def length_statistics(file: TokenFile, seq_length: int | None = None) -> LengthStatistics:
    """Statistics of a sound file's documents; exact, in memory bounded by the distinct lengths."""
    short = np.zeros(_SHORT_LENGTHS, dtype=np.int64)
    long: Counter[int] = Counter()
    for first in range(0, file.documents, SCAN_SEQUENCES):
        lengths = np.diff(file.offsets(first, min(first + SCAN_SEQUENCES, file.documents)))
        short += np.bincount(lengths[lengths < _SHORT_LENGTHS], minlength=_SHORT_LENGTHS)
        long.update(lengths[lengths >= _SHORT_LENGTHS].tolist())
    present = np.flatnonzero(short)
    values = np.concatenate([present, np.array(sorted(long), dtype=np.int64)])
    counts = np.concatenate([short[present], np.array([long[length] for length in sorted(long)], np.int64)])
    ranks = np.cumsum(counts)

    def quantile(share: float) -> int:
        return int(values[np.searchsorted(ranks, np.ceil(share * file.documents))])

    longer = None if seq_length is None else float(counts[values > seq_length].sum() / file.documents)
    return LengthStatistics(
        min=int(values[0]),
        median=quantile(0.5),
        mean=file.tokens / file.documents,
        p95=quantile(0.95),
        max=int(values[-1]),
        seq_length=seq_length,
        longer_share=longer,
        values=values,
        counts=counts,
    )


class Progress:
    """A line on stderr with rate and time left, for `total` bytes or more than `threshold`.

    Rewritten in place on a terminal, else a new line every 10 seconds.
    """

    def __init__(self, label: str, total: int, threshold: int) -> None:
        self._label, self._total = label, total
        self._shown = total > threshold
        self._tty = sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self._shown and now - self._last >= (0.5 if self._tty else 10.0):
            self._last = now
            self._write(done, now - self._start)

    def end(self) -> None:
        if self._shown:
            self._write(self._total, time.monotonic() - self._start)
            if self._tty:
                print(file=sys.stderr)

    def _write(self, done: int, elapsed: float) -> None:
        rate = done / max(elapsed, 1e-9)
        left = (self._total - done) / rate if done else 0.0
        line = (
            f"{self._label}: {100 * done / self._total:5.1f} % | {done / 1e9:.2f} GB |"
            f" {rate / 1e6:.0f} MB/s | ETA {format_duration(left)}"
        )
        start, end = ("\r\x1b[K", "") if self._tty else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)
