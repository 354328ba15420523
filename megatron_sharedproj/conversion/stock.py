"""A model as a stock transformers architecture, for engines that know no K=V.

A tied tensor is written once for each role that it plays, so the logits are the same and the cache saves
nothing. With rotary positions that is so for `--kv-rotary rotate_keys` alone: a stock model rotates no value.
The rules of a format are data: what it asks of a ModelConfig, and why.

Shape legend: V vocabulary, P positions, d hidden size, h heads, g groups, e head size, f ffn size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig

SHAREDPROJ = "sharedproj"
GGUF = "gguf"

# ModelConfig.activation as transformers.activations.ACT2FN spells it.
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "swiglu": "silu"}


class StockModel(NamedTuple):
    """What :func:`to_gpt2` and :func:`to_llama` return.

    Attributes:
        config: config.json of the stock class; tensors: its state, none sharing memory with another.
        note: one line on what the format's cache costs per token, against the model's own.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    note: str


@dataclass(frozen=True)
class _Rule:
    """One thing that a format asks of a model: `holds` for the values of `fields`, else `reason`."""

    fields: tuple[str, ...]
    holds: Callable[[ModelConfig], bool]
    reason: str


_RULES: dict[str, tuple[_Rule, ...]] = {
    "gpt2": (
        _Rule(
            ("position_embedding_type",),
            lambda c: c.position_embedding_type == "learned_absolute",
            "GPT2LMHeadModel has learned positions",
        ),
        _Rule(
            ("normalization",), lambda c: c.normalization == "LayerNorm", "GPT2LMHeadModel has LayerNorm only"
        ),
        _Rule(("activation",), lambda c: c.activation != "swiglu", "GPT2LMHeadModel has no gated MLP"),
        _Rule(("qk_layernorm",), lambda c: not c.qk_layernorm, "GPT2LMHeadModel does not normalise queries"),
        _Rule(
            ("hidden_size", "num_attention_heads", "kv_channels"),
            lambda c: c.hidden_size == c.num_attention_heads * c.kv_channels,
            "GPT2LMHeadModel's heads make up the hidden size",
        ),
    ),
    "llama": (
        _Rule(
            ("position_embedding_type",),
            lambda c: c.position_embedding_type == "rope",
            "LlamaForCausalLM has rotary positions",
        ),
        _Rule(
            ("attention_variant", "kv_rotary"),
            lambda c: not c.variant.tied_kv or c.kv_rotary == "rotate_keys",
            "LlamaForCausalLM rotates keys and no values: of a tied key/value it computes --kv-rotary "
            "rotate_keys alone",
        ),
        _Rule(("rotary_percent",), lambda c: c.rotary_percent == 1.0, "LlamaForCausalLM rotates whole heads"),
        _Rule(
            ("normalization",), lambda c: c.normalization == "RMSNorm", "LlamaForCausalLM has RMSNorm only"
        ),
        _Rule(("activation",), lambda c: c.activation == "swiglu", "LlamaForCausalLM's MLP is gated"),
        _Rule(
            ("qk_layernorm",),
            lambda c: not c.qk_layernorm,
            "LlamaForCausalLM does not normalise queries (Qwen3ForCausalLM does; no such format here)",
        ),
        _Rule(
            ("hidden_size", "num_attention_heads"),
            lambda c: c.hidden_size % c.num_attention_heads == 0,
            "LlamaConfig wants the hidden size to be a multiple of the heads",
        ),
    ),
}

STOCK_FORMATS = tuple(_RULES)


def refusal(config: ModelConfig, name: str) -> str | None:
    """Why format ``name`` cannot hold the model (field, value, reason), or None where it can.

    The names are ``sharedproj`` (takes every model), ``gpt2``, ``llama`` and ``gguf`` (takes what either
    of those two takes).
    Raises:
        ValueError: for a name that is none of these.
    """
    if name == SHAREDPROJ:
        return None
    if name == GGUF:
        reasons = [refusal(config, stock) for stock in STOCK_FORMATS]
        return None if None in reasons else f"llama.cpp has no such model: {'; '.join(map(str, reasons))}"
    if name not in _RULES:
        raise ValueError(f"--format {name}: unknown; choose one of {', '.join((SHAREDPROJ, *_RULES, GGUF))}")
    for rule in _RULES[name]:
        if not rule.holds(config):
            values = ", ".join(f"{field} {getattr(config, field)}" for field in rule.fields)
            return f"{values}: {rule.reason}"
    return None


def formats(config: ModelConfig) -> dict[str, str | None]:
    """Each export format, with None where the model fits it and else the reason why it does not."""
    return {name: refusal(config, name) for name in (SHAREDPROJ, *STOCK_FORMATS, GGUF)}


def check_format(config: ModelConfig, name: str) -> None:
    """Raise ValueError in one line, naming what would work, if format ``name`` cannot hold the model."""
    reason = refusal(config, name)
    if reason is not None:
        fitting = [f"--format {other}" for other, why in formats(config).items() if why is None]
        raise ValueError(f"--format {name}: {reason}; use {' or '.join(fitting)}")


def stock_format(config: ModelConfig, asked_for: str = GGUF) -> str:
    """The stock architecture, "gpt2" or "llama", that the model fits.

    Raises:
        ValueError: where it fits neither; the message names ``asked_for`` as the format.
    """
    check_format(config, asked_for)
    return next(name for name in STOCK_FORMATS if refusal(config, name) is None)


def cache_note(config: ModelConfig, name: str, *, stored_groups: int | None = None) -> str:
    """One line: key/value cache bytes per token (2-byte elements) of a stock format and of the model itself.

    Args:
        stored_groups: key/value heads in the file; by default those that the format has.
    """
    heads = config.num_attention_heads
    groups = stored_groups or (heads if name == "gpt2" else config.num_query_groups)
    written = config.replace(attention_variant="qkv", num_query_groups=groups)
    stock, own = formulas.kv_cache_bytes_per_token(written), formulas.kv_cache_bytes_per_token(config)
    if stock == own:
        return f"--format {name}: cache {stock} bytes per token in 16 bits, the same as --format {SHAREDPROJ}"
    saving = "no saving from K=V: " if config.variant.tied_kv else ""
    return (
        f"--format {name}: {saving}an engine's cache holds key and value of {groups} head(s), {stock} bytes "
        f"per token in 16 bits; --format {SHAREDPROJ} in transformers holds {own}"
    )


def to_gpt2(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    repeat_groups: bool = True,
) -> StockModel:
    """GPT2LMHeadModel: config.json and tensors (transformers.models.gpt2).

    Its Conv1D weights are [in, out]; c_attn is [d, 3 d], queries then keys then values, head-major. It knows
    no groups, so a key/value head is repeated for each query head that reads it.

    Args:
        config: shape of the model.
        tensors: the model under the sharedproj export's names, linears [out, in]; embedding [V, d].
        bos_token_id, eos_token_id, pad_token_id: the tokenizer's, or None.
        repeat_groups: False leaves g key/value heads in c_attn, [d, (h + 2 g) e], for llama.cpp, whose gpt2
            graph takes them; transformers' does not.
    Raises:
        ValueError: where GPT2LMHeadModel is not this model; the message says what would work.
    """
    check_format(config, "gpt2")
    variant, e = config.variant, config.kv_channels
    repeats = config.num_attention_heads // config.num_query_groups if repeat_groups else 1
    d, f = config.hidden_size, config.ffn_hidden_size
    embedding = tensors["model.embed_tokens.weight"]

    def bias(name: str, rows: int) -> Tensor:
        return tensors[name] if config.add_bias_linear else embedding.new_zeros(rows)

    def projected(layer: int, role: str, kind: str) -> Tensor:
        """Rows of the tensor that plays a role, [heads * e, d] or [heads * e]."""
        name = getattr(variant, role)
        groups = config.num_attention_heads if role == "query" else config.num_query_groups
        source = f"model.layers.{layer}.self_attn.{name}_proj.{kind}"
        rows = tensors[source] if kind == "weight" else bias(source, groups * e)
        if role == "query" or repeats == 1:
            return rows
        return rows.reshape(groups, e, -1).repeat_interleave(repeats, 0).reshape(-1, *rows.shape[1:])

    out: dict[str, Tensor] = {
        "transformer.wte.weight": embedding,
        "transformer.wpe.weight": tensors["model.embed_positions.weight"],
    }
    for layer in range(config.num_layers):
        ours, theirs = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            roles = [projected(layer, role, kind) for role in ("query", "key", "value")]
            out[f"{theirs}attn.c_attn.{kind}"] = torch.cat(roles)
            out[f"{theirs}ln_1.{kind}"] = tensors[f"{ours}input_layernorm.{kind}"]
            out[f"{theirs}ln_2.{kind}"] = tensors[f"{ours}post_attention_layernorm.{kind}"]
        for their_name, our_name, rows in (
            ("attn.c_proj", "self_attn.o_proj", d),
            ("mlp.c_fc", "mlp.up_proj", f),
            ("mlp.c_proj", "mlp.down_proj", d),
        ):
            out[f"{theirs}{their_name}.weight"] = tensors[f"{ours}{our_name}.weight"]
            out[f"{theirs}{their_name}.bias"] = bias(f"{ours}{our_name}.bias", rows)
    for name in [name for name in out if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))]:
        out[name] = out[name].t()
    for kind in ("weight", "bias"):
        out[f"transformer.ln_f.{kind}"] = tensors[f"model.norm.{kind}"]
    if config.untie_embeddings_and_output_weights:
        out["lm_head.weight"] = tensors["lm_head.weight"]
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": embedding.shape[0],
        "n_positions": config.max_position_embeddings,
        "n_ctx": config.max_position_embeddings,
        "n_embd": d,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": f,
        "activation_function": _ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.layernorm_epsilon,
        "attn_pdrop": config.attention_dropout,
        "embd_pdrop": config.hidden_dropout,
        "resid_pdrop": config.hidden_dropout,
        **_common(config, embedding, bos_token_id, eos_token_id, pad_token_id),
    }
    stored = None if repeat_groups else config.num_query_groups
    return StockModel(settings, _unshared(out), cache_note(config, "gpt2", stored_groups=stored))


def to_llama(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> StockModel:
    """LlamaForCausalLM: config.json and tensors (transformers.models.llama).

    The names are the sharedproj export's but for the projections, which a tied tensor fills once per role.
    Both rotate half-split pairs, so no weight is permuted.

    Args, Raises: as :func:`to_gpt2`, for LlamaForCausalLM.
    """
    check_format(config, "llama")
    embedding = tensors["model.embed_tokens.weight"]
    own = {f".self_attn.{name}_proj." for name in config.variant.projections}
    out = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in own)}
    kinds = ("weight", "bias") if config.add_bias_linear else ("weight",)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.self_attn."
        for role, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            for kind in kinds:
                source = f"{prefix}{getattr(config.variant, role)}_proj.{kind}"
                out[f"{prefix}{letter}_proj.{kind}"] = tensors[source]
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": _ACTIVATIONS[config.activation],
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rotary_base)},
        "attention_bias": config.add_bias_linear,
        "mlp_bias": config.add_bias_linear,
        "attention_dropout": config.attention_dropout,
        **_common(config, embedding, bos_token_id, eos_token_id, pad_token_id),
    }
    return StockModel(settings, _unshared(out), cache_note(config, "llama"))


def _common(
    config: ModelConfig, embedding: Tensor, bos: int | None, eos: int | None, pad: int | None
) -> dict[str, Any]:
    # Null, not left out: both classes have ids of their own tokenizers as defaults.
    return {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "initializer_range": config.init_method_std,
        "use_cache": True,
        "dtype": str(embedding.dtype).removeprefix("torch."),
    }


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        out[name] = tensor
    return out
