"""The sharded state (weights, optimizer, random streams) and loading it, at any tensor-parallel size.

Nothing is used of a checkpoint before its files were compared with its manifest, and nothing that it holds is
unpickled without restriction.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_sharedproj.checkpointing import files, metadata
from megatron_sharedproj.checkpointing.distributed_optimizer import sharded_state
from megatron_sharedproj.checkpointing.selection import Choice, agree
from megatron_sharedproj.device import Device

_RNG_KEY = "rng_state"


def _rng_tensors(device: Device) -> dict[str, ShardedTensor]:
    """The random streams of this rank, as tensors (nothing to unpickle), one row per rank."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    streams = {"default": device.rng_state(), **get_cuda_rng_tracker().get_states()}
    return {
        name: ShardedTensor.from_rank_offsets(
            f"{_RNG_KEY}/{name}", state.cpu().reshape(1, -1).clone(), (0, rank, ranks)
        )
        for name, state in streams.items()
    }


def _restore_rng(loaded: dict[str, torch.Tensor], device: Device) -> None:
    states = {name: tensor.reshape(-1) for name, tensor in loaded.items()}
    device.set_rng_state(states.pop("default"))
    get_cuda_rng_tracker().set_states(states)


def state_to_save(model: Any, optimizer: Any, device: Device) -> dict[str, Any]:
    """The sharded state of this rank: weights, optimizer (if any), random streams."""
    state: dict[str, Any] = {"model": model.sharded_state_dict()}
    if optimizer is not None:
        state["optimizer"] = sharded_state(optimizer, state["model"], device)
    state[_RNG_KEY] = _rng_tensors(device)
    return state


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """torch.load takes tensors and plain values only, whatever its caller says.

    torch's planner reads byte entries, where Megatron-Core 0.17 and later keep the common state, with
    ``weights_only=False``; these variables are torch's documented way to overrule a call site.
    """
    force, never = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, never)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _drop_extra_state(state: Any) -> Any:
    # Modules' extra state is pickled bytes; this package's modules have none, and nothing pickled is read.
    if isinstance(state, dict):
        return {
            key: _drop_extra_state(value)
            for key, value in state.items()
            if not isinstance(value, ShardedObject)
        }
    return state


def _check_readable(state: Any, folder: Path) -> None:
    known = metadata.read_metadata(folder).state_dict_metadata
    wanted: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, ShardedTensor):
            wanted.append(value.key)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)

    collect(state)
    missing = sorted({key for key in wanted if key not in known})
    if missing:
        raise ValueError(
            f"--load {folder}: holds no {missing[0]} ({len(missing)} tensor(s) missing); use --no-load-optim "
            "or --no-load-rng if that is what is missing, or --finetune for the weights alone"
        )
    pickled = [key for key in wanted if isinstance(known[key], BytesStorageMetadata)]
    if pickled:
        raise ValueError(
            f"--load {folder}: {pickled[0]} is stored as pickled bytes, not as a tensor; refused"
        )


def verify_checkpoint(folder: Path) -> None:
    """Compare all files of a checkpoint with its manifest. Collective; each rank reads its share.

    Raises:
        ValueError: naming every damaged file.
    """
    notes = agree(Choice(folder, folder)).notes
    if torch.distributed.get_rank() == 0:
        for note in notes:
            print(note, file=sys.stderr)


def load_checkpoint(
    folder: Path,
    device: Device,
    *,
    model: Any,
    optimizer: Any = None,
    load_rng: bool = False,
    verify: bool = True,
) -> tuple[dict[str, Any], bool]:
    """Load weights, and where given optimizer and random streams. Collective; any tensor-parallel size.

    Args:
        folder: an iteration folder (selection.resolve_checkpoint).
        model: the unwrapped GPTModel, or the ModelChunks of an interleaved stage.
        optimizer: Megatron optimizer, or None.
        load_rng: restore the random streams if the ranks and their layout are the same.
        verify: compare the files with the manifest first (:func:`verify_checkpoint`).
    Returns:
        The checkpoint's train state, and whether the random streams were restored.
    Raises:
        ValueError: if a file is damaged, or what was asked for is not there or would have to be unpickled.
    """
    if verify:
        verify_checkpoint(folder)
    train_state = files.train_state(folder)
    files.check_engine(folder, train_state)
    state: dict[str, Any] = {"model": _drop_extra_state(model.sharded_state_dict())}
    if optimizer is not None:
        state["optimizer"] = sharded_state(optimizer, state["model"], device, is_loading=True)
    same_ranks = train_state.get("world_size") == torch.distributed.get_world_size()
    saved = files.checkpoint_config(folder).parallel
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
    )
    same_layout = same_ranks and sizes == (
        saved.tensor_model_parallel_size,
        saved.pipeline_model_parallel_size,
        saved.num_virtual_stages_per_pipeline_rank,
        saved.context_parallel_size,
    )
    if load_rng and same_layout:
        state[_RNG_KEY] = _rng_tensors(device)
    _check_readable(state, folder)
    try:
        with _weights_only():
            loaded = dist_checkpointing.load(state, str(folder))
    except torch_checkpoint.CheckpointException as error:
        # torch wraps each rank's error, with its traceback, in a BaseException.
        causes = {f"{type(cause).__name__}: {cause}".splitlines()[0] for cause, _ in error.failures.values()}
        raise ValueError(f"--load {folder}: cannot be read ({'; '.join(sorted(causes))})") from error
    except Exception as error:
        # Megatron-Core reports damage in many ways, an AttributeError for a missing common.pt among them.
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"--load {folder}: cannot be read ({type(error).__name__}: {reason})") from error
    result = model.load_state_dict(loaded["model"], strict=False)
    absent = [key for key in result.missing_keys if not key.endswith("_extra_state")]
    if absent or result.unexpected_keys:
        raise ValueError(f"--load {folder}: missing {absent}, unexpected {result.unexpected_keys}")
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    if _RNG_KEY in state:
        _restore_rng(loaded[_RNG_KEY], device)
    return train_state, _RNG_KEY in state
