"""Rotary positions over batch-first heads, by ops.rotary; angles may differ from sequence to sequence.

Shape legend: b batch (1: the same for all), s tokens, g groups, e head size, r rotated elements of a head,
n elements of a head that the pairs are taken from (element i turns with i + n / 2; n = r unless a model of
Hugging Face turns the first pairs of a whole head).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sharedproj.ops.rotary import rotate


class Angles(NamedTuple):
    """Cosine and sine [b or 1, s, n / 2] of the angle of each position.

    Attributes:
        gain: both are multiplied by it (YaRN's attention factor), so that turning back divides by its square.
    """

    cos: Tensor
    sin: Tensor
    gain: float = 1.0


def angles_of(start: int, end: int, size: int, base: float, like: Tensor) -> Angles:
    """Angles [1, s, r / 2] of positions start to end - 1.

    Args:
        size: r; base: theta of the frequencies theta^(-2 i / r).
        like: gives the device; float64 angles for float64, else float32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponents = torch.arange(0, size, 2, device=like.device, dtype=dtype) / size
    phase = torch.arange(start, end, device=like.device, dtype=dtype)[:, None] * base**-exponents
    return Angles(phase.cos()[None], phase.sin()[None])


def rotate_heads(x: Tensor, angles: Angles, *, inverse: bool = False) -> Tensor:
    """Rotate the first n elements of each head of x [b, s, heads, e], or rotate them back; half-split."""
    b, s = x.shape[:2]
    cos, sin = (part.expand(b, s, -1).reshape(b * s, -1) for part in angles[:2])
    # ops.rotary knows one angle per row: the tokens of all sequences are its rows.
    turned = rotate(x.reshape(b * s, 1, *x.shape[2:]), cos, sin, inverse=inverse).view(x.shape)
    return turned / angles.gain**2 if inverse and angles.gain != 1.0 else turned


def join_rope_head(tied: Tensor, rope: Tensor, size: int) -> Tensor:
    """The key of ``separate_rope_head``: the rotated elements of a head from the shared one.

    Args:
        tied: [..., g, e]; rope: [..., 1, r], rotated; size: n.
    Returns:
        [..., g, e].
    """
    r, half = rope.shape[-1] // 2, size // 2
    first, second = rope.expand(*tied.shape[:-1], 2 * r).split(r, dim=-1)
    return torch.cat([first, tied[..., r:half], second, tied[..., half + r :]], dim=-1)
