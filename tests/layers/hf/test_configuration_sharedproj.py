"""The Hugging Face configuration: the structure derived from a variant's name, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.layers.hf import SharedProjConfig, register
from megatron_sharedproj.variants import (
    CACHE_POLICIES,
    KV_ROTARY,
    VARIANTS,
    cached_tensors,
    resolve_kv_rotary,
)
from tiny_hf import HALF, MODELS, ROPE, config

ROTATED: dict[str, Any] = {"position_embedding_type": "rope", "rope_parameters": ROPE}


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
        (
            {"attention_variant": "qk_eq_v", "position_embedding_type": "rope", "rope_parameters": ROPE},
            [
                "position_embedding_type='rope'",
                "attention_variant=qk_eq_v",
                "rotate_values",
                "learned_absolute",
            ],
        ),
        ({"kv_rotary": "rotate"}, ["kv_rotary='rotate'", "separate_rope_head"]),
        ({"kv_rotary": "rotate_keys"}, ["kv_rotary='rotate_keys'", "'learned_absolute'", "leave it out"]),
        (
            {**ROTATED, "kv_rotary": "partial"},
            ["kv_rotary='partial'", "attention_variant=qkv", "rotate_keys"],
        ),
        (
            {**ROTATED, "attention_variant": "q_eq_k_eq_v", "kv_rotary": "separate_rope_head"},
            ["kv_rotary='separate_rope_head'", "q_eq_k_eq_v", "qk_eq_v"],
        ),
        (
            {**ROTATED, "attention_variant": "qk_eq_v", "kv_rotary": "partial"},
            ["kv_rotary='partial'", "partial_rotary_factor below 1"],
        ),
        (
            {
                "attention_variant": "qk_eq_v",
                "position_embedding_type": "rope",
                "rope_parameters": HALF,
                "kv_rotary": "rotate_values",
            },
            ["kv_rotary='rotate_values'", "whole heads", "kv_rotary partial"],
        ),
        ({"kv_cache_policy": "both"}, ["kv_cache_policy='both'", "store_both"]),
        (
            {**ROTATED, "kv_cache_policy": "store_both"},
            ["kv_cache_policy='store_both'", "qkv", "leave it out"],
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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scheme", ["", *KV_ROTARY])
def test_rotary_schemes_are_those_of_the_variants(scheme: str, variant: str) -> None:
    """What is accepted, what it becomes, what is cached and what the attention sees."""
    for rope in (None, 1.0, 0.5):
        try:
            wanted = resolve_kv_rotary(VARIANTS[variant], scheme, rope=rope is not None)
            if rope is not None and VARIANTS[variant].tied_kv:
                wanted.check_part(rope)
        except ValueError:
            wanted = None
        given: dict[str, Any] = {"attention_variant": variant, "kv_rotary": scheme, "head_dim": 8}
        if rope is not None:
            given |= {
                "position_embedding_type": "rope",
                "rope_parameters": {**ROPE, "partial_rotary_factor": rope},
            }
        if wanted is None:
            with pytest.raises(ValueError, match="kv_rotary"):
                SharedProjConfig(**given)
            continue
        tied = VARIANTS[variant].tied_kv
        for policy in CACHE_POLICIES if tied and wanted.name == "rotate_keys" else CACHE_POLICIES[:1]:
            made = SharedProjConfig(**given, kv_cache_policy=policy)
            assert made.kv_rotary == wanted.name
            assert made.rotates_value == wanted.rotates_value and made.rope_head == wanted.rope_head
            size = made.rotary_dim
            tensors = cached_tensors(
                VARIANTS[variant], wanted, num_groups=4, head_size=8, rope_size=size, policy=policy
            )
            assert made.caches_one_tensor == (len(tensors) == 1)
            assert made.attends_one_tensor == (
                tied and wanted.name not in ("rotate_keys", "separate_rope_head")
            )
            at_read = tied and wanted.name == "rotate_keys" and not tensors[0].rotated
            assert made.rotates_at_read == at_read


def test_a_config_json_from_before_the_schemes() -> None:
    for name, expected in (("qk_eq_v", "none"), ("rope", "rotate_keys"), ("q_eq_k", "none")):
        values = config(name).to_dict()
        del values["kv_rotary"], values["kv_cache_policy"]
        assert SharedProjConfig.from_dict(values).kv_rotary == expected


def test_registering_twice_is_harmless() -> None:
    from transformers import AutoConfig

    register()
    made = AutoConfig.for_model("sharedproj", attention_variant="qk_eq_v")
    assert type(made) is SharedProjConfig
    assert made.projections == ("q", "kv")
