"""Plain PyTorch attention: what every faster path is tested against, gradients included.

Shape legend: s query length, t key length, b batch, h query heads, g groups (key/value heads), e head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """softmax(scale * Q K^T) V in the inputs' own precision (paper, section 3).

    Args:
        query: [s, b, h, e].
        key, value: [t, b, g, e]; query head i reads group i // (h / g). They may be one tensor.
        causal: mask bottom-right aligned: query i sees keys up to i + t - s.
        scale: factor on the scores, 1/sqrt(e) in the paper.
        dropout_p: probability of dropping an attention weight.
    Returns:
        [s, b, h, e]; a query that sees no key gives 0.
    """
    s, t = query.shape[0], key.shape[0]
    heads_per_group = query.shape[2] // key.shape[2]
    k = key.repeat_interleave(heads_per_group, dim=2)
    v = value.repeat_interleave(heads_per_group, dim=2)
    scores = torch.einsum("sbhe,tbhe->bhst", query, k) * scale
    if causal:
        hidden = torch.ones(s, t, dtype=torch.bool, device=query.device).triu(t - s + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    if causal and s > t:
        weights = weights.masked_fill(hidden, 0.0)  # rows without a key: softmax gave NaN
    weights = torch.nn.functional.dropout(weights, dropout_p, training=dropout_p > 0.0)
    return torch.einsum("bhst,tbhe->sbhe", weights, v)


def decode_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    scale: float,
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain twin of ops.decode.decode: same arguments and results, sequence by sequence.

    Args:
        query: [b, s, h, e]; key_cache, value_cache: [b, t, g, e], or pages [p, page size, g, e].
    Returns:
        out [b, s, h, e] and the log-sum-exp, float32 [b, h, s].
    """
    caches = [key_cache] if value_cache is None else [key_cache, value_cache]
    out = torch.zeros_like(query)
    b, s, h, _ = query.shape
    lse = torch.full((b, h, s), float("-inf"), dtype=torch.float32, device=query.device)
    for z in range(b):
        rows = [
            cache[z] if block_table is None else cache[block_table[z].long()].flatten(0, 1)
            for cache in caches
        ]
        length = rows[0].shape[0] if seqlens_k is None else int(seqlens_k[z])
        k, v = rows[0][:length, None], rows[-1][:length, None]
        q = query[z][:, None]
        out[z] = attention_reference(q, k, v, causal=True, scale=scale)[:, 0]
        scores = torch.einsum("she,the->hst", q[:, 0], k[:, 0].repeat_interleave(h // k.shape[2], 1)) * scale
        hidden = torch.ones(s, length, dtype=torch.bool, device=query.device).triu(length - s + 1)
        lse[z] = torch.logsumexp(scores.masked_fill(hidden, float("-inf")).float(), dim=-1)
    return out, lse
