"""What a variant costs in perplexity: the paper's figures, named as the paper's, and ours, named as ours.

Paper: "Do Transformers Need Three Projections?" (arXiv 2606.04032). Its figures are single seeds and of its
padded protocol: one document per row, filled up with scored padding, which lowers perplexity to about 5 and
hides the gap. No figure of one protocol is comparable with one of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sharedproj.config import PRESETS, ModelConfig

ALL_HEADS, MQA = 1, 0  # query heads to a key/value head; MQA: all of them

# Size: (variant, query heads to a key/value head): validation perplexity, padded protocol, one seed.
PAPER_PADDED: Mapping[str, Mapping[tuple[str, int], float]] = {
    "300m": {
        ("qkv", ALL_HEADS): 5.11,
        ("q_eq_k", ALL_HEADS): 5.36,
        ("qk_eq_v", ALL_HEADS): 5.27,
        ("q_eq_k_eq_v", ALL_HEADS): 6.41,
        ("qkv", 4): 5.15,
        ("qkv", MQA): 5.19,
        ("qk_eq_v", 4): 5.32,
        ("qk_eq_v", MQA): 5.36,
    },
    "1b": {
        ("qkv", ALL_HEADS): 5.004,
        ("qk_eq_v", ALL_HEADS): 5.128,
        ("qkv", 4): 5.030,
        ("qkv", MQA): 5.057,
        ("qk_eq_v", MQA): 5.212,
    },
}

# The authors' later run with the padding masked: FineWeb-Edu, 300M, 10e9 tokens, one seed.
PAPER_MASKED: Mapping[str, float] = {"qkv": 20.82, "qk_eq_v": 21.28}


@dataclass(frozen=True)
class OwnFigure:
    """A perplexity that this project measured.

    Attributes:
        where: the run; perplexity: variant -> packed perplexity (real tokens only).
    """

    where: str
    perplexity: Mapping[str, float]


# README, "Measured": one seed.
OURS = OwnFigure(
    "examples/quickstart.sh, 1M parameters, 500 steps of 4,096 tokens, packed, one seed",
    {"qkv": 77.32, "qk_eq_v": 78.63},
)


@dataclass(frozen=True)
class PaperFigure:
    """The paper's perplexity of a variant.

    Attributes:
        size: the paper's model, a preset's name; perplexity: padded, one seed; change: to QKV's, 0.03 is 3%.
    """

    size: str
    perplexity: float
    change: float


def paper_size(config: ModelConfig) -> str | None:
    """The preset whose layers, width and heads a model has; None: not one of the paper's shapes."""
    shape = (config.num_layers, config.hidden_size, config.num_attention_heads)
    for name, preset in PRESETS.items():
        if shape == (preset.num_layers, preset.hidden_size, preset.num_attention_heads):
            return name
    return None


def paper_figure(config: ModelConfig) -> PaperFigure | None:
    """The paper's figure of a variant and its sharing, at its own size or else at 300M; None: it has none."""
    size = paper_size(config) or "300m"
    figures = PAPER_PADDED[size]
    sharing = config.num_attention_heads // config.num_query_groups
    if config.num_query_groups == 1 and config.num_attention_heads > 1:
        sharing = MQA
    found = figures.get((config.attention_variant, sharing))
    if found is None:
        return None
    return PaperFigure(size, found, found / figures["qkv", ALL_HEADS] - 1)


def our_change(config: ModelConfig) -> float | None:
    """Our measured change of perplexity to qkv's, where no heads are shared; None: not measured."""
    if config.num_query_groups != config.num_attention_heads:
        return None
    found = OURS.perplexity.get(config.attention_variant)
    return None if found is None else found / OURS.perplexity["qkv"] - 1


def notes(shapes: set[str | None]) -> list[str]:
    """What has to be said beside the figures of :func:`paper_figure` and :func:`our_change`.

    Args:
        shapes: :func:`paper_size` of the models shown.
    """
    masked = PAPER_MASKED["qk_eq_v"] / PAPER_MASKED["qkv"] - 1
    lines = [
        "the paper's perplexities are single seeds in its padded protocol, where scored padding hides part "
        f"of the gap; with padding masked (its FineWeb-Edu run, 300M) K=V is {masked:+.1%} of QKV's",
        f"our change of perplexity is of {OURS.where}: not the size planned here",
    ]
    if None in shapes:
        lines.append("this shape is not one of the paper's: its 300M figures are shown")
    return lines
