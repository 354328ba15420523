"""Megatron-Core's vocabulary-parallel cross-entropy on a CPU, a few rows at a time.

Megatron's runs its operators over all logits in fp32, each at the speed of memory. Here they run over blocks
of rows that stay in the cache, and no fp32 copy of bf16 logits is made (benchmarks/LOG.md).

Shape legend: s sequence, b batch, n rows (s * b), v vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of a block, 4 MiB in fp32: small enough for the cache, large enough for an operator's call.
_BLOCK = 1 << 20


def _blocks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows [n, v] in fp32: views of them, or their values in a buffer that is used again."""
    size = min(max(1, _BLOCK // rows.shape[1]), max(1, rows.shape[0]))
    buffer = None if rows.dtype == torch.float32 else rows.new_empty(size, rows.shape[1], dtype=torch.float32)
    for start in range(0, rows.shape[0], size):
        part = slice(start, min(start + size, rows.shape[0]))
        block = rows[part]
        yield part, block if buffer is None else buffer[: len(block)].copy_(block)


class _CrossEntropy(torch.autograd.Function):
    """logits [s, b, v] of this rank, target [s, b] -> loss [s, b] in fp32.

    As in Megatron, fp32 logits are replaced by their exponentials here; the gradient replaces either.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        rows, v = logits.view(-1, logits.shape[-1]), logits.shape[-1]
        index = target.flatten() - (group.rank() * v if group is not None else 0)
        absent = (index < 0) | (index >= v)
        index = index.masked_fill(absent, 0)[:, None]
        predicted = rows.gather(1, index)[:, 0].float().masked_fill(absent, 0.0)
        largest = torch.empty_like(predicted)
        total = torch.empty_like(predicted)
        for part, block in _blocks(rows):
            torch.amax(block, -1, out=largest[part])
            torch.sum(block.sub_(largest[part, None]).exp_(), -1, out=total[part])
        own = largest
        if group is not None:
            largest = own.clone()
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
            sums = torch.stack([total * (own - largest).exp(), predicted])
            torch.distributed.all_reduce(sums, group=group)
            total, predicted = sums
        # What turns exp(x - own) into a probability.
        factor = (own - largest).exp() / total
        ctx.save_for_backward(logits, own, factor, index, absent)
        return (largest + total.log() - predicted).view_as(target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, own, factor, index, absent = ctx.saved_tensors
        rows, scale = logits.view(-1, logits.shape[-1]), grad.flatten().float()
        factor = (factor * scale)[:, None]
        at_target = scale.masked_fill(absent, 0.0).neg()[:, None]
        for part, block in _blocks(rows):
            if rows.dtype != torch.float32:
                block.sub_(own[part, None]).exp_()
            block.mul_(factor[part]).scatter_add_(1, index[part], at_target[part])
            if rows.dtype != torch.float32:
                rows[part] = block
        return logits, None, None


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0, tp_group: Any = None
) -> Tensor:
    """Stands in for megatron.core.tensor_parallel.cross_entropy's function of the same name, on a CPU.

    Args:
        vocab_parallel_logits: [s, b, v], contiguous; the backward pass overwrites them, as Megatron's does.
        target: [s, b] int64, ids of the whole vocabulary.
    Returns:
        Loss in nats [s, b], fp32.
    Raises:
        ValueError: for label smoothing, which this trainer does not have.
    """
    from megatron.core import parallel_state

    if label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing}: not supported; use 0")
    group = tp_group or parallel_state.get_tensor_model_parallel_group()
    return _CrossEntropy.apply(vocab_parallel_logits, target, group if group.size() > 1 else None)
