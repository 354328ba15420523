"""Documents of a token file as text: random ones, one, and those that hold a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_sharedproj.data.token_file import Progress, TokenFile
from megatron_sharedproj.data.tokenizers import Tokenizer

_SEARCH_TOKENS = 1 << 18
_SHOW_PROGRESS_BYTES = 50_000_000  # decoding is slow


def sample_documents(file: TokenFile, count: int, seed: int) -> list[int]:
    """`count` distinct random documents (all, if there are fewer), ascending; the same for the same seed."""
    random = np.random.default_rng(seed)
    chosen = random.choice(file.documents, min(count, file.documents), replace=False)
    return sorted(int(index) for index in chosen)


def decode_document(file: TokenFile, document: int, tokenizer: Tokenizer, chars: int | None = None) -> str:
    """A document's text (its first `chars` characters), without the EOD at its end."""
    start, end = (int(offset) for offset in file.offsets(document, document + 1))
    if chars is not None:
        end = min(end, start + 4 * chars + 8)  # a character is at most 4 tokens, one for each of its bytes
    ids = file.ids(start, end)
    if end == file.end(document) and ids and ids[-1] == tokenizer.eod:
        ids.pop()
    return _decode(ids, tokenizer)[:chars]


def _decode(ids: list[int], tokenizer: Tokenizer) -> str:
    # A damaged file may hold any id, and a tokenizer would raise some error of its own.
    return tokenizer.decode([index for index in ids if 0 <= index < tokenizer.vocab_size])


@dataclass(frozen=True)
class Match:
    """A document that holds the text; `excerpt` is its first occurrence there with what is around it."""

    document: int
    excerpt: str


def search_documents(file: TokenFile, text: str, tokenizer: Tokenizer) -> Iterator[Match]:
    """The documents of a sound file whose decoded text holds `text`, in order.

    The ids of the text alone would miss most occurrences: how it is cut into tokens depends on what is around
    it. So chunks of many documents are decoded at once, halved where the text is in one, and a long document
    in pieces that overlap by the most tokens that the text can have.
    """
    progress = Progress(f"search {file.prefix}", file.tokens * file.dtype.itemsize, _SHOW_PROGRESS_BYTES)
    first = 0
    while first < file.documents:
        start = int(file.offsets(first, first)[0])
        last = max(first, file.document_at(start + _SEARCH_TOKENS) - 1)
        last = min(last, file.documents - 1)
        yield from _search_range(file, first, last, text, tokenizer)
        progress.update(file.end(last) * file.dtype.itemsize)
        first = last + 1
    progress.end()


def _search_range(file: TokenFile, first: int, last: int, text: str, tokenizer: Tokenizer) -> Iterator[Match]:
    if first == last:
        excerpt = _search_document(file, first, text, tokenizer)
        if excerpt is not None:
            yield Match(first, excerpt)
    elif text in _decode(file.ids(int(file.offsets(first, first)[0]), file.end(last)), tokenizer):
        middle = (first + last) // 2
        yield from _search_range(file, first, middle, text, tokenizer)
        yield from _search_range(file, middle + 1, last, text, tokenizer)


def _search_document(file: TokenFile, document: int, text: str, tokenizer: Tokenizer) -> str | None:
    start, end = (int(offset) for offset in file.offsets(document, document + 1))
    if end > start and file.ids(end - 1, end) == [tokenizer.eod]:
        end -= 1
    # A token stands for one byte or more; 8 more are for a character that the end of a piece cuts.
    overlap = len(text.encode()) + 8
    for piece in range(start, end, _SEARCH_TOKENS):
        ids = file.ids(piece, min(end, piece + _SEARCH_TOKENS + overlap))
        decoded = _decode(ids, tokenizer)
        at = decoded.find(text)
        if at >= 0:
            return decoded[max(0, at - 40) : at + len(text) + 40]
    return None
