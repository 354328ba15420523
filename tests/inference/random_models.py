"""Small random models for the tests of generation.

Shape legend: s sequence, b batch, V padded vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sharedproj.config import ModelConfig, RunConfig
from megatron_sharedproj.data.tokenizers import build_tokenizer

VOCAB, PADDED, POSITIONS, HEADS = 21, 24, 16, 4
CASES = [
    *(("qkv", groups) for groups in (4, 2, 1)),
    ("q_eq_k", 4),
    *(("qk_eq_v", groups) for groups in (4, 2, 1)),
    ("q_eq_k_eq_v", 4),
]
TIED = {"qk_eq_v", "q_eq_k_eq_v"}
ROPE: dict[str, Any] = {"position_embedding_type": "rope"}
HALF: dict[str, Any] = {**ROPE, "rotary_percent": 0.5}
RMS: dict[str, Any] = {"qk_layernorm": True, "normalization": "RMSNorm", "add_bias_linear": False}
# Every --kv-rotary with the variants, groups, norms and biases that it meets.
ROTARY: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qkv rope": ("qkv", 4, ROPE),
    "qkv-2 half rope": ("qkv", 2, {**HALF, "qk_layernorm": True}),
    "q_eq_k rope": ("q_eq_k", 4, {**ROPE, "qk_layernorm": True}),
    "rotate_keys": ("qk_eq_v", 4, {**ROPE, "kv_rotary": "rotate_keys"}),
    "rotate_keys-1 half": ("qk_eq_v", 1, {**HALF, "kv_rotary": "rotate_keys", "qk_layernorm": True}),
    "rotate_keys q=k=v": ("q_eq_k_eq_v", 4, {**ROPE, "kv_rotary": "rotate_keys", **RMS}),
    "rotate_values-2": ("qk_eq_v", 2, {**ROPE, "kv_rotary": "rotate_values", **RMS}),
    "rotate_values q=k=v": ("q_eq_k_eq_v", 4, {**ROPE, "kv_rotary": "rotate_values"}),
    "partial-2": ("qk_eq_v", 2, {**HALF, "kv_rotary": "partial", "qk_layernorm": True}),
    "partial q=k=v": ("q_eq_k_eq_v", 4, {**HALF, "kv_rotary": "partial"}),
    "separate_rope_head-2": ("qk_eq_v", 2, {**HALF, "kv_rotary": "separate_rope_head"}),
    "separate_rope_head-1": ("qk_eq_v", 1, {**HALF, "kv_rotary": "separate_rope_head", **RMS}),
}
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def load(
    variant: str = "qk_eq_v",
    groups: int = HEADS,
    *,
    seed: int = 3,
    positions: int = POSITIONS,
    tensor_parallel: int = 1,
    **shape: Any,
) -> Any:
    """A random model with logits spread wide enough that no two steps look alike."""
    from megatron_sharedproj.config import ParallelConfig
    from megatron_sharedproj.inference.loading import LoadedModel
    from megatron_sharedproj.model import build_model

    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        padded_vocab_size=PADDED,
        max_position_embeddings=positions,
        attention_variant=variant,
        **shape,
    )
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel)
    model = build_model(config, parallel, parallel_output=False).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place, _, kind = name.rpartition(".")
            if kind.startswith("kv_"):
                continue  # of the weight before it
            # Sharded parameters are drawn whole and cut: the same model at any tensor-parallel size.
            whole, module = list(parameter.shape), model.get_submodule(place)
            own = module.own if getattr(module, "replicates_kv", False) else None
            axis = getattr(parameter, "partition_dim", -1)
            split = getattr(parameter, "tensor_model_parallel", False) and axis >= 0
            if own is not None:
                whole[0] = own.total * module.head_size
            elif split:
                whole[axis] *= tensor_parallel
            noise = torch.randn(whole, generator=generator)
            noise = 1.0 + 0.2 * noise if "layernorm.weight" in name else 0.3 * noise
            if own is not None:
                heads = noise.view(own.total, module.head_size, *whole[1:])
                for part, target in ((own.queries, parameter), (own.keys, getattr(module, f"kv_{kind}"))):
                    target.copy_(heads[part.start : part.stop].flatten(0, 1))
                continue
            if split:
                from megatron.core import parallel_state

                noise = noise.chunk(tensor_parallel, axis)[parallel_state.get_tensor_model_parallel_rank()]
            parameter.copy_(noise)
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=VOCAB)
    return LoadedModel(model, RunConfig(model=config), tokenizer, Path("."), torch.device("cpu"), {})


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def text(tokens: Tensor) -> list[str]:
    return [" ".join(str(index) for index in row) for row in tokens.tolist()]


@torch.no_grad()
def full_logits(model: Any, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None)
