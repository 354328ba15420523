"""Rotary positions in the Megatron layer: what each scheme of variants.KV_ROTARY rotates, stores and reads.

Shape legend: s new tokens, t tokens seen, b batch, h heads on this rank, g groups on this rank, e head size,
r rotated elements of a head (the first), d hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

# Elements of a block: 1 MiB in fp32 stays in a core's cache.
_BLOCK = 1 << 18


class RopeHead(torch.nn.Linear):
    """The projection of a separate rotary head: r elements that all groups share (arXiv 2505.21487).

    Every tensor-parallel rank holds it whole and uses it for its own heads, so that the gradient of its
    output is summed over the ranks.

    Args:
        config: Megatron's TransformerConfig.
        rope_size: r.
        group: the tensor-parallel ranks.
    """

    def __init__(self, config: Any, rope_size: int, group: Any):
        meta = torch.get_default_device().type == "meta"
        super().__init__(
            config.hidden_size, rope_size, bias=config.add_bias_linear, dtype=torch.float32, device=None
        )
        if not meta and config.perform_initialization:
            config.init_method(self.weight)
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)
        self.to(config.params_dtype)
        self.sequence_parallel, self.group = config.sequence_parallel, group
        for parameter in self.parameters():
            # A rank sees a part of the sequence: Megatron sums the gradients of parameters so marked.
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, d] (with sequence parallelism this rank's part of s) -> [s, b, 1, r]."""
        rope = super().forward(hidden_states)
        if self.sequence_parallel:
            rope = gather_from_sequence_parallel_region(rope, group=self.group)
        else:
            rope = copy_to_tensor_model_parallel_region(rope, group=self.group)
        return rope.unsqueeze(-2)


def rotate(
    x: Tensor, angles: Tensor, config: Any, group: Any, packed: Any = None, *, inverse: bool = False
) -> Tensor:
    """Rotate the first r elements of each head, or rotate them back.

    Args:
        x: [s, b, heads, e], or [n, heads, e] of packed sequences, each of which starts at position 0.
        angles: Megatron's, [s, 1, 1, r], or of each sequence's own positions [s, b, 1, r].
        config: Megatron's TransformerConfig; group: its context-parallel ranks.
        packed: megatron.core.packed_seq_params.PackedSeqParams.
    """
    starts = None if packed is None else packed.cu_seqlens_q
    # cos(-a) = cos(a), sin(-a) = -sin(a)
    return apply_rotary_pos_emb(
        x, -angles if inverse else angles, config=config, cu_seqlens=starts, cp_group=group
    )


def join_rope_head(tied: Tensor, rope: Tensor, out: Tensor | None = None) -> Tensor:
    """The key of ``separate_rope_head``: [..., g, e] and the shared head [..., 1, r] -> [..., g, e].

    Args:
        out: memory of the result, without gradients.
    """
    r = rope.shape[-1]
    if out is None:
        return torch.cat([rope.expand(*tied.shape[:-1], r), tied[..., r:]], dim=-1)
    out[..., r:] = tied[..., r:]
    out[..., :r] = rope
    return out


def turning_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Of angles [t, 1, 1, r] the cosine, and the sine with its sign, each of that shape: for :func:`turn`."""
    cos, sin = angles.cos(), angles.sin()
    half = angles.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Rotate cached keys of positions 0 to t - 1 into memory that is there, without gradients.

    Block by block in fp32: the whole would leave a CPU's cache at every product.

    Args:
        x, out: [t, b, g, e]; cos, sin: of :func:`turning_tables`, at least t long.
    """
    r, per_token = cos.shape[-1], x[0].numel()
    compute = torch.promote_types(x.dtype, torch.float32)
    size = max(1, _BLOCK // per_token)
    for start in range(0, x.shape[0], size):
        part = slice(start, min(start + size, x.shape[0]))
        block = x[part].to(compute, copy=True)
        turned = block[..., :r]
        other = turned.roll(r // 2, dims=-1)
        turned.mul_(cos[part]).addcmul_(other, sin[part])
        out[part] = block
    return out
