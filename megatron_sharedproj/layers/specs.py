"""Megatron-Core layer specs of the attention variants.

Only the self-attention of Megatron's own GPT layer spec is replaced; layers, MLP, residuals and norms
stay Megatron's. The module-level specs plug into stock Megatron-LM:

    pretrain_gpt.py --spec megatron_sharedproj.layers.specs qk_eq_v_spec ...
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_sharedproj.layers.attention import SharedProjectionSelfAttention
from megatron_sharedproj.layers.core_attention import SharedProjectionCoreAttention
from megatron_sharedproj.layers.norm import TorchNorm
from megatron_sharedproj.layers.projection import SharedProjectionLinear, te_shared_projection
from megatron_sharedproj.variants import get_variant


def get_layer_spec(
    variant: str,
    *,
    normalization: str = "LayerNorm",
    qk_layernorm: bool = False,
    kv_rotary: str = "",
    rope_size: int = 0,
    transformer_impl: str = "local",
) -> ModuleSpec:
    """The GPT layer spec of a variant.

    Args:
        variant: value of ``--attention-variant``.
        normalization: LayerNorm or RMSNorm.
        qk_layernorm: norm on queries and keys; one where they are tied.
        kv_rotary: value of ``--kv-rotary``; empty: the model has no rotary positions, or an untied value.
        rope_size: rotated elements of a head (config.ModelConfig.rope_size).
        transformer_impl: ``local`` or ``transformer_engine`` (Megatron's own provider).
    Raises:
        ValueError: for an unknown variant, or Transformer Engine asked for and absent.
    """
    name = get_variant(variant).name
    tied_qk = get_variant(variant).tied_qk
    linear: Any
    if transformer_impl == "transformer_engine":
        try:
            linear = te_shared_projection()
            spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        except (ImportError, TypeError, NameError) as error:
            raise ValueError(
                "--transformer-impl transformer_engine: Transformer Engine is not usable here "
                f"({error}); install the [te] extra on a GPU machine, or use --transformer-impl local"
            ) from None
    else:
        linear = SharedProjectionLinear
        spec = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization=normalization)

    layer = spec.submodules
    attention = layer.self_attention
    # The specs carry the variant: Megatron's TransformerConfig has no field for it, and in stock
    # Megatron-LM a spec is all that we can pass.
    changes: dict[str, Any] = {
        "linear_qkv": ModuleSpec(module=linear, params={"variant": name}),
        "core_attention": SharedProjectionCoreAttention,
    }
    for norm in ("q_layernorm", "k_layernorm"):
        given = _norm(getattr(attention.submodules, norm))
        changes[norm] = None if tied_qk and norm == "q_layernorm" else given
    self_attention = ModuleSpec(
        module=SharedProjectionSelfAttention,
        params={**attention.params, "variant": name, "kv_rotary": kv_rotary, "rope_size": rope_size},
        submodules=dataclasses.replace(attention.submodules, **changes),
    )
    submodules = dataclasses.replace(
        layer,
        self_attention=self_attention,
        input_layernorm=_norm(layer.input_layernorm),
        pre_mlp_layernorm=_norm(layer.pre_mlp_layernorm),
    )
    return ModuleSpec(module=spec.module, params=spec.params, submodules=submodules)


def get_block_spec(variant: str, num_layers: int, **kwargs: Any) -> TransformerBlockSubmodules:
    """All layers and the final norm, arguments as :func:`get_layer_spec`.

    A bare layer spec would give the final norm Megatron's LayerNorm whatever ``normalization`` says.
    """
    layer = get_layer_spec(variant, **kwargs)
    if kwargs.get("transformer_impl") == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers, layer_norm=layer.submodules.input_layernorm
    )


def _norm(norm: Any) -> Any:
    return TorchNorm if norm is WrappedTorchNorm else norm


qkv_spec = get_layer_spec("qkv")
q_eq_k_spec = get_layer_spec("q_eq_k")
qk_eq_v_spec = get_layer_spec("qk_eq_v")
q_eq_k_eq_v_spec = get_layer_spec("q_eq_k_eq_v")
