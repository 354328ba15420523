"""The module-level specs work as stock Megatron-LM uses them: passed to GPTModel as they are."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.variants import VARIANTS

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "padded_vocab_size": 64,
    "max_position_embeddings": 16,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_gpt_model_takes_the_exported_spec(parallel_state: Any, variant: str) -> None:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.spec_utils import import_module

    from megatron_sharedproj.model import build_model, transformer_config

    config = ModelConfig(**SHAPE, attention_variant=variant)
    # What pretrain_gpt.py does with --spec MODULE NAME.
    spec = import_module(("megatron_sharedproj.layers.specs", f"{variant}_spec"))
    torch.manual_seed(1)
    stock = GPTModel(
        transformer_config(config),
        spec,
        64,
        16,
        share_embeddings_and_output_weights=True,
        parallel_output=False,
    )
    torch.manual_seed(1)
    ours = build_model(config, parallel_output=False)
    assert sum(p.numel() for p in stock.parameters()) == formulas.parameters(config)["total"]
    tokens = torch.randint(64, (2, 16))
    positions = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(stock(tokens, positions, None), ours(tokens, positions, None), rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["qkv", "q_eq_k"])
def test_rotary_positions_where_the_value_is_not_tied(parallel_state: Any, variant: str) -> None:
    """Order matters although there is no position embedding: swapping two tokens moves the last logits."""
    from megatron_sharedproj.model import build_model

    # One layer: in a deeper causal stack the tokens between have already seen the order.
    shape = {**SHAPE, "num_layers": 1, "position_embedding_type": "rope"}
    config = ModelConfig(**shape, attention_variant=variant)
    model = build_model(config, parallel_output=False)
    tokens = torch.randint(64, (1, 8))
    positions = torch.arange(8)[None]
    logits = model(tokens, positions, None)
    without = build_model(config.replace(position_embedding_type="none"), parallel_output=False)
    swapped = tokens[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    assert not torch.allclose(model(swapped, positions, None)[:, -1], logits[:, -1], atol=1e-6)
    assert torch.allclose(
        without(swapped, positions, None)[:, -1], without(tokens, positions, None)[:, -1], atol=1e-6
    )
    assert not any("position_embeddings" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_shaped_blocks_build_and_train(parallel_state: Any, variant: str) -> None:
    from megatron_sharedproj.model import build_model

    config = ModelConfig(
        **SHAPE,
        attention_variant=variant,
        normalization="RMSNorm",
        activation="swiglu",
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
    )
    model = build_model(config)
    names = dict(model.named_parameters())
    assert not [name for name in names if name.endswith("bias")]
    assert type(model.decoder.final_layernorm) is torch.nn.RMSNorm
    assert sum(p.numel() for p in names.values()) == formulas.parameters(config)["total"]
    tokens = torch.randint(64, (2, 16))
    model(tokens, torch.arange(16).expand(2, 16), None, labels=tokens).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_parameter_has_the_models_dtype(parallel_state: Any, dtype: torch.dtype) -> None:
    from megatron_sharedproj.model import build_model

    model = build_model(ModelConfig(**SHAPE, attention_variant="qk_eq_v"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_transformer_engine_absent_is_one_line(parallel_state: Any) -> None:
    from megatron_sharedproj.layers.specs import get_layer_spec

    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(
        ValueError, match="--transformer-impl transformer_engine: .* --transformer-impl local"
    ):
        get_layer_spec("qk_eq_v", transformer_impl="transformer_engine")
