"""The key/value cache: bytes per token and at any context, by formula and in the storage of a live cache.

The engine's cache (layers/kv_cache.py) hands out pages of 64 tokens, so it is measured with the context
rounded up to a page; the Hugging Face form's (layers/hf) holds the context as it is, on one rank.

    profile.py kv-cache --context 2048,1000 --batch 1,16
    profile.py kv-cache --model 1b --dtype bfloat16,float8_e4m3fn --tensor-model-parallel-size 1,8
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from megatron_sharedproj import formulas
from megatron_sharedproj.command_line import list_of, positive_int
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.profiling.commands.models import add_model_arguments, model_name, models_and_notes
from megatron_sharedproj.profiling.commands.paper import CACHE_TOKENS, checked_lengths
from megatron_sharedproj.profiling.tables import Column, add_output_arguments, write_rows

# Width in bytes of what a cache can be made of, by torch's name.
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}

Row = dict[str, Any]


def _size(value: int) -> str:
    return f"{value / 2**20:,.2f}"


def _gib(value: int) -> str:
    return f"{value / 2**30:.4f}"


_COLUMNS = (
    Column("name", "paper"),
    Column("variant", "variant"),
    Column("num_query_groups", "groups"),
    Column("dtype", "dtype"),
    Column("tensor_model_parallel_size", "TP"),
    Column("batch_size", "batch", ","),
    Column("context_length", "context", ","),
    Column("bytes_per_token", "B/token", ","),
    Column("saved_percent", "saved %", ".3f"),
    Column("bytes", "MiB", _size),
    Column("allocated_tokens", "in pages, tokens", ","),
    Column("allocated_bytes", "formula, bytes", ","),
    Column("measured_bytes", "live cache", ","),
    Column("hugging_face_bytes", "Hugging Face's", ","),
    Column("equal", "equal"),
    Column("bytes_at_32768", "MiB at 32,768", _size),
    Column("bytes_at_32768", "GiB", _gib),
)
_NOTES = (
    "bytes are those of one tensor-parallel rank; with fewer groups than ranks each holds a copy of one",
    "saved: against qkv of the same shape, dtype and ranks, one key/value head per query head",
    "MiB: formula, context x batch; equal: the storage of live caches against the formula, the engine's in "
    "whole pages and Hugging Face's at the context itself (one rank)",
    "at 32,768 tokens and this batch: the paper's arithmetic, whatever the positions allow",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-command's flags."""
    add_model_arguments(parser)
    group = parser.add_argument_group("cache; lists have commas between values")
    numbers = list_of(positive_int)
    group.add_argument("--context", type=numbers, metavar="N,M", help="tokens (default: all positions)")
    group.add_argument("--batch", type=numbers, default=(1,), metavar="N,M", help="default 1")
    group.add_argument(
        "--dtype",
        type=list_of(str, tuple(DTYPES)),
        default=("bfloat16",),
        metavar="A,B",
        help=f"{', '.join(DTYPES)} (default bfloat16)",
    )
    group.add_argument(
        "--tensor-model-parallel-size", type=numbers, default=(1,), metavar="N,M", help="default 1"
    )
    group.add_argument("--no-run", action="store_true", help="make no cache: formulas only")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Count, allocate and print. Raises ValueError for a mistake in the flags."""
    models, notes = models_and_notes(args)
    positions = models[0][1].max_position_embeddings
    contexts = checked_lengths(args.context, models[0][1], "--context", (positions,))
    cases = itertools.product(models, args.dtype, args.tensor_model_parallel_size, args.batch, contexts)
    rows = []
    for (name, config), dtype, ranks, batch, context in cases:
        row = {"model": model_name(args), **count(name, config, dtype, ranks, batch, context)}
        rows.append((row, config))
    if args.no_run:
        notes.append("--no-run: no cache was made")
    else:
        for row, config in rows:
            notes += _measure(row, config)
    write_rows([row for row, _ in rows], _COLUMNS, args, [*_NOTES, *notes])


def count(name: str, config: ModelConfig, dtype: str, ranks: int, batch: int, context: int) -> Row:
    """A row of the formulas' bytes on one rank.

    Raises:
        ValueError: for a number of ranks that the groups cannot be split over.
    """
    full = config.replace(attention_variant="qkv", num_query_groups=config.num_attention_heads)
    width = DTYPES[dtype]
    per_token, baseline = (formulas.kv_cache_bytes_per_token(each, width, ranks) for each in (config, full))
    return {
        "variant": config.attention_variant,
        "num_query_groups": config.num_query_groups,
        "dtype": dtype,
        "tensor_model_parallel_size": ranks,
        "batch_size": batch,
        "context_length": context,
        "bytes_per_token": per_token,
        "bytes": formulas.kv_cache_bytes(config, context, batch, width, ranks),
        "bytes_at_32768": formulas.kv_cache_bytes(config, CACHE_TOKENS, batch, width, ranks),
        "saved_percent": 100 * (1 - per_token / baseline),
        "allocated_tokens": None,
        "allocated_bytes": None,
        "measured_bytes": None,
        "hugging_face_bytes": None,
        "equal": None,
        "name": name,
    }


def _measure(row: Row, config: ModelConfig) -> Iterator[str]:
    """Fill in what live caches take, where memory allows; yields notes."""
    from megatron_sharedproj.profiling.timing import get_machine

    free = get_machine("cpu").free_bytes()
    if 2 * row["bytes"] > free:
        yield (
            f"{row['name']}, {row['dtype']}, batch {row['batch_size']:,}, {row['context_length']:,} tokens: "
            f"not measured, {row['bytes'] / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
        )
        return
    tokens, measured = engine_cache_bytes(row, config)
    row["allocated_tokens"] = tokens
    row["allocated_bytes"] = tokens * row["bytes_per_token"]
    row["measured_bytes"] = measured
    row["equal"] = measured == row["allocated_bytes"]
    if row["tensor_model_parallel_size"] == 1:
        row["hugging_face_bytes"] = hugging_face_cache_bytes(row, config)
        row["equal"] = row["equal"] and row["hugging_face_bytes"] == row["bytes"]


def engine_cache_bytes(row: Row, config: ModelConfig) -> tuple[int, int]:
    """Tokens and bytes of the engine's cache when each sequence of the batch has its context's pages."""
    import torch

    from megatron_sharedproj.layers.kv_cache import KVCache

    batch, context = row["batch_size"], row["context_length"]
    groups = formulas.groups_per_rank(config, row["tensor_model_parallel_size"])
    cache = KVCache(
        layers=config.num_layers,
        shapes=[(1 if tensor.shared else groups, tensor.size) for tensor in config.cached_tensors()],
        max_sequences=batch,
        max_tokens=context,
        page_size=None,
        dtype=getattr(torch, row["dtype"]),
    )
    cache.extend([cache.allocate() for _ in range(batch)], context)
    return cache.tokens, cache.nbytes()


def hugging_face_cache_bytes(row: Row, config: ModelConfig) -> int:
    """Bytes of the Hugging Face form's static cache for the context."""
    import torch

    from megatron_sharedproj.conversion.config_map import hugging_face_config
    from megatron_sharedproj.layers.hf import SharedProjCache, SharedProjConfig

    values = hugging_face_config(config, vocab_size=config.padded_vocab_size, eos_token_id=None)
    values.pop("architectures"), values.pop("model_type")
    form = SharedProjConfig(**values)
    cache = SharedProjCache(form, max_cache_len=row["context_length"])
    cache.early_initialization(
        batch_size=row["batch_size"],
        num_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        dtype=getattr(torch, row["dtype"]),
        device=torch.device("cpu"),
    )
    return int(cache.nbytes())
