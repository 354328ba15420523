"""A Hugging Face folder as a Megatron checkpoint: our own exports bit for bit, and GPT-2 or Llama shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.conversion.config_map import MODEL_TYPE, model_config
from megatron_sharedproj.conversion.export import PADDING, read_record
from megatron_sharedproj.conversion.megatron_checkpoint import check_target, imported_run, write_checkpoint
from megatron_sharedproj.conversion.weight_files import read_config, read_file, read_tensors
from megatron_sharedproj.conversion.weights import vocabulary_names


def read_export(folder: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Tensor] | None]:
    """Configuration, tensors and, where the folder has them, the padding rows of an exported model.

    Raises:
        ValueError: naming the folder and what is missing, damaged or contradictory.
    """
    values = read_config(folder)
    try:
        config = model_config(values)
    except ValueError as error:
        raise ValueError(f"--load {folder}: {error}") from None
    tensors = read_tensors(folder)
    for name in vocabulary_names(config).values():
        rows = tensors[name].shape[0] if name in tensors else values["vocab_size"]
        if rows != values["vocab_size"]:
            raise ValueError(
                f"--load {folder}: {name} has {rows} rows, config.json's vocab_size is {values['vocab_size']}"
            )
    padding = read_file(folder / PADDING) if (folder / PADDING).is_file() else None
    return config, tensors, padding


def import_folder(
    folder: Path,
    save: Path,
    *,
    tokenizer: dict[str, Any],
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the folder's model as a checkpoint.

    Args:
        tokenizer: fields of DataConfig for the run (tokenizer_type, tokenizer_model, ...).
    Returns:
        The iteration folder.
    Raises:
        ValueError: naming the flag and what is wrong; nothing is left behind.
    """
    check_target(save, overwrite)
    values = read_config(folder)
    padding, state = None, {"imported_from": f"{values.get('model_type')} folder {folder.absolute().name}"}
    iteration = 0
    if values.get("model_type") == MODEL_TYPE:
        config, tensors, padding = read_export(folder)
        iteration = int(read_record(folder).get("iteration", 0))
    else:
        from megatron_sharedproj.conversion.foreign_models import read_foreign

        config, tensors = read_foreign(folder, say=say)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise ValueError(f"--load {folder}: holds no model.embed_tokens.weight")
    run = imported_run(config, embedding.dtype, **tokenizer)
    try:
        written = write_checkpoint(
            save, run, tensors, padding=padding, iteration=iteration, train_state=state
        )
    except ValueError as error:
        raise ValueError(f"--load {folder}: {error}") from None
    counts = formulas.parameters(config)["total"]
    rows = config.padded_vocab_size - embedding.shape[0]
    filled = "" if not rows else f", {rows} of them padding ({'as exported' if padding else 'the mean row'})"
    say(f"{config.variant.describe()}")
    say(f"{counts:,} parameters, {config.padded_vocab_size:,} vocabulary rows{filled}")
    return written


def tokenizer_fields(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """DataConfig's tokenizer fields: the flags', else of the folder's own files, else of a NullTokenizer."""
    if any(given.get(name) for name in ("tokenizer_model", "vocab_file", "merge_file")):
        return {name: value for name, value in given.items() if value}
    files = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if any((folder / name).is_file() for name in files):
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder.absolute())}
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    return {"tokenizer_type": "NullTokenizer", "vocab_size": size}
