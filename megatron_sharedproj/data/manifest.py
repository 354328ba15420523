"""The manifest PREFIX.json of a token file: what is in it, what it was made from, and its checksums.

The one home of the format: the preprocessor writes it, the inspector and the trainer read it. What it says
is checked when a Manifest is made, so neither a wrong one can be written nor a damaged one be read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FORMAT = "megatron_core_indexed_dataset"
FORMAT_VERSION = 2
SUFFIX = ".json"
SPECIAL_TOKENS = ("text", "parsed")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "restore it, preprocess again, or move it away (then less can be checked)"


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

    @property
    def bytes_per_token(self) -> float:
        """Text bytes per token: bits per byte = bits per token / this. 0 without tokens."""
        return self.text_bytes / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the ids.

    Attributes:
        type: Megatron-LM's type name.
        description: one line for people.
        vocab_size: every id is below it.
        sha256: of the vocabulary's file(s), in hex; None where it is not known.
        engine: the library that encoded; None where it is not known.
        special_tokens: "text" if a document that spells a special token got plain ids, "parsed" if it got
            the special one; None where it is not known.
    """

    type: str
    description: str
    vocab_size: int
    sha256: str | None
    engine: str | None = None
    special_tokens: str | None = None


@dataclass(frozen=True)
class InputFile:
    """One input: its path below the inputs' common folder, its size in bytes, its sha256 if it was taken."""

    path: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What PREFIX.json says of PREFIX.bin and PREFIX.idx.

    Attributes:
        tool_version: of this package, when it was written.
        split: train, validation, test, or "" for input without splits.
        text_key: the key or column of the text.
        dtype: uint16 or int32.
        append_eod: whether documents end with the id `eod`.
        tokenizer, counts, inputs: see their classes.
        sources: counts per source; they add up to `counts`.
        created: ISO 8601 date and time, UTC; None where it is not known.
        cut_document: the last document was cut to meet a token budget, and so has no `eod`.
        shard, shards: index of this shard and how many there are; both None without sharding.
        excluded_sources: documents left out on request, per source.
        rejected: bad records left out, per kind.
        checksums: sha256 in hex by suffix, ".bin" and ".idx"; empty in manifests of version 1.
    Raises:
        ValueError: if a field has a wrong value or contradicts another; the message starts with its name.
    """

    tool_version: str
    split: str
    text_key: str
    dtype: str
    append_eod: bool
    eod: int
    tokenizer: TokenizerRecord
    counts: Counts
    sources: Mapping[str, Counts]
    created: str | None = None
    cut_document: bool = False
    shard: int | None = None
    shards: int | None = None
    excluded_sources: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    inputs: Sequence[InputFile] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in ("uint16", "int32"):
            raise ValueError(f"dtype is {self.dtype!r}, not uint16 or int32")
        if not 0 <= self.eod < self.tokenizer.vocab_size:
            raise ValueError(f"eod is {self.eod}, outside the vocabulary of {self.tokenizer.vocab_size}")
        if self.tokenizer.special_tokens not in (*SPECIAL_TOKENS, None):
            raise ValueError(
                f"tokenizer.special_tokens is {self.tokenizer.special_tokens!r}, not one of "
                f"{', '.join(SPECIAL_TOKENS)}"
            )
        if self.created is not None:
            try:
                datetime.fromisoformat(self.created)
            except ValueError:
                raise ValueError(f"created is {self.created!r}, not an ISO 8601 date") from None
        if (self.shard is None) != (self.shards is None):
            raise ValueError("shard and shards: one is given without the other")
        if self.shard is not None and self.shards is not None and not 0 <= self.shard < self.shards:
            raise ValueError(f"shard is {self.shard}, of {self.shards} shards")
        digests = {f"checksums[{suffix}]": digest for suffix, digest in self.checksums.items()}
        digests |= {
            f"inputs[{i}].sha256": entry.sha256 for i, entry in enumerate(self.inputs) if entry.sha256
        }
        if self.tokenizer.sha256 is not None:
            digests["tokenizer.sha256"] = self.tokenizer.sha256
        for name, digest in digests.items():
            if not _SHA256.fullmatch(digest):
                raise ValueError(f"{name} is {digest!r}, not a sha256 in hex")
        if not set(self.checksums) <= {".bin", ".idx"}:
            raise ValueError(f"checksums are of {', '.join(self.checksums)}, not of .bin and .idx")
        self._check_sum()

    def _check_sum(self) -> None:
        for name in ("documents", "text_bytes", "tokens"):
            total = getattr(self.counts, name)
            summed = sum(getattr(counts, name) for counts in self.sources.values())
            if self.sources and summed != total:
                raise ValueError(f"counts.{name} is {total}, but the sources add up to {summed}")

    @property
    def bytes_per_token(self) -> float:
        """Text bytes per token, end-of-document ids counted as tokens."""
        return self.counts.bytes_per_token

    def to_json(self) -> str:
        """The text of the file, of the newest format version, with a newline at its end."""
        values = dataclasses.asdict(self)
        for name in ("sources", "excluded_sources", "rejected", "checksums"):
            values[name] = dict(sorted(values[name].items()))
        keys = (
            "tool_version", "created", "split", "text_key", "dtype", "append_eod", "eod", "cut_document",
            "shard", "shards", "tokenizer", "counts", "bytes_per_token", "sources", "excluded_sources",
            "rejected", "inputs", "checksums",
        )  # fmt: skip
        values["bytes_per_token"] = self.bytes_per_token
        ordered = {"format": FORMAT, "format_version": FORMAT_VERSION, **{key: values[key] for key in keys}}
        return json.dumps(ordered, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest of this version, or of version 1, which had no `format_version` and no checksums.

        Raises:
            ValueError: in one line, for text that is not such a manifest or contradicts itself.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f'not a manifest of token files (no "format": "{FORMAT}")')
        top = _Fields(value, "")
        version = top.integer("format_version") if "format_version" in value else 1
        if not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version}, newer than this program; update megatron_sharedproj"
            )
        # What version 1 did not have may be absent from it, and from it only.
        new: dict[str, Any] = {}
        if version >= 2:
            for key in ("created", "cut_document", "shard", "shards", "excluded_sources", "checksums"):
                top.require(key)
            new = {
                "created": top.optional("created", str),
                "cut_document": top.boolean("cut_document"),
                "shard": top.optional("shard", int),
                "shards": top.optional("shards", int),
                "excluded_sources": top.integers("excluded_sources"),
                "checksums": top.strings("checksums"),
            }
        tokenizer = _Fields(top.mapping("tokenizer"), "tokenizer.")
        sources = top.mapping("sources")
        manifest = cls(
            tool_version=top.string("tool_version"),
            split=top.string("split"),
            text_key=top.string("text_key"),
            dtype=top.string("dtype"),
            append_eod=top.boolean("append_eod"),
            eod=top.integer("eod"),
            tokenizer=TokenizerRecord(
                type=tokenizer.string("type"),
                description=tokenizer.string("description"),
                vocab_size=tokenizer.integer("vocab_size"),
                sha256=tokenizer.optional("sha256", str),
                engine=tokenizer.optional("engine", str),
                special_tokens=tokenizer.optional("special_tokens", str),
            ),
            counts=_counts(top.mapping("counts"), "counts."),
            sources={name: _counts(counts, f"sources[{name}].") for name, counts in sources.items()},
            rejected=top.integers("rejected" if version >= 2 else "skipped"),
            inputs=tuple(
                _input(entry, f"inputs[{index}].") for index, entry in enumerate(top.array("inputs"))
            ),
            **new,
        )
        if version >= 2:
            said, exact = top.number("bytes_per_token"), manifest.bytes_per_token
            if abs(said - exact) > 1e-6 * exact:
                raise ValueError(f"bytes_per_token is {said}, but the counts give {exact}")
        return manifest


def manifest_path(prefix: str | Path) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}{SUFFIX}")


def load(prefix: str | Path) -> Manifest | None:
    """The manifest of a token file, or None where it has none.

    Raises:
        ValueError: in one line, naming the file, for one that is damaged or is something else.
    """
    path = manifest_path(prefix)
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; {_REMEDY}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_REMEDY}") from None


def utc_now() -> str:
    """Now, for `created`: 2026-01-31T12:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _counts(value: Any, where: str) -> Counts:
    fields = _Fields(value, where)
    return Counts(*(fields.integer(name) for name in ("documents", "text_bytes", "tokens")))


def _input(value: Any, where: str) -> InputFile:
    fields = _Fields(value, where)
    return InputFile(fields.string("path"), fields.integer("bytes"), fields.optional("sha256", str))


class _Fields:
    """A JSON object whose fields are taken by type; `where` stands before a field's name in a message."""

    def __init__(self, value: Any, where: str) -> None:
        self._where = where
        if not isinstance(value, dict):
            raise ValueError(f"{where.removesuffix('.')} is {_short(value)}, not an object")
        self._value: dict[str, Any] = value

    def require(self, key: str) -> None:
        if key not in self._value:
            raise ValueError(f"{self._where}{key} is missing")

    def _get(self, key: str, name: str, *kinds: type) -> Any:
        self.require(key)
        value = self._value[key]
        if type(value) not in kinds:  # exactly: a bool is an int to isinstance
            raise ValueError(f"{self._where}{key} is {_short(value)}, not {name}")
        return value

    def string(self, key: str) -> str:
        return str(self._get(key, "a string", str))

    def boolean(self, key: str) -> bool:
        return bool(self._get(key, "true or false", bool))

    def integer(self, key: str) -> int:
        value = int(self._get(key, "a whole number", int))
        if value < 0:
            raise ValueError(f"{self._where}{key} is {value}, below 0")
        return value

    def number(self, key: str) -> float:
        return float(self._get(key, "a number", int, float))

    def optional(self, key: str, kind: type) -> Any:
        """A string or whole number; None where it is null or absent."""
        if self._value.get(key) is None:
            return None
        return self.integer(key) if kind is int else self.string(key)

    def mapping(self, key: str) -> dict[str, Any]:
        value: dict[str, Any] = self._get(key, "an object", dict)
        return value

    def array(self, key: str) -> list[Any]:
        value: list[Any] = self._get(key, "a list", list)
        return value

    def integers(self, key: str) -> dict[str, int]:
        fields = _Fields(self.mapping(key), f"{self._where}{key}.")
        return {name: fields.integer(name) for name in fields._value}

    def strings(self, key: str) -> dict[str, str]:
        fields = _Fields(self.mapping(key), f"{self._where}{key}.")
        return {name: fields.string(name) for name in fields._value}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
