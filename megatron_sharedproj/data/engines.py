"""Encoding engines: the fastest library that gives exactly the ids of Hugging Face `tokenizers`.

All engines work on the calling thread and hand over flat arrays. Text that spells a special token stays
plain text, no BOS, EOS or template token is added, and nothing is truncated or padded; added tokens that are
not special (GPT-NeoX's runs of spaces) match as they do in `tokenizers`.
"""

from __future__ import annotations

import importlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sharedproj.data.tokenizers import Tokenizer

ENGINES = ("fastokens", "gigatoken", "tokenizers")
# fastokens has its own pool, which RAYON_NUM_THREADS does not govern; each reads its variable at first use.
ONE_THREAD = {"FASTOKENS_BPE_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Resident bytes that gigatoken's cache may add before it is dropped.
GIGATOKEN_CACHE_BYTES = 256 * 2**20
# `tokenizers` takes some 170 bytes a token while it works, so a batch goes through it in pieces.
_REFERENCE_CHARACTERS = 256 * 2**10
_MOST_PROBED_TOKENS = 64

Ids = NDArray[np.uint32]
Lengths = NDArray[np.int64]


class Engine(ABC):
    """Encodes batches of texts on one thread.

    Attributes:
        name: one of ENGINES.
        reasons: for each faster engine that was passed over, one line "name: why".
    """

    name: str

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """(uint32 [tokens], int64 [len(texts)]): ids of all texts back to back, and how many each has.

        The arrays may be read-only. Raises ValueError where a text holds a lone surrogate, which has no
        UTF-8 form, and whatever NullTokenizer raises for text that is not ids.
        """
        texts = list(texts)
        try:
            return self._encode(texts)
        except (TypeError, UnicodeEncodeError):
            for index, text in enumerate(texts):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"text {index} of the batch is not valid Unicode: {error}") from None
            raise

    @abstractmethod
    def _encode(self, texts: list[str]) -> tuple[Ids, Lengths]: ...


class TokenizersEngine(Engine):
    """The reference: Hugging Face `tokenizers`, or whatever else the tokenizer is made of."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer, parse_special_tokens: bool) -> None:
        super().__init__()
        self._encode_batch = reference_encoder(tokenizer, parse_special_tokens)

    def _encode(self, texts: list[str]) -> tuple[Ids, Lengths]:
        pieces: list[Ids] = []
        lengths = np.zeros(len(texts), dtype=np.int64)
        start = characters = 0
        for end, text in enumerate(texts, 1):
            characters += len(text)
            if characters >= _REFERENCE_CHARACTERS or end == len(texts):
                batch = self._encode_batch(texts[start:end])
                lengths[start:end] = [len(ids) for ids in batch]
                count = int(lengths[start:end].sum())
                pieces.append(np.fromiter(chain.from_iterable(batch), dtype=np.uint32, count=count))
                start, characters = end, 0
        return _join(pieces), lengths


class FastokensEngine(Engine):
    """fastokens: byte-level BPE only. Its cache is bounded (about 120 MB more than freshly loaded)."""

    name = "fastokens"

    def __init__(self, description: str, parse_special_tokens: bool) -> None:
        super().__init__()
        fastokens = importlib.import_module("fastokens")
        self._fast: Any = fastokens.Tokenizer.from_json_str(description)
        self._split = not parse_special_tokens

    def _encode(self, texts: list[str]) -> tuple[Ids, Lengths]:
        ids, offsets = self._fast.encode_batch_flat(
            texts, add_special_tokens=False, split_special_tokens=self._split
        )
        return np.frombuffer(ids, dtype="<u4"), np.diff(np.frombuffer(offsets, dtype="<i8"))


class GigatokenEngine(Engine):
    """gigatoken: byte-level BPE and SentencePiece BPE.

    Release 0.10 caches every distinct word and never forgets one: 0.9 GB of words that do not repeat took
    10 GB. So the tokenizer is built anew (some 0.1 s) once it has grown by GIGATOKEN_CACHE_BYTES.
    """

    name = "gigatoken"

    def __init__(self, description: str, parse_special_tokens: bool) -> None:
        super().__init__()
        # The Rust module alone: the Python package's batches would import awkward, and are no faster.
        self._load: Callable[[str], Any] = importlib.import_module("gigatoken.gigatoken_rs").load_hf_json
        # It has no switch for special tokens, which it finds in any text: it is not told of them.
        self._json = description if parse_special_tokens else _without_special_tokens(description)
        self._build()

    def _build(self) -> None:
        self._fast: Any = None  # the old one goes before the new one comes
        self._fast = self._load(self._json)
        self._resident = _resident_bytes()

    def _encode(self, texts: list[str]) -> tuple[Ids, Lengths]:
        # No local name may hold the tokenizer: _build could not free it.
        batch: list[Ids] = [self._fast.encode(text) for text in texts]
        lengths = np.fromiter((len(ids) for ids in batch), dtype=np.int64, count=len(batch))
        ids = _join(batch)
        if _resident_bytes() - self._resident > GIGATOKEN_CACHE_BYTES:
            self._build()
        return ids, lengths


_FAST: dict[str, Callable[[str, bool], Engine]] = {
    "fastokens": FastokensEngine,
    "gigatoken": GigatokenEngine,
}


class EngineUnavailable(Exception):
    """Why an engine cannot serve a tokenizer, in one line."""


def choose_engine(tokenizer: Tokenizer, name: str = "auto", parse_special_tokens: bool = False) -> Engine:
    """The engine `name`, or for "auto" the first of ENGINES that is installed, loads and is exact.

    Before it is returned, a faster engine has given the ids of `tokenizers` on a small set of awkward texts
    and on spellings of the tokenizer's own added tokens. Sets ONE_THREAD in this process's environment where
    the variables are unset: an engine built before a fork works in the children. With
    `parse_special_tokens`, spelled special tokens become their ids, as in Megatron-LM.

    Raises ValueError in one line where a named engine is not installed, cannot load the tokenizer or gives
    other ids, and where a tokenizer cannot help reading a special token out of plain text (Unigram).
    """
    if name not in (*ENGINES, "auto"):
        raise ValueError(f"--engine {name}: no such engine; use auto, {', '.join(ENGINES)}")
    for variable, value in ONE_THREAD.items():
        os.environ.setdefault(variable, value)
    reasons = []
    for candidate in ENGINES if name == "auto" else (name,):
        try:
            engine = _try_engine(candidate, tokenizer, parse_special_tokens)
        except EngineUnavailable as error:
            if name != "auto":
                raise ValueError(f"--engine {name}: {error}; use --engine auto or tokenizers") from None
            reasons.append(f"{candidate}: {error}")
        else:
            engine.reasons = reasons
            if not parse_special_tokens:
                _check_not_forgeable(engine, tokenizer)
            return engine
    raise AssertionError("the tokenizers engine serves every tokenizer")


def _try_engine(name: str, tokenizer: Tokenizer, parse_special_tokens: bool) -> Engine:
    if name == "tokenizers":
        return TokenizersEngine(tokenizer, parse_special_tokens)
    description = tokenizer.to_json()
    if description is None:
        raise EngineUnavailable(f"{tokenizer.name} has no tokenizer.json to load")
    try:
        engine = _FAST[name](description, parse_special_tokens)
    except ModuleNotFoundError:
        raise EngineUnavailable(f"not installed (pip install {name})") from None
    except BaseException as error:
        raise EngineUnavailable(f"cannot load {tokenizer.name} ({_one_line(error)})") from None
    difference = probe(engine, tokenizer, parse_special_tokens)
    if difference is not None:
        raise EngineUnavailable(difference)
    return engine


def reference_encoder(
    tokenizer: Tokenizer, parse_special_tokens: bool
) -> Callable[[Sequence[str]], list[list[int]]]:
    """What encodes a batch with the tokenizer's own library, in either mode."""
    return tokenizer.encode_batch_parsing_special_tokens if parse_special_tokens else tokenizer.encode_batch


def probe(engine: Engine, tokenizer: Tokenizer, parse_special_tokens: bool = False) -> str | None:
    """None where `engine` gives the reference's ids on the probe texts, else one line on the first that
    differs."""
    texts = probe_texts(tokenizer)
    expected = reference_encoder(tokenizer, parse_special_tokens)(texts)
    try:
        ids, lengths = engine.encode(texts)
    except BaseException as error:
        return f"fails on awkward text ({_one_line(error)})"
    ends = np.cumsum(lengths)
    for text, want, end, length in zip(texts, expected, ends, lengths, strict=True):
        if ids[end - length : end].tolist() != want:
            return f"gives other ids than tokenizers for {_shorten(text)}"
    return None


_PROBE_TEXTS = (
    "",
    " ",
    "\n",
    "a",
    "Plain prose, with commas; it's what they'll say, isn't it? I'd've 'quoted' WE'LL and DON'T'S.\n",
    "  two spaces, three   and four    then\ttab \t mix\r\nCRLF\r\n\r\n\n\nend   ",
    " " * 300 + "x" + "\t" * 70 + "\n" * 130 + " " * 3,
    "a" * 300 + "=" * 257 + "0" * 100 + "ab" * 99 + "'" * 33 + "!?" * 40,
    "NUL \x00 and \x01\x02\x1b[0m\x7f\x80\x85\x9f controls \x0b\x0c\x1c\x1d end\x00",
    "0 12 345 6789 12345678901234567890 3.14159 -1e-9 0xdeadBEEF 1,000,000 \u00bd\u00b2\u2167 \u0663\u0664",
    "def f(x):\n    if x >= 10:\n\t\treturn {'a': x[1:-1]}  # don't\n\n\n#include <a.h>\nint *p = &q->r;//\n",
    "snake_case CamelCase HTTPServer __init__ a.b.c foo@bar.example http://x.y/z?a=b&c=%20#d <br/>&amp;",
    "na\u00efve caf\u00e9 Stra\u00dfe \u0130stanbul \u0131 \ufb01ne \u01c5 \u00aa\u00ba",
    "\u2019tis don\u2019t l\u2019\u00e9t\u00e9 \u017fs it'\u017f",  # the long s is a case variant of s
    "e\u0301 o\u0308\u0323 a\u030a\u0301 \u1e9b\u0323 \u212b \u2126 \u0344 n\u0303o \u0315 alone",
    "\u6f22\u5b57\u3068\u304b\u306a\u3001\u30ab\u30bf\u30ab\u30ca\u3002\ud55c\uad6d\uc5b4",
    "\u1112\u1161\u11ab \U00020000\U0002a6d6 \u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u03b5\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "\u2764\ufe0f 1\ufe0f\u20e3 \U0001fae8 \U000e0067",
    "\u00a0nbsp\u2003em\u2009thin\u3000ideographic\u2028line\u2029para\u1680ogham\u180e\u200bzero\u200c\ufeffbom",
    "\u00e2\u20ac\u2122 mojibake \ufffd \uffff \ufdd0 \U0010ffff \ue000 \U000f0000 \u202eRTL\u202c",
    "x" + "".join(chr(code) + ("a", "1", " ")[code % 3] for code in range(0xA1, 0x3100, 29)),
    "".join(" " + chr(code) for code in (*range(0x10000, 0x1FB00, 523), *range(0xA000, 0xD7FF, 977))),
    # Libraries disagree on which of these is white space, a letter or a number, and on how the last three,
    # of Unicode 16, compose.
    *(
        f"a{char} {char}b{char}{char} 1{char}!{char}\n{char}'s\t{char}"
        for char in "\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2000\u200b\u2028\u2029\u202f\u205f\u2060\u3000"
        "\ufeff\u0345\u0301\u093e\u02b0\u01c5\u00b2\u2167\u0663\u24d0\u3007\u00aa\u00ad\u17b4\u20e3\u1cfa"
        "\U0001d7ce\U00016fe4\U000113c2\U0001611e\U00016d67"
    ),
)


def probe_texts(tokenizer: Tokenizer) -> list[str]:
    """Awkward texts, and texts that spell the added tokens of `tokenizer`, whole and in part."""
    spelled = tokenizer.added_tokens()
    if len(spelled) > _MOST_PROBED_TOKENS:
        half = _MOST_PROBED_TOKENS // 2
        spelled = spelled[:half] + spelled[-half:]
    texts = list(_PROBE_TEXTS)
    for content in spelled:
        texts.append(
            f"a{content}b {content} {content}{content}\n{content}, x {content[:-1]} {content.upper()}"
        )
    return texts


class Verifier:
    """Re-encodes texts with the reference, for `--verify`."""

    def __init__(self, tokenizer: Tokenizer, engine_name: str, parse_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._engine_name = engine_name
        self._encode_batch = reference_encoder(tokenizer, parse_special_tokens)

    def check(self, text: str, ids: NDArray[np.integer] | Sequence[int]) -> None:
        """Raise ValueError where `ids` (without an appended EOD) are not the reference's ids of `text`."""
        expected = np.array(self._encode_batch([text])[0], dtype=np.int64)
        given = np.asarray(ids, dtype=np.int64)
        shorter = min(len(expected), len(given))
        differ = np.flatnonzero(expected[:shorter] != given[:shorter])
        if len(differ) == 0 and len(expected) == len(given):
            return
        first = int(differ[0]) if len(differ) else shorter
        near = self._tokenizer.decode(expected[max(0, first - 8) : first + 8].tolist())
        raise ValueError(
            f"--engine {self._engine_name}: token {first} of a document is {_at(given, first)}, but"
            f" {_at(expected, first)} by tokenizers, near {_shorten(near)}; use --engine tokenizers"
        )


def _check_not_forgeable(engine: Engine, tokenizer: Tokenizer) -> None:
    """A Unigram model finds `</s>` among its pieces whatever it is told: refuse to take that silently."""
    tokens = tokenizer.special_tokens()
    ids, lengths = engine.encode(list(tokens))
    for (content, index), end, length in zip(tokens.items(), np.cumsum(lengths), lengths, strict=True):
        if index in ids[end - length : end]:
            raise ValueError(
                f"--tokenizer-model: {tokenizer.name} reads the text {content!r} as its special token"
                f" {index}; use another tokenizer, or accept it with --parse-special-tokens"
            )


def _without_special_tokens(description: str) -> str:
    parsed = json.loads(description)
    parsed["added_tokens"] = [token for token in parsed.get("added_tokens") or [] if not token["special"]]
    # A template names special tokens that are now unknown, and nothing here runs it.
    parsed["post_processor"] = None
    return json.dumps(parsed)


def _join(pieces: list[Ids]) -> Ids:
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint32)


def _resident_bytes() -> int:
    # Of this process, whichever it is: an engine is often built before a fork.
    import psutil  # for gigatoken alone

    return int(psutil.Process().memory_info().rss)


def _one_line(error: BaseException) -> str:
    """The error in one line; an interrupt goes on, but a Rust panic (a BaseException) is a failure."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _at(ids: NDArray[np.int64], position: int) -> str:
    return str(ids[position]) if position < len(ids) else "missing"


def _shorten(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
