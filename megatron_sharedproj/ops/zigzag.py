"""How context parallelism divides a sequence: 2P chunks, of which rank r has chunks r and 2P - 1 - r.

A causal query sees the keys before it, so that consecutive pieces would give the last rank the most work. An
early and a late chunk give each rank the same (Megatron-Core's get_batch_on_this_cp_rank).

Shape legend: S whole sequence, c chunk (S / 2P), P context-parallel ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def own_chunks(x: Tensor, dim: int, ranks: int, rank: int) -> Tensor:
    """A rank's two chunks.

    Args:
        x: S along ``dim``.
    Returns:
        The same with 2c along ``dim``; a copy.
    Raises:
        ValueError: if 2 * ranks does not divide S.
    """
    if x.shape[dim] % (2 * ranks):
        raise ValueError(f"sequence of {x.shape[dim]}: must be divisible by {2 * ranks} chunks")
    chunks = x.chunk(2 * ranks, dim)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], dim)


def in_order(gathered: Tensor) -> Tensor:
    """The whole sequence of what the ranks hold: [P, 2c, ...] -> [S, ...], a copy."""
    early, late = gathered.chunk(2, 1)
    return torch.cat([early, late.flip(0)]).flatten(0, 1)


def by_rank(whole: Tensor, ranks: int) -> Tensor:
    """What each rank holds of the whole sequence, :func:`in_order` undone: [S, ...] -> [P, 2c, ...]."""
    chunks = whole.unflatten(0, (2 * ranks, -1))
    return torch.cat([chunks[:ranks], chunks[ranks:].flip(0)], 1)
