"""How large the output will be: from file sizes, or from encoding a sample of every kind of file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sharedproj.data.engines import Engine
from megatron_sharedproj.data.indexed import token_dtype
from megatron_sharedproj.data.readers import Input, open_reader
from megatron_sharedproj.data.records import SourceError, parse_block
from megatron_sharedproj.data.tokenizers import Tokenizer

# Tokens per byte of a file, by its kind, at 4.4 bytes of English a token; SlimPajama's card has 2.5 times as
# much text as .zst.
_TOKENS_PER_BYTE = {".zst": 0.62, ".gz": 0.55, ".parquet": 0.4}
_PLAIN = 0.22
_SAMPLED_FILES = 8


@dataclass(frozen=True)
class Estimate:
    """Tokens and bytes of the .bin files, and the bytes that are free where they go.

    Attributes:
        sampled: documents that were encoded for it; 0: from sizes alone.
    """

    tokens: float
    size: float
    free: int
    sampled: int

    def line(self) -> str:
        """One line for the user."""
        how = f"from {self.sampled} sampled documents" if self.sampled else "from file sizes"
        warning = "; LESS IS FREE" if self.free < self.size else ""
        return (
            f"about {self.tokens / 1e6:,.1f} M tokens, {self.size / 1e9:,.2f} GB ({how}); "
            f"{self.free / 1e9:,.1f} GB free{warning}"
        )


def estimate(
    files: Mapping[str, Sequence[Input]],
    tokenizer: Tokenizer,
    engine: Engine,
    output_prefix: str,
    *,
    exact: bool,
    text_key: str = "text",
) -> Estimate:
    """Tokens to expect; `exact`: from the first documents of files spread over the input.

    Raises SourceError for a sampled file that cannot be read.
    """
    inputs = [item for group in files.values() for item in group]
    sizes = [item.stat().st_size if isinstance(item, Path) else 0 for item in inputs]
    tokens, sampled = 0.0, 0
    if exact:
        step = max(1, len(inputs) // _SAMPLED_FILES)
        chosen = range(0, len(inputs), step)
        rates = {index: _sample(inputs[index], engine, text_key) for index in chosen}
        sampled = sum(count for _, count in rates.values())
        weights = sum(sizes[index] for index in chosen)
        if weights:
            rate = sum(sizes[index] * rates[index][0] for index in chosen) / weights
            tokens = rate * sum(sizes)
    else:
        for item, bytes_of_it in zip(inputs, sizes, strict=True):
            rate = next((rate for end, rate in _TOKENS_PER_BYTE.items() if str(item).endswith(end)), _PLAIN)
            tokens += bytes_of_it * rate
    folder = Path(output_prefix).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    size = tokens * token_dtype(tokenizer.vocab_size).itemsize
    return Estimate(tokens, size, shutil.disk_usage(os.fspath(folder)).free, sampled)


def _sample(item: Input, engine: Engine, text_key: str) -> tuple[float, int]:
    """(Tokens per byte of the file, documents) in its first block."""
    reader = open_reader(item, text_key)
    try:
        for block in reader.unit(0):
            texts = parse_block(block, text_key).texts
            ids, _ = engine.encode(texts)
            return (ids.size + len(texts)) / max(1, reader.position), len(texts)
        if reader.problem is not None:
            raise SourceError(str(reader.problem))
        return 0.0, 0
    finally:
        reader.close()
