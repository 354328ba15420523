"""Models of every kind that converts, small: the eight of the paper, and what else the trainer accepts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from megatron_sharedproj.config import ModelConfig

VOCAB, PADDED, POSITIONS, HEADS = 90, 96, 64, 4

LLAMA: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
PAPER: dict[str, dict[str, Any]] = {
    "qkv": {"attention_variant": "qkv"},
    "gqa": {"attention_variant": "qkv", "num_query_groups": 2},
    "mqa": {"attention_variant": "qkv", "num_query_groups": 1},
    "q_eq_k": {"attention_variant": "q_eq_k"},
    "qk_eq_v": {"attention_variant": "qk_eq_v"},
    "q_gqa": {"attention_variant": "qk_eq_v", "num_query_groups": 2},
    "q_mqa": {"attention_variant": "qk_eq_v", "num_query_groups": 1},
    "q_eq_k_eq_v": {"attention_variant": "q_eq_k_eq_v"},
}
ROTARY: dict[str, dict[str, Any]] = {
    "rope_qkv": {"attention_variant": "qkv", "position_embedding_type": "rope"},
    "rope_q_eq_k": {"attention_variant": "q_eq_k", "position_embedding_type": "rope", "rotary_base": 500},
}
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {"attention_variant": "qkv", "num_query_groups": 2, **LLAMA},
    "llama_qk_norm": {"attention_variant": "qkv", "qk_layernorm": True, **LLAMA},
    "partial_rope": {"attention_variant": "qkv", "position_embedding_type": "rope", "rotary_percent": 0.5},
    "swiglu": {"attention_variant": "qk_eq_v", "num_query_groups": 2, "activation": "swiglu"},
    "no_bias": {"attention_variant": "q_eq_k_eq_v", "add_bias_linear": False, "activation": "gelu"},
    "untied": {"attention_variant": "qk_eq_v", "untie_embeddings_and_output_weights": True},
    "no_positions": {"attention_variant": "qk_eq_v", "position_embedding_type": "none"},
    "wide_heads": {"attention_variant": "q_eq_k", "kv_channels": 24, "normalization": "RMSNorm"},
}
_TIED: dict[str, Any] = {"attention_variant": "qk_eq_v", "position_embedding_type": "rope"}
_RMS: dict[str, Any] = {"normalization": "RMSNorm", "qk_layernorm": True}
# What rotary positions do to a tied key/value (--kv-rotary).
TIED: dict[str, dict[str, Any]] = {
    "rotate_keys": {**_TIED, "kv_rotary": "rotate_keys", "num_query_groups": 2, "qk_layernorm": True},
    "rotate_keys_half": {**_TIED, "kv_rotary": "rotate_keys", "num_query_groups": 1, "rotary_percent": 0.5},
    "rotate_values": {**_TIED, "kv_rotary": "rotate_values", "num_query_groups": 1, **_RMS},
    "rotate_values_one": {
        **_TIED,
        "attention_variant": "q_eq_k_eq_v",
        "kv_rotary": "rotate_values",
        "qk_layernorm": True,
    },
    "partial": {**_TIED, "kv_rotary": "partial", "num_query_groups": 2, "rotary_percent": 0.5},
    "separate_rope_head": {**_TIED, "kv_rotary": "separate_rope_head", "rotary_percent": 0.5},
    "separate_rope_head_mqa": {
        **_TIED,
        "kv_rotary": "separate_rope_head",
        "num_query_groups": 1,
        "rotary_percent": 0.25,
        "add_bias_linear": False,
        **_RMS,
    },
    "tied_llama": {**LLAMA, **_TIED, "kv_rotary": "rotate_keys", "num_query_groups": 2},
}
ALL = {**PAPER, **ROTARY, **OTHERS, **TIED}

# Saved as checkpoints (conftest.py), with a tokenizer of 300 ids and 12 rows of padding.
CONVERTED = [*PAPER, *ROTARY, *TIED, "llama", "llama_qk_norm", "untied"]
VOCABULARY, ROWS, LONG = 300, 312, 256
SAMPLE = Path(__file__).parents[2] / "megatron_sharedproj" / "conversion" / "verification_text.txt"


def config(name: str, **changes: Any) -> ModelConfig:
    """The small model of that name: 2 layers, hidden 64, 4 heads of 16."""
    values = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": HEADS,
        "padded_vocab_size": PADDED,
        "max_position_embeddings": POSITIONS,
        "ffn_hidden_size": 96,
    }
    return ModelConfig(**{**values, **ALL[name], **changes})


def build(config: ModelConfig, seed: int = 1) -> Any:
    """A GPTModel with random biases and norms too, spread enough that two tokens differ; logits gathered."""
    from megatron_sharedproj.model import build_model

    model = build_model(config, parallel_output=False).eval()
    scatter(model, seed)
    return model


def scatter(model: Any, seed: int = 1) -> None:
    """Random values for every parameter, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.15 * noise)


def tokens(batch: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
    """int64 [batch, length] below the vocabulary."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def load(folder: Path) -> Any:
    """A checkpoint as the tools load it, logits gathered."""
    from megatron_sharedproj.inference.loading import add_loading_args, load_model

    parser = argparse.ArgumentParser()
    add_loading_args(parser, parallel=False)
    return load_model(parser.parse_args(["--load", str(folder)]), parallel_output=False)
