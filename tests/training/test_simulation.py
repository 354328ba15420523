"""A simulated rank: parameters and bytes sent equal the formulas', for every kind of model and layout."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny

TESTS = Path(__file__).resolve().parents[1]
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qkv": ("qkv", 0, {}),
    "q_eq_k_eq_v": ("q_eq_k_eq_v", 0, {}),
    "Q-MQA": ("qk_eq_v", 1, {}),
    "llama": (
        "qkv",
        2,
        {
            "normalization": "RMSNorm",
            "swiglu": True,
            "no_bias_gelu_fusion": None,
            "disable_bias_linear": True,
            "untie_embeddings_and_output_weights": True,
            "position_embedding_type": "rope",
        },
    ),
}
PP2 = {"pipeline_model_parallel_size": 2, "num_layers": 4}
TP2 = {"tensor_model_parallel_size": 2}
BF16 = {"bf16": True, "use_distributed_optimizer": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "DP8": (8, {}),
    "DP8+optimizer": (8, {**BF16, "grad_reduce_in_bf16": True}),
    "DP4+overlap": (4, {**BF16, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2": (2, TP2),
    "TP2+SP x DP2": (4, {**TP2, **BF16, "sequence_parallel": True}),
    "CP2": (2, {"context_parallel_size": 2}),
    "CP2 x TP2 x DP2": (8, {"context_parallel_size": 2, **TP2, **BF16}),
    "PP2 x DP2": (4, {**PP2, **BF16}),
    "TP2+SP x PP2": (4, {**PP2, **TP2, **BF16, "sequence_parallel": True}),
    "PP2, interleaved": (2, {**PP2, **BF16, "num_virtual_stages_per_pipeline_rank": 2}),
    "TP4 x DP128": (512, {"tensor_model_parallel_size": 4, "bf16": True}),
}


def line(model: str, layout: str) -> list[str]:
    variant, groups, shape = MODELS[model]
    world, flags = LAYOUTS[layout]
    sizes = (flags.get(f"{name}_model_parallel_size", 1) for name in ("tensor", "pipeline"))
    replicas = world // math.prod(sizes) // flags.get("context_parallel_size", 1)
    changes = {"micro_batch_size": 2, "global_batch_size": 2 * replicas * 6, "data_path": None, "split": None}
    return tiny.flags("", variant, groups, **{**changes, **shape, **flags})


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], list[dict[str, Any]]]:
    cases = [(model, layout) for model in MODELS for layout in LAYOUTS]
    asked = json.dumps([[LAYOUTS[layout][0], line(model, layout)] for model, layout in cases])
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "training" / "simulation_worker.py")],
        input=asked,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = iter(json.loads(done.stdout))
    stages = {case: LAYOUTS[case[1]][1].get("pipeline_model_parallel_size", 1) for case in cases}
    return {case: [next(ranks) for _ in range(min(2, stages[case]))] for case in cases}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_equals_the_formulas(found: Any, model: str, layout: str) -> None:
    for rank in found[model, layout]:
        assert rank["built"] == rank["parameters"]
        assert rank["total"] == sum(rank["counted"].values())
        for part, counted in rank["counted"].items():
            # Megatron pads the buffers of its distributed optimizer, which shows in a model this small.
            padded = part in ("data_parallel", "parameter_gather") and "bf16" in LAYOUTS[layout][1]
            assert counted == pytest.approx(rank["formula"][part], rel=0.05 if padded else 1e-12), part


def test_one_process_sends_nothing(found: Any) -> None:
    assert all(found[model, "one"][0]["kinds"] == [] for model in MODELS)


def test_collectives_are_named(found: Any) -> None:
    [rank] = found["qkv", "TP2+SP x DP2"]
    kinds = {(purpose, kind): (ranks, calls) for purpose, kind, ranks, calls in rank["kinds"]}
    assert kinds["data_parallel", "reduce-scatter"] == (2, 1)
    assert kinds["parameter_gather", "all-gather"] == (2, 1)
    # Two linears with an output that is scattered, per layer and direction, six micro batches, and the ends.
    assert kinds["tensor_parallel", "reduce-scatter"][1] >= 2 * 2 * 2 * 6
