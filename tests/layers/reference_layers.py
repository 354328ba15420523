"""Random Megatron layers in float64, and where each head's rows lie in their projection.

The rows are found by arithmetic of its own (``q.. k v`` group by group), so that a wrong layout shows.

Shape legend: s sequence, b batch, h heads, g groups, e head size, d hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_sharedproj.config import ModelConfig

S, B, H, D, VOCAB = 7, 2, 4, 32, 64
TOLERANCE = {"rtol": 0.0, "atol": 1e-10}
CASES = [
    *(("qkv", groups) for groups in (4, 2, 1)),
    ("q_eq_k", 4),
    *(("qk_eq_v", groups) for groups in (4, 2, 1)),
    ("q_eq_k_eq_v", 4),
]


def build(variant: str, groups: int, **changes: Any) -> Any:
    """A model in float64 with every parameter random, the biases and norms too."""
    from megatron_sharedproj.model import build_model  # after the fixture has prepared Megatron-Core

    config = ModelConfig(
        num_layers=2,
        hidden_size=D,
        num_attention_heads=H,
        num_query_groups=groups,
        padded_vocab_size=VOCAB,
        max_position_embeddings=16,
        attention_variant=variant,
        activation="gelu",
        attention_dropout=0.0,
        hidden_dropout=0.0,
    ).replace(**changes)
    model = build_model(config, dtype=torch.float64).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1.0 + 0.2 * noise if "layernorm.weight" in name else 0.3 * noise)
    return model


def head_slices(variant: str, groups: int, e: int) -> list[tuple[slice, slice, slice]]:
    """Rows of W_q, W_k and W_v of each query head in the interleaved projection."""
    shared = H // groups
    order = {  # what a group stores, head by head
        "qkv": ["q"] * shared + ["k", "v"],
        "q_eq_k": ["k", "v"],
        "qk_eq_v": ["q"] * shared + ["k"],
        "q_eq_k_eq_v": ["k"],
    }[variant]
    rows = []
    for head in range(H):
        group, inside = head // shared, head % shared

        def at(position: int, group: int = group) -> slice:
            start = (group * len(order) + position) * e
            return slice(start, start + e)

        key = at(order.index("k"))
        query = at(inside) if "q" in order else key
        value = at(order.index("v")) if "v" in order else key
        rows.append((query, key, value))
    return rows
