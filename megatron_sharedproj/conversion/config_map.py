"""ModelConfig <-> the config.json of the Hugging Face form."""

from __future__ import annotations

import math
from typing import Any, get_type_hints

from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.variants import CACHE_POLICIES

MODEL_TYPE = "sharedproj"

# ModelConfig's field -> config.json's, where the value is the same.
_SAME = {
    "attention_variant": "attention_variant",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "position_embedding_type": "position_embedding_type",
    "normalization": "normalization",
    "layernorm_epsilon": "norm_epsilon",
    "add_bias_linear": "use_bias",
    "qk_layernorm": "qk_layernorm",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
    "init_method_std": "initializer_range",
}
# activation -> (hidden_act, gated_mlp)
_ACTIVATIONS = {"gelu": ("gelu", False), "gelu_tanh": ("gelu_pytorch_tanh", False), "swiglu": ("silu", True)}


def hugging_face_config(
    config: ModelConfig,
    *,
    vocab_size: int,
    eos_token_id: int | None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    dtype: str = "float32",
    kv_cache_policy: str = CACHE_POLICIES[0],
) -> dict[str, Any]:
    """The config.json of an exported model.

    Args:
        vocab_size: rows of the exported embedding; Megatron's are kept as ``padded_vocab_size``.
        dtype: name of the weights' torch dtype.
        kv_cache_policy: one of variants.CACHE_POLICIES, for a model whose rotary scheme has the choice.
    """
    values: dict[str, Any] = {
        "architectures": ["SharedProjForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": vocab_size,
        "padded_vocab_size": config.padded_vocab_size,
    }
    values.update({theirs: getattr(config, ours) for ours, theirs in _SAME.items()})
    values["hidden_act"], values["gated_mlp"] = _ACTIVATIONS[config.activation]
    values["tie_word_embeddings"] = not config.untie_embeddings_and_output_weights
    values["kv_rotary"], values["kv_cache_policy"] = config.kv_rotary, kv_cache_policy
    values["rope_parameters"] = None
    if config.position_embedding_type == "rope":
        values["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": float(config.rotary_base),
            "partial_rotary_factor": config.rotary_percent,
        }
    values.update(
        eos_token_id=eos_token_id, bos_token_id=bos_token_id, pad_token_id=pad_token_id, dtype=dtype
    )
    return values


def model_config(values: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json.

    ``scaled_init`` is not in it: it says how weights were drawn, not what they compute.

    Raises:
        ValueError: for another kind of model, a missing field, or values that ModelConfig refuses.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type {values.get('model_type')!r}: expected {MODEL_TYPE!r}")
    needed = {*_SAME.values(), "vocab_size", "hidden_act", "gated_mlp", "tie_word_embeddings"}
    missing = sorted(needed - set(values))
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}")
    _check_kinds(values)
    activation = (values["hidden_act"], values["gated_mlp"])
    activations = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    if activation not in activations:
        raise ValueError(
            f"hidden_act {activation[0]!r} with gated_mlp {activation[1]}: known are "
            + ", ".join(f"{name} ({'gated' if gated else 'plain'})" for name, gated in activations)
        )
    fields: dict[str, Any] = {ours: values[theirs] for ours, theirs in _SAME.items()}
    fields["kv_rotary"] = values.get("kv_rotary") or ""  # older exports have none
    if fields["position_embedding_type"] == "rope":
        fields.update(_rotary(values.get("rope_parameters") or {}))
    return ModelConfig(
        padded_vocab_size=values.get("padded_vocab_size") or values["vocab_size"],
        activation=activations[activation],
        untie_embeddings_and_output_weights=not values["tie_word_embeddings"],
        **fields,
    )


def _check_kinds(values: dict[str, Any]) -> None:
    """JSON holds anything: a size that is text or not whole would come out much later, as something else."""
    kinds: dict[str, type] = {theirs: _FIELD_KINDS[ours] for ours, theirs in _SAME.items()}
    kinds |= {"vocab_size": int, "hidden_act": str, "gated_mlp": bool, "tie_word_embeddings": bool}
    kinds |= {name: kind for name, kind in _OPTIONAL.items() if values.get(name) is not None}
    for name, kind in kinds.items():
        value = values[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name} {value!r}: expected {_KINDS[kind]}")
    vocabulary = values["vocab_size"]
    rows = values.get("padded_vocab_size") or vocabulary
    # Where the folder has no padding rows they are made up: this many and no more.
    if not 0 < vocabulary <= rows <= 2 * vocabulary + _MAX_PADDING:
        raise ValueError(f"vocab_size {vocabulary} and padded_vocab_size {rows} do not fit each other")


_FIELD_KINDS: dict[str, type] = get_type_hints(ModelConfig)
_OPTIONAL: dict[str, type] = {"padded_vocab_size": int, "rope_parameters": dict, "kv_rotary": str}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "an object"}
_MAX_PADDING = 65536


def _rotary(rope: dict[str, Any]) -> dict[str, Any]:
    theta, share = rope.get("rope_theta", 10000.0), rope.get("partial_rotary_factor", 1.0)
    numbers = all(type(number) in (int, float) and math.isfinite(number) for number in (theta, share))
    if rope.get("rope_type", "default") != "default" or not numbers or theta < 1 or theta != int(theta):
        raise ValueError(f"rope_parameters {rope}: supported is rope_type default with a whole rope_theta")
    return {"rotary_base": int(theta), "rotary_percent": share}
