"""The MLP's width at which two variants have as many parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.matching import TOLERANCE, baseline_of, describe_match, match_parameters

PAPER = ModelConfig(
    num_layers=20,
    hidden_size=1024,
    num_attention_heads=16,
    padded_vocab_size=50304,
    max_position_embeddings=2048,
)
SMALL = ModelConfig(
    num_layers=4, hidden_size=128, num_attention_heads=4, padded_vocab_size=2048, max_position_embeddings=256
)


def total(config: ModelConfig) -> int:
    return formulas.parameters(config)["total"]


@pytest.mark.parametrize("base", [PAPER, SMALL])
@pytest.mark.parametrize(
    "changes",
    [
        {"attention_variant": "q_eq_k"},
        {"attention_variant": "qk_eq_v"},
        {"attention_variant": "q_eq_k_eq_v"},
        {"attention_variant": "qk_eq_v", "num_query_groups": 1},
        {"num_query_groups": 2},
        {"attention_variant": "qk_eq_v", "activation": "swiglu", "add_bias_linear": False},
        {
            "attention_variant": "qk_eq_v",
            "position_embedding_type": "rope",
            "kv_rotary": "separate_rope_head",
            "rotary_percent": 0.5,
        },
    ],
)
def test_the_total_is_the_baselines(base: ModelConfig, changes: dict[str, object]) -> None:
    config = replace(base, **changes)
    matched = match_parameters(config, "qkv")
    baseline = replace(
        base, **{**changes, "attention_variant": "qkv", "num_query_groups": 0, "kv_rotary": ""}
    )
    assert abs(total(matched) / total(baseline) - 1) <= TOLERANCE
    assert matched.ffn_hidden_size > config.ffn_hidden_size
    assert replace(matched, ffn_hidden_size=config.ffn_hidden_size) == config


def test_a_width_that_kernels_like_is_preferred() -> None:
    # 20 layers save 1024 x 1024 weights and 1024 biases each; a unit of width costs 2 x 1024 + 1 in each.
    matched = match_parameters(replace(PAPER, attention_variant="qk_eq_v"), "qkv")
    assert matched.ffn_hidden_size == 4096 + 512
    assert match_parameters(PAPER, "qkv") == PAPER


def test_a_larger_model_is_narrowed() -> None:
    matched = match_parameters(PAPER, "qk_eq_v")
    assert matched.ffn_hidden_size == 4096 - 512
    assert total(matched) == pytest.approx(total(replace(PAPER, attention_variant="qk_eq_v")), rel=TOLERANCE)


def test_tensor_parallel_ranks_divide_the_width() -> None:
    for ranks in (2, 3, 4):
        config = replace(SMALL, attention_variant="qk_eq_v", num_layers=2)
        assert match_parameters(config, "qkv", multiple_of=ranks).ffn_hidden_size % ranks == 0


def test_refusals_name_the_flag_and_the_remedy() -> None:
    tiny = ModelConfig(
        num_layers=1, hidden_size=64, num_attention_heads=2, padded_vocab_size=128,
        max_position_embeddings=16, attention_variant="qk_eq_v",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="--match-parameters-of qkv: .* closest multiple of 64.*tensor-parallel"
    ):
        match_parameters(tiny, "qkv", multiple_of=64)
    with pytest.raises(ValueError, match="--match-parameters-of qqq: .*unknown"):
        match_parameters(tiny, "qqq")
    narrow = replace(tiny, attention_variant="qkv", num_layers=1, ffn_hidden_size=1)
    with pytest.raises(ValueError, match="--match-parameters-of q_eq_k_eq_v: .*without its MLP"):
        match_parameters(narrow, "q_eq_k_eq_v")


def test_a_baseline_has_a_head_of_keys_for_each_head() -> None:
    assert (
        baseline_of(replace(SMALL, attention_variant="qk_eq_v", num_query_groups=1), "Q-K=V").num_query_groups
        == 4
    )


def test_the_line_says_both_totals() -> None:
    matched = match_parameters(replace(SMALL, attention_variant="qk_eq_v"), "qkv")
    line = describe_match(matched, "qkv", 512)
    assert f"512 -> {matched.ffn_hidden_size}" in line
    assert f"{total(matched):,} parameters against {total(SMALL):,}" in line
