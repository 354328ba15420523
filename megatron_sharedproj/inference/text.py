"""Text of tokens as they come: pieces that never split a character, and stop strings across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens whose text is decoded again with each new one: some tokenizers write a token by its neighbours.
_CONTEXT = 8
_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not, or not yet, a character


class TextStream:
    """Decodes a continuation piece by piece; the pieces together are :attr:`text`.

    Args:
        tokenizer: data.tokenizers.Tokenizer.
        prompt: ids that the continuation follows (none for the start of a document).
        stop: strings that end the text; it is cut before them.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._window = list(prompt[-_CONTEXT:])
        self._sent = len(self._decode())
        self._pending = ""  # may be the beginning of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, "" if none is."""
        self._window.append(token)
        whole = self._decode()
        # One trailing replacement character may be the beginning of a character whose bytes come next.
        certain = len(whole) - whole.endswith(_REPLACEMENT)
        piece = whole[self._sent : certain]
        self._sent = max(self._sent, certain)
        if certain == len(whole) and len(self._window) > 2 * _CONTEXT:
            self._window = self._window[-_CONTEXT:]
            self._sent = len(self._decode())
        return self._release(piece, last=False)

    def finish(self) -> str:
        """No more tokens come: the rest of the text, what was held back included."""
        if self.stopped:
            return ""
        return self._release(self._decode()[self._sent :], last=True)

    def _release(self, piece: str, *, last: bool) -> str:
        self._pending += piece
        found = [index for text in self._stop if (index := self._pending.find(text)) >= 0]
        if found:
            self.stopped = True
            out, self._pending = self._pending[: min(found)], ""
        else:
            held = 0 if last else max((_overlap(self._pending, text) for text in self._stop), default=0)
            cut = len(self._pending) - held
            out, self._pending = self._pending[:cut], self._pending[cut:]
        self.text += out
        return out

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window) if self._window else ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, and does not end with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
