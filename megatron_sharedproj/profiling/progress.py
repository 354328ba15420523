"""How far a long measurement is: a bar on stderr, with the time that is left."""

from __future__ import annotations

import sys
import time

from megatron_sharedproj.duration import format_duration

_WIDTH = 24
_SECONDS_BETWEEN_LINES = 15.0


class ProgressBar:
    """A bar: rewritten in place on a terminal, elsewhere a new line every 15 seconds.

    Args:
        total: all work, in any unit that is proportional to time.
    """

    def __init__(self, total: float) -> None:
        self._total = max(total, 1e-9)
        self._tty = sys.stderr.isatty()
        self._start = time.monotonic()
        self._last = self._start
        self._shown = False

    def show(self, done: float, what: str) -> None:
        """Show that ``done`` of the work is done, and what comes next."""
        now = time.monotonic()
        if not self._tty and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        share = min(1.0, done / self._total)
        left = format_duration((now - self._start) * (1 - share) / share) if share else "?"
        bar = ("#" * round(_WIDTH * share)).ljust(_WIDTH, ".")
        line = f"[{bar}] {100 * share:3.0f} %, ETA {left}: {what}"
        print(f"\r\x1b[K{line}" if self._tty else line, end="" if self._tty else "\n", file=sys.stderr)
        sys.stderr.flush()
        self._shown = True

    def clear(self) -> None:
        """Take the bar away, for what is printed next."""
        if self._tty and self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
