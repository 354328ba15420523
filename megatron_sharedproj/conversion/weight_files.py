"""config.json and safetensors of a Hugging Face folder, with every damage reported as one line.

Pickled weights are not read: loading them runs what is in the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# No model has more; names are listed per layer before they are compared, so a wild number would fill memory.
MAX_LAYERS = 10_000


def read_config(folder: Path, flag: str = "--load") -> dict[str, Any]:
    """config.json.

    Raises:
        ValueError: if the folder or the file is not there, or is no JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: no such folder")
    if not path.is_file():
        raise ValueError(f"{flag} {folder}: has no config.json; give a folder that save_pretrained wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag} {folder}: config.json is not valid JSON ({error})") from None
    except OSError as error:
        raise ValueError(f"{flag} {folder}: config.json cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{flag} {folder}: config.json holds no object")
    for name in ("num_hidden_layers", "n_layer"):
        layers = values.get(name)
        if isinstance(layers, int | float) and not layers <= MAX_LAYERS:
            raise ValueError(f"{flag} {folder}: config.json: {name} {layers}: at most {MAX_LAYERS} are read")
    return values


def read_tensors(folder: Path, flag: str = "--load") -> dict[str, Tensor]:
    """All tensors of a folder, from model.safetensors or from the shards that its index names.

    Raises:
        ValueError: for missing, truncated or damaged files, or shards that do not fit the index.
    """
    if (folder / SINGLE).is_file():
        return read_file(folder / SINGLE, flag)
    if not (folder / INDEX).is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        reason = (
            f"its weights are pickled ({pickled[0]}), which are not read; save them as safetensors first"
            if pickled
            else f"has neither {SINGLE} nor {INDEX}"
        )
        raise ValueError(f"{flag} {folder}: {reason}")
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        if not all(isinstance(name, str) for name in files):
            raise TypeError("file names that are no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{flag} {folder}: {INDEX} is damaged ({error})") from None
    tensors: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{flag} {folder}: {INDEX} names {name}, which is not there")
        tensors.update(read_file(folder / name, flag))
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise ValueError(f"{flag} {folder}: {INDEX} names {missing[0]}, which no shard holds")
    return tensors


def read_file(path: Path, flag: str = "--load") -> dict[str, Tensor]:
    """The tensors of one safetensors file, memory-mapped.

    Raises:
        ValueError: if the file is truncated or its header does not describe it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{flag} {path}: not a whole safetensors file ({error})") from None
