"""The Hugging Face configuration: the structure derived from a variant's name, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.layers.hf import SharedProjConfig, register
from megatron_sharedproj.variants import VARIANTS
from tiny_hf import MODELS, ROPE, config


@pytest.mark.parametrize("name", VARIANTS)
def test_structure_is_that_of_the_variant(name: str) -> None:
    ours, variant = SharedProjConfig(attention_variant=name), VARIANTS[name]
    assert ours.projections == variant.projections
    assert ours.roles == (variant.query, variant.key, variant.value)
    assert ours.tied_qk == variant.tied_qk
    assert ours.tied_kv == variant.tied_kv
    plan = {key.split(".")[-1] for key in ours.base_model_tp_plan if "self_attn" in key}
    assert plan == {f"{projection}_proj" for projection in (*variant.projections, "o")}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_through_json(name: str, tmp_path: Path) -> None:
    made = config(name, padded_vocab_size=64, eos_token_id=3)
    made.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "sharedproj"
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert "base_model_tp_plan" not in written
    read = SharedProjConfig.from_pretrained(tmp_path)
    assert read.to_dict() == {**made.to_dict(), "transformers_version": read.transformers_version}
    assert read.projections == made.projections
    assert (read.rope_parameters is None) == (made.position_embedding_type != "rope")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"attention_variant": "kqv"}, ["attention_variant='kqv'", "q_eq_k_eq_v"]),
        ({"position_embedding_type": "alibi"}, ["position_embedding_type='alibi'", "learned_absolute"]),
        ({"normalization": "BatchNorm"}, ["normalization='BatchNorm'", "RMSNorm"]),
        ({"hidden_act": "relu"}, ["hidden_act='relu'", "silu"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "[1, 2, 4]"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads=0", "at least 1"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0", "at least 1"]),
        ({"hidden_dropout": 1.0}, ["hidden_dropout=1.0", "below 1"]),
        ({"attention_variant": "q_eq_k", "num_key_value_heads": 2}, ["num_key_value_heads=2", "q_eq_k"]),
        ({"attention_variant": "q_eq_k", "qk_layernorm": True}, ["qk_layernorm=True", "qkv"]),
        (
            {"attention_variant": "qk_eq_v", "position_embedding_type": "rope", "rope_parameters": ROPE},
            ["position_embedding_type='rope'", "not available yet", "learned_absolute"],
        ),
        (
            {
                "position_embedding_type": "rope",
                "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 2.0},
            },
            ["rope_parameters=", "yarn", "'default'"],
        ),
        (
            {"position_embedding_type": "rope", "rope_parameters": {**ROPE, "partial_rotary_factor": 0.4}},
            ["partial_rotary_factor", "even"],
        ),
    ],
)
def test_refusals_name_field_value_and_what_is_accepted(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        config("qkv", **changes)
    for word in words:
        assert word in str(error.value)


def test_registering_twice_is_harmless() -> None:
    from transformers import AutoConfig

    register()
    made = AutoConfig.for_model("sharedproj", attention_variant="qk_eq_v")
    assert type(made) is SharedProjConfig
    assert made.projections == ("q", "kv")
