"""Figures of a step that cost a pass over the model or a message between ranks: for logged steps only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_sharedproj.config import LogConfig
from megatron_sharedproj.device import Device

# In this order; every rank has them all, also where its pipeline stage has no such parameter.
GROUPS = ("embedding", "attention", "mlp", "norms", "output")


def group_of(name: str) -> str:
    """The group of a parameter of Megatron-Core's GPTModel by its name."""
    if "norm" in name:
        return "norms"
    for part, group in (("self_attention.", "attention"), ("mlp.", "mlp"), ("embedding.", "embedding")):
        if part in name:
            return group
    return "output"


def gradient_figures(config: LogConfig, chunks: list[Any], loss_scale: float) -> dict[str, float]:
    """Norms of the reduced gradient by group, and its zeros; collective, after the backward passes.

    Args:
        chunks: Megatron's DistributedDataParallel around each GPTModel of this rank.
        loss_scale: that the gradients are multiplied with.
    Returns:
        ``grad_norm_<group>`` with --log-grad-norm-per-group: before clipping, the root of their squares' sum
        is the gradient norm. ``num_zeros`` with --log-num-zeros-in-grad.
    """
    if not (config.log_grad_norm_per_group or config.log_num_zeros_in_grad):
        return {}
    sums = torch.zeros(len(GROUPS) + 1, dtype=torch.float64, device=_device(chunks))
    sharded = False
    for chunk in chunks:
        sharded = chunk.ddp_config.use_distributed_optimizer
        names = {parameter: name for name, parameter in chunk.module.named_parameters()}
        for parameter, gradient in _reduced_gradients(chunk, sharded):
            index = GROUPS.index(group_of(names[parameter]))
            sums[index] += torch.linalg.vector_norm(gradient, dtype=torch.float32).double() ** 2
            if config.log_num_zeros_in_grad:
                sums[-1] += gradient.numel() - torch.count_nonzero(gradient)
    torch.distributed.all_reduce(sums, group=parallel_state.get_model_parallel_group())
    if sharded:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=group)
    found: dict[str, float] = {}
    *squares, zeros = sums.tolist()
    if config.log_grad_norm_per_group:
        found = {
            f"grad_norm_{name}": square**0.5 / loss_scale
            for name, square in zip(GROUPS, squares, strict=True)
            if square
        }
    return {**found, "num_zeros": int(zeros)} if config.log_num_zeros_in_grad else found


def _device(chunks: list[Any]) -> torch.device:
    return next(chunks[0].module.parameters()).device


def _counts_here(parameter: Any) -> bool:
    """Whether it counts on this rank: others have copies of norms, biases and tied embeddings."""
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)


def _reduced_gradients(chunk: Any, sharded: bool) -> Iterator[tuple[Any, torch.Tensor]]:
    """Parameters and the part of their gradient that is reduced on this rank, flat.

    With the distributed optimizer that is this rank's slice of each bucket of Megatron's gradient buffer.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    rank, ranks = (group.rank(), group.size()) if sharded else (0, 1)
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            for parameter, (start, end) in bucket.param_to_index.items():
                if _counts_here(parameter):
                    first, last = owned(start, end, bucket.grad_data.numel(), rank, ranks)
                    if first < last:
                        yield parameter, bucket.grad_data[first:last]


def owned(start: int, end: int, size: int, rank: int, ranks: int) -> tuple[int, int]:
    """The part of [start, end) in a rank's slice of a bucket of `size` elements; empty: first >= last."""
    share = size // ranks
    return max(start, rank * share), min(end, (rank + 1) * share)


def parameter_norm(chunks: list[Any]) -> float:
    """L2 norm of all parameters (Megatron's --log-params-norm), in their own dtype; collective."""
    total = torch.zeros((), dtype=torch.float64, device=_device(chunks))
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            # Until the next forward pass a rank has updated its shard only.
            chunk.start_param_sync(force_sync=True)
        for parameter in chunk.module.parameters():
            if _counts_here(parameter):
                total += torch.linalg.vector_norm(parameter.detach(), dtype=torch.float32).double() ** 2
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return float(total.item()) ** 0.5


def memory_figures(config: LogConfig, device: Device, local: torch.device) -> dict[str, Any]:
    """The most memory that any rank had in use, and Megatron's figures of this rank; collective.

    Returns:
        ``peak_memory_bytes`` (a GPU's tensors; on a CPU the resident set) of the rank that has most,
        ``peak_memory_rank``, ``peak_memory_bytes_per_rank``; with --log-memory-to-tensorboard ``mem_*``.
    """
    peak = torch.tensor([device.peak_memory_bytes()], device=local)
    peaks = [torch.empty_like(peak) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(peaks, peak)
    per_rank = [int(p.item()) for p in peaks]
    most = max(per_rank)
    figures: dict[str, Any] = {
        "peak_memory_bytes": most,
        "peak_memory_rank": per_rank.index(most),
        "peak_memory_bytes_per_rank": per_rank,
    }
    return {**figures, **device.memory_stats()} if config.log_memory_to_tensorboard else figures
