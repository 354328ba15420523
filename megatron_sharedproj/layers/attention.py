"""Self-attention that projects only what its variant has, and caches a tied key/value once.

Subclasses megatron.core.transformer.attention.SelfAttention.

Shape legend: s sequence, b batch, h heads on this rank, g groups on this rank, e head size, d hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_sharedproj.layers.core_attention import SharedProjectionCoreAttention
from megatron_sharedproj.layers.kv_cache import CacheContext, alias_tied_cache
from megatron_sharedproj.variants import get_variant


class SharedProjectionSelfAttention(SelfAttention):
    """Projection-sharing self-attention.

    Args:
        variant: value of ``--attention-variant``.
        The others are Megatron's; ``submodules.linear_qkv`` must build the same variant's projection.
    """

    def __init__(
        self, config: Any, submodules: Any, layer_number: int, *args: Any, variant: str, **kwargs: Any
    ):
        self.variant = get_variant(variant)
        self.variant.check_groups(config.num_attention_heads, config.num_query_groups)
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        if isinstance(self.core_attention, SharedProjectionCoreAttention):
            self.core_attention.tied_kv = self.variant.tied_kv

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Megatron's, or with a CacheContext this package's own cached attention.

        Args:
            hidden_states: [s, b, d].
        Returns:
            output [s, b, d], and its bias, which the layer adds.
        """
        context = kwargs.get("inference_context")
        if not isinstance(context, CacheContext):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        angles = kwargs.get("rotary_pos_emb")
        if angles is not None:
            if self.variant.tied_kv:
                raise ValueError(
                    f"--position-embedding-type rope: the cache of --attention-variant {self.variant.name} "
                    "has no tensor for values apart from rotated keys; use learned positions"
                )
            # [t, 1, 1, r] -> each sequence's own positions, [s, b, 1, r]. The cache stores rotated keys.
            angles = angles[context.positions.t(), 0]
            tied = key is query
            query = self._rotate(query, angles)
            key = query if tied else self._rotate(key, angles)
        out = context.attend(self.layer_number - 1, query, key, value, self.core_attention.scale)
        return self.linear_proj(out.flatten(-2))

    def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, angles, config=self.config, cp_group=self.pg_collection.cp)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
        **unused: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project and split.

        Args:
            hidden_states: [s, b, d].
        Returns:
            query [s, b, h, e], key [s, b, g, e], value [s, b, g, e]; tensors that the variant ties are
            the same tensor object.
        Raises:
            ValueError: for Megatron options that assume three projections.
        """
        if output_gate or not split_qkv:
            option = "attention_output_gate" if output_gate else "fused_single_qkv_rope"
            raise ValueError(f"{option}: not supported with --attention-variant {self.variant.name}")
        mixed, _ = self.linear_qkv(hidden_states)
        heads, groups, ranks = (
            self.config.num_attention_heads,
            self.config.num_query_groups,
            self.world_size,
        )
        split_groups = groups < ranks
        if split_groups:
            # Fewer groups than ranks (MQA): a rank's rows are a piece of a group. Gather all rows, keep
            # this rank's group, then this rank's query heads (as Megatron does for three projections).
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed)
            index = self.tp_group.rank() // (ranks // groups)
            size = mixed.shape[-1] // groups
            mixed = mixed[..., index * size : (index + 1) * size]

        e = self.hidden_size_per_attention_head
        layout = self.variant.group_layout(heads, groups)
        s, b = mixed.shape[:2]
        mixed = mixed.view(s, b, self.num_query_groups_per_partition, -1)
        parts = torch.split(mixed, [count * e for _, count in layout], dim=-1)
        tensors = {name: part.reshape(s, b, -1, e) for (name, _), part in zip(layout, parts, strict=True)}
        query, key = tensors[self.variant.query], tensors[self.variant.key]
        value = tensors[self.variant.value]
        if split_groups:
            local = heads // ranks
            start = (self.tp_group.rank() % (ranks // groups)) * local
            query = query[:, :, start : start + local]
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            normed = self.k_layernorm(key)
            # IdentityOp returns its input, and then key and value stay one tensor.
            value = normed if value is key and normed is key else value
            key = normed
        return query, key, value

    def _adjust_key_value_for_inference(
        self, inference_context: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # Megatron has no public hook for the cache: it allocates two buffers in this method.
        if inference_context is not None and self.variant.tied_kv:
            alias_tied_cache(self, inference_context, key)
        adjusted = super()._adjust_key_value_for_inference(
            inference_context, query, key, value, *args, **kwargs
        )
        query, key, value, rotary, _, *rest = adjusted
        if self.variant.tied_kv and inference_context is not None:
            value = key
        # The core attention masks bottom-right, which is right for one token and for a chunk of them;
        # Megatron switches the mask off after the prompt, which is right for one token only.
        return (query, key, value, rotary, self.attn_mask_type, *rest)
