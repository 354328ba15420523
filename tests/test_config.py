"""Configuration dataclasses: defaults, refusals, JSON, presets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.config import (
    PRESETS,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    to_dict,
    write_json,
    write_text,
)

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "padded_vocab_size": 256,
    "max_position_embeddings": 32,
}
ROPE: dict[str, Any] = {"position_embedding_type": "rope"}
TIED: dict[str, Any] = {**ROPE, "attention_variant": "qk_eq_v"}


def full_run() -> RunConfig:
    # Every section differs from its defaults, so a section that is dropped shows.
    return RunConfig(
        model=ModelConfig(**SMALL, attention_variant="qk_eq_v", num_query_groups=2, activation="swiglu"),
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        train=TrainConfig(seq_length=32, lr=1e-3, lr_warmup_fraction=0.01, adam_beta2=0.95),
        data=DataConfig(data_path=["0.3", "a", "0.7", "b"], split="90,10,0"),
        checkpoint=CheckpointConfig(save="runs/a", save_interval=7),
        distill=DistillConfig(distill_teacher="runs/qkv", distill_alpha=0.25),
        log=LogConfig(log_interval=3, log_throughput=True),
    )


def test_run_config_survives_json() -> None:
    config = full_run()
    again = from_dict(RunConfig, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert [type(getattr(again, f.name)) for f in dataclasses.fields(again)] == [
        ModelConfig, ParallelConfig, TrainConfig, DataConfig, CheckpointConfig, DistillConfig,
        LogConfig,
    ]  # fmt: skip
    for section in dataclasses.fields(config):
        if section.name != "model":
            assert getattr(config, section.name) != type(getattr(config, section.name))()


def test_missing_sections_take_their_defaults() -> None:
    again = from_dict(RunConfig, {"model": SMALL})
    assert again == RunConfig(model=ModelConfig(**SMALL))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": SMALL, "extra": 1}, "RunConfig: unknown field(s) extra; written by a newer version?"),
        (
            {"model": {**SMALL, "window": 4, "sinks": 1}},
            "ModelConfig: unknown field(s) sinks, window; written by a newer version?",
        ),
        (
            {"model": SMALL, "train": {"learning_rate": 1.0}},
            "TrainConfig: unknown field(s) learning_rate; written by a newer version?",
        ),
    ],
)
def test_unknown_field_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_dict(RunConfig, values)
    assert str(error.value) == message


def test_write_json_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "run_config.json"
    write_json(path, {"old": 1})
    write_json(path, to_dict(full_run()))
    assert from_dict(RunConfig, json.loads(path.read_text())) == full_run()
    assert [entry.name for entry in tmp_path.iterdir()] == ["run_config.json"]


def test_text_that_cannot_be_written_leaves_what_there_was(tmp_path: Path) -> None:
    path, folder = tmp_path / "notes.txt", tmp_path / "folder"
    write_text(path, "caf\u00e9\n")
    folder.mkdir()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it \ud800")
    with pytest.raises(OSError):
        write_text(folder, "a folder is in the way")
    assert path.read_bytes() == b"caf\xc3\xa9\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "notes.txt"]


def test_defaults_are_resolved() -> None:
    config = ModelConfig(**SMALL)
    assert (config.num_query_groups, config.kv_channels, config.ffn_hidden_size) == (4, 16, 256)
    assert config.attention_variant == "qkv"


def test_given_sizes_are_kept() -> None:
    config = ModelConfig(**SMALL, num_query_groups=1, kv_channels=24, ffn_hidden_size=100)
    assert (config.num_query_groups, config.kv_channels, config.ffn_hidden_size) == (1, 24, 100)


def test_a_paper_spelling_is_resolved_to_the_flag_value() -> None:
    config = ModelConfig(**SMALL, attention_variant="Q-K=V")
    assert config.attention_variant == "qk_eq_v"
    assert config.variant.tied_kv


def test_replace_checks_again() -> None:
    config = ModelConfig(**SMALL, num_query_groups=2)
    assert config.replace(attention_variant="K=V").attention_variant == "qk_eq_v"
    with pytest.raises(ValueError, match="--num-query-groups 2: --attention-variant q_eq_k ties"):
        config.replace(attention_variant="q_eq_k")


def test_model_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**SMALL).hidden_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"attention_variant": "kqv"}, ["--attention-variant kqv", "choose one of qkv, q_eq_k, qk_eq_v"]),
        ({"hidden_size": 66}, ["--hidden-size 66", "--num-attention-heads 4", "or give --kv-channels"]),
        ({"num_layers": 0}, ["--num-layers 0", "at least 1"]),
        ({"hidden_size": 0}, ["--hidden-size 0", "at least 1"]),
        ({"num_attention_heads": -4}, ["--num-attention-heads -4", "at least 1"]),
        ({"padded_vocab_size": 0}, ["--padded-vocab-size 0", "at least 1"]),
        ({"num_query_groups": 3}, ["--num-query-groups 3", "must divide --num-attention-heads 4"]),
        (
            {"num_query_groups": 2, "attention_variant": "q_eq_k_eq_v"},
            ["--num-query-groups 2", "q_eq_k_eq_v", "drop --group-query-attention"],
        ),
        (
            {"position_embedding_type": "alibi"},
            ["--position-embedding-type alibi", "choose one of learned_absolute, rope, none"],
        ),
        ({"normalization": "BatchNorm"}, ["--normalization BatchNorm", "choose one of LayerNorm, RMSNorm"]),
        ({"activation": "relu"}, ["--activation relu", "choose one of gelu, gelu_tanh, swiglu"]),
        (
            {"position_embedding_type": "rope", "attention_variant": "qk_eq_v"},
            ["--position-embedding-type rope", "--attention-variant qk_eq_v", "use learned_absolute"],
        ),
        (
            {"position_embedding_type": "rope", "attention_variant": "q_eq_k_eq_v"},
            ["--position-embedding-type rope", "--attention-variant q_eq_k_eq_v", "use learned_absolute"],
        ),
        ({**ROPE, "rotary_percent": 0.0}, ["--rotary-percent 0.0", "at least 2"]),
        ({**ROPE, "rotary_percent": 1.5}, ["--rotary-percent 1.5", "(0, 1]"]),
        ({**ROPE, "rotary_percent": 0.2}, ["--rotary-percent 0.2", "even number", "--kv-channels 16"]),
        ({**ROPE, "kv_rotary": "partial"}, ["--kv-rotary partial", "qkv has a value of its own"]),
        ({**TIED, "kv_rotary": "both"}, ["--kv-rotary both", "choose one of none, rotate_keys"]),
        (
            {**TIED, "kv_rotary": "none"},
            ["--position-embedding-type rope", "--kv-rotary, one of rotate_keys"],
        ),
        ({**TIED, "kv_rotary": "partial"}, ["--rotary-percent 1.0", "partial", "below 1"]),
        ({**TIED, "kv_rotary": "separate_rope_head"}, ["--rotary-percent 1.0", "below 1"]),
        (
            {**TIED, "kv_rotary": "rotate_values", "rotary_percent": 0.5},
            ["--rotary-percent 0.5", "whole heads", "--kv-rotary partial"],
        ),
        (
            {**ROPE, "attention_variant": "q_eq_k_eq_v", "kv_rotary": "separate_rope_head"},
            ["--kv-rotary separate_rope_head", "q_eq_k_eq_v", "use qk_eq_v"],
        ),
        ({"kv_rotary": "rotate_keys"}, ["--kv-rotary rotate_keys", "add --position-embedding-type rope"]),
        ({"attention_dropout": 1.0}, ["--attention-dropout 1.0", "must be in [0, 1)"]),
        ({"hidden_dropout": -0.1}, ["--hidden-dropout -0.1", "must be in [0, 1)"]),
    ],
)
def test_refusals(changes: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig(**{**SMALL, **changes})
    message = str(error.value)
    assert message.startswith("--")
    for part in expected:
        assert part in message


@pytest.mark.parametrize("name", ["qkv", "q_eq_k"])
def test_an_untied_value_needs_no_choice(name: str) -> None:
    config = ModelConfig(**SMALL, attention_variant=name, position_embedding_type="rope")
    assert (config.kv_rotary, config.rope_size) == ("rotate_keys", 16)
    assert ModelConfig(**SMALL, attention_variant=name).kv_rotary == "none"


@pytest.mark.parametrize(
    "scheme, part, one, cached",
    [
        ("rotate_keys", 1.0, False, "kv"),
        ("rotate_values", 1.0, True, "kv (rotated)"),
        ("partial", 0.5, True, "kv (rotated)"),
        ("separate_rope_head", 0.5, False, "kv, k_rope (rotated)"),
    ],
)
def test_rotary_schemes(scheme: str, part: float, one: bool, cached: str) -> None:
    config = ModelConfig(**{**SMALL, **TIED}, kv_rotary=scheme, rotary_percent=part)
    assert config.rope_size == 16 * part
    assert config.attends_one_tensor == one
    text = config.describe_attention()
    assert text.endswith(f", cached: {cached}") and f", rotary {scheme}" in text
    assert ("8 of 16 elements" in text) == (part < 1)
    assert from_dict(ModelConfig, to_dict(config)) == config


def test_a_scheme_goes_with_its_variant() -> None:
    config = ModelConfig(**{**SMALL, **TIED}, kv_rotary="rotate_values")
    assert config.replace(attention_variant="q_eq_k_eq_v").kv_rotary == "rotate_values"
    assert config.replace(attention_variant="qkv").kv_rotary == "rotate_keys"
    assert config.replace(position_embedding_type="learned_absolute").kv_rotary == "none"
    with pytest.raises(ValueError, match="--kv-rotary, one of"):
        config.replace(attention_variant="qkv").replace(attention_variant="qk_eq_v")


def test_configurations_of_before_are_read() -> None:
    config = ModelConfig(**SMALL, attention_variant="qkv", position_embedding_type="rope")
    values = to_dict(config)
    del values["kv_rotary"]
    assert from_dict(ModelConfig, values) == config


@pytest.mark.parametrize(
    "name, layers, hidden, heads, ffn",
    [("300m", 20, 1024, 16, 4096), ("1b", 22, 2048, 32, 8192)],
)
def test_presets_are_the_papers(name: str, layers: int, hidden: int, heads: int, ffn: int) -> None:
    preset = PRESETS[name]
    assert (preset.num_layers, preset.hidden_size, preset.num_attention_heads) == (layers, hidden, heads)
    assert (preset.kv_channels, preset.ffn_hidden_size, preset.num_query_groups) == (64, ffn, heads)
    assert (preset.padded_vocab_size, preset.max_position_embeddings) == (50304, 2048)
    assert preset.position_embedding_type == "learned_absolute"
    assert (preset.normalization, preset.layernorm_epsilon) == ("LayerNorm", 1e-5)
    assert (preset.activation, preset.add_bias_linear, preset.qk_layernorm) == ("gelu", True, False)
    assert not preset.untie_embeddings_and_output_weights
    assert (preset.attention_dropout, preset.hidden_dropout) == (0.0, 0.1)
    assert (preset.init_method_std, preset.scaled_init) == (0.02, False)


def test_there_are_no_other_presets() -> None:
    assert set(PRESETS) == {"300m", "1b"}
