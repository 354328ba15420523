"""Megatron's distributed optimizer over torch's AdamW: what its checkpoint code leaves out.

Without apex and Transformer Engine, Megatron-Core (0.16.1 and 0.19.2) falls back to torch's AdamW, whose
state has a tensor ``step`` per parameter. Its save knows that, its load does not: it wants the steps of a
state that is empty before the first step, looks for ``step`` among what was saved, and leaves one tensor to
all parameters, so that each update would count as many steps as there are parameters.

With any optimizer, it gathers a buffer's buckets without the padding at their ends, but looks for a parameter
where it is with the padding: behind the first bucket, a parameter got its neighbour's moments and masters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_sharedproj.device import Device


def sharded_state(optimizer: Any, model_state: Any, device: Device, *, is_loading: bool = False) -> Any:
    """Any Megatron optimizer's ``sharded_state_dict``, laid out to load at any parallel size. Collective.

    Args:
        model_state: the model's sharded_state_dict.
        is_loading: make ``optimizer`` ready to load into; its master weights change, so load them as well.
    """
    parts = [
        part
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        if isinstance(part, DistributedOptimizer)
    ]
    if is_loading:
        for part in parts:
            if not part.optimizer.state:
                _allocate_state(part.optimizer)
            _load_steps_apart(part)
    layout = {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathered on the CPU through gloo, or on each rank's GPU; the files are interchangeable.
        "distrib_optim_fully_reshardable_mem_efficient": device.type == "cpu",
    }
    with _places_without_padding(parts):
        state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=layout)
    if state is not None and state.get("param_state", state) is None:
        del state["param_state"]  # this rank saves none, and Megatron warns of what ranks do not share
    return state


@contextlib.contextmanager
def _places_without_padding(parts: list[DistributedOptimizer]) -> Iterator[None]:
    """Parameters' places in the buffers as gathered: buckets back to back."""
    buffers = [buffer for part in parts for buffer in part.buffers]
    usual = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        padding, gathered = [], 0
        for bucket in buffer.buckets:
            padding.append(bucket.offset - gathered)
            gathered += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - padding[bucket], end - padding[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, usual, strict=True):
            buffer.param_index_map = places


def _allocate_state(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    adam.step()
    adam.zero_grad()


def _load_steps_apart(part: DistributedOptimizer) -> None:
    set_states = type(part)._set_main_param_and_optimizer_states

    def set_states_and_step(model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        set_states(part, model_param, tensors)

    # Called by Megatron for each parameter that it loads; there is no public hook.
    part._set_main_param_and_optimizer_states = set_states_and_step
