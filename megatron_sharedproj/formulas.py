"""Every count: parameters, multiply-accumulates, FLOPs, cache bytes (training memory: formulas_memory.py).

Pure functions of a ModelConfig, needing neither torch nor Megatron. Trainer, profiler, README tables and
model cards read these and nothing else. Closed forms: the paper's released tables (paper.md, section 6).

Shape legend: d hidden size, h heads, g groups, e head size, f ffn size, V padded vocabulary, T tokens.
"""

from __future__ import annotations

import re

from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.variants import CACHE_POLICIES


def projected_rows(config: ModelConfig) -> int:
    """Rows of a layer's query/key/value projection: elements projected per token."""
    per_group = config.variant.heads_per_group(config.num_attention_heads, config.num_query_groups)
    return config.num_query_groups * per_group * config.kv_channels


def rope_head_rows(config: ModelConfig) -> int:
    """Rows of a layer's projection of a separate rotary head, which all groups share; 0 for most schemes."""
    return config.rope_size if config.rotary_scheme.rope_head else 0


def qk_norm_parameters(config: ModelConfig) -> int:
    """Parameters of a layer's norms on query and key heads, one where they are tied; 0 without."""
    norms = 0 if not config.qk_layernorm else 1 if config.variant.tied_qk else 2
    return norms * (2 if config.normalization == "LayerNorm" else 1) * config.kv_channels


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by component, in elements, and their ``total``.

    ``attention`` counts the projections and the output projection of all layers, biases included.
    """
    d, f, layers = config.hidden_size, config.ffn_hidden_size, config.num_layers
    bias = int(config.add_bias_linear)
    attended = config.num_attention_heads * config.kv_channels
    rows = projected_rows(config)
    norm = 2 * d if config.normalization == "LayerNorm" else d
    up = 2 * f if config.activation == "swiglu" else f
    rope_head = rope_head_rows(config) * (d + bias)
    learned = config.position_embedding_type == "learned_absolute"
    counts = {
        "embedding": config.padded_vocab_size * d,
        "position_embedding": config.max_position_embeddings * d if learned else 0,
        "attention": layers
        * (rows * d + bias * rows + attended * d + bias * d + qk_norm_parameters(config) + rope_head),
        "mlp": layers * (d * up + bias * up + f * d + bias * d),
        "norms": layers * 2 * norm + norm,
        "head": config.padded_vocab_size * d if config.untie_embeddings_and_output_weights else 0,
    }
    counts["total"] = sum(counts.values())
    return counts


def macs(config: ModelConfig, seq_length: int, *, causal: bool = False) -> dict[str, int]:
    """Multiply-accumulates of one forward pass over one sequence, by component.

    Args:
        seq_length: T tokens.
        causal: count the lower triangle of the scores only, T (T + 1) / 2 pairs; the paper's tables
            count all T^2.
    """
    t, d = seq_length, config.hidden_size
    attended = config.num_attention_heads * config.kv_channels
    pairs = t * (t + 1) // 2 if causal else t * t
    up = 2 if config.activation == "swiglu" else 1
    counts = {
        "projections": config.num_layers * t * d * (projected_rows(config) + rope_head_rows(config)),
        "scores": config.num_layers * 2 * pairs * attended,
        "output": config.num_layers * t * d * attended,
        "mlp": config.num_layers * t * d * config.ffn_hidden_size * (up + 1),
        "head": t * d * config.padded_vocab_size,
    }
    counts["total"] = sum(counts.values())
    return counts


def flops(config: ModelConfig, seq_length: int, *, causal: bool = False) -> dict[str, int]:
    """FLOPs of the matrix products of one training step over one sequence: forward, backward, total.

    Two per multiply-accumulate. The backward is twice the forward: a product's two gradients are products
    of the same size. What is recomputed (activation recompute, the scores in a fused kernel) is not counted,
    nor are elementwise operations; arguments as in :func:`macs`.
    """
    forward = 2 * macs(config, seq_length, causal=causal)["total"]
    return {"forward": forward, "backward": 2 * forward, "total": 3 * forward}


def train_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """FLOPs per trained token: 2 per multiply-accumulate, causal scores, backward twice the forward.

    The count behind TFLOP/s and MFU in the log. Megatron's own formula assumes three projections.
    """
    return flops(config, seq_length, causal=True)["total"] / seq_length


def elementwise_flops(config: ModelConfig, seq_length: int) -> dict[str, int]:
    """Multiplications and additions that torch.profiler counts beside the products of a forward pass.

    One per element of the first operand, of aten::mul and aten::add only: norms, softmax, activations and
    subtractions count nothing. The masking of scores is not in it: the released code fills, which counts
    nothing (counted_flops.py).

    Args:
        seq_length: T tokens of one sequence.
    """
    t, d, layers, heads = seq_length, config.hidden_size, config.num_layers, config.num_attention_heads
    scheme = config.rotary_scheme
    keys = 0 if config.variant.tied_qk else 1 if scheme.rope_head else config.num_query_groups
    outputs = heads if scheme.rotates_value else 0
    # Of a pair four multiplications and an addition; its other half is a subtraction.
    rotated = 5 * t * (heads + keys + outputs) * (config.rope_size // 2)
    return {
        "score_scaling": layers * heads * t * t,
        "residuals": layers * 2 * t * d,
        "positions": t * d if config.position_embedding_type == "learned_absolute" else 0,
        "rotary": layers * rotated,
        "gating": layers * t * config.ffn_hidden_size if config.activation == "swiglu" else 0,
    }


def profiled_flops(config: ModelConfig, seq_length: int) -> int:
    """FLOPs that torch.profiler counts in one forward pass of the eager fp32 model over one sequence.

    2 MACs (all T^2 scores; a bias is part of its addmm) and :func:`elementwise_flops`. For the paper's
    models: 2 MACs + layers h T^2 + 2 layers T d + T d (paper.md, section 6).
    """
    products = 2 * macs(config, seq_length)["total"]
    return products + sum(elementwise_flops(config, seq_length).values())


def groups_per_rank(config: ModelConfig, tensor_model_parallel_size: int = 1) -> int:
    """Key/value heads that one tensor-parallel rank holds; fewer groups than ranks: each rank holds one.

    Raises:
        ValueError: if heads or groups do not divide so.
    """
    tp, heads, groups = tensor_model_parallel_size, config.num_attention_heads, config.num_query_groups
    if tp < 1 or heads % tp or (groups % tp and tp % groups):
        sizes = [n for n in range(1, heads + 1) if not heads % n and (not groups % n or not n % groups)]
        raise ValueError(
            f"--tensor-model-parallel-size {tp}: must divide --num-attention-heads {heads}, and divide "
            f"--num-query-groups {groups} or be a multiple of it; use one of {sizes}"
        )
    return max(1, groups // tp)


def projected_rows_per_rank(config: ModelConfig, tensor_model_parallel_size: int = 1) -> int:
    """Rows of a layer's query/key/value projection on one tensor-parallel rank.

    With fewer groups than ranks: of its own query heads, and a copy of its group's keys and values
    (layers/projection.py).

    Raises:
        ValueError: as :func:`groups_per_rank`.
    """
    groups = groups_per_rank(config, tensor_model_parallel_size)
    heads = config.num_attention_heads // tensor_model_parallel_size
    return groups * config.variant.heads_per_group(heads, groups) * config.kv_channels


def kv_cache_bytes_per_token(
    config: ModelConfig,
    bytes_per_element: int = 2,
    tensor_model_parallel_size: int = 1,
    policy: str = CACHE_POLICIES[0],
) -> int:
    """Key/value cache bytes per token on one rank, all layers.

    m g e layers bytes, m = 1 if K and V are tied; with rotary positions what the scheme stores
    (variants.cached_tensors): a separate rotary head adds its r elements on every rank.

    Args:
        bytes_per_element: width of the cache's dtype.
        tensor_model_parallel_size: ranks over which the groups are split (:func:`groups_per_rank`).
        policy: of variants.CACHE_POLICIES, where the scheme has the choice.
    Raises:
        ValueError: for a number of ranks that the groups cannot be split over.
    """
    groups = groups_per_rank(config, tensor_model_parallel_size)
    tensors = config.cached_tensors(policy)
    per_layer = sum((1 if tensor.shared else groups) * tensor.size for tensor in tensors)
    return config.num_layers * per_layer * bytes_per_element


def kv_cache_bytes(
    config: ModelConfig,
    tokens: int,
    batch_size: int = 1,
    bytes_per_element: int = 2,
    tensor_model_parallel_size: int = 1,
    policy: str = CACHE_POLICIES[0],
) -> int:
    """Key/value cache bytes on one rank of ``batch_size`` sequences with ``tokens`` tokens each."""
    per_token = kv_cache_bytes_per_token(config, bytes_per_element, tensor_model_parallel_size, policy)
    return tokens * batch_size * per_token


# Dense peak FLOP/s of tensor cores in bf16, from NVIDIA's data sheets; what MFU is a fraction of.
PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by its name, or None where it is not known (then no MFU is printed)."""
    words = re.split(r"[ -]", device_name)
    for name, flops in sorted(PEAK_BF16_FLOPS.items(), key=lambda item: -len(item[0])):
        if all(word in words for word in name.split()):
            return flops
    return None
