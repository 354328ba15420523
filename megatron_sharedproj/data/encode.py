"""A unit of a file -> token ids in a part file: what a worker process does.

A part is two files in the run's folder: `FILE-UNIT.part` (for each output: ids, then int32 lengths, int64
text bytes and int32 source of each document) and `FILE-UNIT.json`, whose appearance says that the part is
whole; `FILE-UNIT.rejects` lists bad records, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_sharedproj.data.engines import Engine, Verifier
from megatron_sharedproj.data.indexed import token_dtype
from megatron_sharedproj.data.readers import FileProblem, Input, UnitReader, open_reader
from megatron_sharedproj.data.records import BadRecord, Block, Documents, parse_block
from megatron_sharedproj.data.tokenizers import Tokenizer

_LONGEST_VERIFIED = 1 << 18  # HF tokenizers takes 100 bytes of memory for one of text


@dataclass(frozen=True)
class EncodeOptions:
    """What the tokens depend on, and how to check them.

    Attributes:
        text_key: key or column of the text.
        append_eod: end each document with the tokenizer's end-of-document id.
        by_source: one output per source, else one for all.
        exclude_sources: sources whose documents are left out (and counted).
        unit_bytes: size of a unit; part of what a run must be resumed with.
        verify: documents of each unit (of at most 256 Ki characters) to encode again with HF tokenizers.
    """

    text_key: str = "text"
    append_eod: bool = True
    by_source: bool = False
    exclude_sources: tuple[str, ...] = ()
    unit_bytes: int = 32 << 20
    verify: int = 0


@dataclass
class Part:
    """What `FILE-UNIT.json` holds.

    Attributes:
        file, unit: index of the file among all inputs, and of the unit in it.
        records: lines or rows read, bad ones included; position: bytes of the file that they took.
        ended: nothing is behind this unit; problem: (kind, reason) why the file ended early.
        outputs: (name, documents, tokens) of each output in the order of the part file.
        sources: names by index.
        rejected: count per kind; first_bad: (record, reason) of the first one, counted within the unit.
        excluded: documents left out per source.
        sha256: of the whole file, where it was read from end to end.
        verified: documents whose ids were compared with HF tokenizers.
    """

    file: int
    unit: int
    records: int = 0
    position: int = 0
    ended: bool = False
    problem: tuple[str, str] | None = None
    outputs: list[tuple[str, int, int]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)
    first_bad: tuple[int, str] | None = None
    excluded: dict[str, int] = field(default_factory=dict)
    sha256: str | None = None
    verified: int = 0

    @property
    def name(self) -> str:
        return part_name(self.file, self.unit)


@dataclass
class OutputDocuments:
    """Documents of one output: ids back to back, and per document its length, text bytes and source."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    text_bytes: NDArray[np.int64]
    sources: NDArray[np.int32]


def part_name(file: int, unit: int) -> str:
    return f"{file:07d}-{unit:06d}"


def read_part(folder: Path, name: str) -> Part:
    """The part of that name. Raises ValueError if its files do not fit together (a power cut)."""
    part = Part(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    part.outputs = [(output, documents, tokens) for output, documents, tokens in part.outputs]
    return part


def part_documents(folder: Path, part: Part, dtype: np.dtype[Any]) -> list[tuple[str, OutputDocuments]]:
    """(output, documents) of a part. Raises ValueError if the part file is shorter or longer than it says."""
    data = (folder / f"{part.name}.part").read_bytes()
    expected = sum(tokens * dtype.itemsize + documents * 16 for _, documents, tokens in part.outputs)
    if len(data) != expected:
        raise ValueError(f"{folder / part.name}.part is {len(data)} bytes, not {expected}")
    found, at = [], 0

    def take(count: int, kind: Any) -> NDArray[Any]:
        nonlocal at
        array = np.frombuffer(data, kind, count, at)
        at += array.nbytes
        return array

    for output, documents, tokens in part.outputs:
        arrays = take(tokens, dtype), take(documents, np.int32)
        found.append((output, OutputDocuments(*arrays, take(documents, np.int64), take(documents, np.int32))))
    return found


class UnitEncoder:
    """Encodes units; keeps the last file open, so that its next unit needs no second decompression."""

    def __init__(
        self,
        inputs: Sequence[Input],
        tokenizer: Tokenizer,
        engine: Engine,
        verifier: Verifier,
        options: EncodeOptions,
        folder: Path,
    ) -> None:
        self._inputs, self._options, self._folder = inputs, options, folder
        self._tokenizer, self._engine, self._verifier = tokenizer, engine, verifier
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._reader: UnitReader | None = None
        self._next = (-1, 0)  # file, first unit that the open reader can still give

    def encode(self, file: int, unit: int, progress: Callable[[int, int, int, int], None]) -> Part:
        """Write a part. Calls `progress` after each block: documents, text bytes, tokens, file bytes of it.

        Raises ValueError where ids differ from those of HF tokenizers, SourceError for an input that no run
        can use (a missing column), OSError where the part cannot be written.
        """
        part = Part(file, unit)
        work = _Work(part, self._dtype, random.Random(f"{file}-{unit}"), self._options.verify)
        temporary = self._folder / f"{part.name}.{os.getpid()}.tmp"
        try:
            reader = self._open(file, unit)
        except FileProblem as problem:
            part.ended, part.problem = True, (problem.kind, problem.reason)
        else:
            start = reader.position
            with open(temporary, "w", encoding="utf-8") as rejects:
                for block in reader.unit(unit):
                    before = reader.position
                    counts = self._encode_block(block, work, rejects)
                    progress(*counts, before - start - part.position)
                    part.position = before - start
                for record, reason in reader.overlong:
                    work.reject(BadRecord(reader.path, record, "overlong_line", reason), rejects)
                if part.rejected:
                    rejects.flush()
                    os.fsync(rejects.fileno())
            part.records, part.ended, part.sha256 = reader.records, reader.ended, reader.sha256()
            part.position = reader.position - start
            if reader.problem is not None:
                part.problem = (reader.problem.kind, reader.problem.reason)
            self._next = (file, unit + 1)
            if part.rejected:
                os.replace(temporary, self._folder / f"{part.name}.rejects")
            else:
                os.unlink(temporary)
        self._write(part, work, temporary)
        return part

    def _open(self, file: int, unit: int) -> UnitReader:
        if self._reader is None or self._next[0] != file or unit < self._next[1]:
            self.close()
            self._reader = open_reader(self._inputs[file], self._options.text_key, self._options.unit_bytes)
        self._next = (file, unit)
        return self._reader

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _write(self, part: Part, work: _Work, temporary: Path) -> None:
        part.sources = list(work.source_index)
        with open(temporary, "wb") as stream:
            for name, output in work.outputs.items():
                part.outputs.append((name, sum(map(len, output.lengths)), output.count))
                for array in (*output.tokens, *output.lengths):
                    stream.write(array.data)
                stream.write(np.array(output.text_bytes, np.int64).data)
                stream.write(np.array(output.sources, np.int32).data)
            stream.flush()
            os.fsync(stream.fileno())  # before the name that says it is whole, for a power cut
        os.replace(temporary, self._folder / f"{part.name}.part")
        temporary.write_text(json.dumps(asdict(part)), encoding="utf-8")
        os.replace(temporary, self._folder / f"{part.name}.json")

    def _encode_block(self, block: Block, work: _Work, rejects: IO[str]) -> tuple[int, int, int]:
        documents = parse_block(block, self._options.text_key)
        if self._options.exclude_sources:
            documents = self._included(documents, work)
        ids, lengths = self._ids(block, documents)
        if not lengths.all():
            documents, lengths = _without_empty(block, documents, lengths)
        for bad in sorted(documents.bad, key=lambda bad: bad.record):
            work.reject(bad, rejects)
        if ids.size and int(ids.max()) >= self._tokenizer.vocab_size:  # before a narrower dtype wraps it
            vocab = self._tokenizer.vocab_size
            raise ValueError(f"{block.path}: {self._engine.name} gave id {ids.max()} of {vocab}")
        self._verify(documents.texts, ids, lengths, work)
        eod = self._tokenizer.eod if self._options.append_eod else None
        tokens, lengths = _with_eod(ids, lengths, eod, self._dtype)
        text_bytes = [len(text) if text.isascii() else len(text.encode()) for text in documents.texts]
        if self._options.by_source:
            ends = np.cumsum(lengths)
            for source in dict.fromkeys(documents.sources):
                chosen = [i for i, name in enumerate(documents.sources) if name == source]
                pieces = [tokens[ends[i] - lengths[i] : ends[i]] for i in chosen]
                sizes = [text_bytes[i] for i in chosen]
                work.add(source, np.concatenate(pieces), lengths[chosen], sizes, [source] * len(chosen))
        elif documents.texts:
            work.add("", tokens, lengths, text_bytes, documents.sources)
        return len(documents.texts), sum(text_bytes), tokens.size

    def _included(self, documents: Documents, work: _Work) -> Documents:
        kept = Documents(bad=documents.bad)
        excluded = self._options.exclude_sources
        for text, source, record in zip(documents.texts, documents.sources, documents.records, strict=True):
            if source in excluded:
                work.part.excluded[source] = work.part.excluded.get(source, 0) + 1
                continue
            kept.texts.append(text)
            kept.sources.append(source)
            kept.records.append(record)
        return kept

    def _ids(self, block: Block, documents: Documents) -> tuple[NDArray[Any], NDArray[Any]]:
        """Ids of all texts and their lengths; a text that cannot be encoded gets a bad record and no ids."""
        try:
            return self._engine.encode(documents.texts)
        except ValueError:
            pieces: list[NDArray[Any]] = []
            kept = Documents(bad=documents.bad)
            for text, source, record in zip(
                documents.texts, documents.sources, documents.records, strict=True
            ):
                try:
                    pieces.append(self._engine.encode([text])[0])
                except ValueError as error:
                    reason = f"cannot be encoded: {error}"
                    kept.bad.append(BadRecord(block.path, record, "not_encodable", reason))
                    continue
                kept.texts.append(text)
                kept.sources.append(source)
                kept.records.append(record)
            documents.texts, documents.sources, documents.records = kept.texts, kept.sources, kept.records
            ids = np.concatenate(pieces) if pieces else np.empty(0, np.uint32)
            return ids, np.array([len(piece) for piece in pieces], np.int64)

    def _verify(self, texts: Sequence[str], ids: NDArray[Any], lengths: NDArray[Any], work: _Work) -> None:
        count = -(-work.left_to_verify // 2)  # half at once, as nobody knows how many blocks will come
        if not count:
            return
        candidates = [index for index, text in enumerate(texts) if len(text) <= _LONGEST_VERIFIED]
        ends = np.cumsum(lengths)
        for index in work.random.sample(candidates, min(count, len(candidates))):
            self._verifier.check(texts[index], ids[ends[index] - lengths[index] : ends[index]])
            work.part.verified += 1
            work.left_to_verify -= 1


@dataclass
class _Output:
    tokens: list[NDArray[Any]] = field(default_factory=list)
    lengths: list[NDArray[np.int32]] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    count: int = 0


class _Work:
    """What a part holds so far."""

    def __init__(self, part: Part, dtype: np.dtype[Any], numbers: random.Random, verify: int) -> None:
        self.part, self.random = part, numbers
        self.outputs: dict[str, _Output] = {}
        self.source_index: dict[str, int] = {}
        self._dtype = dtype
        self.left_to_verify = verify

    def add(
        self,
        name: str,
        tokens: NDArray[Any],
        lengths: NDArray[np.int32],
        text_bytes: Sequence[int],
        sources: Sequence[str],
    ) -> None:
        output = self.outputs.setdefault(name, _Output())
        output.tokens.append(tokens)
        output.lengths.append(lengths)
        output.text_bytes += text_bytes
        index = self.source_index
        output.sources += [index.setdefault(source, len(index)) for source in sources]
        output.count += tokens.size

    def reject(self, bad: BadRecord, rejects: IO[str]) -> None:
        counts = self.part.rejected
        counts[bad.kind] = counts.get(bad.kind, 0) + 1
        if self.part.first_bad is None or bad.record < self.part.first_bad[0]:
            self.part.first_bad = (bad.record, bad.reason)
        rejects.write(json.dumps({"record": bad.record, "kind": bad.kind, "reason": bad.reason}) + "\n")


def _without_empty(
    block: Block, documents: Documents, lengths: NDArray[Any]
) -> tuple[Documents, NDArray[Any]]:
    kept = Documents(bad=documents.bad)
    for index, length in enumerate(lengths.tolist()):
        if not length:
            record = documents.records[index]
            kept.bad.append(BadRecord(block.path, record, "empty_document", "no tokens in this text"))
            continue
        kept.texts.append(documents.texts[index])
        kept.sources.append(documents.sources[index])
        kept.records.append(documents.records[index])
    return kept, lengths[lengths > 0]


def _with_eod(
    ids: NDArray[Any], lengths: NDArray[Any], eod: int | None, dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Ids in the output's dtype, each document ended by `eod` unless that is None; and the new lengths."""
    if eod is None:
        return ids.astype(dtype), lengths.astype(np.int32)
    tokens = np.full(ids.size + lengths.size, eod, dtype)
    if ids.size > 64 * lengths.size:  # few documents: copying each is faster than a mask over all ids
        end = 0
        for index, length in enumerate(lengths.tolist()):
            tokens[end + index : end + index + length] = ids[end : end + length]
            end += length
    else:
        of_text = np.ones(tokens.size, np.bool_)
        of_text[np.cumsum(lengths) + np.arange(lengths.size)] = False
        tokens[of_text] = ids
    return tokens, (lengths + 1).astype(np.int32)
