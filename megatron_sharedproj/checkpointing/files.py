"""Names and small files of a checkpoint folder; needs neither torch.distributed nor Megatron.

<save>/latest_checkpointed_iteration.txt       the last complete iteration
<save>/iter_0001000/                           torch_dist shards (.metadata, *.distcp, common.pt)
<save>/iter_0001000/run_config.json            RunConfig: all arguments
<save>/iter_0001000/train_state.json           iteration, consumed samples, schedule
<save>/iter_0001000/manifest.json              size and checksum of each of these files (manifest.py)
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_sharedproj.checkpointing import manifest
from megatron_sharedproj.config import ModelConfig, RunConfig, from_dict

TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.json"
TRAIN_STATE = "train_state.json"
_NEXT_TRACKER = f".{TRACKER}.tmp"
_NEEDED = (RUN_CONFIG, TRAIN_STATE, "metadata.json", ".metadata")

# Fields that shape neither the weights nor the function of an evaluated model.
_FREE_FIELDS = {"attention_dropout", "hidden_dropout", "init_method_std", "scaled_init"}


def iteration_dir(root: str | Path, iteration: int) -> Path:
    """Megatron-LM's folder name of an iteration."""
    return Path(root) / f"iter_{iteration:07d}"


def iteration_of(folder: str | Path) -> int | None:
    """The iteration that a folder's name says, or None for another name."""
    digits = Path(folder).name.removeprefix("iter_")
    return int(digits) if Path(folder).name.startswith("iter_") and digits.isdecimal() else None


def iteration_dirs(root: str | Path) -> list[Path]:
    """All checkpoint folders of a --save folder, the newest first, whatever their state."""
    found = [path for path in Path(root).glob("iter_*") if iteration_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: iteration_of(path) or 0, reverse=True)


def has_checkpoint(root: str | Path) -> bool:
    """Whether a folder holds a checkpoint, or what is left of one."""
    return (Path(root) / TRACKER).exists() or bool(iteration_dirs(root))


def latest_iteration(root: str | Path) -> int | None:
    """The last complete iteration of a checkpoint folder, or None where no file names one.

    Raises:
        ValueError: if the tracker file does not hold a number.
    """
    tracker = Path(root) / TRACKER
    announced = _announced_iteration(Path(root))
    try:
        text = tracker.read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return announced
    except OSError as error:
        raise ValueError(f"checkpoint {tracker}: cannot be read ({error.strerror})") from None
    if not (text.isascii() and text.isdigit()):
        raise ValueError(
            f"checkpoint {tracker}: holds {text[:40]!r}, not an iteration number; correct it or remove it"
        )
    return max(int(text), announced or 0)


def _announced_iteration(root: Path) -> int | None:
    # Of a save that was killed between its last two renames: complete, and not named yet.
    try:
        text = (root / _NEXT_TRACKER).read_bytes()
    except OSError:
        return None
    if text.isdigit() and (iteration_dir(root, int(text)) / manifest.MANIFEST).is_file():
        return int(text)
    return None


def missing_files(folder: Path, *, promised: bool = True) -> list[str]:
    """What every checkpoint has and this folder lacks: checkpoints without a manifest can be checked so.

    Args:
        promised: the manifest, too, if the training state says that there was one.
    """
    if not folder.is_dir():
        return [f"{folder.name} (missing)"]
    lacking = [f"{name} (missing)" for name in _NEEDED if not (folder / name).is_file()]
    if promised and not (folder / manifest.MANIFEST).is_file() and _promises_manifest(folder):
        lacking.append(f"{manifest.MANIFEST} (missing)")
    return lacking


def _promises_manifest(folder: Path) -> bool:
    try:
        return bool(_read_json(folder / TRAIN_STATE).get("has_manifest"))
    except (OSError, ValueError, AttributeError):
        return False


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def checkpoint_config(folder: str | Path) -> RunConfig:
    """The RunConfig that a checkpoint was written with.

    Raises:
        ValueError: if the file is not valid.
    """
    path = Path(folder) / RUN_CONFIG
    try:
        return from_dict(RunConfig, _read_json(path))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: not a readable run configuration ({error})") from None


def train_state(folder: str | Path) -> dict[str, Any]:
    """Iteration, consumed samples and schedule of a checkpoint.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    path = Path(folder) / TRAIN_STATE
    try:
        state = _read_json(path)
        return {
            **state,
            "iteration": int(state["iteration"]),
            "consumed_samples": int(state["consumed_samples"]),
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"checkpoint {path}: not a readable training state ({error}); use another iter_NNNNNNN folder"
        ) from None


def check_engine(folder: str | Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that the installed Megatron-Core is too old to read.

    Megatron-Core 0.17 moved the common state from common.pt into the shards; it still reads common.pt.

    Raises:
        ValueError: naming both versions.
    """
    here = version("megatron-core")
    if tuple(int(part) for part in here.split(".")[:2]) >= (0, 17) or (Path(folder) / "common.pt").is_file():
        return
    saved = state.get("megatron_core", "0.17 or later")
    raise ValueError(
        f"--load {folder}: written with megatron-core {saved}, which megatron-core {here} cannot read; load "
        "it with 0.17 or later (Python 3.12)"
    )


def changed_training(saved: RunConfig, wanted: RunConfig, *, same_data: bool = False) -> list[str]:
    """Flags that decide the schedule, the data order or the loss and differ from the checkpoint's, in words.

    Args:
        same_data: the data are known to be the same, wherever they are.
    """
    found = []
    for part, names in (
        ("train", _SCHEDULE_FIELDS),
        ("data", _DATA_FIELDS),
        ("distill", _DISTILL_FIELDS),
    ):
        before, now = getattr(saved, part), getattr(wanted, part)
        for name in names:
            if getattr(before, name) != getattr(now, name) and not (same_data and name.endswith("data_path")):
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
    "rampup_batch_size",
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
_DISTILL_FIELDS = ("distill_teacher", "distill_temperature", "distill_alpha")


def announce_tracker(root: str | Path, iteration: int) -> None:
    """Write the tracker's next contents aside and sync them: the folder of that iteration comes next."""
    manifest.write_durable(Path(root) / _NEXT_TRACKER, str(iteration).encode())


def write_tracker(root: str | Path, iteration: int) -> None:
    """Name the latest complete iteration, atomically and durably."""
    announce_tracker(root, iteration)
    os.replace(Path(root) / _NEXT_TRACKER, Path(root) / TRACKER)
    manifest.sync_folder(Path(root))
