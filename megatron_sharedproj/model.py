"""ModelConfig -> Megatron-Core's GPTModel with projection-sharing attention."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sharedproj.config import ModelConfig, ParallelConfig
from megatron_sharedproj.device import get_device
from megatron_sharedproj.layers.specs import get_block_spec


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Megatron's fused bias-GELU as a function: the tanh approximation."""
    return torch.nn.functional.gelu(x, approximate="tanh")


_ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu": torch.nn.functional.silu,
}


def normal_init(std: float) -> Any:
    """In-place N(0, std) initialiser."""

    def init(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.init.normal_(tensor, mean=0.0, std=std)

    return init


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    fused: bool | None = None,
) -> TransformerConfig:
    """Megatron-Core's configuration of a model.

    Args:
        model: shape of the model.
        parallel: how it is split; one rank by default.
        dtype: parameter dtype (float32, bfloat16, float16; float64 for reference tests).
        fused: use Megatron's fused bias, activation and dropout; by default where the device has them.
    """
    parallel = parallel or ParallelConfig()
    init = normal_init(model.init_method_std)
    fused = get_device().has_fused_kernels if fused is None else fused
    # apex's weight-gradient kernel is the only provider of this fusion.
    fused_gradients = fused and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    # Megatron fuses the bias into the tanh form only, under the name of the exact one.
    fused_activation = fused and model.add_bias_linear and model.activation != "gelu"
    activation = _ACTIVATIONS[model.activation]
    if fused_activation and model.activation == "gelu_tanh":
        activation = torch.nn.functional.gelu
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization=model.normalization,
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=activation,
        gated_linear_unit=model.activation == "swiglu",
        add_bias_linear=model.add_bias_linear,
        qk_layernorm=model.qk_layernorm,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method=init,
        # None lets Megatron scale it by 1/sqrt(2 * layers); the paper does not scale.
        output_layer_init_method=None if model.scaled_init else init,
        init_method_std=model.init_method_std,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # The full weight is drawn on the CPU and sliced: the same weights at any tensor-parallel size.
        use_cpu_initialization=True,
        gradient_accumulation_fusion=fused_gradients,
        cross_entropy_loss_fusion=parallel.cross_entropy_loss_fusion,
        masked_softmax_fusion=False,
        bias_activation_fusion=fused_activation,
        bias_dropout_fusion=fused,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def build_model(
    model_config: ModelConfig,
    parallel: ParallelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    parallel_output: bool = True,
    **config_overrides: Any,
) -> GPTModel:
    """Build the model of this rank on the CPU (or on torch's default device, e.g. meta).

    Megatron's parallel state must be initialised, and ``get_device().install()`` called before.

    Args:
        parallel_output: leave the logits split over the tensor-parallel ranks.
        config_overrides: fields set on the TransformerConfig (finalize_model_grads_func, ...).
    """
    parallel = parallel or ParallelConfig()
    config = transformer_config(model_config, parallel, dtype=dtype)
    for name, value in config_overrides.items():
        setattr(config, name, value)
    block = get_block_spec(
        model_config.attention_variant,
        model_config.num_layers,
        normalization=model_config.normalization,
        qk_layernorm=model_config.qk_layernorm,
        transformer_impl=parallel.transformer_impl,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=model_config.padded_vocab_size,
        max_sequence_length=model_config.max_position_embeddings,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=not model_config.untie_embeddings_and_output_weights,
        position_embedding_type=model_config.position_embedding_type,
        rotary_percent=model_config.rotary_percent,
        rotary_base=model_config.rotary_base,
    )
    # Megatron makes some parameters (position embedding, norms) in fp32 whatever the dtype is.
    return model.to(dtype)
