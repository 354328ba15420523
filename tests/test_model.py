"""Models as Megatron-Core builds them, against the paper's counts and formulas.py; on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sharedproj import formulas
from megatron_sharedproj.config import PRESETS, ModelConfig

pytestmark = pytest.mark.usefixtures("parallel_state")

# preset, variant, groups, parameters: paper.md, section 2.
PAPER = {
    "qkv": ("300m", "qkv", 16, 305_534_976),
    "q_eq_k": ("300m", "q_eq_k", 16, 284_542_976),
    "qk_eq_v": ("300m", "qk_eq_v", 16, 284_542_976),
    "q_eq_k_eq_v": ("300m", "q_eq_k_eq_v", 16, 263_550_976),
    "GQA-4": ("300m", "qkv", 4, 274_046_976),
    "MQA": ("300m", "qkv", 1, 266_174_976),
    "Q-GQA-4": ("300m", "qk_eq_v", 4, 268_798_976),
    "Q-MQA": ("300m", "qk_eq_v", 1, 264_862_976),
    "1.2B": ("1b", "qkv", 32, 1_215_102_976),
}
# Rows of the projection at 300M, from head counts: 16 query heads, then the key and value heads; times 64.
ROWS = {
    "qkv": (16 + 16 + 16) * 64,
    "q_eq_k": (16 + 16) * 64,
    "qk_eq_v": (16 + 16) * 64,
    "q_eq_k_eq_v": 16 * 64,
    "GQA-4": (16 + 4 + 4) * 64,
    "MQA": (16 + 1 + 1) * 64,
    "Q-GQA-4": (16 + 4) * 64,
    "Q-MQA": (16 + 1) * 64,
}
ATTENTION_TENSORS = {"linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight", "linear_proj.bias"}


def paper_config(name: str) -> ModelConfig:
    preset, variant, groups, _ = PAPER[name]
    return PRESETS[preset].replace(attention_variant=variant, num_query_groups=groups)


def build_on_meta(config: ModelConfig) -> Any:
    from megatron_sharedproj.model import build_model  # after the fixture has prepared Megatron-Core

    with torch.device("meta"):
        return build_model(config)


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def attention_tensors(names: Any, layer: int) -> set[str]:
    prefix = f"decoder.layers.{layer}.self_attention."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


@pytest.mark.parametrize("name", PAPER)
def test_parameter_count_is_the_papers(name: str) -> None:
    model = build_on_meta(paper_config(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count(model) == PAPER[name][3]


@pytest.mark.parametrize("name", ROWS)
def test_layers_hold_the_projected_rows_and_nothing_else(name: str) -> None:
    config = paper_config(name).replace(num_layers=2)
    model = build_on_meta(config)
    assert formulas.projected_rows(config) == ROWS[name]
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for index, layer in enumerate(model.decoder.layers):
        projection = layer.self_attention.linear_qkv
        assert projection.weight.shape == (ROWS[name], 1024)
        assert projection.bias.shape == (ROWS[name],)
        # No tensor of its own for a value, nor for anything else: one projection and the output.
        assert attention_tensors(dict(model.named_parameters()), index) == ATTENTION_TENSORS
        assert attention_tensors(state, index) == ATTENTION_TENSORS
    assert not list(model.named_buffers())


SMALL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "padded_vocab_size": 128,
    "max_position_embeddings": 20,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_channels": 20},
        {"num_query_groups": 2, "attention_variant": "qk_eq_v", "kv_channels": 8},
        {"add_bias_linear": False},
        {"normalization": "RMSNorm"},
        {"activation": "swiglu", "ffn_hidden_size": 100},
        {"activation": "swiglu", "add_bias_linear": False, "normalization": "RMSNorm"},
        {"untie_embeddings_and_output_weights": True},
        {"position_embedding_type": "rope"},
        {"position_embedding_type": "none"},
        {"qk_layernorm": True},
        {"qk_layernorm": True, "normalization": "RMSNorm", "kv_channels": 20},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_formula_counts_every_option(options: dict[str, Any]) -> None:
    config = ModelConfig(**SMALL, **options)
    model = build_on_meta(config)
    counts = formulas.parameters(config)
    assert count(model) == counts["total"]
    parts = {
        "embedding": "embedding.word_embeddings.",
        "position_embedding": "embedding.position_embeddings.",
        "attention": ".self_attention.",
        "mlp": ".mlp.",
        "head": "output_layer.",
    }
    for part, name in parts.items():
        held = [p.numel() for key, p in model.named_parameters() if name in key]
        assert sum(held) == counts[part], part


def test_initial_weights_follow_the_configuration() -> None:
    from megatron_sharedproj.model import build_model

    shape = {**SMALL, "hidden_size": 128, "padded_vocab_size": 512, "init_method_std": 0.05}
    for scaled, expected in ((False, 0.05), (True, 0.05 / (2 * SMALL["num_layers"]) ** 0.5)):
        model = build_model(ModelConfig(**shape, attention_variant="qk_eq_v", scaled_init=scaled))
        layer = model.decoder.layers[-1]
        for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
            assert linear.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert not linear.bias.any()
        for weight in (layer.self_attention.linear_qkv.weight, model.embedding.word_embeddings.weight):
            assert weight.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("activation, approximate", [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_activation(activation: str, approximate: str) -> None:
    from megatron_sharedproj.model import transformer_config

    function = transformer_config(ModelConfig(**SMALL, activation=activation)).activation_func
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    expected = torch.nn.functional.gelu(x, approximate=approximate)
    torch.testing.assert_close(function(x), expected, rtol=0, atol=0)
    assert (torch.nn.functional.gelu(x) - torch.nn.functional.gelu(x, approximate="tanh")).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("activation", "name"), [("gelu", "gelu"), ("gelu_tanh", "gelu"), ("swiglu", "silu")]
)
def test_fused_configurations_are_ones_that_megatron_takes(activation: str, name: str) -> None:
    """What a GPU uses: Megatron checks the combination, and its fused GELU is the tanh form."""
    from megatron_sharedproj.model import transformer_config

    shape = PRESETS["300m"].replace(activation=activation)
    config = transformer_config(shape, fused=True)
    assert config.activation_func is getattr(torch.nn.functional, name)
    assert config.bias_activation_fusion == (activation != "gelu")
    assert config.bias_dropout_fusion
    plain = transformer_config(shape, fused=False)
    assert not plain.bias_activation_fusion
    x = torch.randn(100)
    approximate = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.equal(plain.activation_func(x), approximate) == (activation == "gelu_tanh")
