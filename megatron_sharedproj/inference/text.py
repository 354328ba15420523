"""Text of tokens as they come: pieces that never split a character, and stop strings across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens whose text is decoded again with each new one: some tokenizers write a token by its neighbours.
_CONTEXT = 8
_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not, or not yet, a character
_LONGEST = 4  # bytes of a character, so tokens that it can take


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
        self._sent = self._decode()  # the window's text up to what is certain
        self._open = 0  # tokens since it was all certain
        self._pending = ""  # may be the beginning of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, "" if none is."""
        self._window.append(token)
        self._open += 1
        whole = self._decode()
        if whole.endswith(_REPLACEMENT):
            # Maybe the beginning of a character whose bytes come next: one replacement character for all of
            # them, or (byte fallback) one for each, and for those of the characters just before as well.
            waits = self._open < _LONGEST
            piece = self._advance(whole.rstrip(_REPLACEMENT) if waits else whole.removesuffix(_REPLACEMENT))
        else:
            piece = self._advance(whole)
            self._open = 0
            self._shorten()
        return self._release(piece, last=False)

    def finish(self) -> str:
        """No more tokens come: the rest of the text, what was held back included."""
        if self.stopped:
            return ""
        return self._release(self._advance(self._decode()), last=True)

    def _advance(self, certain: str) -> str:
        """What is new in the window's certain text."""
        if not certain.startswith(self._sent):
            if self._sent.startswith(certain):
                return ""
            # The decoder takes back text that is out: go on with the open tokens alone.
            self._window, self._sent = self._window[-self._open :], ""
            certain = self._decode()
        piece = certain[len(self._sent) :]
        self._sent = certain
        return piece

    def _shorten(self) -> None:
        if len(self._window) <= 2 * _CONTEXT:
            return
        for size in range(_CONTEXT, _CONTEXT + _LONGEST):  # a cut inside a character would change the text
            text = self._tokenizer.decode(self._window[-size:])
            if self._sent.endswith(text):
                self._window, self._sent = self._window[-size:], text
                return

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
