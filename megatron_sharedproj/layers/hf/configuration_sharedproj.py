"""The Hugging Face configuration of a model whose attention shares projections (K=V).

This file travels with an exported model: transformers and the standard library only, so the variant's
structure is derived from the spelling of its name, and the rotary schemes are stated here again (tests
compare both with megatron_sharedproj.variants).
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

_CHOICES: dict[str, tuple[str, ...]] = {
    "attention_variant": ("qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v"),
    "position_embedding_type": ("learned_absolute", "rope", "none"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "hidden_act": ("gelu", "gelu_pytorch_tanh", "silu"),
    "kv_rotary": ("none", "rotate_keys", "rotate_values", "partial", "separate_rope_head"),
    "kv_cache_policy": ("rotate_at_read", "store_both"),
}
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_AUTO_MAP = {
    "AutoConfig": "configuration_sharedproj.SharedProjConfig",
    "AutoModel": "modeling_sharedproj.SharedProjModel",
    "AutoModelForCausalLM": "modeling_sharedproj.SharedProjForCausalLM",
}


class SharedProjConfig(PreTrainedConfig):
    """Shape of a SharedProj model; the fields are those of config.json.

    Attributes:
        attention_variant: qkv, q_eq_k, qk_eq_v or q_eq_k_eq_v (paper, section 3).
        vocab_size: rows of the embedding, the tokenizer's vocabulary; padded_vocab_size: rows in training.
        num_key_value_heads: groups g (default: as many as heads); head_dim: default hidden size / heads.
        position_embedding_type: learned_absolute, rope or none.
        rope_parameters: rope_type "default", rope_theta, partial_rotary_factor; None without rope.
        kv_rotary: what rotary positions do to a tied key/value x: rotate_keys (key rotated, value x),
            rotate_values (key and value rotated, the output rotated back), partial (the same on a part of the
            head) or separate_rope_head (the rotated part of the key is one more projection's, value x). Left
            out: none without rope, rotate_keys where the value is a tensor of its own.
        kv_cache_policy: how rotate_keys of a tied key/value is cached, the same function: rotate_at_read (one
            tensor, rotated at every step) or store_both (two).
        hidden_act: of the MLP, on the gate where gated_mlp (SwiGLU).
        qk_layernorm: normalise query and key per head, before rotary; a tensor in two roles is normed once.
        use_compiled_kernel: attention through megatron_sharedproj.ops where that is installed and serves the
            input; read at every call.
    Raises:
        ValueError: naming the field, its value and what is accepted.
    """

    model_type = "sharedproj"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # A key that transformers' check of "default" does not know.
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}

    attention_variant: str = "qkv"
    vocab_size: int = 50257
    padded_vocab_size: int | None = None
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    # None: __post_init__ fills them in.
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    position_embedding_type: str = "learned_absolute"
    rope_parameters: dict[str, Any] | None = None
    kv_rotary: str = ""
    kv_cache_policy: str = "rotate_at_read"
    normalization: str = "LayerNorm"
    norm_epsilon: float = 1e-5
    hidden_act: str = "gelu"
    gated_mlp: bool = False
    use_bias: bool = True
    qk_layernorm: bool = False
    tie_word_embeddings: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    use_compiled_kernel: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)
        # save_pretrained of the causal model writes its own entry only; engines load by AutoModel.
        kwargs["auto_map"] = {**_AUTO_MAP, **(kwargs.get("auto_map") or {})}
        super().__post_init__(**kwargs)
        if self.position_embedding_type != "rope":
            self.rope_parameters = None  # transformers fills in a theta
        if not self.kv_rotary:
            # Also what a config.json from before this field means.
            rotated = self.position_embedding_type == "rope" and not self.tied_kv
            self.kv_rotary = "rotate_keys" if rotated else "none"
        self.check()
        self.base_model_tp_plan = {
            **{f"layers.*.self_attn.{name}_proj": "colwise" for name in self.projections},
            "layers.*.self_attn.o_proj": "rowwise",
            "layers.*.mlp.up_proj": "colwise",
            "layers.*.mlp.down_proj": "rowwise",
        }
        if self.gated_mlp:
            self.base_model_tp_plan["layers.*.mlp.gate_proj"] = "colwise"
        if self.qk_layernorm:
            for name in self.norms:
                self.base_model_tp_plan[f"layers.*.self_attn.{name}"] = "replicated_with_grad_allreduce"
        self.base_model_pp_plan = {"embed_tokens": (["input_ids"], ["inputs_embeds"])}
        if self.position_embedding_type == "learned_absolute":
            self.base_model_pp_plan["embed_positions"] = (
                ["inputs_embeds", "position_ids"],
                ["hidden_states"],
            )
        self.base_model_pp_plan["layers"] = (["hidden_states", "attention_mask"], ["hidden_states"])
        self.base_model_pp_plan["norm"] = (["hidden_states"], ["hidden_states"])

    @property
    def tied_qk(self) -> bool:
        """Query and key are one tensor."""
        return self.attention_variant.startswith("q_eq_k")

    @property
    def tied_kv(self) -> bool:
        """Key and value are one tensor, so the cache stores one."""
        return self.attention_variant.endswith("k_eq_v")

    @property
    def roles(self) -> tuple[str, str, str]:
        """Names of the projections that play query, key and value."""
        key = "kv" if self.tied_kv else "k"
        return (key if self.tied_qk else "q", key, "kv" if self.tied_kv else "v")

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projected tensors, in the order of megatron_sharedproj.variants."""
        return tuple(dict.fromkeys(self.roles))

    @property
    def norms(self) -> tuple[str, ...]:
        """Norms of the projected queries and keys: one where those are one tensor."""
        if not self.qk_layernorm:
            return ()
        return ("k_norm",) if self.tied_qk else ("q_norm", "k_norm")

    @property
    def rotates_value(self) -> bool:
        """Key and value are one rotated tensor, and the output is rotated back."""
        return self.kv_rotary in ("rotate_values", "partial")

    @property
    def rope_head(self) -> bool:
        """The rotated part of the key is a projection of its own, which all groups share."""
        return self.kv_rotary == "separate_rope_head"

    @property
    def attends_one_tensor(self) -> bool:
        """The attention sees key and value as one tensor."""
        return self.tied_kv and self.kv_rotary in ("none", "rotate_values", "partial")

    @property
    def rotates_at_read(self) -> bool:
        """The cache holds x, and its keys are rotated at every step."""
        at_read = self.kv_cache_policy == "rotate_at_read"
        return self.tied_kv and self.kv_rotary == "rotate_keys" and at_read

    @property
    def caches_one_tensor(self) -> bool:
        """A layer's cache is one tensor."""
        return self.attends_one_tensor or self.rotates_at_read

    @property
    def rotary_dim(self) -> int:
        """Leading elements of a head that are rotated; 0 without rope."""
        if self.rope_parameters is None:
            return 0
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    def check(self) -> None:
        """Raise ValueError for a field, or fields that do not go together (also called by the model)."""
        for field, accepted in _CHOICES.items():
            value = getattr(self, field)
            if value not in accepted:
                raise ValueError(f"{field}={value!r}: unknown; choose one of {', '.join(accepted)}")
        for field in _POSITIVE:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}={value!r}: must be an integer of at least 1")
        for field in ("attention_dropout", "hidden_dropout"):
            value = getattr(self, field)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{field}={value!r}: must be a probability from 0 to below 1")
        self._check_heads()
        self._check_scheme()
        self._check_rope()

    def _check_heads(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"num_key_value_heads={groups}: must divide num_attention_heads={heads}; "
                f"use one of {divisors}"
            )
        if self.tied_qk and groups != heads:
            raise ValueError(
                f"num_key_value_heads={groups}: attention_variant={self.attention_variant} ties query and "
                f"key, so it must be num_attention_heads={heads}"
            )

    def _check_scheme(self) -> None:
        scheme, variant = self.kv_rotary, self.attention_variant
        if self.position_embedding_type != "rope":
            if scheme != "none":
                raise ValueError(
                    f"kv_rotary={scheme!r}: position_embedding_type={self.position_embedding_type!r} rotates "
                    "nothing; leave it out, or use rope"
                )
        elif not self.tied_kv:
            if scheme != "rotate_keys":
                raise ValueError(
                    f"kv_rotary={scheme!r}: attention_variant={variant} has a value of its own, so that keys "
                    "are rotated as usual; leave it out, or use rotate_keys"
                )
        elif scheme == "none":
            choices = ", ".join(name for name in _CHOICES["kv_rotary"] if name != "none")
            raise ValueError(
                f"position_embedding_type='rope': with attention_variant={variant} key and value are one "
                f"tensor; choose what a rotation does to the value by kv_rotary, one of {choices}; or use "
                "learned_absolute"
            )
        elif self.rope_head and self.tied_qk:
            raise ValueError(
                f"kv_rotary={scheme!r}: attention_variant={variant} has no query of its own to meet the "
                "separate head; use qk_eq_v, or another scheme"
            )
        if self.kv_cache_policy == "store_both" and not (self.tied_kv and scheme == "rotate_keys"):
            raise ValueError(
                "kv_cache_policy='store_both': is for kv_rotary rotate_keys of a tied key/value, and this is "
                f"{scheme} of attention_variant={variant}; leave it out"
            )

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        if self.position_embedding_type != "rope":
            return
        if rope is None or rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters={rope}: rope_type must be 'default'")
        theta = rope.get("rope_theta")
        if not isinstance(theta, (int, float)) or theta <= 0:
            raise ValueError(f"rope_parameters={rope}: rope_theta must be a number above 0")
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rope_parameters={rope}: partial_rotary_factor times head_dim={self.head_dim} must be an "
                f"even number from 2 to {self.head_dim}"
            )
        whole = self.rotary_dim == self.head_dim
        if self.tied_kv and self.kv_rotary == "rotate_values" and not whole:
            raise ValueError(
                f"rope_parameters={rope}: kv_rotary='rotate_values' rotates whole heads; leave "
                "partial_rotary_factor out, or use kv_rotary partial"
            )
        if self.kv_rotary in ("partial", "separate_rope_head") and whole:
            raise ValueError(
                f"rope_parameters={rope}: kv_rotary={self.kv_rotary!r} rotates a part of the head; give a "
                "partial_rotary_factor below 1, such as 0.25 or 0.5"
            )


__all__ = ["SharedProjConfig"]
