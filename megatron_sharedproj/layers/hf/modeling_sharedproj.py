"""A GPT whose attention shares projections (K=V), for transformers.

This file travels with an exported model: torch and transformers only. Where megatron_sharedproj is installed
with its compiled extension, plain causal attention runs on its kernels, which read a tied tensor once.
Paper: "Do Transformers Need Three Projections?" (arXiv 2606.04032), section 3; block as in GPT-2.

Shape legend: b batch, s new tokens, t tokens seen (cached and new), d hidden size, h heads, g groups
(key/value heads), e head size, r half of the rotated elements of a head, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_sharedproj import SharedProjCache
from .configuration_sharedproj import SharedProjConfig

try:
    from megatron_sharedproj.ops import attention as attention_ops
    from megatron_sharedproj.ops import decode as decode_ops
    from megatron_sharedproj.ops import paths as paths_ops
except ImportError:
    attention_ops = decode_ops = paths_ops = None  # type: ignore[assignment]


# transformers 5.24 calls it cache, what was past_key_values before.
_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class PlainCausal(NamedTuple):
    """An attention without a mask: token i of the s new ones sees all t - s + i before it.

    Attributes:
        visible: leading tokens of the key buffer that exist; None: all.
        lengths: the same as int32 [b], for a compiled step over a static cache; None: see visible.
    """

    visible: int | None = None
    lengths: Tensor | None = None


class Rotary(NamedTuple):
    """Cosine and sine of positions: of the new tokens [b, s, 1, r], and of all tokens [b, t, 1, r] of a cache
    whose keys are rotated when they are read."""

    own: tuple[Tensor, Tensor]
    cached: tuple[Tensor, Tensor] | None = None


def _norm(config: SharedProjConfig, size: int) -> nn.Module:
    if config.normalization == "RMSNorm":
        return nn.RMSNorm(size, eps=config.norm_epsilon)
    return nn.LayerNorm(size, eps=config.norm_epsilon)


def rotary_angles(config: SharedProjConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [b, s, 1, r], of the angles of positions [b, s]."""
    dim = config.rotary_dim
    assert config.rope_parameters is not None
    exponents = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim
    frequencies = 1.0 / (config.rope_parameters["rope_theta"] ** exponents)
    angles = position_ids[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 r elements of each head of x [b, s, heads, e], half-split; cos, sin [b, s, 1, r]."""
    half = cos.shape[-1]
    compute = torch.promote_types(x.dtype, torch.float32)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    a, b = first.to(compute), second.to(compute)
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    return torch.cat([rotated, rest], dim=-1)


def join_rope_head(tied: Tensor, head: Tensor) -> Tensor:
    """The key of kv_rotary separate_rope_head: [..., t, e] begins with the head [..., t, 2 r]."""
    rotated = head.shape[-1]
    return torch.cat([head.expand(*tied.shape[:-1], rotated), tied[..., rotated:]], dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention with an additive mask.

    Args:
        query: [b, h, s, e]; key, value: [b, g, t, e], one object where they are tied.
    Returns:
        [b, s, h, e] and the weights [b, h, s, t].
    """
    heads_per_group = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(heads_per_group, dim=1) if heads_per_group > 1 else key
    if value is key:
        values = keys
    else:
        values = value.repeat_interleave(heads_per_group, dim=1) if heads_per_group > 1 else value
    scores = (query @ keys.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    compute = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=compute).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ values).transpose(1, 2).contiguous(), weights


def kernel_attention(query: Tensor, key: Tensor, value: Tensor, plain: PlainCausal, scaling: float) -> Tensor:
    """The same through megatron_sharedproj.ops: [b, h, s, e], [b, g, t, e] twice -> [b, s, h, e]."""
    tied = value is key
    few = query.shape[2] <= paths_ops.DECODE_QUERIES and not torch.is_grad_enabled()
    if plain.lengths is not None or few:
        keys, values = key.transpose(1, 2)[:, : plain.visible], value.transpose(1, 2)[:, : plain.visible]
        out, _ = decode_ops.decode(
            query.transpose(1, 2), keys, None if tied else values, scale=scaling, seqlens_k=plain.lengths
        )
        return out
    keys = key.permute(2, 0, 1, 3)[: plain.visible]
    values = keys if tied else value.permute(2, 0, 1, 3)[: plain.visible]
    out = attention_ops.attention(query.permute(2, 0, 1, 3), keys, values, causal=True, scale=scaling)
    return out.transpose(0, 1)


class SharedProjAttention(nn.Module):
    """Attention over the projections that the variant has; a tensor in two roles is one tensor."""

    def __init__(self, config: SharedProjConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        for name in config.projections:
            heads = config.num_attention_heads if name == config.roles[0] else config.num_key_value_heads
            linear = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.use_bias)
            self.add_module(f"{name}_proj", linear)
        self.o_proj = nn.Linear(
            config.num_attention_heads * self.head_dim, config.hidden_size, bias=config.use_bias
        )
        if config.rope_head:
            self.k_rope_proj = nn.Linear(config.hidden_size, config.rotary_dim, bias=config.use_bias)
        for name in config.norms:
            self.add_module(name, _norm(config, self.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: Rotary | None = None,
        plain_causal: PlainCausal | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[b, s, d] -> [b, s, d], and the weights where the implementation gives them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projected = {
            name: getattr(self, f"{name}_proj")(hidden_states).view(shape) for name in self.config.projections
        }
        query_name, key_name, value_name = self.config.roles
        for norm in self.config.norms:
            name = query_name if norm == "q_norm" else key_name
            projected[name] = getattr(self, norm)(projected[name])
        query, key, value = projected[query_name], projected[key_name], projected[value_name]
        rope = position_embeddings
        read_at = None if rope is None or past_key_values is None else rope.cached
        if rope is not None:
            one = key is query
            query = rotate(query, *rope.own)
            if not self.config.rope_head and read_at is None:
                key = query if one else rotate(key, *rope.own)
                value = key if self.config.rotates_value else value
        one = value is key
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = key if one else value.transpose(1, 2)
        if rope is not None and self.config.rope_head:
            head = rotate(self.k_rope_proj(hidden_states).unsqueeze(-2), *rope.own).transpose(1, 2)
            key, value = self._with_rope_head(key, head, past_key_values)
        elif past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            if read_at is not None:
                key = rotate(key.transpose(1, 2), *read_at).transpose(1, 2)
        weights: Tensor | None = None
        if plain_causal is not None:
            output = kernel_attention(query, key, value, plain_causal, self.scaling)
        else:
            interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            output, weights = interface(
                self,
                query,
                key,
                value,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        if rope is not None and self.config.rotates_value:
            cos, sin = rope.own
            output = rotate(output.reshape(shape), cos, -sin)
        return self.o_proj(output.reshape(*shape[:-2], -1)), weights

    def _with_rope_head(self, tied: Tensor, head: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Key and value [b, g, t, e] of a separate rotary head: a cache of ours holds the head as it is.

        Args:
            tied: [b, g, s, e]; head: [b, 1, s, 2 r], rotated.
        """
        if cache is not None and getattr(cache, "layout", "") == "rope_head":
            tied, head = cache.update(tied, head, self.layer_idx)
            return join_rope_head(tied, head), tied
        key = join_rope_head(tied, head)
        return (key, tied) if cache is None else cache.update(key, tied, self.layer_idx)


class SharedProjMLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) where gated (SwiGLU)."""

    def __init__(self, config: SharedProjConfig) -> None:
        super().__init__()
        self.gated = config.gated_mlp
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up if self.gated else self.act_fn(up))


class SharedProjDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: SharedProjConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = _norm(config, config.hidden_size)
        self.self_attn = SharedProjAttention(config, layer_idx)
        self.post_attention_layernorm = _norm(config, config.hidden_size)
        self.mlp = SharedProjMLP(config)

    def _dropout(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, p=self.hidden_dropout, training=self.training)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[b, s, d] -> [b, s, d]; the arguments of SharedProjAttention by name."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self._dropout(attended)
        transformed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self._dropout(transformed)


class LearnedPositions(nn.Embedding):
    """Adds the row of each position; an engine that drops it on a later pipeline rank passes x through."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        return hidden_states + super().forward(position_ids)


class SharedProjPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers needs to know of the model."""

    config_class = SharedProjConfig
    config: SharedProjConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SharedProjDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SharedProjDecoderLayer, "attentions": SharedProjAttention}


class SharedProjModel(SharedProjPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: SharedProjConfig) -> None:
        config.check()  # a field may have been set since it was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned_absolute":
            self.embed_positions = LearnedPositions(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            SharedProjDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = _norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids [b, s] or embeddings [b, s, d] -> last_hidden_state [b, s, d] and the cache.

        Args:
            attention_mask: [b, t], 0 for padding, or prepared [b, 1, s, t].
            position_ids: [b, s]; counted from the cache, and past the padding, if not given.
            past_key_values, cache: any cache of transformers, under its old or new name; use_cache without
                one makes a SharedProjCache.
        Raises:
            ValueError: for positions beyond max_position_embeddings with learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = SharedProjCache(self.config)
        plain_causal = self.plain_causal(inputs_embeds, attention_mask, position_ids, cache)
        if plain_causal is None:
            attention_mask_ = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{_CACHE: cache},
            )
        else:
            attention_mask_ = None
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask, cache)
        hidden_states = inputs_embeds
        angles = None
        if self.config.position_embedding_type == "learned_absolute":
            self._check_positions(position_ids, cache)
            hidden_states = self.embed_positions(hidden_states, position_ids)
        elif self.config.position_embedding_type == "rope":
            cached = None
            if isinstance(cache, SharedProjCache) and cache.layout == "at_read":
                positions = cache.append_positions(position_ids, inputs_embeds.shape[0])
                cached = rotary_angles(self.config, positions)
            angles = Rotary(rotary_angles(self.config, position_ids), cached)
        hidden_states = nn.functional.dropout(
            hidden_states, p=self.config.hidden_dropout, training=self.training
        )
        # A checkpointed layer runs twice: as in transformers, it has no cache.
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask_,
                position_ids=position_ids,
                past_key_values=None if checkpointed else cache,
                use_cache=use_cache,
                position_embeddings=angles,
                plain_causal=plain_causal,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{_CACHE: cache})

    def plain_causal(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> PlainCausal | None:
        """How the compiled kernels serve this call; None where a mask or another implementation must.

        Args:
            inputs: [b, s, anything], of the model's device and dtype; the rest as in forward.
        """
        config = self.config
        if paths_ops is None or not config.use_compiled_kernel or config._attn_implementation != "sdpa":
            return None
        if self.training and config.attention_dropout > 0.0 or 0 in inputs.shape[:2]:
            return None
        if cache is not None and not isinstance(cache, SharedProjCache):
            return None
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if tracing and not torch.compiler.is_dynamo_compiling():
            return None  # an export: for any length, and for machines without these ops
        if attention_mask is not None:
            if attention_mask.dim() != 2 or tracing or not bool(attention_mask.all()):
                return None
        elif cache is None and position_ids is not None and position_ids.shape[-1] > 1:
            # Positions that start again are sequences packed in one row.
            if tracing or not bool((position_ids.diff(dim=-1) == 1).all()):
                return None
        b, s = inputs.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        static = cache is not None and cache.is_compileable
        if not self._kernel_serves(inputs, s if cache is None or static else s + past):
            return None
        if not static:
            return PlainCausal()
        if s > 1:
            return None if tracing else PlainCausal(visible=int(past) + s)
        if torch.is_grad_enabled():
            return None
        total = torch.as_tensor(past, device=inputs.device).reshape(1) + 1
        return PlainCausal(lengths=total.to(torch.int32).repeat(b))

    def _kernel_serves(self, inputs: Tensor, keys: int) -> bool:
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        request = paths_ops.Request(
            device=device,
            dtype=dtype,
            head_size=self.config.head_dim,
            tied=self.config.attends_one_tensor,
            queries=inputs.shape[1],
            keys=keys,
            training=torch.is_grad_enabled(),
            capability=torch.cuda.get_device_capability(inputs.device) if device == "cuda" else None,
        )
        return paths_ops.choose(request).name == "extension"

    @staticmethod
    def _positions(inputs: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """[1 or b, s]: after the cached tokens; past left padding where the mask shows it."""
        s = inputs.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None and attention_mask.dim() == 2 and isinstance(past, int):
            if attention_mask.shape[1] == past + s:
                return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        return (torch.arange(s, device=inputs.device) + past)[None]

    def _check_positions(self, position_ids: Tensor, cache: Cache | None) -> None:
        limit = self.config.max_position_embeddings
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not position_ids.numel():
            return
        if position_ids.is_cuda:
            # Reading them would wait for the GPU: only where the length leaves a doubt.
            past = 0 if cache is None else cache.get_seq_length()
            if isinstance(past, Tensor) or torch.cuda.is_current_stream_capturing():
                return
            if past + position_ids.shape[-1] <= limit:
                return
        last = int(position_ids.max())
        if last >= limit:
            raise ValueError(
                f"position {last}: max_position_embeddings={limit} and positions are learned, so at most "
                f"{limit} tokens (prompt and continuation) fit; shorten the prompt or lower max_new_tokens"
            )


class SharedProjForCausalLM(SharedProjPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model with its language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: SharedProjConfig) -> None:
        super().__init__(config)
        self.model = SharedProjModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Arguments of SharedProjModel.forward -> logits [b, s, V], the cache, and the loss if asked for.

        Args:
            labels: [b, s], shifted here; -100 is not scored.
            logits_to_keep: the last n positions (0: all), or the positions' indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{_CACHE: outputs[_CACHE] if _CACHE in outputs else None},
        )

    def create_masks_for_generate(
        self,
        config: SharedProjConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """generate's mask for a static cache: none where the kernels need none."""
        cache = past_key_values if cache is None else cache
        if self.model.plain_causal(inputs_embeds, attention_mask, position_ids, cache) is not None:
            return None
        return create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{_CACHE: cache},
        )

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, **kwargs: Any
    ) -> SharedProjCache:
        # As transformers does: never shorter than before, so that a compiled step is compiled once.
        length = max(max_cache_len, getattr(self, "_previous_max_cache_length", -1))
        self._previous_max_cache_length = length
        cache = SharedProjCache(
            self.config, max_cache_len=length, offloading="offloaded" in cache_implementation
        )
        if kwargs.get("prefill_chunk_size") is not None and (shape := self._get_static_cache_init_shape()):
            heads, head_dim = shape
            cache.early_initialization(batch_size, heads, head_dim, self.dtype, self.device)
        return cache

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get(_CACHE)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(_CACHE)
        if given is None and made is not None and type(made) is DynamicCache:
            model_kwargs[_CACHE] = SharedProjCache(self.config, offloading=made.offloading)


__all__ = ["SharedProjForCausalLM", "SharedProjModel", "SharedProjPreTrainedModel"]
