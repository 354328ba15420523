"""What the kernels are held to: exact attention in float64, and plain PyTorch's error in their own dtype.

Shape legend: b sequences, s query length, t key length, h query heads, g groups, e head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sharedproj.ops.reference import attention_reference


def exact(query: Tensor, key: Tensor, *, causal: bool, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """out [b, s, h, e] and lse [b, h, s] in float64 of query [b, s, h, e] and key = value [b, t, g, e]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys = key.double().repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("bshe,bthe->bhst", query.double(), keys) * scale
    if causal:
        s, t = query.shape[1], key.shape[1]
        scores.masked_fill_(torch.ones(s, t, dtype=torch.bool).triu(t - s + 1), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)  # rows without a key: -inf - -inf
    return torch.einsum("bhst,bthe->bshe", weights, keys), lse


def plain(query: Tensor, key: Tensor, *, causal: bool, scale: float | None = None) -> Tensor:
    """The reference in the inputs' dtype, [b, s, h, e]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = query.transpose(0, 1), key.transpose(0, 1)
    return attention_reference(query, key, key, causal=causal, scale=scale).transpose(0, 1)


def assert_as_exact_as_plain(result: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0) -> None:
    """At most `factor` times plain PyTorch's largest error, and 1.5 times its mean error."""
    assert not result.isnan().any()
    if result.numel() == 0:
        return
    error, allowed = (result.double() - exact).abs(), (plain.double() - exact).abs()
    rounding = 2 * ((exact.float() + 0.3 - 0.3) - exact.float()).abs().max().item()
    assert error.max() <= factor * allowed.max() + rounding
    assert error.mean() <= 1.5 * allowed.mean() + rounding


def assert_same_lse(lse: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(lse.double(), exact, atol=1e-5, rtol=1e-6)
