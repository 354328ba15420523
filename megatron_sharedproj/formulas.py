"""Every count: parameters, multiply-accumulates, FLOPs, cache bytes, training memory.

Pure functions of a ModelConfig, needing neither torch nor Megatron. Trainer, profiler, README tables and
model cards read these and nothing else. Closed forms: the paper's released tables (paper.md, section 6).

Shape legend: d hidden size, h heads, g groups, e head size, f ffn size, V padded vocabulary, T tokens.
"""

from __future__ import annotations

import re

from megatron_sharedproj.config import ModelConfig, ParallelConfig


def projected_rows(config: ModelConfig) -> int:
    """Rows of a layer's query/key/value projection: elements projected per token."""
    per_group = config.variant.heads_per_group(config.num_attention_heads, config.num_query_groups)
    return config.num_query_groups * per_group * config.kv_channels


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
    qk_norm = 2 * (norm // d) * config.kv_channels if config.qk_layernorm else 0
    learned = config.position_embedding_type == "learned_absolute"
    counts = {
        "embedding": config.padded_vocab_size * d,
        "position_embedding": config.max_position_embeddings * d if learned else 0,
        "attention": layers * (rows * d + bias * rows + attended * d + bias * d + qk_norm),
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
        "projections": config.num_layers * t * d * projected_rows(config),
        "scores": config.num_layers * 2 * pairs * attended,
        "output": config.num_layers * t * d * attended,
        "mlp": config.num_layers * t * d * config.ffn_hidden_size * (up + 1),
        "head": t * d * config.padded_vocab_size,
    }
    counts["total"] = sum(counts.values())
    return counts


def train_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """FLOPs per trained token: 2 per multiply-accumulate, causal scores, backward twice the forward.

    The count behind TFLOP/s and MFU in the log. Megatron's own formula assumes three projections.
    """
    return 3 * 2 * macs(config, seq_length, causal=True)["total"] / seq_length


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """Key/value cache bytes per token over all layers: m g e layers bytes, m = 1 when K and V are tied."""
    tensors = len(config.variant.cached)
    return tensors * config.num_query_groups * config.kv_channels * config.num_layers * bytes_per_element


def training_memory_bytes(
    config: ModelConfig,
    parallel: ParallelConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    data_parallel_size: int = 1,
    low_precision: bool = False,
) -> dict[str, int]:
    """Bytes that one rank needs to train, by component; without recompute, allocator slack or workspace.

    fp32: 4 bytes each for weight, gradient buffer and two Adam moments. bf16/fp16: 2 for the weight, 4 for
    the fp32 gradient buffer, 12 for the master weight and moments, which the distributed optimizer divides
    over the data-parallel ranks. Activations count what autograd keeps per layer: the norms' and linears'
    inputs, the projected tensors, attention output, MLP intermediate and dropout masks; the logits are kept
    in fp32 with their gradient.

    Args:
        seq_length: tokens in a sequence; micro_batch_size: sequences in one forward pass.
        data_parallel_size: ranks over which the distributed optimizer shards its state.
        low_precision: bf16 or fp16 parameters.
    """
    tp = parallel.tensor_model_parallel_size
    per_rank = -(-parameters(config)["total"] // tp)
    sharded = data_parallel_size if parallel.use_distributed_optimizer else 1
    weight, state = (2, 12) if low_precision else (4, 8)
    tokens = seq_length * micro_batch_size
    width = 2 if low_precision else 4
    d = config.hidden_size
    attended = config.num_attention_heads * config.kv_channels
    up = 3 if config.activation == "swiglu" else 2
    # Not split by tensor parallelism without sequence parallelism: residual stream, norm outputs, masks.
    replicated = tokens * d * (6 * width + 2)
    if parallel.sequence_parallel:
        replicated //= tp
    split = tokens * width * (projected_rows(config) + 2 * attended + up * config.ffn_hidden_size) // tp
    counts = {
        "weights": per_rank * weight,
        "gradients": per_rank * 4,
        "optimizer": per_rank * state // sharded,
        "activations": config.num_layers * (replicated + split),
        "logits": tokens * config.padded_vocab_size * (width + 8) // tp,
    }
    counts["total"] = sum(counts.values())
    return counts


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
