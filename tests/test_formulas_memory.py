"""Memory and communication formulas against real Megatron models, trainers and collectives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_worker import BATCH, LAYOUTS, MICRO, MODELS, model_saved_bytes

import tiny
from megatron_sharedproj import formulas
from megatron_sharedproj.config import PRESETS, ModelConfig, ParallelConfig, RunConfig, from_dict
from megatron_sharedproj.formulas_memory import (
    communication_bytes,
    in_flight,
    parameters_per_rank,
    training_memory_bytes,
)

# Every case so far agreed to the byte, but for the random-number states that recompute keeps.
TOLERANCE = 0.02
SHARED = [("qkv", 4), ("qkv", 2), ("qkv", 1), ("q_eq_k", 4), ("qk_eq_v", 4), ("qk_eq_v", 2), ("qk_eq_v", 1),
          ("q_eq_k_eq_v", 4)]  # fmt: skip
DROPOUT = {"hidden_dropout": 0.1}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": DROPOUT,
    "attention dropout": {"attention_dropout": 0.1},
    "tanh": {"activation": "gelu_tanh"},
    "llama": {"normalization": "RMSNorm", "activation": "swiglu", "add_bias_linear": False, **DROPOUT},
}
ROTARY: dict[str, dict[str, Any]] = {
    "rope": {},
    "rope, query and key norm": {"qk_layernorm": True},
    "rope, RMS query and key norm": {"qk_layernorm": True, "normalization": "RMSNorm"},
    "rope, attention dropout": {"attention_dropout": 0.1},
    "rope, attention dropout, norms": {"attention_dropout": 0.1, "qk_layernorm": True},
    "rope, half of the head": {"rotary_percent": 0.5},
}
NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"qk_layernorm": True},
    "RMS": {"qk_layernorm": True, "normalization": "RMSNorm"},
    "attention dropout": {"attention_dropout": 0.1},
    "attention dropout, norms": {"attention_dropout": 0.1, "qk_layernorm": True},
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "full, two layers a unit": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "full, one layer of all": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective"},
}
SEQ, MICRO_BATCH = 64, 2


def small(**changes: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "padded_vocab_size": 128,
            "max_position_embeddings": SEQ,
            "activation": "gelu",
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **changes,
        }
    )


def check_saved(config: ModelConfig, recompute: str = "none", dtype: torch.dtype = torch.float32) -> None:
    from megatron_sharedproj.model import build_model

    parallel = ParallelConfig(**RECOMPUTE.get(recompute, {}))
    model = build_model(config, parallel, dtype=dtype)
    found = model_saved_bytes(model, MICRO_BATCH, SEQ)
    counts = training_memory_bytes(
        config, parallel, seq_length=SEQ, micro_batch_size=MICRO_BATCH, fused=False,
        low_precision=dtype != torch.float32,
    )  # fmt: skip
    assert counts["activations"] + counts["logits"] == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant, groups", SHARED)
def test_activations_are_what_autograd_keeps(
    parallel_state: Any, variant: str, groups: int, shape: str
) -> None:
    check_saved(small(attention_variant=variant, num_query_groups=groups, **SHAPES[shape]))


@pytest.mark.parametrize("shape", ROTARY)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_activations_with_rotary_positions(parallel_state: Any, groups: int, shape: str) -> None:
    check_saved(small(num_query_groups=groups, position_embedding_type="rope", **ROTARY[shape]))


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("variant, groups", [(v, g) for v, g in SHARED if v != "qkv"])
def test_activations_with_shared_norms_and_rotations(
    parallel_state: Any, variant: str, groups: int, norms: str
) -> None:
    shared = {"attention_variant": variant, "num_query_groups": groups, **NORMS[norms]}
    check_saved(small(**shared))
    if variant == "q_eq_k":
        check_saved(small(position_embedding_type="rope", **shared))
        return
    for scheme in ("rotate_keys", "rotate_values", "partial", "separate_rope_head"):
        if scheme == "separate_rope_head" and variant == "q_eq_k_eq_v":
            continue
        part = 1.0 if scheme == "rotate_values" else 0.5
        config = small(position_embedding_type="rope", kv_rotary=scheme, rotary_percent=part, **shared)
        check_saved(config)
        check_saved(config, "selective")


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("variant, groups", SHARED)
def test_activations_with_recompute(parallel_state: Any, variant: str, groups: int, recompute: str) -> None:
    check_saved(small(attention_variant=variant, num_query_groups=groups, **DROPOUT), recompute)
    if recompute == "selective":
        dropped = small(attention_variant=variant, num_query_groups=groups, attention_dropout=0.1)
        check_saved(dropped, recompute)


@pytest.mark.parametrize("variant", ["qkv", "qk_eq_v"])
def test_activations_in_bf16(parallel_state: Any, variant: str) -> None:
    check_saved(small(attention_variant=variant, **DROPOUT), dtype=torch.bfloat16)


def test_one_sequence_and_untied_head(parallel_state: Any) -> None:
    check_saved(small(untie_embeddings_and_output_weights=True, position_embedding_type="none"))


@pytest.mark.parametrize("variant, untied", [("qkv", False), ("qk_eq_v", False), ("qk_eq_v", True)])
def test_a_trainers_tensors(tmp_path: Path, parallel_state: Any, variant: str, untied: bool) -> None:
    """Weights, gradients and Adam state to the byte; the peak of a step beside them within 3%."""
    line = tiny.flags(
        tiny.write_data(tmp_path), variant, num_layers=4, hidden_size=64, seq_length=64,
        max_position_embeddings=64, micro_batch_size=4, global_batch_size=8, hidden_dropout=0.1,
        make_vocab_size_divisible_by=4096, untie_embeddings_and_output_weights=untied,
    )  # fmt: skip
    trainer = tiny.trainer(line)
    iterator = trainer._iterator(trainer.train_data, 0)
    trainer.model.train()
    trainer.step(iterator)  # Adam's state is made in the first
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        trainer.step(iterator)
    counts = training_memory_bytes(
        trainer.config.model, trainer.config.parallel, seq_length=64, micro_batch_size=4, fused=False
    )
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in trainer.model.parameters()
    }
    states = [
        value
        for state in trainer.optimizer.optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    assert counts["weights"] == sum(storages.values())
    assert counts["gradients"] == sum(buffer.grad_data.nbytes for buffer in trainer.model.buffers)
    assert counts["optimizer"] == sum(state.nbytes for state in states)

    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert counts["activations"] + counts["logits"] + counts["temporary"] == pytest.approx(peak, rel=0.03)


def memory(config: ModelConfig | None = None, parallel: ParallelConfig | None = None, **changes: Any) -> Any:
    values: dict[str, Any] = {"seq_length": 512, "micro_batch_size": 2, **changes}
    return training_memory_bytes(config or PRESETS["300m"], parallel or ParallelConfig(), **values)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant, sharing", [("qkv", 1), ("qk_eq_v", 4), ("q_eq_k_eq_v", 1)])
def test_one_rank_has_all_parameters(preset: str, variant: str, sharing: int) -> None:
    config = PRESETS[preset]
    config = config.replace(attention_variant=variant, num_query_groups=config.num_attention_heads // sharing)
    assert parameters_per_rank(config) == formulas.parameters(config)["total"]


def test_bytes_of_a_parameter() -> None:
    count = 305_534_976
    assert [memory()[part] for part in ("weights", "gradients", "optimizer")] == [
        4 * count, 4 * count, 8 * count
    ]  # fmt: skip
    low = memory(low_precision=True)
    assert [low[part] for part in ("weights", "gradients", "optimizer")] == [2 * count, 4 * count, 12 * count]
    reduced = memory(parallel=ParallelConfig(grad_reduce_in_bf16=True), low_precision=True)
    assert reduced["gradients"] == 2 * count
    assert low["total"] == sum(value for name, value in low.items() if name != "total")


def test_only_the_distributed_optimizer_divides_its_state() -> None:
    plain = memory(data_parallel_size=8)
    sharded = memory(parallel=ParallelConfig(use_distributed_optimizer=True), data_parallel_size=8)
    assert plain == memory()
    assert sharded["optimizer"] * 8 == plain["optimizer"]
    assert {k: v for k, v in sharded.items() if k not in ("optimizer", "total")} == {
        k: v for k, v in plain.items() if k not in ("optimizer", "total")
    }


def test_fewer_projections_need_less() -> None:
    models = [("qkv", 16), ("qk_eq_v", 16), ("qk_eq_v", 4), ("qk_eq_v", 1)]
    configs = [PRESETS["300m"].replace(attention_variant=v, num_query_groups=g) for v, g in models]
    for part in ("weights", "gradients", "optimizer", "total"):
        found = [memory(config)[part] for config in configs]
        assert found == sorted(found, reverse=True) and len(set(found)) == len(found)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_keeps_less(recompute: str) -> None:
    assert memory(recompute=recompute)["activations"] < memory()["activations"]
    assert memory(recompute=recompute)["total"] < memory()["total"]


@pytest.mark.parametrize(
    "stage, expected",
    # By hand, 4 stages of 2 chunks: 2 per later stage and a round of 4, then one before the first backward.
    [(0, (11, 8)), (1, (9, 8)), (2, (7, 7)), (3, (5, 5))],
)
def test_interleaved_stages_wait_with_more(stage: int, expected: tuple[int, int]) -> None:
    assert in_flight(4, stage, 2, None) == in_flight(4, stage, 2, 8) == expected
    assert in_flight(4, stage, 2, 4) == (min(expected[0], 8), min(expected[1], 4))
    assert in_flight(4, stage, 1, None) == (4 - stage, 4 - stage)


def test_pipeline_stages() -> None:
    """Stages together hold the model, and a tied embedding twice; the first holds the most micro batches."""
    config = PRESETS["300m"]
    stages = [
        parameters_per_rank(config, pipeline_parallel_size=4, pipeline_stage=stage) for stage in range(4)
    ]
    assert sum(stages) == formulas.parameters(config)["total"] + 50304 * 1024
    kept = [memory(pipeline_parallel_size=4, pipeline_stage=stage)["activations"] for stage in range(4)]
    assert kept == sorted(kept, reverse=True)
    one = memory(pipeline_parallel_size=4, pipeline_stage=1, micro_batches=1)["activations"]
    assert kept[1] == 3 * one
    # Without the ends a quarter of the layers keeps a quarter.
    assert one * 4 == memory()["activations"] - (_ends(config, 1024))
    assert memory(pipeline_parallel_size=4, pipeline_stage=0)["logits"] == 0


def _ends(config: ModelConfig, tokens: int) -> int:
    embedding = 16 + config.hidden_size  # indices, and a mask byte per element
    final = 2 * 4 * config.hidden_size + 8 + 9  # norm's input, output and statistics; loss's target and mask
    return tokens * (embedding + final)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_length": 0}, "--seq-length 0: must be at least 1"),
        ({"micro_batch_size": -1}, "--micro-batch-size -1: must be at least 1"),
        ({"data_parallel_size": 0}, "--data-parallel-size 0: must be at least 1"),
        ({"recompute": "some"}, "--recompute-granularity some: choose one of none, selective, full"),
        ({"pipeline_parallel_size": 3}, "--pipeline-model-parallel-size 3: must divide --num-layers 20"),
        ({"pipeline_parallel_size": 2, "pipeline_stage": 2}, "pipeline stage 2: must be from 0 to 1"),
    ],
)
def test_bad_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory(**changes)


def sent(parallel: ParallelConfig, **changes: Any) -> dict[str, int]:
    values: dict[str, Any] = {"seq_length": 512, "micro_batch_size": 2, **changes}
    return communication_bytes(PRESETS["300m"], parallel, **values)


def test_one_rank_sends_nothing() -> None:
    assert set(sent(ParallelConfig()).values()) == {0}


def test_distributed_optimizer_sends_a_gather_instead_of_half_a_reduction() -> None:
    count = formulas.parameters(PRESETS["300m"])["total"]
    plain = sent(ParallelConfig(), data_parallel_size=4, low_precision=True)
    sharded = sent(ParallelConfig(use_distributed_optimizer=True), data_parallel_size=4, low_precision=True)
    assert plain["data_parallel"] == 2 * sharded["data_parallel"] == 2 * 3 * count
    assert plain["parameter_gather"] == 0
    assert sharded["parameter_gather"] == 2 * count * 3 // 4


def test_copies_of_keys_and_values_send_less_than_gathered_rows() -> None:
    """By hand: 16 + 1 heads of 64 rows, of which 8 + 1 on each of two ranks; Transformer Engine gathers."""
    config = PRESETS["300m"].replace(attention_variant="qk_eq_v", num_query_groups=1)
    ways = [
        ParallelConfig(tensor_model_parallel_size=2, transformer_impl=name)
        for name in ("local", "transformer_engine")
    ]
    copied, gathered = (
        communication_bytes(config, way, seq_length=512, micro_batch_size=2)["tensor_parallel"]
        for way in ways
    )
    # Halves of an output [1024, 17 * 64], twice; half of a gradient [64, 1024 + 1], twice; fp32, 20 layers.
    assert gathered - copied == 20 * 4 * (1024 * 17 * 64 - 64 * 1025)
    copied, gathered = (memory(config, way)["activations"] for way in ways)
    assert gathered - copied == 20 * 4 * (1024 * 8 * 64 - 9 * 64 * 1024)
    one, two = (parameters_per_rank(config, ranks) for ranks in (1, 2))
    without_keys = config.replace(attention_variant="q_eq_k_eq_v", num_query_groups=16)
    halves = [parameters_per_rank(without_keys, ranks) for ranks in (1, 2)]
    assert one - halves[0] == two - halves[1] == 20 * 64 * 1025


def test_pipeline_sends_to_neighbours() -> None:
    hop = 1024 * 1024 * 4
    table = 50304 * 1024 * 4
    found = [
        sent(ParallelConfig(), pipeline_parallel_size=4, pipeline_stage=stage, micro_batches=8)["pipeline"]
        for stage in range(4)
    ]
    assert found == [8 * hop + table, 16 * hop, 16 * hop, 8 * hop + table]
    interleaved = ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=5)
    found = [sent(interleaved, pipeline_stage=stage, micro_batches=8)["pipeline"] for stage in (0, 1)]
    assert found == [8 * 9 * hop + table] * 2  # five chunks there and back, but for the loss and the tokens


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ranks")
    tiny.write_data(folder)
    tests = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tests / "memory_worker.py"), str(folder), *LAYOUTS]
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_ranks_keep_and_send_what_is_counted(measured: Any, layout: str, model: str) -> None:
    found = measured[f"{layout} {model}"]
    config = from_dict(RunConfig, found["config"])
    tp = config.parallel.tensor_model_parallel_size
    shape = {"seq_length": tiny.SEQ, "micro_batch_size": MICRO}
    kept = training_memory_bytes(config.model, config.parallel, fused=False, **shape)
    replicas = 2 // config.parallel.ranks_per_replica
    sends = communication_bytes(
        config.model, config.parallel, **shape, micro_batches=BATCH // MICRO // replicas,
        data_parallel_size=replicas,
    )  # fmt: skip
    assert parameters_per_rank(config.model, tp) == found["parameters"]
    assert kept["activations"] + kept["logits"] == pytest.approx(found["saved"], rel=TOLERANCE)
    assert sends["total"] == pytest.approx(found["sent"], rel=TOLERANCE)
