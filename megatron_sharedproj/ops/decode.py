"""Decode: a few queries of each sequence over its cache, contiguous or paged; a tied one is one tensor.

Layouts are those of serving engines: query [b, s, h, e], contiguous cache [b, t, g, e], paged cache
[pages, page size, g, e] with a block table.

Shape legend: s query length (1 in plain decoding), t cache capacity, b batch, h query heads, g groups,
e head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sharedproj.ops.paths import Request, choose, refusal
from megatron_sharedproj.ops.reference import decode_reference


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """What csrc/bindings.cpp checks, for the path that does not go there."""
    if query.dim() != 4 or key_cache.dim() != 4:
        shapes = f"query {tuple(query.shape)}, key {tuple(key_cache.shape)}"
        raise ValueError(f"{shapes}: expected [b, s, h, e] and [b, t, g, e]")
    b, _, h, e = query.shape
    pages, length, g, key_e = key_cache.shape
    if key_e != e or g == 0 or h % g:
        raise ValueError(f"key has {g} groups of {key_e}: the query has {h} heads of {e}")
    if value_cache is not None and value_cache.shape != key_cache.shape:
        raise ValueError(f"value has shape {tuple(value_cache.shape)}: the key has {tuple(key_cache.shape)}")
    if block_table is None:
        if pages != b:
            raise ValueError(f"key has batch {pages}: the query has {b}")
    else:
        if block_table.dim() != 2 or block_table.shape[0] != b:
            raise ValueError(f"block_table has shape {tuple(block_table.shape)}: expected [{b}, pages]")
        length *= block_table.shape[1]
    lengths = [length] * b if seqlens_k is None else seqlens_k.tolist()
    if len(lengths) != b:
        raise ValueError(f"seqlens_k has {len(lengths)} entries: expected {b}")
    for z, keys in enumerate(lengths):
        if not 0 <= keys <= length:
            raise ValueError(f"seqlens_k gives sequence {z} the length {keys}: accepted are 0 to {length}")
        used = [] if block_table is None else block_table[z, : -(-keys // key_cache.shape[1])].tolist()
        for page in used:
            if not 0 <= page < pages:
                raise ValueError(
                    f"block_table names page {page} for sequence {z}: accepted are 0 to {pages - 1}"
                )


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None = None,
    *,
    scale: float,
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of the last s positions of each sequence; query i sees keys up to i + length - s.

    Args:
        query: [b, s, h, e].
        key_cache: [b, t, g, e], or [pages, page size, g, e] with a page size that is a multiple of 64.
        value_cache: like key_cache; None where key and value are one tensor.
        scale: factor on the scores.
        seqlens_k: int32 [b], keys of each sequence, the s new ones included; None: all t.
        block_table: int32 [b, pages of a sequence], makes the cache paged. An entry that is no page is an
            error on a CPU and gives NaN on a GPU, where checking would cost a synchronisation.
        num_splits: parts that the key length is cut into; 0 chooses for the machine.
    Returns:
        out [b, s, h, e] and the natural-log log-sum-exp of the scaled scores, float32 [b, h, s]
        (-inf and 0 for a query without a key). Not differentiable.
    Raises:
        ValueError: naming the argument, its value and what is accepted; or if the kernel is required
            (``--require-kernel``) and cannot run.
    """
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key_cache, value_cache)
    ):
        raise ValueError("decode has no gradient: call it under torch.no_grad(), or use ops.attention")
    request = Request(
        device=query.device.type,
        dtype=query.dtype,
        head_size=query.shape[-1],
        tied=value_cache is None,
        queries=query.shape[1],
        keys=key_cache.shape[1],
        capability=torch.cuda.get_device_capability(query.device) if query.is_cuda else None,
    )
    if refusal(request):
        choose(request)  # an error where the kernel is required
        _check(query, key_cache, value_cache, seqlens_k, block_table)
        return decode_reference(query, key_cache, value_cache, scale, seqlens_k, block_table)
    return torch.ops.megatron_sharedproj.attention_decode(
        query, key_cache, value_cache, scale, seqlens_k, block_table, num_splits
    )
