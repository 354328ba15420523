"""The input of a run as one list of files, and how the run is to go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron_sharedproj
from megatron_sharedproj.data.readers import Input
from megatron_sharedproj.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class PreprocessOptions:
    """How to run. `tokenizer` holds build_tokenizer's arguments.

    Attributes:
        engine: auto, or one of engines.ENGINES; parse_special_tokens: see engines.choose_engine.
        by_source, exclude_sources, unit_bytes: see encode.EncodeOptions.
        target_tokens, shard_bytes: see outputs.OutputOptions.
        verify: documents to encode again with HF tokenizers, over the whole run (about).
        on_error: stop at a bad record or file, or skip it.
        overwrite: replace existing output, and an unfinished run with other settings.
    """

    tokenizer: Mapping[str, Any]
    text_key: str = "text"
    engine: str = "auto"
    parse_special_tokens: bool = False
    append_eod: bool = True
    by_source: bool = False
    exclude_sources: tuple[str, ...] = ()
    target_tokens: int | None = None
    shard_bytes: int | None = None
    verify: int = 0
    workers: int = 1
    on_error: str = "stop"
    max_reported_errors: int = 20
    overwrite: bool = False
    log_interval: float = 10.0
    unit_bytes: int = 32 << 20


@dataclass
class Split:
    """A split: its files by index, and what was left out of them."""

    name: str
    files: list[int]
    rejected: Counter[str] = field(default_factory=Counter)
    excluded: Counter[str] = field(default_factory=Counter)


class Corpus:
    """Files 0, 1, ... of all splits. Small splits go first: a problem that they have in common shows early.

    Attributes:
        order: the splits as they were given.
        inputs, sizes: by file; a size is in bytes, 0 where it is not known.
    """

    def __init__(self, files: Mapping[str, Sequence[Input]]) -> None:
        self.order = list(files)
        self.inputs: list[Input] = []
        self.sizes: list[int] = []
        self.splits: list[Split] = []
        sizes = {split: [file_size(item) for item in group] for split, group in files.items()}
        for split in sorted(files, key=lambda split: sum(sizes[split])):
            first = len(self.inputs)
            self.inputs += files[split]
            self.sizes += sizes[split]
            self.splits.append(Split(split, list(range(first, len(self.inputs)))))
        self.split_of = {file: split for split in self.splits for file in split.files}

    def settings(self, options: PreprocessOptions, tokenizer: Tokenizer) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes."""
        return {
            "inputs": [
                [self.split_of[file].name, str(item), size, _mtime(item)]
                for file, (item, size) in enumerate(zip(self.inputs, self.sizes, strict=True))
            ],
            "tokenizer": tokenizer.sha256,
            "--parse-special-tokens": options.parse_special_tokens,
            "--append-eod": options.append_eod,
            "--split-by-source": options.by_source,
            "--exclude-source": list(options.exclude_sources),
            "--target-tokens": options.target_tokens,
            "--shard-size": options.shard_bytes,
            "unit size": options.unit_bytes,
            "tool version": megatron_sharedproj.__version__,
        }


def file_size(item: Input) -> int:
    """In bytes; 0 where it is not known. A file that cannot be read shows when its turn comes."""
    return item.stat().st_size if isinstance(item, Path) and item.exists() else 0


def _mtime(item: Input) -> int:
    return item.stat().st_mtime_ns if isinstance(item, Path) and item.exists() else 0
