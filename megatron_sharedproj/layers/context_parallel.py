"""Attention over a sequence that is divided over ranks: the keys and values are gathered, once if tied.

Each rank keeps its queries. For K=V one tensor is gathered and the gradient of one is reduce-scattered, half
the bytes of separate keys and values. A rank's two chunks of queries each see a prefix of the keys, which is
the op's own causal mask (bottom-right aligned).

Shape legend: S whole sequence, P context-parallel ranks, s queries of this rank (S / P, two chunks), b batch,
h heads, g groups, e head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_sharedproj.ops.attention import attention
from megatron_sharedproj.ops.zigzag import by_rank, in_order


class _Gather(torch.autograd.Function):
    """[s, b, g, e] of each rank -> [S, b, g, e]; its gradient is summed over the ranks and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return in_order(gathered.unflatten(0, (group.size(), -1)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        parts = by_rank(grad, ctx.group.size())
        own = torch.empty_like(parts[0])
        torch.distributed.reduce_scatter_tensor(own, parts.flatten(0, 1), group=ctx.group)
        return own, None


def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, group: Any, *, causal: bool, **options: Any
) -> Tensor:
    """Attention of this rank's queries to the whole sequence. Collective.

    Args:
        query: [s, b, h, e]; key, value: [s, b, g, e], one tensor object where they are tied.
        group: the context-parallel ranks, which hold the sequence as ops.zigzag says.
        causal: each query sees the keys up to its own position; else all.
        options: of :func:`megatron_sharedproj.ops.attention.attention`.
    Returns:
        [s, b, h, e].
    """
    keys = _Gather.apply(key, group)
    values = keys if value is key else _Gather.apply(value, group)
    if not causal:
        return attention(query, keys, values, causal=False, **options)
    ranks, rank = group.size(), group.rank()
    chunk = query.shape[0] // 2
    outputs = []
    for queries, last in ((query[:chunk], rank), (query[chunk:], 2 * ranks - 1 - rank)):
        seen = keys[: (last + 1) * chunk]
        out = attention(
            queries, seen, seen if values is keys else values[: seen.shape[0]], causal=True, **options
        )
        outputs.append(out)
    return torch.cat(outputs)
