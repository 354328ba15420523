"""The figures that the paper's authors released, as data (paper.md, sections 2, 5 and 6).

They are of the paper's shapes (config.PRESETS). Nothing is computed from them: they stand beside our counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sharedproj.config import PRESETS, ModelConfig

# (preset, variant, groups): parameters.
PARAMETERS = {
    ("300m", "qkv", 16): 305_534_976,
    ("300m", "q_eq_k", 16): 284_542_976,
    ("300m", "qk_eq_v", 16): 284_542_976,
    ("300m", "q_eq_k_eq_v", 16): 263_550_976,
    ("300m", "qkv", 4): 274_046_976,
    ("300m", "qkv", 1): 266_174_976,
    ("300m", "qk_eq_v", 4): 268_798_976,
    ("300m", "qk_eq_v", 1): 264_862_976,
    ("1b", "qkv", 32): 1_215_102_976,
}

# (variant, groups) at 300M: bytes per token at 2 bytes per element.
CACHE_BYTES_PER_TOKEN = {
    ("qkv", 16): 81_920,
    ("qk_eq_v", 16): 40_960,
    ("qkv", 4): 20_480,
    ("qkv", 1): 5_120,
    ("qk_eq_v", 4): 10_240,
    ("qk_eq_v", 1): 2_560,
}

# Projections at 300M, heads not shared -> tokens: (MACs, FLOPs counted by torch.profiler).
_BY_PROJECTIONS = {
    3: {
        128: (39_476_789_248, 78_964_195_328),
        512: (165_960_220_672, 332_025_823_232),
        1024: (353_395_277_824, 707_169_091_584),
        2048: (792_689_901_568, 1_586_807_963_648),
    },
    2: {
        128: (36_792_434_688, 73_595_486_208),
        512: (155_222_802_432, 310_550_986_752),
        1024: (331_920_441_344, 664_219_418_624),
        2048: (749_740_228_608, 1_500_908_617_728),
    },
    1: {
        128: (34_108_080_128, 68_226_777_088),
        512: (144_485_384_192, 289_076_150_272),
        1024: (310_445_604_864, 621_269_745_664),
        2048: (706_790_555_648, 1_415_009_271_808),
    },
}
_PROJECTIONS = {"qkv": 3, "q_eq_k": 2, "qk_eq_v": 2, "q_eq_k_eq_v": 1}

# (variant, tokens) at 300M, heads not shared: 16 entries each.
MACS = {
    (variant, tokens): macs
    for variant, count in _PROJECTIONS.items()
    for tokens, (macs, _) in _BY_PROJECTIONS[count].items()
}
PROFILED_FLOPS = {
    (variant, tokens): flops
    for variant, count in _PROJECTIONS.items()
    for tokens, (_, flops) in _BY_PROJECTIONS[count].items()
}


@dataclass(frozen=True)
class Released:
    """What was released of a model and a length; None where there is no figure."""

    parameters: int | None = None
    macs: int | None = None
    profiled_flops: int | None = None
    cache_bytes_per_token: int | None = None


def released(config: ModelConfig, seq_length: int) -> Released:
    """The released figures of a model, by its shape: nothing where it is not one of the paper's."""
    variant, groups = config.attention_variant, config.num_query_groups
    name = next((name for name, preset in PRESETS.items() if _is_variant_of(preset, config)), None)
    if name is None:
        return Released()
    full = name == "300m" and groups == config.num_attention_heads
    return Released(
        parameters=PARAMETERS.get((name, variant, groups)),
        macs=MACS.get((variant, seq_length)) if full else None,
        profiled_flops=PROFILED_FLOPS.get((variant, seq_length)) if full else None,
        cache_bytes_per_token=CACHE_BYTES_PER_TOKEN.get((variant, groups)) if name == "300m" else None,
    )


def _is_variant_of(preset: ModelConfig, config: ModelConfig) -> bool:
    variant, groups = config.attention_variant, config.num_query_groups
    same_heads = preset.num_attention_heads == config.num_attention_heads
    return same_heads and preset.replace(attention_variant=variant, num_query_groups=groups) == config
