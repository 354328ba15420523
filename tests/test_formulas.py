"""Every count against the paper's figures (literals of its released tables)."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sharedproj import formulas
from megatron_sharedproj.config import PRESETS, ModelConfig, ParallelConfig

# name: (variant, groups at 300M)
MODELS = {
    "qkv": ("qkv", 16),
    "q_eq_k": ("q_eq_k", 16),
    "qk_eq_v": ("qk_eq_v", 16),
    "q_eq_k_eq_v": ("q_eq_k_eq_v", 16),
    "GQA-4": ("qkv", 4),
    "MQA": ("qkv", 1),
    "Q-GQA-4": ("qk_eq_v", 4),
    "Q-MQA": ("qk_eq_v", 1),
}
BY_PROJECTIONS = {3: "qkv", 2: "qk_eq_v", 1: "q_eq_k_eq_v"}


def model_300m(name: str) -> ModelConfig:
    variant, groups = MODELS[name]
    return PRESETS["300m"].replace(attention_variant=variant, num_query_groups=groups)


@pytest.mark.parametrize(
    "name, total",
    [
        ("qkv", 305_534_976),
        ("q_eq_k", 284_542_976),
        ("qk_eq_v", 284_542_976),
        ("q_eq_k_eq_v", 263_550_976),
        ("GQA-4", 274_046_976),
        ("MQA", 266_174_976),
        ("Q-GQA-4", 268_798_976),
        ("Q-MQA", 264_862_976),
    ],
)
def test_parameters_300m(name: str, total: int) -> None:
    counts = formulas.parameters(model_300m(name))
    assert counts.pop("total") == total
    assert sum(counts.values()) == total


def test_parameters_1b() -> None:
    assert formulas.parameters(PRESETS["1b"])["total"] == 1_215_102_976


@pytest.mark.parametrize(
    "name, attention",
    [
        ("qkv", 83_968_000),
        ("q_eq_k", 62_976_000),
        ("qk_eq_v", 62_976_000),
        ("q_eq_k_eq_v", 41_984_000),
    ],
)
def test_attention_parameters_300m(name: str, attention: int) -> None:
    assert formulas.parameters(model_300m(name))["attention"] == attention


@pytest.mark.parametrize(
    "name, per_token, mib, saved_percent",
    [
        ("qkv", 81_920, 2560, 0.0),
        ("q_eq_k", 81_920, 2560, 0.0),
        ("qk_eq_v", 40_960, 1280, 50.0),
        ("q_eq_k_eq_v", 40_960, 1280, 50.0),
        ("GQA-4", 20_480, 640, 75.0),
        ("MQA", 5_120, 160, 93.75),
        ("Q-GQA-4", 10_240, 320, 87.5),
        ("Q-MQA", 2_560, 80, 96.875),
    ],
)
def test_kv_cache_300m(name: str, per_token: int, mib: int, saved_percent: float) -> None:
    bytes_per_token = formulas.kv_cache_bytes_per_token(model_300m(name))
    assert bytes_per_token == per_token
    assert bytes_per_token * 32_768 == mib * 2**20
    baseline = formulas.kv_cache_bytes_per_token(model_300m("qkv"))
    assert 100 * (1 - bytes_per_token / baseline) == saved_percent
    assert formulas.kv_cache_bytes_per_token(model_300m(name), bytes_per_element=4) == 2 * per_token


# T, projections, MACs, FLOPs counted by torch.profiler on the eager fp32 model (paper.md, section 6).
COMPUTE = [
    (128, 3, 39_476_789_248, 78_964_195_328),
    (128, 2, 36_792_434_688, 73_595_486_208),
    (128, 1, 34_108_080_128, 68_226_777_088),
    (512, 3, 165_960_220_672, 332_025_823_232),
    (512, 2, 155_222_802_432, 310_550_986_752),
    (512, 1, 144_485_384_192, 289_076_150_272),
    (1024, 3, 353_395_277_824, 707_169_091_584),
    (1024, 2, 331_920_441_344, 664_219_418_624),
    (1024, 1, 310_445_604_864, 621_269_745_664),
    (2048, 3, 792_689_901_568, 1_586_807_963_648),
    (2048, 2, 749_740_228_608, 1_500_908_617_728),
    (2048, 1, 706_790_555_648, 1_415_009_271_808),
]


@pytest.mark.parametrize("tokens, projections, macs, profiled", COMPUTE)
def test_macs_300m(tokens: int, projections: int, macs: int, profiled: int) -> None:
    config = model_300m(BY_PROJECTIONS[projections])
    counts = formulas.macs(config, tokens)
    assert counts.pop("total") == macs
    assert sum(counts.values()) == macs
    # The profiler's count has the score scaling and the residual and embedding additions besides.
    layers, heads, d = config.num_layers, config.num_attention_heads, config.hidden_size
    additions = layers * heads * tokens**2 + 2 * layers * tokens * d + tokens * d
    assert 2 * macs + additions == profiled


def test_both_two_projection_variants_compute_alike() -> None:
    assert formulas.macs(model_300m("q_eq_k"), 512) == formulas.macs(model_300m("qk_eq_v"), 512)


@pytest.mark.parametrize(
    "name, key_value_rows",
    [("GQA-4", 2 * 4 * 64), ("MQA", 2 * 64), ("Q-GQA-4", 4 * 64), ("Q-MQA", 64)],
)
def test_shared_heads_project_fewer_rows(name: str, key_value_rows: int) -> None:
    config = model_300m(name)
    assert formulas.projected_rows(config) == 1024 + key_value_rows
    counts = formulas.macs(config, 128)
    assert counts["projections"] == 20 * 128 * 1024 * (1024 + key_value_rows)
    baseline = formulas.macs(model_300m("qkv"), 128)
    for part in ("scores", "output", "mlp", "head"):
        assert counts[part] == baseline[part]


@pytest.mark.parametrize("tokens", [1, 2, 7, 128])
def test_causal_macs_count_the_visible_pairs(tokens: int) -> None:
    config = model_300m("qk_eq_v")
    pairs = sum(1 for i in range(tokens) for j in range(tokens) if j <= i)
    full, causal = formulas.macs(config, tokens), formulas.macs(config, tokens, causal=True)
    assert causal["scores"] == 20 * 2 * pairs * 1024
    assert full["scores"] == 20 * 2 * tokens**2 * 1024
    assert full["total"] - causal["total"] == full["scores"] - causal["scores"]


def test_train_flops_per_token() -> None:
    # 300M, T = 2048: causal scores are (T + 1) / 2T of the full ones; 2 FLOPs a MAC, backward twice forward.
    full_scores = 20 * 2 * 2048**2 * 1024
    causal = 792_689_901_568 - full_scores + full_scores * 2049 // 4096
    per_token = formulas.train_flops_per_token(model_300m("qkv"), 2048)
    assert per_token == pytest.approx(6 * causal / 2048, rel=1e-15)


def memory(config: ModelConfig | None = None, parallel: ParallelConfig | None = None, **changes: Any) -> Any:
    values: dict[str, Any] = {"seq_length": 512, "micro_batch_size": 2, **changes}
    return formulas.training_memory_bytes(config or model_300m("qkv"), parallel or ParallelConfig(), **values)


def test_training_memory_of_weights_is_exact() -> None:
    counts = memory()
    assert (counts["weights"], counts["gradients"]) == (4 * 305_534_976, 4 * 305_534_976)
    assert counts["optimizer"] == 8 * 305_534_976
    low = memory(low_precision=True)
    assert (low["weights"], low["gradients"]) == (2 * 305_534_976, 4 * 305_534_976)
    assert low["optimizer"] == 12 * 305_534_976
    for each in (counts, low):
        assert each["total"] == sum(value for name, value in each.items() if name != "total")


@pytest.mark.parametrize(
    "larger",
    [
        {"seq_length": 1024},
        {"micro_batch_size": 4},
        {"config": model_300m("qkv").replace(num_layers=24)},
        {"config": model_300m("qkv").replace(ffn_hidden_size=8192)},
        {"config": model_300m("qkv").replace(padded_vocab_size=60000)},
        {"config": model_300m("qkv").replace(activation="swiglu")},
    ],
)
def test_training_memory_grows(larger: dict[str, Any]) -> None:
    assert memory(**larger)["total"] > memory()["total"]


def test_training_memory_shrinks_with_fewer_projections() -> None:
    totals = [memory(model_300m(name))["total"] for name in ("qkv", "qk_eq_v", "Q-GQA-4", "Q-MQA")]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_training_memory_of_parallel_runs() -> None:
    one, two = memory(), memory(parallel=ParallelConfig(tensor_model_parallel_size=2))
    sequence = memory(parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True))
    for part in ("weights", "gradients", "optimizer", "logits"):
        assert two[part] * 2 == one[part]
    assert one["activations"] / 2 < two["activations"] < one["activations"]
    assert sequence["activations"] * 2 == one["activations"]


def test_only_the_distributed_optimizer_divides_its_state() -> None:
    plain = memory(data_parallel_size=8)
    sharded = memory(parallel=ParallelConfig(use_distributed_optimizer=True), data_parallel_size=8)
    assert plain == memory()
    assert sharded["optimizer"] * 8 == plain["optimizer"]
    assert {k: v for k, v in sharded.items() if k not in ("optimizer", "total")} == {
        k: v for k, v in plain.items() if k not in ("optimizer", "total")
    }


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu (2 thread(s) per process)", None),
        ("", None),
    ],
)
def test_peak_flops(name: str, flops: float | None) -> None:
    assert formulas.peak_flops(name) == flops
