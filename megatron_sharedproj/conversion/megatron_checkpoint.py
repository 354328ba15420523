"""Whole models out of and into checkpoints in Megatron-Core's sharded format, at any layout.

One process with tensor-parallel size 1: a sharded checkpoint loads at any size.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sharedproj import distributed
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sharedproj.conversion.weights import to_megatron
from megatron_sharedproj.device import get_device


def model_state(model: Any) -> dict[str, Tensor]:
    """Parameters of a GPTModel by name, without Megatron's (empty) extra state."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def check_target(save: Path, overwrite: bool, flag: str = "--save") -> None:
    """Refuse a folder that holds a checkpoint, before any work.

    Raises:
        ValueError: naming the flag and the folder.
    """
    if save.exists() and not save.is_dir():
        raise ValueError(f"{flag} {save}: is not a folder")
    if not overwrite and (files.latest_iteration(save) is not None or any(save.glob("iter_*"))):
        raise ValueError(f"{flag} {save}: holds a checkpoint already; give another folder, or --overwrite")


def write_checkpoint(
    save: Path,
    run: RunConfig,
    tensors: Mapping[str, Tensor],
    *,
    padding: Mapping[str, Tensor] | None = None,
    iteration: int = 0,
    train_state: Mapping[str, Any] | None = None,
) -> Path:
    """Write Hugging Face tensors as a checkpoint without optimizer: ``--load SAVE --finetune`` trains on.

    Weights are stored in the dtype that ``run.train`` says (``--bf16``, ``--fp16``, else float32).

    Args:
        tensors, padding: as in :func:`megatron_sharedproj.conversion.weights.to_megatron`.
        train_state: further JSON-ready entries (provenance) of train_state.json.
    Returns:
        The iteration folder, complete and named latest.
    Raises:
        ValueError: if the tensors do not fit the configuration; OSError: if the folder cannot be written.
            Nothing is left behind then.
    """
    state = to_megatron(run.model, tensors, padding)
    device = get_device()
    distributed.initialize(device, seed=run.train.seed)

    from megatron_sharedproj.checkpointing.saver import SaveError, save_checkpoint
    from megatron_sharedproj.model import build_model

    dtype = getattr(torch, run.train.params_dtype)
    model = build_model(run.model, ParallelConfig(), dtype=dtype)
    missing = [
        name for name in model.load_state_dict(state, strict=False).missing_keys if name in model_state(model)
    ]
    if missing:
        raise ValueError(f"the model has tensors that the table of names lacks: {', '.join(missing)}")
    created = next((path for path in [*reversed(save.absolute().parents), save] if not path.exists()), None)
    run.checkpoint.save = str(save)
    try:
        save.mkdir(parents=True, exist_ok=True)
        return save_checkpoint(
            run,
            device,
            model=model,
            optimizer=None,
            train_state={"iteration": iteration, "consumed_samples": 0, **(train_state or {})},
        )
    except BaseException as error:
        shutil.rmtree(
            created or save / f".{files.iteration_dir(save, iteration).name}.tmp", ignore_errors=True
        )
        if isinstance(error, SaveError):
            raise OSError(error.reason) from error  # the tools name their own flag
        raise


def imported_run(model: ModelConfig, dtype: torch.dtype, **data: Any) -> RunConfig:
    """The RunConfig of weights that were not trained here; ``data`` are fields of DataConfig."""
    run = RunConfig(model=model)
    run.train.seq_length = model.max_position_embeddings
    run.train.bf16, run.train.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    for name, value in data.items():
        setattr(run.data, name, value)
    return run
