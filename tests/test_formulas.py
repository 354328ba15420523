"""Every count against the paper's figures (literals of its released tables)."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest

from megatron_sharedproj import formulas
from megatron_sharedproj.config import PRESETS, ModelConfig
from megatron_sharedproj.profiling.commands.models import PAPER_VARIANTS, PaperVariant
from megatron_sharedproj.variants import KV_ROTARY

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


@pytest.mark.parametrize("tokens", [1, 7, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_a_step(tokens: int, causal: bool) -> None:
    config = model_300m("Q-GQA-4")
    found = formulas.flops(config, tokens, causal=causal)
    forward = 2 * formulas.macs(config, tokens, causal=causal)["total"]
    assert found == {"forward": forward, "backward": 2 * forward, "total": 3 * forward}


@pytest.mark.parametrize(
    "ranks, groups, per_rank", [(1, 16, 16), (4, 16, 4), (4, 4, 1), (8, 4, 1), (16, 1, 1), (2, 4, 2)]
)
def test_groups_of_a_rank(ranks: int, groups: int, per_rank: int) -> None:
    config = PRESETS["300m"].replace(attention_variant="qk_eq_v", num_query_groups=groups)
    assert formulas.groups_per_rank(config, ranks) == per_rank
    assert formulas.kv_cache_bytes_per_token(config, 2, ranks) == per_rank * 64 * 20 * 2
    assert formulas.kv_cache_bytes(config, 100, 3, 1, ranks) == 300 * per_rank * 64 * 20


@pytest.mark.parametrize(("heads", "groups", "ranks"), [(16, 16, 3), (16, 4, 0), (16, 1, 32), (12, 6, 4)])
def test_groups_that_ranks_cannot_share(heads: int, groups: int, ranks: int) -> None:
    config = PRESETS["300m"].replace(num_attention_heads=heads, num_query_groups=groups, kv_channels=64)
    with pytest.raises(ValueError, match=rf"--tensor-model-parallel-size {ranks}: must divide .* use one of"):
        formulas.kv_cache_bytes_per_token(config, 2, ranks)


# Every variant with every number of groups that four heads can have.
_VARIANTS = [(v, 4) for v in ("qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v")] + [
    (v, g) for v in ("qkv", "qk_eq_v") for g in (2, 1)
]


def accepted() -> list[ModelConfig]:
    """Every combination of options that the trainer accepts, on a shape whose sizes all differ."""
    base = ModelConfig(
        num_layers=2, hidden_size=48, num_attention_heads=4, kv_channels=10, ffn_hidden_size=100,
        padded_vocab_size=64, max_position_embeddings=16,
    )  # fmt: skip
    positions = [("learned_absolute", "", 1.0), ("none", "", 1.0), ("rope", "", 0.6)]
    positions += [("rope", name, 1.0 if name == "rotate_values" else 0.6) for name in list(KV_ROTARY)[1:]]
    found = []
    for (variant, groups), norm, activation, position, bias, qk_norm, untied in itertools.product(
        _VARIANTS, ("LayerNorm", "RMSNorm"), ("gelu", "gelu_tanh", "swiglu"),
        positions, (True, False), (False, True), (False, True),
    ):  # fmt: skip
        kind, scheme, part = position
        if scheme and variant in ("qkv", "q_eq_k"):
            continue  # the one that they have is there already, unnamed
        try:
            found.append(base.replace(
                attention_variant=variant, num_query_groups=groups, normalization=norm, activation=activation,
                position_embedding_type=kind, kv_rotary=scheme, rotary_percent=part, add_bias_linear=bias,
                qk_layernorm=qk_norm, untie_embeddings_and_output_weights=untied,
            ))  # fmt: skip
        except ValueError:
            continue
    return found


ACCEPTED = accepted()
assert len(ACCEPTED) == 8 * 2 * 48 + 4 * 48 + 15 * 48
# One in 29: a prime, so that every option's values appear.
SAMPLE = ACCEPTED[::29]


OPTIONS = (
    "attention_variant", "num_query_groups", "normalization", "activation", "position_embedding_type",
    "kv_rotary", "add_bias_linear", "qk_layernorm", "untie_embeddings_and_output_weights",
)  # fmt: skip


def short_name(config: ModelConfig) -> str:
    return "-".join(str(getattr(config, name)) for name in OPTIONS)


def check_built_model(config: ModelConfig) -> None:
    """Parameters by component, products forward and backward, all that the profiler counts, cache bytes."""
    import torch

    from megatron_sharedproj.layers.hf import SharedProjCache
    from megatron_sharedproj.profiling.counted_flops import count_flops, eager_model

    tokens = 7
    model = eager_model(config)
    held = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parts = {
        "embedding": "embed_tokens", "position_embedding": "embed_positions", "attention": ".self_attn.",
        "mlp": ".mlp.", "head": "lm_head", "norms": "norm.",
    }  # fmt: skip
    counts = formulas.parameters(config)
    assert sum(held.values()) == counts["total"]
    for part, mark in parts.items():
        names = [name for name in held if mark in name and (part != "norms" or "self_attn" not in name)]
        assert sum(held[name] for name in names) == counts[part], part
    assert count_flops(model, tokens).total == formulas.profiled_flops(config, tokens)

    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == formulas.flops(config, tokens)["total"]

    cache = SharedProjCache(model.config, max_cache_len=tokens)
    with torch.no_grad():
        model(input_ids=torch.zeros(3, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert cache.nbytes() == formulas.kv_cache_bytes(config, tokens, 3, bytes_per_element=4)


@pytest.mark.parametrize("config", SAMPLE, ids=short_name)
def test_built_models(config: ModelConfig) -> None:
    check_built_model(config)


def test_the_sample_has_every_option() -> None:
    for name, values in zip(OPTIONS, (4, 3, 2, 3, 3, 5, 2, 2, 2), strict=True):
        assert len({getattr(config, name) for config in SAMPLE}) == values, name


@pytest.mark.slow
def test_all_built_models() -> None:
    for config in ACCEPTED:
        check_built_model(config)


@pytest.mark.parametrize("preset", ["300m", "1b"])
@pytest.mark.parametrize("row", PAPER_VARIANTS, ids=lambda row: row.name)
def test_models_of_both_sizes(parallel_state: Any, preset: str, row: PaperVariant) -> None:
    """Megatron-Core's model and the Hugging Face form, built without memory."""
    import torch

    from megatron_sharedproj.model import build_model
    from megatron_sharedproj.profiling.counted_flops import eager_model

    base = PRESETS[preset]
    groups = row.groups(base.num_attention_heads)
    config = base.replace(attention_variant=row.variant, num_query_groups=groups)
    counts = formulas.parameters(config)
    with torch.device("meta"):
        megatron = build_model(config)
    assert sum(p.numel() for p in megatron.parameters()) == counts["total"]
    assert sum(p.numel() for p in eager_model(config, "meta").parameters()) == counts["total"]
    # Each linear's weight is read once per token; the head is the tied embedding.
    linears = sum(
        p.numel() for name, p in megatron.named_parameters() if "linear" in name and name.endswith("weight")
    )
    macs = formulas.macs(config, 3)
    assert macs["projections"] + macs["output"] + macs["mlp"] == 3 * linears
    assert macs["head"] == 3 * counts["embedding"]


_RANKS = """
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_sharedproj.device import get_device
get_device().install()
torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
from megatron.core import parallel_state
parallel_state.initialize_model_parallel(tensor_model_parallel_size=8, create_gloo_process_groups=False)
from megatron_sharedproj import formulas
from megatron_sharedproj.config import PRESETS, ParallelConfig
from megatron_sharedproj.layers.kv_cache import KVCache
from megatron_sharedproj.model import build_model
from megatron_sharedproj.profiling.commands.models import PAPER_VARIANTS
for row in PAPER_VARIANTS:
    config = PRESETS["300m"].replace(
        num_layers=2, attention_variant=row.variant, num_query_groups=row.groups(16), padded_vocab_size=64
    )
    model = build_model(config, ParallelConfig(tensor_model_parallel_size=8))
    groups = {layer.self_attention.num_query_groups_per_partition for layer in model.decoder.layers}
    assert groups == {formulas.groups_per_rank(config, 8)}, (row.name, groups)
    cache = KVCache.for_model(model, config, max_sequences=3, max_tokens=64, page_size=None)
    assert cache.nbytes() == formulas.kv_cache_bytes(config, 64, 3, 4, 8), row.name
    print(row.name)
"""


@pytest.mark.slow
def test_a_rank_of_eight_holds_what_the_formula_says() -> None:
    """Megatron-Core's own layers on rank 0 of 8: 16, 4 and 1 groups."""
    done = subprocess.run([sys.executable, "-c", _RANKS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
