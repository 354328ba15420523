"""The manifest: what is written is read back, and what is wrong is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.data import manifest as manifests
from megatron_sharedproj.data.manifest import Counts, InputFile, Manifest, TokenizerRecord

TOKENIZER = TokenizerRecord("HuggingFaceTokenizer", "some words", 300, "a" * 64, "fastokens", "text")
FULL = Manifest(
    tool_version="1.2",
    created="2026-01-31T12:00:00+00:00",
    split="train",
    text_key="text",
    dtype="uint16",
    append_eod=True,
    eod=0,
    cut_document=True,
    shard=1,
    shards=3,
    tokenizer=TOKENIZER,
    counts=Counts(3, 100, 7),
    sources={"b": Counts(1, 40, 3), "a": Counts(2, 60, 4)},
    excluded_sources={"RedPajamaBook": 5},
    rejected={"bad_json": 2},
    inputs=[InputFile("chunk1/a.jsonl", 123, "b" * 64), InputFile("chunk1/b.jsonl", 0)],
    checksums={".bin": "c" * 64, ".idx": "d" * 64},
)
# As version 1 wrote it.
OLD: dict[str, Any] = {
    "format": "megatron_core_indexed_dataset",
    "tool_version": "0.1.0",
    "split": "",
    "text_key": "text",
    "dtype": "int32",
    "append_eod": False,
    "eod": 9,
    "tokenizer": {"type": "NullTokenizer", "description": "d", "vocab_size": 10, "sha256": "e" * 64},
    "counts": {"documents": 1, "text_bytes": 8, "tokens": 4},
    "sources": {"": {"documents": 1, "text_bytes": 8, "tokens": 4}},
    "skipped": {"bad_json": 1},
    "inputs": [{"path": "a.jsonl", "bytes": 10}],
}


def test_round_trip() -> None:
    text = FULL.to_json()
    again = Manifest.from_json(text)
    assert again.to_json() == text and text.endswith("}\n")
    assert dataclasses.replace(again, inputs=list(again.inputs)) == FULL
    value = json.loads(text)
    assert (value["format_version"], value["bytes_per_token"]) == (2, 100 / 7)
    assert list(value["sources"]) == ["a", "b"]  # the bytes do not depend on the order of arrival
    assert FULL.bytes_per_token == 100 / 7


def test_optional_fields_may_be_unknown() -> None:
    tokenizer = TokenizerRecord("t", "d", 300, None)
    least = dataclasses.replace(FULL, tokenizer=tokenizer, created=None, shard=None, shards=None)
    again = Manifest.from_json(least.to_json())
    assert (again.created, again.shard, again.tokenizer) == (None, None, tokenizer)


def test_version_1_is_read() -> None:
    old = Manifest.from_json(json.dumps(OLD))
    assert old.rejected == {"bad_json": 1} and old.checksums == {} and not old.cut_document
    assert old.inputs == (InputFile("a.jsonl", 10),) and old.tokenizer.engine is None
    assert Manifest.from_json(old.to_json()) == old


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda value: value.pop(key)


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        *parents, key, new = path
        for parent in parents:
            value = value[parent]
        value[key] = new

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("format"), "not a manifest of token files"),
        (put("format", "other"), "not a manifest of token files"),
        (put("format_version", 3), "format_version is 3, newer than this program"),
        (put("format_version", True), "format_version is true, not a whole number"),
        (without("counts"), "counts is missing"),
        (without("checksums"), "checksums is missing"),
        (put("counts", "documents", "3"), r'counts.documents is "3", not a whole number'),
        (put("counts", "documents", True), "counts.documents is true, not a whole number"),
        (put("counts", "documents", -3), "counts.documents is -3, below 0"),
        (put("counts", "tokens", 8), "counts.tokens is 8, but the sources add up to 7"),
        (put("sources", "a", 5), r"sources\[a\] is 5, not an object"),
        (put("sources", []), r"sources is \[\], not an object"),
        (put("append_eod", 1), "append_eod is 1, not true or false"),
        (put("split", None), "split is null, not a string"),
        (put("dtype", "float32"), "dtype is 'float32', not uint16 or int32"),
        (put("eod", 300), "eod is 300, outside the vocabulary of 300"),
        (put("created", "yesterday"), "created is 'yesterday', not an ISO 8601 date"),
        (put("shards", None), "shard and shards: one is given without the other"),
        (put("shard", 3), "shard is 3, of 3 shards"),
        (put("tokenizer", "sha256", "abc"), "tokenizer.sha256 is 'abc', not a sha256 in hex"),
        (put("tokenizer", "special_tokens", "both"), "special_tokens is 'both', not one of text, parsed"),
        (put("checksums", ".bin", 5), r"checksums.\.bin is 5, not a string"),
        (put("checksums", ".txt", "c" * 64), "not of .bin and .idx"),
        (put("inputs", 1, "bytes", 0.5), r"inputs\[1\].bytes is 0.5, not a whole number"),
        (put("inputs", 0, []), r"inputs\[0\] is \[\], not an object"),
        (put("bytes_per_token", 4.0), "bytes_per_token is 4.0, but the counts give 14.28"),
    ],
)
def test_damage_is_named(change: Callable[[dict[str, Any]], None], message: str) -> None:
    value = json.loads(FULL.to_json())
    change(value)
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.from_json(json.dumps(value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00", "[" * 100_000, '{"format": 1}'])
def test_other_json_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="not JSON|not a manifest") as caught:
        Manifest.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_wrong_manifest_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="counts.documents is 4"):
        dataclasses.replace(FULL, counts=Counts(4, 100, 7))


def test_load_names_the_file(tmp_path: Path) -> None:
    prefix = tmp_path / "a.b"  # a dot in a prefix is no suffix
    assert manifests.load(prefix) is None
    path = tmp_path / "a.b.json"
    path.write_text(FULL.to_json())
    loaded = manifests.load(str(prefix))
    assert loaded is not None and loaded.counts == FULL.counts
    path.write_text(FULL.to_json()[:-20])
    with pytest.raises(ValueError, match=r"a\.b\.json: not JSON .*; restore it, preprocess again"):
        manifests.load(prefix)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.b\.json: not UTF-8 text"):
        manifests.load(prefix)


def test_now_is_utc_and_accepted() -> None:
    now = manifests.utc_now()
    assert now.endswith("+00:00")
    assert dataclasses.replace(FULL, created=now).created == now


def test_counts_add_up() -> None:
    counts = Counts(1, 2, 3)
    counts.add(Counts(10, 20, 30))
    assert counts == Counts(11, 22, 33) and Counts().bytes_per_token == 0.0
