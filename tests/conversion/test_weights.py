"""The name map moves every value once: both ways, bit for bit, and refuses what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models
from megatron_sharedproj import formulas
from megatron_sharedproj.conversion.config_map import hugging_face_config, model_config
from megatron_sharedproj.conversion.megatron_checkpoint import model_state
from megatron_sharedproj.conversion.weights import padding_rows, to_hugging_face, to_megatron

pytestmark = pytest.mark.usefixtures("parallel_state")
V, W = models.VOCAB, models.PADDED


@pytest.fixture(params=models.ALL)
def case(request: Any) -> Any:
    config = models.config(request.param)
    return config, model_state(models.build(config))


def test_there_and_back_is_bit_exact(case: Any) -> None:
    config, state = case
    tensors = to_hugging_face(config, state, V)
    back = to_megatron(config, tensors, padding_rows(config, state, V))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_every_parameter_is_there_once(case: Any) -> None:
    config, state = case
    tensors = to_hugging_face(config, state, V)
    tables = 2 if config.untie_embeddings_and_output_weights else 1
    trimmed = tables * (W - V) * config.hidden_size
    assert sum(t.numel() for t in tensors.values()) == formulas.parameters(config)["total"] - trimmed
    storages = {t.untyped_storage().data_ptr() for t in tensors.values()}
    assert len(storages) == len(tensors)
    assert all(t.is_contiguous() for t in tensors.values())


def test_a_tied_projection_is_one_tensor(case: Any) -> None:
    config, state = case
    names = {n.split("self_attn.")[1] for n in to_hugging_face(config, state, V) if "layers.0.self_attn" in n}
    projected = {n.split("_proj")[0] for n in names if n.endswith("_proj.weight")} - {"o"}
    alone = {"k_rope"} if config.kv_rotary == "separate_rope_head" else set()
    assert projected == {*config.variant.projections, *alone}


def test_projections_are_the_rows_that_the_layer_uses(case: Any) -> None:
    config, state = case
    model = models.build(config)
    x = torch.randn(5, 1, config.hidden_size)
    attention = model.decoder.layers[1].self_attention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = None
    found = attention.get_query_key_value_tensors(x)
    tensors = to_hugging_face(config, model_state(models.build(config)), V)
    roles = (config.variant.query, config.variant.key, config.variant.value)
    for name, given in zip(roles, found, strict=True):
        prefix = f"model.layers.1.self_attn.{name}_proj"
        wanted = torch.nn.functional.linear(x, tensors[f"{prefix}.weight"], tensors.get(f"{prefix}.bias"))
        torch.testing.assert_close(given.flatten(2), wanted)


def test_unknown_padding_is_the_mean_row(case: Any) -> None:
    config, state = case
    tensors = to_hugging_face(config, state, V)
    back = to_megatron(config, tensors)
    table = back["embedding.word_embeddings.weight"]
    assert torch.equal(table[:V], state["embedding.word_embeddings.weight"][:V])
    torch.testing.assert_close(table[V:], table[:V].mean(0).expand(W - V, -1))


def test_configuration_there_and_back(case: Any) -> None:
    config, _ = case
    values = hugging_face_config(config, vocab_size=V, eos_token_id=V - 1)
    assert model_config(values) == config
    assert values["vocab_size"] == V and values["padded_vocab_size"] == W


def test_an_export_from_before_the_rotary_schemes() -> None:
    for name in ("qk_eq_v", "rope_qkv", "llama"):
        config = models.config(name)
        values = hugging_face_config(config, vocab_size=V, eos_token_id=0)
        del values["kv_rotary"], values["kv_cache_policy"]
        assert model_config(values) == config


def test_what_does_not_fit_is_named() -> None:
    config = models.config("qk_eq_v")
    tensors = to_hugging_face(config, model_state(models.build(config)), V)
    kv = "model.layers.0.self_attn.kv_proj.weight"
    with pytest.raises(ValueError, match=r"1 missing \(model.layers.0.self_attn.kv_proj.weight"):
        to_megatron(config, {n: t for n, t in tensors.items() if n != kv})
    with pytest.raises(ValueError, match=r"1 unknown \(model.layers.0.self_attn.v_proj.weight"):
        to_megatron(config, {**tensors, kv.replace("kv_", "v_"): tensors[kv]})
    with pytest.raises(
        ValueError, match=r"kv_proj.weight: shape \(64, 63\), the configuration says \(64, 64\)"
    ):
        to_megatron(config, {**tensors, kv: tensors[kv][:, :63]})
    with pytest.raises(ValueError, match=r"embed_tokens.weight: shape \(97, 64\), expected at most 96 rows"):
        to_megatron(config, {**tensors, "model.embed_tokens.weight": torch.zeros(97, 64)})
    with pytest.raises(ValueError, match=r"padding of model.embed_tokens.weight: shape \(1, 64\)"):
        to_megatron(config, tensors, {"model.embed_tokens.weight": torch.zeros(1, 64)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' with gated_mlp False"),
        ({"attention_variant": "k_eq_q"}, "k_eq_q: unknown"),
        ({"hidden_size": "64"}, "hidden_size '64': expected a whole number"),
        ({"head_dim": None}, "head_dim None: expected a whole number"),
        ({"kv_rotary": 1}, "kv_rotary 1: expected text"),
        ({"kv_rotary": "rotate"}, "--kv-rotary rotate: unknown"),
        ({"kv_rotary": "partial"}, "--kv-rotary partial: needs rotary positions"),
        ({"position_embedding_type": "rope", "kv_rotary": "none"}, "-type rope: .*--kv-rotary"),
    ],
)
def test_bad_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    values = hugging_face_config(models.config("qk_eq_v"), vocab_size=V, eos_token_id=0)
    with pytest.raises(ValueError, match=message):
        model_config({**values, **change})
    del values["norm_epsilon"]
    with pytest.raises(ValueError, match="config.json has no norm_epsilon"):
        model_config(values)
