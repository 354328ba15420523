"""A Hugging Face folder as a Megatron checkpoint: our own exports bit for bit, and GPT-2 or Llama shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.conversion.config_map import MODEL_TYPE, model_config
from megatron_sharedproj.conversion.export import PADDING, RECORD, read_record
from megatron_sharedproj.conversion.megatron_checkpoint import check_target, imported_run, write_checkpoint
from megatron_sharedproj.conversion.weight_files import read_config, read_file, read_tensors
from megatron_sharedproj.conversion.weights import vocabulary_names
from megatron_sharedproj.data.tokenizers import build_tokenizer


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
        ValueError: naming the flag and what is wrong; OSError: if ``save`` cannot be written. Nothing is
            left behind.
    """
    check_target(save, overwrite)
    values = read_config(folder)
    padding, iteration = None, 0
    origin = f"{values.get('model_type')} folder {folder.resolve().name}"
    if values.get("model_type") == MODEL_TYPE:
        config, tensors, padding = read_export(folder)
        iteration = _iteration(folder)
        origin += f" at step {iteration:,}, whose README.md says how it was trained and checked"
    else:
        origin += ", not trained by this package"
        from megatron_sharedproj.conversion.foreign_models import read_foreign

        config, tensors = read_foreign(folder, say=say)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise ValueError(f"--load {folder}: holds no model.embed_tokens.weight")
    ids = build_tokenizer(**tokenizer).vocab_size
    if ids > config.padded_vocab_size:
        raise ValueError(
            f"--tokenizer-model {tokenizer.get('tokenizer_model') or tokenizer.get('vocab_file')}: {ids} "
            f"tokens, the model has {config.padded_vocab_size} rows; give the one that it was trained with"
        )
    run = imported_run(config, embedding.dtype, **tokenizer)
    state = {"imported_from": origin}
    try:
        written = write_checkpoint(
            save, run, tensors, padding=padding, iteration=iteration, train_state=state
        )
    except ValueError as error:
        raise ValueError(f"--load {folder}: {error}") from None
    counts = formulas.parameters(config)["total"]
    rows = config.padded_vocab_size - embedding.shape[0]
    filled = "" if not rows else f", {rows} of them padding ({'as exported' if padding else 'the mean row'})"
    say(config.describe_attention())
    say(f"{counts:,} parameters, {config.padded_vocab_size:,} vocabulary rows{filled}")
    return written


def _iteration(folder: Path) -> int:
    iteration = read_record(folder).get("iteration", 0)
    if type(iteration) is not int or not 0 <= iteration < 10**12:
        raise ValueError(
            f"--load {folder}: {RECORD} is damaged (iteration {iteration!r}); remove it to go on"
        )
    return iteration


def tokenizer_fields(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """DataConfig's tokenizer fields: the flags', else of the folder's own files, else of a NullTokenizer.

    Raises:
        ValueError: if the number of ids for a NullTokenizer is not in config.json.
    """
    if any(given.get(name) for name in ("tokenizer_model", "vocab_file", "merge_file")):
        return {name: value for name, value in given.items() if value}
    files = ("tokenizer.json", "vocab.json", "tokenizer.model")
    kind = given.get("tokenizer_type") or "HuggingFaceTokenizer"
    if kind != "NullTokenizer" and any((folder / name).is_file() for name in files):
        return {"tokenizer_type": kind, "tokenizer_model": str(folder.absolute())}
    size = read_config(folder).get("vocab_size")
    if type(size) is not int or size < 2:
        raise ValueError(
            f"--load {folder}: config.json: vocab_size {size!r}: expected a whole number above 1"
        )
    return {"tokenizer_type": "NullTokenizer", "vocab_size": size}
