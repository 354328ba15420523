"""Parts -> token files: appended in order, cut at a token budget, divided into shards, and resumable.

All files of a run stand in its folder until `publish`. Between two `state`s nothing is promised: a resumed
output is cut back to the state that was saved last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sharedproj.data.encode import OutputDocuments
from megatron_sharedproj.data.indexed import IndexedWriter, token_dtype
from megatron_sharedproj.data.manifest import Counts
from megatron_sharedproj.data.tokenizers import Tokenizer

SUFFIXES = (".bin", ".json", ".idx")  # .idx last: a pair is complete when its .idx exists


@dataclass(frozen=True)
class OutputOptions:
    """Where token files go and how long they get.

    Attributes:
        prefix: of all outputs of the run; text_key: key or column, a part of their names.
        target_tokens: length of each output in tokens, exactly if there is enough text; None: all.
        shard_bytes: size of a .bin at which a new shard starts (between documents); None: one file.
        append_eod: whether documents end with the end-of-document id.
    """

    prefix: str
    text_key: str
    target_tokens: int | None = None
    shard_bytes: int | None = None
    append_eod: bool = True


@dataclass
class Shard:
    """A token file: what is in it so far, per source; its checksums when it is closed."""

    documents: int = 0
    tokens: int = 0
    sources: dict[str, Counts] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        total = Counts()
        for counts in self.sources.values():
            total.add(counts)
        return total


class Output:
    """The documents of one split, or of one source of it.

    Attributes:
        shards: the files, the last one possibly still open.
        cut: the last document was cut to meet the budget; complete: the budget is met.
    """

    def __init__(
        self, split: str, source: str, tokenizer: Tokenizer, options: OutputOptions, folder: Path
    ) -> None:
        self.split, self.source = split, source
        self.shards: list[Shard] = []
        self.cut = False
        self._tokenizer, self._options, self._folder = tokenizer, options, folder
        self._item = token_dtype(tokenizer.vocab_size).itemsize
        self._writer: IndexedWriter | None = None

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def complete(self) -> bool:
        target = self._options.target_tokens
        return target is not None and self.tokens >= target

    def prefix(self, shard: int) -> str:
        """Of a shard's final files."""
        name = output_prefix_of(self._options.prefix, self.split, self._options.text_key, self.source)
        return name if self._options.shard_bytes is None else f"{name}_{shard:05d}"

    def add(self, documents: OutputDocuments, source_names: list[str]) -> None:
        """Append documents, as many as the budget leaves room for."""
        if self._options.target_tokens is not None:
            documents = self._within(documents, self._options.target_tokens - self.tokens)
        ends = np.cumsum(documents.lengths, dtype=np.int64)
        start, total = 0, int(documents.lengths.size)
        while start < total:
            writer, stop = self._open(), total
            if self._options.shard_bytes is not None:
                taken = int(ends[start - 1]) if start else 0
                room = self._options.shard_bytes // self._item - writer.tokens
                stop = int(np.searchsorted(ends, taken + room, side="right"))
                if stop <= start and writer.tokens:
                    self.close()
                    continue
                stop = max(stop, start + 1)  # a document longer than a shard has one of its own
            self._append(writer, documents, source_names, slice(start, stop), ends)
            start = stop

    def _append(
        self,
        writer: IndexedWriter,
        documents: OutputDocuments,
        names: list[str],
        chosen: slice,
        ends: np.ndarray[Any, Any],
    ) -> None:
        begin = int(ends[chosen.start - 1]) if chosen.start else 0
        lengths, sources = documents.lengths[chosen], documents.sources[chosen]
        writer.add(documents.tokens[begin : int(ends[chosen.stop - 1])], lengths)
        shard = self.shards[-1]
        shard.documents, shard.tokens = writer.documents, writer.tokens
        by_documents = np.bincount(sources, minlength=len(names))
        # Sums of whole numbers below 2^53: exact in float64.
        by_tokens = np.bincount(sources, lengths, len(names))
        by_bytes = np.bincount(sources, documents.text_bytes[chosen], len(names))
        for index, name in enumerate(names):
            if by_documents[index]:
                counts = Counts(int(by_documents[index]), int(by_bytes[index]), int(by_tokens[index]))
                shard.sources.setdefault(name, Counts()).add(counts)

    def _within(self, documents: OutputDocuments, room: int) -> OutputDocuments:
        """The first `room` tokens: whole documents, and a part of the next one."""
        ends = np.cumsum(documents.lengths, dtype=np.int64)
        if not ends.size or ends[-1] <= room:
            return documents
        whole = int(np.searchsorted(ends, room, side="right"))
        left = room - (int(ends[whole - 1]) if whole else 0)
        count = whole + (left > 0)
        lengths, text_bytes = documents.lengths[:count].copy(), documents.text_bytes[:count].copy()
        if left:
            begin = room - left
            lengths[-1] = left
            text_bytes[-1] = self._text_bytes(documents.tokens[begin:room])
            self.cut = True
        return OutputDocuments(documents.tokens[:room], lengths, text_bytes, documents.sources[:count])

    def _text_bytes(self, ids: np.ndarray[Any, Any]) -> int:
        by_id = self._tokenizer.byte_lengths()
        if by_id is not None:
            return int(by_id[ids.astype(np.int64)].sum())
        return len(self._tokenizer.decode(ids.tolist()).encode())

    def _open(self) -> IndexedWriter:
        if self._writer is None:
            self.shards.append(Shard())
            self._writer = IndexedWriter(
                self.prefix(len(self.shards) - 1), self._tokenizer.vocab_size, self._folder
            ).__enter__()
        return self._writer

    def close(self) -> None:
        """Write the index of the open shard."""
        if self._writer is not None:
            self._writer.close()
            self.shards[-1].checksums = self._writer.checksums
            self._writer = None

    def leave(self) -> None:
        """Close the open files as they are."""
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            self._writer = None

    def state(self) -> dict[str, Any]:
        """What `restored` needs; what was added until now is on the disk."""
        if self._writer is not None:
            self._writer.sync()
        return {
            "split": self.split,
            "source": self.source,
            "cut": self.cut,
            "shards": [asdict(shard) for shard in self.shards],
        }

    @classmethod
    def restored(
        cls, state: Mapping[str, Any], tokenizer: Tokenizer, options: OutputOptions, folder: Path
    ) -> Output:
        """An output as it was when its state was taken. Raises ValueError where its files are gone."""
        output = cls(state["split"], state["source"], tokenizer, options, folder)
        output.cut = state["cut"]
        for shard in state["shards"]:
            sources = {name: Counts(**counts) for name, counts in shard["sources"].items()}
            output.shards.append(Shard(shard["documents"], shard["tokens"], sources, shard["checksums"]))
        last = output.shards[-1] if output.shards else None
        if last is not None and not last.checksums:
            writer = IndexedWriter(output.prefix(len(output.shards) - 1), tokenizer.vocab_size, folder)
            output._writer = writer.resume(last.documents, last.tokens)
        return output


def output_prefix_of(output_prefix: str, split: str, text_key: str, source: str = "") -> str:
    """`PREFIX_<split>_<source>_<key>_document`, without the parts that are empty."""
    parts = (output_prefix, split, re.sub(r"[^\w.-]", "-", source), text_key, "document")
    return "_".join(part for part in parts if part)


def blend_path(output_prefix: str, split: str, text_key: str) -> Path:
    """Where the weights and prefixes of a split's several files go."""
    stem = output_prefix_of(output_prefix, split, text_key).removesuffix("_document")
    return Path(f"{stem}_blend.txt")


def check_free(prefixes: Iterable[str]) -> None:
    """Raises FileExistsError naming the first output file that is there already."""
    for path in (prefix + suffix for prefix in prefixes for suffix in SUFFIXES):
        if os.path.exists(path):
            raise FileExistsError(f"{path} exists")
