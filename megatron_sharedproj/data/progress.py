"""The line that shows how far preprocessing is."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from megatron_sharedproj.data.manifest import Counts
from megatron_sharedproj.duration import format_duration

_SHOWN_SOURCES = 7


class Progress:
    """A line on stderr: rewritten in place on a terminal, else a new one every `interval` seconds.

    Args:
        total: input bytes (or files, where their sizes are not known).
        done: of them, what an earlier run has done.
    """

    def __init__(self, total: float, interval: float, done: float = 0.0) -> None:
        self._total = max(1.0, total)
        self._before = done
        self._tty = sys.stderr.isatty()
        self._interval = min(interval, 0.5) if self._tty else interval
        self._start = self._last = time.monotonic()
        self.shown = False

    def due(self) -> bool:
        """Whether it is time for the next line."""
        return time.monotonic() - self._last >= self._interval

    def show(self, counts: Counts, done: float, sources: Mapping[str, Counts], *, end: bool = False) -> None:
        """Show a line.

        Args:
            counts: of this run; done: input bytes of both runs.
            sources: tokens written so far, per source.
        """
        self._last = time.monotonic()
        seconds = max(self._last - self._start, 1e-9)
        share = 1.0 if end else min(1.0, done / self._total)
        rate = (done - self._before) / seconds
        left = (self._total - done) / rate if rate > 0 else 0.0
        ahead = format_duration(0.0 if end else left)
        line = (
            f"{counts.documents:,} documents | {counts.tokens / 1e6:,.1f} Mtok |"
            f" {counts.tokens / 1e6 / seconds:.2f} Mtok/s |"
            f" {counts.text_bytes / 1e6 / seconds:.1f} MB/s text | {100 * share:5.1f} % | ETA {ahead}"
            f"{_shares(sources)}"
        )
        start, stop = ("\r\x1b[K", "\n" if end else "") if self._tty else ("", "\n")
        print(start + line, end=stop, file=sys.stderr, flush=True)
        self.shown = True

    def message(self, text: str) -> None:
        """A line of its own."""
        print(("\r\x1b[K" if self._tty else "") + text, file=sys.stderr, flush=True)


def _shares(sources: Mapping[str, Counts]) -> str:
    total = sum(counts.tokens for counts in sources.values())
    if len(sources) < 2 or not total:
        return ""
    largest = sorted(sources.items(), key=lambda item: -item[1].tokens)[:_SHOWN_SOURCES]
    shares = (
        f"{name.removeprefix('RedPajama')} {100 * counts.tokens / total:.0f} %" for name, counts in largest
    )
    return " | " + ", ".join(shares)
