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
