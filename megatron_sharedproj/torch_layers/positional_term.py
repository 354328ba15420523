"""The asymmetric positional term of the paper's "+" forms, (Q=K)+ and (Q=K=V)+.

Paper: "Do Transformers Need Three Projections?" (arXiv 2606.04032), non-causal tasks: with one tensor as
query and key the scores are symmetric; a learned reading of a fixed 2-D sinusoid makes them asymmetric:
S'_ij = S_ij sum(w) + sum_c w_c P_ijc + b.

S is the scaled score here, a Q K^T: the term is added to what the softmax takes, so that its size does not
depend on the head size. Of P's m = 10 channels the first 5 are the usual sinusoid of i (channel c:
sin(i / 10000^(c / 5)) for even c, cos(i / 10000^((c - 1) / 5)) for odd c), the last 5 that of j; their
frequencies are a choice of this package. So P_ijc depends on i alone or on j alone, and the term is a column
plus a row: no [n, n, m] tensor is made. Terms of i and b are the same for all keys, which a softmax does not
see: b gets no gradient, and the first 5 of w get theirs through sum(w).

Shape legend: s queries, t keys, m channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS = 10


def sinusoid(length: int, like: Tensor) -> Tensor:
    """[length, m / 2]: half of P's channels, of positions 0 to length - 1; float64 or float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    half = CHANNELS // 2
    channel = torch.arange(half, device=like.device)
    exponents = (channel - channel % 2).to(dtype) / half
    phase = torch.arange(length, device=like.device, dtype=dtype)[:, None] * 10000.0**-exponents
    return torch.where(channel % 2 == 0, phase.sin(), phase.cos())


class PositionalTerm(nn.Module):
    """w [m] and the scalar b of one layer, shared by its heads; starts as w = 1/m (sum(w) = 1), b = 0."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.full((CHANNELS,), 1.0 / CHANNELS, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def forward(self, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """The factor sum(w) on the scaled scores, and the term [s, t] to add to them."""
        of_query, of_key = self.weight.split(CHANNELS // 2)
        rows = sinusoid(queries, self.weight).to(self.weight.dtype) @ of_query
        columns = sinusoid(keys, self.weight).to(self.weight.dtype) @ of_key
        return self.weight.sum(), rows[:, None] + columns + self.bias
