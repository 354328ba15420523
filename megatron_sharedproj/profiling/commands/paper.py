"""The paper's analytical tables: parameters, multiply-accumulates (MACs), FLOPs and cache of every variant.

Beside ours stand the figures that its authors released. FLOPs are also counted by torch.profiler while the
eager fp32 Hugging Face form really runs.

    profile.py paper
    profile.py paper --model 1b --no-run --format json --output 1b.json
    profile.py paper --num-layers 4 --attention-variant qkv,qk_eq_v --seq-lengths 128
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_sharedproj import formulas
from megatron_sharedproj.command_line import list_of, positive_int
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.profiling.commands.models import add_model_arguments, model_name, models_and_notes
from megatron_sharedproj.profiling.progress import ProgressBar
from megatron_sharedproj.profiling.released_tables import Released, released
from megatron_sharedproj.profiling.tables import Column, Section, add_output_arguments, write_sections

SEQ_LENGTHS = (128, 512, 1024, 2048)
CACHE_TOKENS = 32_768  # the length at which the paper gives its caches
_CACHE_BYTES = 2  # per element

Row = dict[str, Any]


def _billions(value: int) -> str:
    return f"{value / 1e9:.9f}"  # all digits


_STATIC = (
    Column("name", "paper"),
    Column("variant", "variant"),
    Column("num_query_groups", "groups"),
    Column("parameters", "parameters", ","),
    Column("parameters_released", "released", ","),
    Column("parameters_saved_percent", "saved %", ".2f"),
    Column("kv_cache_bytes_per_token", "cache B/token", ","),
    Column("kv_cache_released", "released", ","),
    Column("kv_cache_saved_percent", "saved %", ".3f"),
    Column("kv_cache_bytes_at_32768", "MiB at 32,768", lambda value: f"{value / 2**20:,.2f}"),
    Column("kv_cache_bytes_at_32768", "GiB", lambda value: f"{value / 2**30:.4f}"),
    Column("equal", "equal"),
)
_COMPUTE = (
    Column("name", "paper"),
    Column("seq_length", "tokens", ","),
    Column("macs", "GMACs", _billions),
    Column("macs_released", "released", _billions),
    Column("macs_saved_percent", "saved %", ".2f"),
    Column("macs_causal", "causal GMACs", _billions),
    Column("flops_formula", "GFLOPs, formula", _billions),
    Column("flops_profiled", "profiled", _billions),
    Column("flops_released", "released", _billions),
    Column("flops_saved_percent", "saved %", ".2f"),
    Column("equal", "equal"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-command's flags."""
    add_model_arguments(parser)
    group = parser.add_argument_group("counting")
    group.add_argument(
        "--seq-lengths",
        type=list_of(positive_int),
        metavar="N,M",
        help="tokens of a sequence (default 128,512,1024,2048, as far as the positions reach)",
    )
    group.add_argument("--no-run", action="store_true", help="run no model: flops_profiled is null")
    group.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the models run (default cpu)"
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Count, run and print. Raises ValueError for a mistake in the flags, before any model runs."""
    models, notes = models_and_notes(args)
    lengths = checked_lengths(args.seq_lengths, models[0][1], "--seq-lengths", SEQ_LENGTHS)
    if not args.no_run:
        _check_run(args.device)
    rows = {
        (name, length): count(model_name(args), name, config, length)
        for name, config in models
        for length in lengths
    }
    if args.no_run:
        notes.append("--no-run: no model was run, so nothing was profiled")
    else:
        notes += _profile(rows, models, lengths, args.device)
    for (name, length), row in rows.items():
        row.update(_compared(row, released(dict(models)[name], length)))
    first = [rows[name, lengths[0]] for name, _ in models]
    sections = [
        Section("Parameters and key/value cache", _with_equal(first, "static"), _STATIC),
        Section("One forward pass over one sequence", _with_equal(list(rows.values()), "compute"), _COMPUTE),
    ]
    shown = [{key: row[key] for key in row if not key.startswith("_")} for row in rows.values()]
    write_sections(shown, sections, args, [*_NOTES, *notes])


_NOTES = (
    "1 MAC is 2 FLOPs (a multiplication and an addition); the released text calls this factor an overhead",
    "MACs count all T^2 scores, as the paper does; causal MACs count the T (T + 1) / 2 that a token may see",
    "GFLOPs: 2 MACs + score scaling + residual and position additions: what torch.profiler counts when the "
    "eager fp32 Hugging Face form runs (a bias is inside its addmm); a Megatron-Core model adds its biases "
    "apart and counts more",
    "cache: 2 bytes per element, one sequence; at 32,768 tokens it is the paper's arithmetic, whatever the "
    "positions allow",
    "saved: against qkv of the same shape, one key/value head per query head",
    "equal: every figure of the line that has a released or a profiled one beside it is the same",
)


def checked_lengths(
    asked: Sequence[int] | None, config: ModelConfig, flag: str, default: Sequence[int]
) -> tuple[int, ...]:
    """The lengths asked for, or those of the default that the positions reach.

    Raises:
        ValueError: for a length beyond learned positions.
    """
    limit = config.max_position_embeddings
    if config.position_embedding_type != "learned_absolute":
        return tuple(asked or default)
    for length in asked or ():
        if length > limit:
            raise ValueError(
                f"{flag} {length}: beyond the {limit} learned positions; use up to {limit}, or "
                f"--max-position-embeddings {length}"
            )
    return tuple(asked or [length for length in default if length <= limit] or [limit])


def count(model: str, name: str, config: ModelConfig, seq_length: int) -> Row:
    """A row of counts from formulas.py: MACs, FLOPs and bytes are integers, saved is percent of qkv's."""
    full = config.replace(attention_variant="qkv", num_query_groups=config.num_attention_heads)
    own, baseline = (_counts(each, seq_length) for each in (config, full))
    return {
        "model": model,
        "variant": config.attention_variant,
        "num_query_groups": config.num_query_groups,
        "seq_length": seq_length,
        "parameters": own["parameters"],
        "macs": own["macs"],
        "flops_profiled": None,
        "flops_formula": own["flops"],
        "kv_cache_bytes_per_token": own["kv_cache"],
        "name": name,
        "macs_causal": formulas.macs(config, seq_length, causal=True)["total"],
        "kv_cache_bytes_at_32768": formulas.kv_cache_bytes(config, CACHE_TOKENS, 1, _CACHE_BYTES),
        **{f"{key}_saved_percent": 100 * (1 - own[key] / baseline[key]) for key in own},
    }


def _counts(config: ModelConfig, seq_length: int) -> dict[str, int]:
    return {
        "parameters": formulas.parameters(config)["total"],
        "macs": formulas.macs(config, seq_length)["total"],
        "flops": formulas.profiled_flops(config, seq_length),
        "kv_cache": formulas.kv_cache_bytes_per_token(config, _CACHE_BYTES),
    }


def _compared(row: Row, figures: Released) -> Row:
    """The released figures, and whether ours are the same; None where there is nothing to compare."""
    static = [
        (row["parameters"], figures.parameters),
        (row["kv_cache_bytes_per_token"], figures.cache_bytes_per_token),
    ]
    compute = [
        (row["macs"], figures.macs),
        (row["flops_formula"], figures.profiled_flops),
        (row["flops_formula"], row["flops_profiled"]),
    ]
    return {
        "parameters_released": figures.parameters,
        "macs_released": figures.macs,
        "flops_released": figures.profiled_flops,
        "kv_cache_released": figures.cache_bytes_per_token,
        "equal": _equal(static + compute),
        "_static": _equal(static),
        "_compute": _equal(compute),
    }


def _equal(pairs: Sequence[tuple[int, int | None]]) -> bool | None:
    known = [ours == theirs for ours, theirs in pairs if theirs is not None]
    return all(known) if known else None


def _with_equal(rows: Sequence[Row], part: str) -> list[Row]:
    return [{**row, "equal": row[f"_{part}"]} for row in rows]


def _check_run(device: str) -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError(
            "paper: the models run in their Hugging Face form, and transformers is not installed; install "
            "the [hf] extra, or give --no-run"
        ) from None
    from megatron_sharedproj.profiling.timing import get_machine

    get_machine(device)


def _profile(
    rows: dict[tuple[str, int], Row],
    models: Sequence[tuple[str, ModelConfig]],
    lengths: Sequence[int],
    device: str,
) -> Iterator[str]:
    """Fill in flops_profiled by running every model; yields notes."""
    from megatron_sharedproj.profiling.counted_flops import count_flops, eager_model, needed_bytes
    from megatron_sharedproj.profiling.timing import get_machine

    machine = get_machine(device)
    progress = ProgressBar(sum(row["flops_formula"] for row in rows.values()))
    done = 0
    left_out: dict[str, int] = {}
    for name, config in models:
        model: Any = None
        for length in lengths:
            row = rows[name, length]
            progress.show(done, f"{row['model']} {name}, {length:,} tokens")
            done += row["flops_formula"]
            weights = formulas.parameters(config)["total"] * 4 if model is not None else 0
            machine.release()
            free, needed = machine.free_bytes() + weights, needed_bytes(config, length)
            if needed > free:
                yield (
                    f"{name}, {length:,} tokens: not run, needs {needed / 2**30:.1f} GiB of memory and "
                    f"{free / 2**30:.1f} are free"
                )
                continue
            model = eager_model(config, device) if model is None else model
            counted = count_flops(model, length)
            row["flops_profiled"] = counted.total
            for reason, flops in counted.left_out.items():
                left_out[reason] = max(left_out.get(reason, 0), flops)
    progress.clear()
    if left_out:
        yield "torch.profiler also counts, left out as the released code does it otherwise: " + ", ".join(
            f"{reason} (up to {flops:,} FLOPs)" for reason, flops in left_out.items()
        )
