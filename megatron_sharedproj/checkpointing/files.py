"""Names and small files of a checkpoint folder; needs neither torch.distributed nor Megatron.

<save>/latest_checkpointed_iteration.txt       the last complete iteration
<save>/iter_0001000/                           torch_dist shards (.metadata, *.distcp, common.pt)
<save>/iter_0001000/run_config.json            RunConfig: all arguments
<save>/iter_0001000/train_state.json           iteration, consumed samples, schedule
"""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

from megatron_sharedproj.config import ModelConfig, RunConfig, from_dict

TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.json"
TRAIN_STATE = "train_state.json"

# Fields that shape neither the weights nor the function of an evaluated model.
_FREE_FIELDS = {"attention_dropout", "hidden_dropout", "init_method_std", "scaled_init"}


def iteration_dir(root: str | Path, iteration: int) -> Path:
    """Megatron-LM's folder name of an iteration."""
    return Path(root) / f"iter_{iteration:07d}"


def latest_iteration(root: str | Path) -> int | None:
    """The last complete iteration of a checkpoint folder, or None where there is none.

    Raises:
        ValueError: if the tracker file does not hold a number.
    """
    tracker = Path(root) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise ValueError(
            f"checkpoint {tracker}: holds {text!r}, not an iteration number; correct it or remove it"
        )
    return int(text)


def resolve_checkpoint(path: str | Path, flag: str = "--load") -> Path:
    """The iteration folder that ``path`` names: a checkpoint root (its latest) or the folder itself.

    Raises:
        ValueError: if there is no complete checkpoint.
    """
    path = Path(path)
    if (path / RUN_CONFIG).is_file() and (path / "metadata.json").is_file():
        return path
    iteration = latest_iteration(path)
    if iteration is None:
        raise ValueError(
            f"{flag} {path}: no checkpoint there ({TRACKER} is missing); give a --save folder of a training "
            "run, or one of its iter_NNNNNNN folders"
        )
    folder = iteration_dir(path, iteration)
    for name in (RUN_CONFIG, "metadata.json", ".metadata"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{flag} {path}: {folder / name} is missing, the checkpoint is not complete; load another "
                "iter_NNNNNNN folder"
            )
    return folder


def checkpoint_config(folder: str | Path) -> RunConfig:
    """The RunConfig that a checkpoint was written with.

    Raises:
        ValueError: if the file is not valid.
    """
    path = Path(folder) / RUN_CONFIG
    try:
        return from_dict(RunConfig, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: not a readable run configuration ({error})") from None


def train_state(folder: str | Path) -> dict[str, Any]:
    """Iteration, consumed samples and schedule of a checkpoint.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    path = Path(folder) / TRAIN_STATE
    try:
        state = json.loads(path.read_text())
        return {
            **state,
            "iteration": int(state["iteration"]),
            "consumed_samples": int(state["consumed_samples"]),
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"checkpoint {path}: not a readable training state ({error}); use another iter_NNNNNNN folder"
        ) from None


def changed_training(saved: RunConfig, wanted: RunConfig) -> list[str]:
    """Flags that decide the schedule or the data order and differ from the checkpoint's, in words."""
    found = []
    for part, names in (("train", _SCHEDULE_FIELDS), ("data", _DATA_FIELDS)):
        before, now = getattr(saved, part), getattr(wanted, part)
        for name in names:
            if getattr(before, name) != getattr(now, name):
                flag = "--" + name.replace("_", "-")
                found.append(f"{flag} was {getattr(before, name)}, now {getattr(now, name)}")
    return found


def check_same_model(
    wanted: ModelConfig, saved: ModelConfig, folder: str | Path, flag: str = "--load"
) -> None:
    """Refuse a checkpoint of another variant or shape, listing the differing fields.

    Raises:
        ValueError: naming each field with both values.
    """
    fields = [name for name in vars(wanted) if name not in _FREE_FIELDS]
    differing = [
        f"{_FLAGS.get(name, name)} is {getattr(saved, name)} there and {getattr(wanted, name)} here"
        for name in fields
        if getattr(saved, name) != getattr(wanted, name)
    ]
    if differing:
        raise ValueError(
            f"{flag} {folder}: checkpoint of another model: {'; '.join(differing)}; pass the checkpoint's "
            "values, or train into another --save folder"
        )


# Fields that no flag has the name of.
_FLAGS = {
    "activation": "activation (--swiglu, --no-bias-gelu-fusion)",
    "add_bias_linear": "add_bias_linear (--disable-bias-linear)",
    "padded_vocab_size": "padded_vocab_size (the tokenizer, --make-vocab-size-divisible-by)",
    "layernorm_epsilon": "layernorm_epsilon (--norm-epsilon)",
}

_SCHEDULE_FIELDS = (
    "seq_length",
    "global_batch_size",
    "train_iters",
    "seed",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_decay_iters",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "clip_grad",
)
_DATA_FIELDS = (
    "data_path",
    "train_data_path",
    "split",
    "reset_position_ids",
    "reset_attention_mask",
    "eod_mask_loss",
)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads .metadata with the classes it consists of, and refuses all others."""

    _MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "torch.distributed.checkpoint.planner",
        "megatron.core.dist_checkpointing.strategies.torch",
    )
    _NAMES = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("builtins", "list"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        # A dotted name could walk from an allowed module to any other.
        if "." not in name:
            found = super().find_class(module, name) if module in (*self._MODULES, "torch") else None
            is_data_class = module in self._MODULES and isinstance(found, type)
            is_plain = isinstance(found, _plain_torch_types())
            if is_data_class or is_plain or (module, name) in self._NAMES:
                return found if found is not None else super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in checkpoint metadata")


def _plain_torch_types() -> tuple[type, ...]:
    import torch

    return (torch.dtype, torch.layout, torch.memory_format)


def read_metadata(folder: str | Path) -> Any:
    """torch.distributed.checkpoint Metadata of a checkpoint, through a restricted unpickler.

    torch's own reader unpickles this file with no restriction, so it is checked here first.

    Raises:
        ValueError: if the file holds anything but metadata.
    """
    path = Path(folder) / ".metadata"
    try:
        return _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise ValueError(f"checkpoint {path}: not checkpoint metadata ({error}); refused") from None


def write_tracker(root: str | Path, iteration: int) -> None:
    """Name the latest complete iteration, atomically."""
    temporary = Path(root) / f".{TRACKER}.tmp"
    temporary.write_text(str(iteration))
    os.replace(temporary, Path(root) / TRACKER)
