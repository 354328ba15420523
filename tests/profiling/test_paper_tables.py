"""The paper's tables: the released figures to the last unit, counted by formula and by torch.profiler."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from megatron_sharedproj import formulas
from megatron_sharedproj.config import PRESETS, ModelConfig
from megatron_sharedproj.profiling import counted_flops, released_tables
from megatron_sharedproj.profiling.commands import paper
from megatron_sharedproj.profiling.commands.models import PAPER_VARIANTS
from megatron_sharedproj.profiling.counted_flops import count_flops, eager_model, needed_bytes

LENGTHS = (128, 512, 1024, 2048)
FULL = ("qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v")
# A model of the paper's kind that runs at once; no two of its sizes are alike.
TINY = [
    "--num-layers", "3", "--hidden-size", "64", "--num-attention-heads", "8", "--kv-channels", "12",
    "--ffn-hidden-size", "100", "--vocab-size", "72", "--max-position-embeddings", "40",
]  # fmt: skip
KEYS = [
    "model", "variant", "num_query_groups", "seq_length", "parameters", "macs", "flops_profiled",
    "flops_formula", "kv_cache_bytes_per_token",
]  # fmt: skip


def paper_rows(capsys: pytest.CaptureFixture[str], *line: str) -> list[dict[str, Any]]:
    """The JSON rows of the command."""
    parser = argparse.ArgumentParser()
    paper.add_arguments(parser)
    paper.run(parser.parse_args([*line, "--format", "json"]))
    return json.loads(capsys.readouterr().out)


def model(preset: str, variant: str, groups: int) -> ModelConfig:
    return PRESETS[preset].replace(attention_variant=variant, num_query_groups=groups)


def test_the_data_has_all_released_entries() -> None:
    assert sorted(released_tables.MACS) == sorted((v, t) for v in FULL for t in LENGTHS)
    assert sorted(released_tables.PROFILED_FLOPS) == sorted(released_tables.MACS)
    assert len(released_tables.PARAMETERS) == 9
    assert len(released_tables.CACHE_BYTES_PER_TOKEN) == 6


@pytest.mark.parametrize("variant, tokens", released_tables.MACS)
def test_released_macs_and_flops(variant: str, tokens: int) -> None:
    config = model("300m", variant, 16)
    assert formulas.macs(config, tokens)["total"] == released_tables.MACS[variant, tokens]
    assert formulas.profiled_flops(config, tokens) == released_tables.PROFILED_FLOPS[variant, tokens]


def test_released_parameters_and_caches() -> None:
    for (preset, variant, groups), parameters in released_tables.PARAMETERS.items():
        assert formulas.parameters(model(preset, variant, groups))["total"] == parameters
    for (variant, groups), per_token in released_tables.CACHE_BYTES_PER_TOKEN.items():
        assert formulas.kv_cache_bytes_per_token(model("300m", variant, groups)) == per_token


@pytest.mark.parametrize("variant", FULL)
def test_torch_profiler_on_the_300m_model(variant: str) -> None:
    """The real model, all its layers and vocabulary."""
    counted = count_flops(eager_model(model("300m", variant, 16)), 128)
    assert counted.total == released_tables.PROFILED_FLOPS[variant, 128]
    # The only other thing of size that it counts: [1, 16, 128, 128] + mask, in 20 layers.
    assert counted.left_out.pop(counted_flops.MASK) == 20 * 16 * 128**2
    assert sum(counted.left_out.values()) < 128 * 10


@pytest.mark.slow
@pytest.mark.parametrize("variant", FULL)
def test_torch_profiler_on_the_300m_model_at_all_released_lengths(variant: str) -> None:
    running = eager_model(model("300m", variant, 16))
    found = {tokens: count_flops(running, tokens).total for tokens in LENGTHS}
    assert found == {tokens: released_tables.PROFILED_FLOPS[variant, tokens] for tokens in LENGTHS}


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("row", PAPER_VARIANTS, ids=lambda row: row.name)
def test_torch_profiler_on_small_models(row: Any, tokens: int) -> None:
    config = PRESETS["300m"].replace(
        num_layers=2, hidden_size=64, num_attention_heads=8, num_query_groups=row.groups(8), kv_channels=12,
        ffn_hidden_size=100, padded_vocab_size=72, max_position_embeddings=40, attention_variant=row.variant,
    )  # fmt: skip
    counted = count_flops(eager_model(config), tokens)
    assert counted.total == formulas.profiled_flops(config, tokens)
    assert counted.left_out[counted_flops.MASK] == 2 * 8 * tokens**2


def test_weights_do_not_change_the_count() -> None:
    import torch

    config = PRESETS["300m"].replace(
        num_layers=1, hidden_size=32, padded_vocab_size=40, num_attention_heads=4, num_query_groups=4,
        kv_channels=8, ffn_hidden_size=48, max_position_embeddings=16,
    )  # fmt: skip
    running = eager_model(config)
    assert running.lm_head.weight is running.model.embed_tokens.weight
    before = count_flops(running, 9).total
    with torch.no_grad():
        for parameter in running.parameters():
            parameter.normal_()
    assert count_flops(running, 9).total == before


def test_json_rows(capsys: pytest.CaptureFixture[str]) -> None:
    found = paper_rows(capsys, "--no-run")
    assert len(found) == 8 * len(LENGTHS)
    groups = {"Q=K-V": 16, "GQA-4": 4, "MQA": 1, "Q-GQA-4": 4, "Q-MQA": 1}
    for row in found:
        assert list(row)[: len(KEYS)] == KEYS
        assert row["flops_profiled"] is None
        assert all(type(row[key]) is int for key in KEYS[2:] if key != "flops_profiled")
        assert row["model"] == "300m"
        assert row["num_query_groups"] == groups.get(row["name"], 16)
        assert row["equal"] is True  # its parameters at least are released
    winner = next(row for row in found if row["variant"] == "qk_eq_v" and row["seq_length"] == 512)
    assert winner["parameters"] == winner["parameters_released"] == 284_542_976
    assert winner["macs"] == winner["macs_released"] == 155_222_802_432
    assert winner["flops_formula"] == winner["flops_released"] == 310_550_986_752
    assert winner["kv_cache_bytes_per_token"] == winner["kv_cache_released"] == 40_960
    assert winner["kv_cache_bytes_at_32768"] == 1280 * 2**20
    assert winner["kv_cache_saved_percent"] == 50.0
    assert winner["parameters_saved_percent"] == pytest.approx(100 * 20_992_000 / 305_534_976)
    assert winner["macs_saved_percent"] == pytest.approx(100 * (1 - 155_222_802_432 / 165_960_220_672))
    assert winner["macs_causal"] == 155_222_802_432 - 20 * 1024 * 512 * 511


def test_1b_rows(capsys: pytest.CaptureFixture[str]) -> None:
    found = paper_rows(capsys, "--no-run", "--model", "1b", "--seq-lengths", "2048")
    assert [(row["name"], row["num_query_groups"]) for row in found if row["num_query_groups"] < 32] == [
        ("GQA-8", 8), ("MQA", 1), ("Q-GQA-8", 8), ("Q-MQA", 1),
    ]  # fmt: skip
    assert [row["equal"] for row in found] == [True] + 7 * [None]
    assert found[0]["parameters"] == 1_215_102_976


def test_models_are_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = paper_rows(capsys, *TINY, "--seq-lengths", "5,16")
    assert len(found) == 16
    for row in found:
        assert type(row["flops_profiled"]) is int
        assert row["flops_profiled"] == row["flops_formula"]
        assert row["equal"] is True and row["macs_released"] is None


def test_a_model_that_is_too_large_is_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_sharedproj.profiling.timing import Machine

    small = PRESETS["300m"].replace(
        num_layers=3, hidden_size=64, num_attention_heads=8, num_query_groups=8, kv_channels=12,
        ffn_hidden_size=100, padded_vocab_size=72, max_position_embeddings=40,
    )  # fmt: skip
    free = (needed_bytes(small, 5) + needed_bytes(small, 40)) // 2
    monkeypatch.setattr(Machine, "free_bytes", lambda _: free)
    line = [*TINY, "--attention-variant", "qkv", "--seq-lengths", "40,5"]
    parser = argparse.ArgumentParser()
    paper.add_arguments(parser)
    paper.run(parser.parse_args([*line, "--format", "json"]))
    captured = capsys.readouterr()
    large, fits = json.loads(captured.out)
    assert large["flops_profiled"] is None and large["equal"] is None
    assert fits["flops_profiled"] == fits["flops_formula"]
    assert "QKV, 40 tokens: not run, needs" in captured.err


def test_a_wrong_count_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = formulas.macs

    def wrong(config: ModelConfig, tokens: int, **options: Any) -> dict[str, int]:
        counts = right(config, tokens, **options)
        return {**counts, "total": counts["total"] + (config.attention_variant == "q_eq_k")}

    monkeypatch.setattr(formulas, "macs", wrong)
    found = paper_rows(capsys, "--no-run")
    assert {row["variant"] for row in found if not row["equal"]} == {"q_eq_k"}


def test_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    paper.add_arguments(parser)
    paper.run(parser.parse_args(["--no-run"]))
    lines = capsys.readouterr().out.splitlines()
    qmqa = next(line.split() for line in lines if line.startswith("Q-MQA"))
    assert qmqa == ["Q-MQA", "qk_eq_v", "1", "264,862,976", "264,862,976", "13.31", "2,560", "2,560",
                    "96.875", "80.00", "0.0781", "yes"]  # fmt: skip
    last = next(line.split() for line in lines if line.startswith("Q=K=V") and " 2,048 " in line)
    assert last == ["Q=K=V", "2,048", "706.790555648", "706.790555648", "10.84", "620.933152768",
                    "1415.009271808", "-", "1415.009271808", "10.83", "yes"]  # fmt: skip
    notes = [line for line in lines if line.startswith("note: ")]
    assert any("1 MAC is 2 FLOPs" in line for line in notes)
    assert any("Megatron-Core model adds its biases apart" in line for line in notes)


def test_only_the_papers_shapes_have_released_figures() -> None:
    assert released_tables.released(PRESETS["300m"], 128).macs == 39_476_789_248
    assert released_tables.released(PRESETS["300m"], 129).macs is None
    assert released_tables.released(PRESETS["1b"], 128).macs is None
    for change in (
        {"num_layers": 21},
        {"activation": "swiglu"},
        {"num_attention_heads": 8, "num_query_groups": 8},
    ):
        nothing = released_tables.released(PRESETS["300m"].replace(**change), 128)
        assert nothing == released_tables.Released()
