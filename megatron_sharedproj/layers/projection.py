"""One column-parallel projection that holds only the tensors a variant has.

Weight [g * p * e, d], p = projected heads in a group (variants.AttentionVariant.group_layout): groups are
contiguous, ``q.. kv | q.. kv``, so the tensor-parallel shard is a plain slice of axis 0.

Shape legend: s sequence, b batch, h heads, g groups, e head size, d hidden size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_sharedproj.variants import get_variant


def projection_size(config: Any, variant: str) -> int:
    """Rows of the projection weight for a Megatron TransformerConfig, over all ranks."""
    groups = config.num_query_groups
    heads = get_variant(variant).heads_per_group(config.num_attention_heads, groups)
    return groups * heads * config.kv_channels


class SharedProjectionMixin:
    """Makes a Megatron column-parallel linear allocate the variant's rows, not Q + K + V.

    SelfAttention.__init__ asks its ``linear_qkv`` for q + 2 kv rows; this ignores that number, which
    keeps Megatron's constructor (whose signature differs between releases) as it is.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, variant: str, **kwargs: Any):
        super().__init__(  # type: ignore[call-arg]
            input_size, projection_size(config, variant), config=config, **kwargs
        )


class SharedProjectionLinear(SharedProjectionMixin, ColumnParallelLinear):
    """``linear_qkv`` of the local implementation."""


def te_shared_projection() -> type:
    """``linear_qkv`` of the Transformer Engine implementation (norm and projection fused).

    Raises:
        ImportError: if Transformer Engine is not installed.
    """
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    class TESharedProjectionLinear(SharedProjectionMixin, TELayerNormColumnParallelLinear):
        pass

    return TESharedProjectionLinear
