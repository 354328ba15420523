"""What preprocessing counts, and the line that shows how far it is."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Documents, UTF-8 bytes of their text, and tokens (end-of-document ids included)."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0

    def add(self, other: Counts) -> None:
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.tokens += other.tokens


@dataclass
class SplitSummary:
    """What was written for one split."""

    split: str
    prefix: str
    total: Counts = field(default_factory=Counts)
    sources: dict[str, Counts] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, sources: Mapping[str, Counts]) -> None:
        """Add a block's counts per source."""
        for source, counts in sources.items():
            self.sources.setdefault(source, Counts()).add(counts)
            self.total.add(counts)

    def line(self) -> str:
        """One line for the user."""
        skipped = ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items())) or "0"
        return (
            f"{self.split or 'all'}: {self.total.documents} documents, {self.total.tokens} tokens,"
            f" {self.total.text_bytes / self.total.tokens:.3f} bytes per token, skipped {skipped}"
            f" -> {self.prefix}.bin"
        )


class Progress:
    """A line on stderr: rewritten in place on a terminal, else a new one every `interval` seconds."""

    def __init__(self, total_bytes: int, interval: float) -> None:
        self._total = max(1, total_bytes)
        self._tty = sys.stderr.isatty()
        self._interval = min(interval, 0.5) if self._tty else interval
        self._start = self._last = time.monotonic()

    def update(self, summaries: Mapping[str, SplitSummary], position: int) -> None:
        """Show progress if it is time to; `position` is the bytes of all input that are done."""
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self._write(summaries, position / self._total, now - self._start)

    def end(self, summaries: Mapping[str, SplitSummary]) -> None:
        self._write(summaries, 1.0, time.monotonic() - self._start)
        if self._tty:
            print(file=sys.stderr)

    def message(self, text: str) -> None:
        print(("\r\x1b[K" if self._tty else "") + text, file=sys.stderr, flush=True)

    def _write(self, summaries: Mapping[str, SplitSummary], done: float, elapsed: float) -> None:
        total = Counts()
        for summary in summaries.values():
            total.add(summary.total)
        seconds = max(elapsed, 1e-9)
        eta = int(elapsed / done - elapsed) if done > 0 else 0
        rate = total.tokens / 1e6 / seconds
        line = (
            f"{total.documents} documents | {total.tokens / 1e6:.2f} Mtok |"
            f" {rate:.2f} Mtok/s | {total.text_bytes / 1e6 / seconds:.1f} MB/s text | {100 * done:5.1f} % |"
            f" ETA {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
        )
        start, end = ("\r\x1b[K", "") if self._tty else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)
