"""Self-attention that projects only what its variant has, and caches a tied key/value once.

Subclasses megatron.core.transformer.attention.SelfAttention.

Shape legend: s sequence, t tokens seen, b batch, h heads on this rank, g groups on this rank, e head size,
r rotated elements of a head, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_sharedproj.layers.core_attention import SharedProjectionCoreAttention
from megatron_sharedproj.layers.kv_cache import CacheContext, alias_tied_cache
from megatron_sharedproj.layers.rotary import RopeHead, join_rope_head, rotate, turn
from megatron_sharedproj.variants import KV_ROTARY, get_variant, resolve_kv_rotary


class SharedProjectionSelfAttention(SelfAttention):
    """Projection-sharing self-attention.

    Args:
        variant: value of ``--attention-variant``.
        kv_rotary: value of ``--kv-rotary``; empty: the model has no rotary positions, or an untied value.
        rope_size: r, which a scheme with a projection of its own needs.
        The others are Megatron's; ``submodules.linear_qkv`` must build the same variant's projection.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int,
        *args: Any,
        variant: str,
        kv_rotary: str = "",
        rope_size: int = 0,
        **kwargs: Any,
    ):
        self.variant = get_variant(variant)
        self.variant.check_groups(config.num_attention_heads, config.num_query_groups)
        self.scheme = KV_ROTARY[kv_rotary or "none"]
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        if isinstance(self.core_attention, SharedProjectionCoreAttention):
            self.core_attention.tied_kv = self.variant.tied_kv
        if self.scheme.rope_head:
            self.linear_k_rope = RopeHead(config, rope_size, self.pg_collection.tp)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Megatron's; with a CacheContext, or where more than the key is rotated, this package's own.

        Args:
            hidden_states: [s, b, d].
        Returns:
            output [s, b, d], and its bias, which the layer adds.
        """
        context, angles = kwargs.get("inference_context"), kwargs.get("rotary_pos_emb")
        if angles is not None and self.scheme.name == "none":
            # A layer of stock Megatron-LM learns only here that its model has rotary positions.
            self.scheme = resolve_kv_rotary(self.variant, "", rope=True)
        if isinstance(context, CacheContext):
            return self._forward_cached(hidden_states, context, angles)
        if not (self.scheme.rotates_value or self.scheme.rope_head):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        if context is not None:
            raise ValueError(
                f"--kv-rotary {self.scheme.name}: {type(context).__name__} stores keys and values that are "
                "not rotated; use layers.kv_cache.CacheContext (tools/generate.py does)"
            )
        if angles is None:
            raise ValueError(
                f"--kv-rotary {self.scheme.name}: needs rotary positions; add --position-embedding-type rope"
            )
        return self._forward_rotated(hidden_states, angles, kwargs.get("packed_seq_params"))

    def _forward_rotated(
        self, hidden_states: Tensor, angles: Tensor, packed: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The schemes that rotate another thing than query and key: angles [s, 1, 1, r]."""
        s, b = self._sequence(hidden_states)
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        rope = self.linear_k_rope(hidden_states) if self.scheme.rope_head else None
        if packed is not None:
            tied = key is query
            query, key = query.squeeze(1), key.squeeze(1)
            query, value = key if tied else query, key
            rope = None if rope is None else rope.squeeze(1)
        query, key, value, _ = self._rotated(query, key, value, rope, angles, packed)
        if self.checkpoint_core_attention and self.training:
            out = self._checkpointed_attention_forward(
                query, key, value, None, attn_mask_type=self.attn_mask_type, packed_seq_params=packed
            )
        else:
            out = self.core_attention(
                query, key, value, None, attn_mask_type=self.attn_mask_type, packed_seq_params=packed
            )
        if self.scheme.rotates_value:
            out = self._rotate(out.view(query.shape), angles, packed, inverse=True)
        return self.linear_proj(out.reshape(s, b, -1))

    def _forward_cached(
        self, hidden_states: Tensor, context: CacheContext, angles: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to what the context's sequences hold and the new tokens: angles [t, 1, 1, r]."""
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        stored: tuple[Tensor, ...]
        read: Callable[..., tuple[Tensor, Tensor]] | None = None
        if angles is None:
            stored = (key,) if self.variant.tied_kv else (key, value)
        else:
            rope = self.linear_k_rope(hidden_states) if self.scheme.rope_head else None
            # [t, 1, 1, r] -> each sequence's own positions, [s, b, 1, r].
            own = angles[context.positions.t(), 0]
            tied = key
            query, key, value, rope = self._rotated(query, key, value, rope, own)
            if self.scheme.rope_head:
                assert rope is not None
                stored = tied, rope
                read = lambda x, head: (join_rope_head(x, head, out=context.scratch(x)), x)  # noqa: E731
            elif self.scheme.rotates_value:
                stored = (key,)
            elif self.variant.tied_kv and len(context.cache.stored(self.layer_number - 1)) == 1:
                tables = context.rotation(angles)
                stored, read = (tied,), lambda x: (turn(x, *tables, out=context.scratch(x)), x)
            else:
                stored = key, value
        out = context.attend(
            self.layer_number - 1, query, key, value, self.core_attention.scale, stored=stored, read=read
        )
        if angles is not None and self.scheme.rotates_value:
            out = self._rotate(out, own, inverse=True)
        return self.linear_proj(out.flatten(-2))

    def _rotated(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rope: Tensor | None,
        angles: Tensor,
        packed: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key and value as the attention sees them, and the rotated separate head."""
        one = key is query
        query = self._rotate(query, angles, packed)
        if rope is not None:
            rope = self._rotate(rope, angles, packed)
            return query, join_rope_head(key, rope), value, rope
        rotated = query if one else self._rotate(key, angles, packed)
        return query, rotated, rotated if self.scheme.rotates_value else value, None

    def _rotate(self, x: Tensor, angles: Tensor, packed: Any = None, *, inverse: bool = False) -> Tensor:
        return rotate(x, angles, self.config, self.pg_collection.cp, packed, inverse=inverse)

    def _sequence(self, hidden_states: Tensor) -> tuple[int, int]:
        """Length and batch of the output projection's input: sequence parallelism divides the layer's."""
        ranks = self.world_size if self.config.sequence_parallel else 1
        return hidden_states.shape[0] * ranks, hidden_states.shape[1]

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
        ranks, own = self.world_size, self.config.num_attention_heads // self.world_size
        heads, groups = own, self.num_query_groups_per_partition
        replicates = getattr(self.linear_qkv, "replicates_kv", False)
        gathers = self.config.num_query_groups < ranks and not replicates
        if gathers:
            # Transformer Engine's linear with fewer groups than ranks (MQA): a rank's rows are a piece of a
            # group. Gather all rows, keep this rank's group, then this rank's query heads (as Megatron does
            # for three projections).
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed)
            sharing = ranks // self.config.num_query_groups
            index, place = divmod(self.tp_group.rank(), sharing)
            size = mixed.shape[-1] // self.config.num_query_groups
            mixed = mixed[..., index * size : (index + 1) * size]
            heads = sharing * own

        e = self.hidden_size_per_attention_head
        layout = self.variant.group_layout(heads, groups)
        s, b = mixed.shape[:2]
        mixed = mixed.view(s, b, groups, -1)
        parts = torch.split(mixed, [count * e for _, count in layout], dim=-1)
        tensors = {name: part.reshape(s, b, -1, e) for (name, _), part in zip(layout, parts, strict=True)}
        query, key = tensors[self.variant.query], tensors[self.variant.key]
        value = tensors[self.variant.value]
        if gathers:
            query = query[:, :, place * own : (place + 1) * own]
        # A norm belongs to a projected tensor: whatever roles it plays, it is normed once, and unrotated.
        normed = key if self.k_layernorm is None else self.k_layernorm(key)
        if query is key:
            query = normed
        elif self.q_layernorm is not None:
            query = self.q_layernorm(query)
        return query, normed, normed if value is key else value

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
