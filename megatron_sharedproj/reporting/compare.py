"""A table of several runs: what each costs and what it reaches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sharedproj import formulas
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.reporting.plots import load_run

# Files that tools/evaluate.py and tools/generate.py are asked to leave in a run folder.
EVALUATION = "perplexity.json"
GENERATION = "generation.json"

_COLUMNS = (
    ("variant", "variant", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("packed perplexity", "perplexity", "{:.2f}"),
    ("bits per byte", "bits_per_byte", "{:.4f}"),
    ("loss", "loss", "{:.4f}"),
    ("cache bytes/token", "cache_bytes_per_token", "{:,.0f}"),
    ("train tokens/s", "train_tokens_per_second", "{:,.0f}"),
    ("generate tokens/s", "generate_tokens_per_second", "{:,.1f}"),
)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def summarize(run: str | Path) -> dict[str, Any]:
    """Figures of one run folder; those that were not measured are absent.

    ``cache_bytes_per_token`` is measured: bytes of the live cache by its length, per sequence.

    Raises:
        ValueError: if the folder is not a run.
    """
    run = Path(run)
    if not (run / files.RUN_CONFIG).is_file():
        raise ValueError(
            f"{run}: not a run folder ({files.RUN_CONFIG} is missing); give a trainer's --save folder"
        )
    config = files.checkpoint_config(run)
    figures: dict[str, Any] = {
        "run": str(run),
        "variant": config.model.attention_variant,
        "parameters": formulas.parameters(config.model)["total"],
    }
    packed = _read_json(run / EVALUATION).get("packed", {})
    for name in ("perplexity", "bits_per_byte", "loss", "unigram_entropy"):
        if name in packed:
            figures[name] = packed[name]
    generated = _read_json(run / GENERATION)
    if generated:
        figures["cache_bytes_per_token"] = generated["cache_bytes"] / generated["cache_tokens"]
        figures["generate_tokens_per_second"] = generated["tokens_per_second"]
        figures["sample"] = generated["text"][0]
    speeds = [record["tokens_per_second"] for record in load_run(run).training]
    if speeds:
        figures["train_tokens_per_second"] = sorted(speeds)[len(speeds) // 2]
    return figures


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of :func:`summarize`'s figures; ``-`` where one was not measured."""
    cells = [[title for title, _, _ in _COLUMNS]]
    cells += [[form.format(row[key]) if key in row else "-" for _, key, form in _COLUMNS] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    lines = [
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
