"""Rotary positions with a tied key/value on the plain kernel: the scheme ``rotate_values``.

The rotated tensor is key and value alike, and the only one that is cached; the output is rotated back by the
query's own position, so that a value arrives rotated by the distance alone: out_i = sum_j a_ij R(j - i) v_j.
Nothing but the query, that one tensor and the output exists, and the kernel is the one for learned positions.

Shape legend: s query length, t key length, b batch, h query heads, g groups, e head size, r rotated half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sharedproj.ops.attention import attention


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the first 2 r elements of each head, half-split (Megatron's default, rotary_interleaved off).

    Args:
        x: [s, b, h, e].
        cos, sin: float32 [s, r] with 2 r <= e, of the angle of each position.
        inverse: rotate back.
    Returns:
        [s, b, h, e] in x's dtype; computed in float32 (float64 for float64).
    Raises:
        ValueError: if cos and sin do not fit x.
    """
    half = cos.shape[-1]
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != x.shape[0] or 2 * half > x.shape[-1]:
        raise ValueError(
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: expected [{x.shape[0]}, r] with 2 r at most "
            f"{x.shape[-1]}"
        )
    compute = torch.promote_types(x.dtype, torch.float32)
    c, s = cos.to(compute)[:, None, None], sin.to(compute)[:, None, None]
    if inverse:
        s = -s
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    a, b = first.to(compute), second.to(compute)
    return torch.cat([(a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype), rest], dim=-1)


def attention_rotate_values(
    query: Tensor,
    rotated_kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    causal: bool,
    scale: float,
    deterministic: bool = False,
) -> Tensor:
    """Attention whose value is the rotated key, un-rotated at the output.

    Args:
        query: [s, b, h, e], not rotated yet; its positions are the last s of t.
        rotated_kv: [t, b, g, e], rotated by :func:`rotate` (as it lies in a cache).
        cos, sin: float32 [s, r], angles of the queries' positions.
        causal, scale, deterministic: as in :func:`megatron_sharedproj.ops.attention.attention`.
    Returns:
        [s, b, h, e].
    """
    options: dict[str, Any] = {"causal": causal, "scale": scale, "deterministic": deterministic}
    out = attention(rotate(query, cos, sin), rotated_kv, rotated_kv, **options)
    return rotate(out, cos, sin, inverse=True)
