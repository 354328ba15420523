"""ModelConfig -> Megatron-Core's GPTModel with projection-sharing attention."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
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
    chunks = parallel.num_virtual_stages_per_pipeline_rank
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
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        # Megatron-LM's choice: the interleaved schedule sends while it computes.
        overlap_p2p_comm=chunks > 1,
        batch_p2p_comm=chunks == 1,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity or None,
        recompute_method=parallel.recompute_method or None,
        recompute_num_layers=parallel.recompute_num_layers or None,
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


class ModelChunks(torch.nn.ModuleList):
    """The chunks of a rank under the interleaved schedule as one module, to save and to load.

    Their keys get the chunk's index in front; a sharded tensor keeps its own key, which names the layer in
    the whole model, so that the files do not depend on the layout.
    """

    def sharded_state_dict(self) -> dict[str, Any]:
        return {
            f"{index}.{name}": value
            for index, chunk in enumerate(self)
            for name, value in chunk.sharded_state_dict().items()
        }


class _Drawing:
    """Draws the initial weights of a rank's layers from the whole model's stream of random numbers.

    One process draws the embedding, layer after layer, then the head. A pipeline stage draws in the same
    order what other stages hold, and drops it: the weights of a seed are the same at any pipeline size.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, layer: TransformerBlockSubmodules):
        self.config, self.model, self.layer = config, model, layer
        self.drawn = -1  # layers so far; -1: not even the embedding

    def skip_to(self, layer: int, vp_stage: int | None) -> None:
        """Draw and drop what comes before a layer (0: the first)."""
        if torch.get_default_device().type == "meta":
            return
        if self.drawn < 0:
            LanguageModelEmbedding(
                config=self.config,
                vocab_size=self.model.padded_vocab_size,
                max_sequence_length=self.model.max_position_embeddings,
                position_embedding_type=self.model.position_embedding_type,  # type: ignore[arg-type]
            )
            self.drawn = 0
        for _ in range(self.drawn, layer):
            TransformerBlock(self.config, self.layer, post_layer_norm=False, vp_stage=vp_stage)
        self.drawn = layer


def build_chunks(
    model_config: ModelConfig,
    parallel: ParallelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    parallel_output: bool = True,
    **config_overrides: Any,
) -> list[GPTModel]:
    """Build this rank's part of the model on the CPU (or on torch's default device, e.g. meta).

    Megatron's parallel state must be initialised for ``parallel``, and ``get_device().install()`` called
    before. For one state of the random generator the weights are the same under every layout.

    Args:
        parallel_output: leave the logits split over the tensor-parallel ranks.
        config_overrides: fields set on the TransformerConfig (finalize_model_grads_func, ...).
    Returns:
        The chunks in the order of their layers: one, or with the interleaved schedule several.
    """
    parallel = parallel or ParallelConfig()
    config = transformer_config(model_config, parallel, dtype=dtype)
    for name, value in config_overrides.items():
        setattr(config, name, value)
    stages, count = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    layers = model_config.num_layers // (stages * count)

    def block(size: int) -> TransformerBlockSubmodules:
        return get_block_spec(
            model_config.attention_variant,
            size,
            normalization=model_config.normalization,
            qk_layernorm=model_config.qk_layernorm,
            kv_rotary=model_config.kv_rotary,
            rope_size=model_config.rope_size,
            transformer_impl=parallel.transformer_impl,
        )

    rank = parallel_state.get_pipeline_model_parallel_rank() if stages > 1 else 0
    drawing = _Drawing(config, model_config, block(1))
    chunks = []
    for index in range(count):
        place = index * stages + rank
        vp_stage = index if count > 1 else None
        if place:
            drawing.skip_to(place * layers, vp_stage)
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=block(layers),
            vocab_size=model_config.padded_vocab_size,
            max_sequence_length=model_config.max_position_embeddings,
            pre_process=place == 0,
            post_process=place == stages * count - 1,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=not model_config.untie_embeddings_and_output_weights,
            position_embedding_type=model_config.position_embedding_type,
            rotary_percent=model_config.rotary_percent,
            rotary_base=model_config.rotary_base,
            vp_stage=vp_stage,
        )
        drawing.drawn = (place + 1) * layers
        # Megatron makes some parameters (position embedding, norms) in fp32 whatever the dtype is.
        chunks.append(chunk.to(dtype))
    return chunks


def build_model(
    model_config: ModelConfig, parallel: ParallelConfig | None = None, **options: Any
) -> GPTModel:
    """The only chunk of :func:`build_chunks`: the whole model, or a pipeline stage. Arguments as there."""
    (model,) = build_chunks(model_config, parallel, **options)
    return model
