"""The attention op: one entry for every variant, which picks the path and says why.

PyTorch's SDPA with key and value the same tensor, or the plain reference where SDPA would give NaN. The
compiled extension will come first once it exists.

Shape legend: s query length, t key length, b batch, h query heads, g groups (key/value heads), e head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sharedproj.ops.reference import attention_reference


@dataclass(frozen=True)
class Path:
    """Which implementation runs, and the reason in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"attention path: {self.name} ({self.reason})"


def select_path(*, tied_kv: bool, require_kernel: bool = False) -> Path:
    """The path that :func:`attention` takes on this machine.

    Args:
        tied_kv: key and value are one tensor.
        require_kernel: refuse to fall back (``--require-kernel``).
    Raises:
        ValueError: if the compiled kernel was required and is not there.
    """
    missing = "the compiled extension is not installed"
    if require_kernel:
        raise ValueError(
            f"--require-kernel: {missing}; build it with `pip install --no-build-isolation -e .` on a tree "
            "that has csrc/shared_kv_attention.cu, or drop the flag to run on PyTorch's SDPA"
        )
    tensors = "key and value one tensor" if tied_kv else "key and value two tensors"
    return Path("sdpa", f"{missing}; SDPA with {tensors}")


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}: expected [s, b, h, e] and [t, b, g, e]"
        )
    if key.shape != value.shape:
        raise ValueError(f"value {tuple(value.shape)}: must have the key's shape {tuple(key.shape)}")
    if query.shape[1] != key.shape[1] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}: batch and head size must be equal"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"key has {key.shape[2]} groups: must divide the query's {query.shape[2]} heads")
    if query.dtype != key.dtype or key.dtype != value.dtype:
        raise ValueError(f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: must be equal")


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """Attention over strided views, without copying or expanding key and value.

    Args:
        query: [s, b, h, e], any strides.
        key, value: [t, b, g, e]; the same tensor for the variants that tie them.
        causal: bottom-right aligned causal mask.
        scale: factor on the scores.
        dropout_p: attention dropout probability (0 outside training).
    Returns:
        [s, b, h, e], contiguous.
    Raises:
        ValueError: for shapes or dtypes that do not fit together.
    """
    _check(query, key, value)
    s, t = query.shape[0], key.shape[0]
    if causal and s > t:
        # Some queries see no key, and SDPA would give NaN there.
        out = attention_reference(query, key, value, causal=True, scale=scale, dropout_p=dropout_p)
        return out.contiguous()
    mask = None
    if causal and 1 < s < t:
        mask = torch.ones(s, t, dtype=torch.bool, device=query.device).tril(t - s)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal and s == t and s > 1,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.permute(2, 0, 1, 3).contiguous()
