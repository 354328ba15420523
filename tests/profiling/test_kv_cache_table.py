"""The cache table: the formula beside the storage of live caches, for any variant, dtype, batch and ranks."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from megatron_sharedproj.config import PRESETS
from megatron_sharedproj.profiling.commands import kv_cache

pytestmark = pytest.mark.usefixtures("parallel_state")


def cache_rows(capsys: pytest.CaptureFixture[str], *line: str) -> list[dict[str, Any]]:
    """The JSON rows of the command."""
    parser = argparse.ArgumentParser()
    kv_cache.add_arguments(parser)
    kv_cache.run(parser.parse_args([*line, "--format", "json"]))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("preset", ["300m", "1b"])
def test_live_caches_hold_what_the_formula_says(capsys: pytest.CaptureFixture[str], preset: str) -> None:
    found = cache_rows(
        capsys, "--model", preset, "--dtype", ",".join(kv_cache.DTYPES), "--batch", "1,3",
        "--context", "64,100",
    )  # fmt: skip
    assert len(found) == 8 * 5 * 2 * 2
    for row in found:
        assert row["equal"] is True
        assert row["bytes"] == row["bytes_per_token"] * row["batch_size"] * row["context_length"]
        assert row["hugging_face_bytes"] == row["bytes"]
        assert row["allocated_tokens"] == row["batch_size"] * {64: 64, 100: 128}[row["context_length"]]
        assert row["measured_bytes"] == row["bytes_per_token"] * row["allocated_tokens"]


# name: cached heads over all layers, of the 16 (300M) that qkv has twice.
CACHED = {
    "QKV": 32, "Q=K-V": 32, "Q-K=V": 16, "Q=K=V": 16, "GQA-4": 8, "MQA": 2, "Q-GQA-4": 4, "Q-MQA": 1
}  # fmt: skip


def test_figures_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    found = cache_rows(capsys, "--no-run")
    assert {row["name"] for row in found} == set(CACHED)
    for row in found:
        heads = CACHED[row["name"]]
        assert row["bytes_per_token"] == heads * 64 * 20 * 2
        assert row["bytes_at_32768"] == heads * 80 * 2**20
        assert row["saved_percent"] == 100 * (1 - heads / 32)
        assert row["context_length"] == 2048 and row["bytes"] == heads * 5 * 2**20
        assert row["equal"] is None and row["measured_bytes"] is None


def test_bytes_of_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """16 heads on 8 ranks: 2 groups each of 16; a copy of one where there are 4 groups or 1."""
    found = cache_rows(capsys, "--tensor-model-parallel-size", "1,8", "--context", "64")
    per_token = {(row["name"], row["tensor_model_parallel_size"]): row["bytes_per_token"] for row in found}
    one_group = 64 * 20 * 2
    assert per_token["QKV", 8] == 2 * 2 * one_group
    assert per_token["Q-K=V", 8] == 2 * one_group
    assert per_token["GQA-4", 8] == per_token["MQA", 8] == 2 * one_group
    assert per_token["Q-GQA-4", 8] == per_token["Q-MQA", 8] == per_token["Q-MQA", 1] == one_group
    assert all(row["equal"] for row in found)
    assert {row["hugging_face_bytes"] is None for row in found if row["tensor_model_parallel_size"] == 8} == {
        True
    }


def test_ranks_that_do_not_divide() -> None:
    parser = argparse.ArgumentParser()
    kv_cache.add_arguments(parser)
    with pytest.raises(
        ValueError, match=r"--tensor-model-parallel-size 3: must .*heads 16, .* use one of \[1, 2, 4,"
    ):
        kv_cache.run(parser.parse_args(["--no-run", "--tensor-model-parallel-size", "3"]))


def test_a_cache_beyond_memory_is_not_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_sharedproj.profiling.timing import Machine

    monkeypatch.setattr(Machine, "free_bytes", lambda _: 8 << 20)
    parser = argparse.ArgumentParser()
    kv_cache.add_arguments(parser)
    line = ["--attention-variant", "qk_eq_v", "--num-query-groups", "1,16", "--context", "1024"]
    kv_cache.run(parser.parse_args([*line, "--format", "json"]))
    captured = capsys.readouterr()
    small, large = json.loads(captured.out)
    assert (small["equal"], large["equal"], large["measured_bytes"]) == (True, None, None)
    assert "Q-K=V, bfloat16, batch 1, 1,024 tokens: not measured" in captured.err


@pytest.mark.parametrize("fault", ["untied", "wide"])
def test_a_cache_that_holds_more_is_not_equal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A cache that stores a tied tensor twice, or in another dtype, is seen by its storage."""
    import torch

    from megatron_sharedproj.layers import kv_cache as live

    class Wrong(live.KVCache):
        def __init__(self, **sizes: Any) -> None:
            changed = {"shapes": [sizes["shapes"][0]] * 2} if fault == "untied" else {"dtype": torch.float32}
            super().__init__(**{**sizes, **changed})

    monkeypatch.setattr(live, "KVCache", Wrong)
    found = cache_rows(capsys, "--context", "64")
    wrong = {row["name"] for row in found if not row["equal"]}
    assert wrong == ({"Q-K=V", "Q=K=V", "Q-GQA-4", "Q-MQA"} if fault == "untied" else set(CACHED))


@pytest.mark.parametrize("variant, groups", [("qkv", 4), ("qk_eq_v", 4), ("qk_eq_v", 1), ("q_eq_k", 4)])
def test_a_cache_that_a_model_has_filled(variant: str, groups: int) -> None:
    """Tokens go through a Megatron-Core model and through its Hugging Face form; both caches are measured."""
    import torch

    from megatron_sharedproj import formulas
    from megatron_sharedproj.layers.hf import SharedProjCache
    from megatron_sharedproj.layers.kv_cache import KVCache
    from megatron_sharedproj.model import build_model
    from megatron_sharedproj.profiling.counted_flops import eager_model

    config = PRESETS["300m"].replace(
        attention_variant=variant, num_query_groups=groups, num_layers=2, hidden_size=32,
        num_attention_heads=4, kv_channels=8, ffn_hidden_size=48, padded_vocab_size=64,
        max_position_embeddings=128,
    )  # fmt: skip
    cache = KVCache.for_model(build_model(config), config, max_sequences=2, max_tokens=100)
    slots = [cache.allocate(), cache.allocate()]
    cache.extend(slots, 70)
    assert cache.tokens == 2 * 128
    assert cache.nbytes() == formulas.kv_cache_bytes(config, 128, 2, bytes_per_element=4)

    running = eager_model(config)
    filled = SharedProjCache(running.config, max_cache_len=70)
    with torch.no_grad():
        running(input_ids=torch.zeros(2, 70, dtype=torch.long), past_key_values=filled, use_cache=True)
    assert filled.get_seq_length() == 70
    assert filled.nbytes() == formulas.kv_cache_bytes(config, 70, 2, bytes_per_element=4)
