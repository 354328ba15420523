"""How large the output will be, from encoding a sample of files spread over the input."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_sharedproj.data.corpus import file_size
from megatron_sharedproj.data.engines import Engine
from megatron_sharedproj.data.indexed import token_dtype
from megatron_sharedproj.data.readers import Input, open_reader
from megatron_sharedproj.data.records import parse_block
from megatron_sharedproj.data.tokenizers import Tokenizer

# Files to sample, and characters of each: in a moment before a run, or as well as is possible in a dry one.
_QUICK = (3, 1 << 18)
_THOROUGH = (16, 1 << 22)


@dataclass(frozen=True)
class Estimate:
    """Tokens and bytes of the .bin files, and the bytes that are free where they go.

    Attributes:
        sampled: documents that were encoded for it; 0: nothing is known.
    """

    tokens: float
    size: float
    free: int
    sampled: int

    def line(self) -> str:
        """One line for the user."""
        if not self.sampled:
            return f"output of unknown size; {self.free / 1e9:,.1f} GB free"
        warning = "; LESS IS FREE" if self.free < self.size else ""
        return (
            f"about {self.tokens / 1e6:,.1f} M tokens, {self.size / 1e9:,.2f} GB"
            f" (from {self.sampled} sampled documents); {self.free / 1e9:,.1f} GB free{warning}"
        )


def estimate(
    files: Mapping[str, Sequence[Input]],
    tokenizer: Tokenizer,
    engine: Engine,
    output_prefix: str,
    *,
    thorough: bool,
    text_key: str = "text",
) -> Estimate:
    """Tokens to expect. Files that cannot be read are passed over: the run itself says so.

    Args:
        thorough: encode more of more files.
    """
    inputs = [item for group in files.values() for item in group if isinstance(item, Path)]
    sizes = [file_size(item) for item in inputs]
    count, characters = _THOROUGH if thorough else _QUICK
    tokens, sampled, weight = 0.0, 0, 0
    for index in range(0, len(inputs), max(1, -(-len(inputs) // count))):
        try:
            rate, documents = _sample(inputs[index], engine, text_key, characters)
        except ValueError:  # SourceError, or text that the engine refuses
            continue
        if documents:
            tokens += rate * sizes[index]
            weight += sizes[index]
            sampled += documents
    tokens *= sum(sizes) / max(1, weight)
    folder = Path(output_prefix).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    size = tokens * token_dtype(tokenizer.vocab_size).itemsize
    return Estimate(tokens, size, shutil.disk_usage(os.fspath(folder)).free, sampled)


def _sample(item: Input, engine: Engine, text_key: str, characters: int) -> tuple[float, int]:
    """(Tokens per byte of the file, documents) of about so many characters from its beginning."""
    reader = open_reader(item, text_key)
    ids = kept = whole = documents = 0
    try:
        for block in reader.unit(0):
            texts = parse_block(block, text_key).texts
            sizes = [len(text) for text in texts]
            whole += sum(sizes)
            enough = next(
                (n for n, size in enumerate(accumulate(sizes), 1) if size >= characters), len(texts)
            )
            ids += engine.encode(texts[:enough])[0].size + enough
            kept += sum(sizes[:enough])
            documents += enough
            if kept >= characters:
                break
        share = kept / whole if whole else 0.0
        return (ids / share / max(1, reader.position) if share else 0.0), documents
    finally:
        reader.close()
