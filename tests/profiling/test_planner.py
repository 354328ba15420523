"""What fits, and the bounds of prefill and decode."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sharedproj import formulas
from megatron_sharedproj.config import PRESETS, ModelConfig
from megatron_sharedproj.profiling import quality
from megatron_sharedproj.profiling.planner import (
    Layout,
    decode,
    largest_micro_batch,
    prefill,
    serving,
)

QKV = PRESETS["300m"]
KV = QKV.replace(attention_variant="qk_eq_v")
GPU: dict[str, Any] = {"dtype": "bf16", "peak": 312e12, "bandwidth": 1555e9}


@pytest.mark.parametrize("config", [QKV, KV])
@pytest.mark.parametrize("memory", [8 << 30, 20 << 30, 35 << 30])
def test_the_largest_micro_batch_fits_and_one_more_does_not(config: ModelConfig, memory: int) -> None:
    layout = Layout()
    size = largest_micro_batch(config, layout, 2048, memory)
    assert size >= 1
    assert layout.training_bytes(config, 2048, size)["total"] <= memory
    assert layout.training_bytes(config, 2048, size + 1)["total"] > memory


def test_nothing_fits_in_too_little() -> None:
    assert largest_micro_batch(QKV, Layout(), 2048, 1 << 30) == 0
    held = serving(QKV, memory=1 << 20, context=2048, dtype="bf16")
    assert held.sequences == 0 and held.free < 0


def test_a_pipelines_need_is_its_largest_stages() -> None:
    one = Layout(pipeline=2).training_bytes(QKV, 2048, 4)
    stages = [formulas_of_stage(stage) for stage in range(2)]
    assert one["total"] == max(stages)


def formulas_of_stage(stage: int) -> int:
    from megatron_sharedproj.formulas_memory import training_memory_bytes

    return training_memory_bytes(
        QKV, Layout().parallel, seq_length=2048, micro_batch_size=4, low_precision=True,
        pipeline_parallel_size=2, pipeline_stage=stage,
    )["total"]  # fmt: skip


def test_serving_holds_twice_the_sequences_without_v() -> None:
    memory, context = 40 << 30, 2048
    base, tied = (serving(c, memory=memory, context=context, dtype="bf16") for c in (QKV, KV))
    assert base.weights == 2 * 305_534_976
    assert (base.per_token, tied.per_token) == (81_920, 40_960)
    assert base.sequences == (memory - base.weights) // (81_920 * context)
    assert tied.weights + tied.sequences * tied.per_sequence <= memory
    assert tied.weights + (tied.sequences + 1) * tied.per_sequence > memory
    assert 2 * base.sequences <= tied.sequences <= 2 * base.sequences + 2


def test_serving_over_tensor_parallel_ranks() -> None:
    """Groups are divided over ranks while there are enough; a single group is on every rank."""
    mqa = KV.replace(num_query_groups=1)
    assert serving(KV, memory=1 << 34, context=1, dtype="fp32", tensor=4).per_token == 81_920 // 4
    whole = serving(mqa, memory=1 << 34, context=1, dtype="bf16", tensor=4).per_token
    assert whole == formulas.kv_cache_bytes_per_token(mqa)


def test_prefill_is_the_causal_forward_with_the_last_logits_alone() -> None:
    phase = prefill(QKV, batch=3, context=512, **GPU)
    full = formulas.macs(QKV, 512, causal=True)
    head = QKV.hidden_size * QKV.padded_vocab_size
    assert phase.flops == 3 * 2 * (full["total"] - 511 * head)
    weights = formulas.parameters(QKV)["total"] - 2048 * 1024
    assert phase.moved == 2 * weights + 3 * 512 * 81_920
    assert phase.tokens == 3 * 512
    assert phase.bound == "compute"
    assert phase.tokens_per_second == pytest.approx(phase.tokens * 312e12 / phase.flops)


def test_decode_reads_weights_once_and_each_cache() -> None:
    phase = decode(KV, batch=8, context=2048, **GPU)
    weights = formulas.parameters(KV)["total"] - 2048 * 1024
    assert phase.moved == 2 * weights + 8 * 2048 * 40_960
    # A prompt one token longer costs what its last token does, and the head that prefill leaves out.
    longer, shorter = (formulas.macs(KV, n, causal=True)["total"] for n in (2048, 2047))
    assert phase.flops == 8 * 2 * (longer - shorter)
    assert phase.bound == "memory"
    assert phase.tokens_per_second == pytest.approx(8 * 1555e9 / phase.moved)


def test_decode_becomes_compute_bound_where_bandwidth_is_plenty() -> None:
    assert decode(KV, batch=8, context=64, **{**GPU, "bandwidth": 1e18}).bound == "compute"


@pytest.mark.parametrize("untied", [False, True])
def test_looked_up_tables_are_not_read_whole(untied: bool) -> None:
    config = QKV.replace(untie_embeddings_and_output_weights=untied)
    counts = formulas.parameters(config)
    looked_up = counts["position_embedding"] + (counts["embedding"] if untied else 0)
    moved = decode(config, batch=1, context=1, **GPU).moved
    assert moved == 2 * (counts["total"] - looked_up) + 81_920


@pytest.mark.parametrize(
    "layout, message",
    [
        (Layout(tensor=3), "--tensor-model-parallel-size 3: must divide --num-attention-heads 16"),
        (Layout(sequence_parallel=True), "--sequence-parallel: needs --tensor-model-parallel-size"),
        (Layout(pipeline=3), "--pipeline-model-parallel-size 3: must divide --num-layers 20"),
        (Layout(distributed_optimizer=True, dtype="fp32"), "--use-distributed-optimizer: needs --dtype bf16"),
    ],
)
def test_layouts_that_do_not_divide(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(QKV, 2048)


def test_the_papers_figures() -> None:
    """The named cells of the paper's tables, at their size, and nothing for what it did not train."""
    assert quality.paper_figure(KV) == quality.PaperFigure("300m", 5.27, pytest.approx(5.27 / 5.11 - 1))
    gqa = PRESETS["1b"].replace(num_query_groups=8)
    assert quality.paper_figure(gqa) == quality.PaperFigure("1b", 5.030, pytest.approx(5.030 / 5.004 - 1))
    mqa = PRESETS["1b"].replace(attention_variant="qk_eq_v", num_query_groups=1)
    assert quality.paper_figure(mqa) == quality.PaperFigure("1b", 5.212, pytest.approx(5.212 / 5.004 - 1))
    assert quality.paper_figure(QKV.replace(num_query_groups=8)) is None
    assert quality.paper_figure(PRESETS["1b"].replace(attention_variant="q_eq_k")) is None


def test_a_shape_that_is_not_the_papers_is_said_to_be_none() -> None:
    other = KV.replace(num_layers=2)
    assert quality.paper_size(other) is None
    figure = quality.paper_figure(other)
    assert figure is not None and figure.size == "300m"
    assert any("not one of the paper's" in note for note in quality.notes({None}))
    assert not any("not one of the paper's" in note for note in quality.notes({"300m"}))
    assert quality.our_change(KV) == pytest.approx(78.63 / 77.32 - 1)
    assert quality.our_change(KV.replace(num_query_groups=4)) is None
