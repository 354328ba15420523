"""Tiny Hugging Face models for the tests, and a plain implementation of them to compare with.

Shape legend: b batch, s sequence, d hidden size, h heads, g groups, e head size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj.variants import VARIANTS

pytest.importorskip("transformers", minversion="5.8")

from megatron_sharedproj.layers.hf import SharedProjConfig, SharedProjForCausalLM  # noqa: E402
from megatron_sharedproj.ops import extension  # noqa: E402

VOCAB = 61
H = 4
ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}

# The paper's eight: four variants, and the two that may share heads in groups and as one.
EIGHT: dict[str, dict[str, Any]] = {
    **{name: {"attention_variant": name} for name in VARIANTS},
    **{
        f"{name}-{groups}": {"attention_variant": name, "num_key_value_heads": groups}
        for name in ("qkv", "qk_eq_v")
        for groups in (2, 1)
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "rope": {"position_embedding_type": "rope", "rope_parameters": ROPE, "num_key_value_heads": 2},
    "rope_q_eq_k": {
        "attention_variant": "q_eq_k",
        "position_embedding_type": "rope",
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    },
    "swiglu_rmsnorm": {
        "attention_variant": "qk_eq_v",
        "normalization": "RMSNorm",
        "gated_mlp": True,
        "hidden_act": "silu",
    },
    "qk_layernorm": {"qk_layernorm": True, "position_embedding_type": "rope", "rope_parameters": ROPE},
    "no_positions": {"attention_variant": "qk_eq_v", "position_embedding_type": "none"},
    "no_bias_untied": {
        "attention_variant": "q_eq_k_eq_v",
        "use_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "gelu_pytorch_tanh",
    },
}
HALF = {**ROPE, "partial_rotary_factor": 0.5}


def _tied(kv_rotary: str, groups: int, rope: dict[str, Any] = ROPE, **changes: Any) -> dict[str, Any]:
    shape = {"attention_variant": "qk_eq_v", "num_key_value_heads": groups, "position_embedding_type": "rope"}
    return {**shape, "rope_parameters": rope, "kv_rotary": kv_rotary, **changes}


RMS: dict[str, Any] = {"normalization": "RMSNorm", "qk_layernorm": True}
ONE: dict[str, Any] = {"attention_variant": "q_eq_k_eq_v"}
# What rotary positions do to a tied key/value, with groups, norms and biases that it meets.
TIED: dict[str, dict[str, Any]] = {
    "rotate_keys": _tied("rotate_keys", 2, qk_layernorm=True),
    "rotate_keys-half": _tied("rotate_keys", 1, HALF, kv_cache_policy="store_both", **RMS),
    "rotate_keys-one": _tied("rotate_keys", H, **ONE, **RMS),
    "rotate_values": _tied("rotate_values", 2, **RMS),
    "rotate_values-one": _tied("rotate_values", H, **ONE, qk_layernorm=True),
    "partial": _tied("partial", 1, HALF, use_bias=False),
    "partial-one": _tied("partial", H, HALF, **ONE),
    "separate_rope_head": _tied("separate_rope_head", 2, HALF),
    "separate_rope_head-1": _tied("separate_rope_head", 1, {**ROPE, "partial_rotary_factor": 0.25}, **RMS),
}
MODELS = {**EIGHT, **OTHERS, **TIED}

needs_kernel = pytest.mark.skipif(bool(extension.MISSING), reason=extension.MISSING)


def config(name: str = "qk_eq_v", **changes: Any) -> SharedProjConfig:
    """Configuration of a model by its name in MODELS."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 8 * H,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": H,
        "max_position_embeddings": 256,
        # Wide: tokens differ, and the greedy choice is far from a tie.
        "initializer_range": 0.3,
    }
    return SharedProjConfig(**{**shape, **MODELS[name], **changes})


def build(name: str = "qk_eq_v", *, seed: int = 0, **changes: Any) -> Any:
    """A model by its name in MODELS, with random weights, biases and norms, in eval mode."""
    torch.manual_seed(seed)
    model = SharedProjForCausalLM(config(name, **changes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain_logits(p: dict[str, Tensor], c: SharedProjConfig, ids: Tensor) -> Tensor:
    """Tokens [b, s] -> logits [b, s, V] from tensors by their contract names, one head at a time."""
    variant = VARIANTS[c.attention_variant]
    e, groups = c.head_dim, c.num_key_value_heads
    b, s = ids.shape

    def norm(x: Tensor, name: str) -> Tensor:
        if c.normalization == "RMSNorm":
            return p[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + c.norm_epsilon).sqrt()
        x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + c.norm_epsilon).sqrt()
        return p[f"{name}.weight"] * x / scale + p[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        out = x @ p[f"{name}.weight"].T
        return out + p[f"{name}.bias"] if c.use_bias else out

    def rotated(x: Tensor, sign: int = 1) -> Tensor:
        if c.position_embedding_type != "rope":
            return x
        dim = int(e * c.rope_parameters["partial_rotary_factor"])
        out = x.clone()
        for i in range(dim // 2):
            frequency = sign * c.rope_parameters["rope_theta"] ** (-2 * i / dim)
            angle = torch.arange(s, dtype=x.dtype) * frequency
            a, z = x[..., i], x[..., i + dim // 2]
            out[..., i] = a * angle.cos() - z * angle.sin()
            out[..., i + dim // 2] = z * angle.cos() + a * angle.sin()
        return out

    def activation(x: Tensor) -> Tensor:
        if c.hidden_act == "silu":
            return x / (1 + (-x).exp())
        if c.hidden_act == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = p["model.embed_tokens.weight"][ids]
    if c.position_embedding_type == "learned_absolute":
        x = x + p["model.embed_positions.weight"][:s]
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
    for n in range(c.num_hidden_layers):
        layer = f"model.layers.{n}"
        y = norm(x, f"{layer}.input_layernorm")
        made = {name: linear(y, f"{layer}.self_attn.{name}_proj") for name in variant.projections}
        heads = []
        for head in range(H):
            group = head // (H // groups)
            query = made[variant.query].view(b, s, -1, e)[:, :, head]
            key = made[variant.key].view(b, s, -1, e)[:, :, group]
            value = made[variant.value].view(b, s, -1, e)[:, :, group]
            if c.qk_layernorm:
                tied = variant.query == variant.key, variant.key == variant.value
                key = norm(key, f"{layer}.self_attn.k_norm")
                query = key if tied[0] else norm(query, f"{layer}.self_attn.q_norm")
                value = key if tied[1] else value
            if c.kv_rotary == "separate_rope_head":
                dim = int(e * c.rope_parameters["partial_rotary_factor"])
                alone = linear(y, f"{layer}.self_attn.k_rope_proj")
                assert alone.shape[-1] == dim
                key = torch.cat([alone, key[..., dim:]], -1)
            if c.kv_rotary in ("rotate_values", "partial"):
                value = rotated(value)
            scores = rotated(query) @ rotated(key).transpose(1, 2) / math.sqrt(e)
            attended = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value
            heads.append(rotated(attended, -1) if c.kv_rotary in ("rotate_values", "partial") else attended)
        x = x + linear(torch.cat(heads, -1), f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        up = linear(y, f"{layer}.mlp.up_proj")
        gated = activation(linear(y, f"{layer}.mlp.gate_proj")) * up if c.gated_mlp else activation(up)
        x = x + linear(gated, f"{layer}.mlp.down_proj")
    head_weight = p["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    return norm(x, "model.norm") @ head_weight.T
