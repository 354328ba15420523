"""The width of the MLP at which a model has as many parameters as another variant of it.

The paper compares variants of one shape, so that K=V has 6.9% fewer parameters than QKV at 300M (paper.md,
section 2). A comparison at equal parameters puts what the projections save into the MLP.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.variants import get_variant

TOLERANCE = 1e-3
_MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)


def baseline_of(config: ModelConfig, baseline: str) -> ModelConfig:
    """The model that ``config`` is measured against: another variant, as many key/value heads as heads."""
    tied = get_variant(baseline).tied_kv and config.variant.tied_kv
    return replace(
        config,
        attention_variant=get_variant(baseline).name,
        num_query_groups=0,
        kv_rotary=config.kv_rotary if tied else "",
    )


def match_parameters(config: ModelConfig, baseline: str, *, multiple_of: int = 1) -> ModelConfig:
    """The same model with the MLP so wide that its parameters are the baseline's, to 0.1%.

    Of the widths that are close enough, the one divisible by the largest power of two up to 128 is taken, for
    the sake of matrix products.

    Args:
        baseline: a variant; its model has this MLP's width, and a key/value head for each head.
        multiple_of: what the width has to be divisible by (tensor-parallel ranks).
    Raises:
        ValueError: naming --match-parameters-of, where no width comes close enough.
    """
    flag = f"--match-parameters-of {baseline}"
    try:
        target = formulas.parameters(baseline_of(config, baseline))["total"]
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    total = formulas.parameters(config)["total"]
    unit = formulas.parameters(replace(config, ffn_hidden_size=config.ffn_hidden_size + 1))["total"] - total
    ideal = config.ffn_hidden_size + (target - total) / unit
    if ideal < 1:
        raise ValueError(
            f"{flag}: has fewer parameters ({target:,}) than this model without its MLP; widen "
            f"--ffn-hidden-size {config.ffn_hidden_size}"
        )
    step = nearest = multiple_of
    for step in sorted({m for m in _MULTIPLES if m % multiple_of == 0} | {multiple_of}, reverse=True):
        nearest = max(1, round(ideal / step)) * step
        if abs(nearest - ideal) * unit <= TOLERANCE * target:
            return replace(config, ffn_hidden_size=nearest)
    difference = abs(nearest - ideal) * unit / target
    raise ValueError(
        f"{flag}: an MLP of width {nearest}, the closest multiple of {step}, is {100 * difference:.2f}% away "
        f"from its {target:,} parameters; 0.1% needs a larger model"
        + (", or fewer tensor-parallel ranks" if multiple_of > 1 else "")
    )


def describe_match(config: ModelConfig, baseline: str, width: int) -> str:
    """One line for a log: both totals and their difference.

    Args:
        config: the widened model; width: of the baseline's MLP.
    """
    mine = formulas.parameters(config)["total"]
    other = baseline_of(replace(config, ffn_hidden_size=width), baseline)
    theirs = formulas.parameters(other)["total"]
    return (
        f"--match-parameters-of {baseline}: MLP width {width} -> {config.ffn_hidden_size}; {mine:,} "
        f"parameters against {theirs:,} ({100 * (mine / theirs - 1):+.3f}%)"
    )
