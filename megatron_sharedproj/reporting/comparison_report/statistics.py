"""What the seeds of a comparison allow to say: paired changes, intervals, order."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sharedproj.experiments.statistics import Estimate, estimate, holm, ranks
from megatron_sharedproj.reporting.comparison_report.reading import Comparison, Family, Model

CONFIDENCE = 0.95
METHOD = (
    "A change is paired: a seed has the same data order for every model, so each seed's model is set "
    "against the baseline of that seed; given are the mean of these changes and their standard deviation s. "
    "The 95 % interval is Student's t, mean +- t s / sqrt(n) with n - 1 degrees of freedom (t = 4.30 for "
    "three seeds): it takes the changes of the seeds for independent and roughly normal. Two models are "
    "told apart where it leaves zero out. p (Holm) is the two-sided p value of that test, corrected for the "
    "number of models in the table. The interval says what other seeds would give on this text, not on "
    "other text."
)


@dataclass(frozen=True)
class Change:
    """A model's figure against another's.

    Attributes:
        by_seed: percent, or the plain difference; estimate: over them.
        adjusted: p value by Holm's method over the comparisons of its family; None for one seed.
    """

    by_seed: Mapping[int, float]
    estimate: Estimate
    adjusted: float | None = None

    @property
    def verdict(self) -> str:
        """higher, lower, not told apart, or one seed."""
        if self.estimate.count == 1:
            return "one seed"
        return {1: "higher", -1: "lower", 0: "not told apart"}[self.estimate.sign]


def paired(model: Model, other: Model, figure: str, *, percent: bool = True) -> Change | None:
    """``model`` against ``other``, seed by seed; None where no seed has both."""
    mine, theirs = model.values(figure), other.values(figure)
    seeds = sorted(set(mine) & set(theirs))
    if not seeds:
        return None
    changes = {
        seed: 100 * (mine[seed] / theirs[seed] - 1) if percent else mine[seed] - theirs[seed]
        for seed in seeds
    }
    return Change(changes, estimate(list(changes.values()), CONFIDENCE))


def changes(family: Family, figure: str, *, percent: bool = True) -> dict[str, Change]:
    """Name -> change against the baseline, of the family's other models that have a seed with it."""
    found = {
        model.name: change
        for model in family.models[1:]
        if (change := paired(model, family.models[0], figure, percent=percent))
    }
    tested = [name for name, change in found.items() if change.estimate.count > 1]
    adjusted = dict(zip(tested, holm([found[name].estimate.p_value for name in tested]), strict=True))
    return {
        name: Change(change.by_seed, change.estimate, adjusted.get(name)) for name, change in found.items()
    }


@dataclass(frozen=True)
class Pair:
    """Two models, the lower mean first; the second against the first, and in how many seeds it is higher."""

    low: Model
    high: Model
    change: Change
    agreeing: int


@dataclass(frozen=True)
class Ordering:
    """The order of a family by a figure, the lowest first.

    Attributes:
        models: by their mean over ``seeds``; seeds: that all models with the figure share.
        by_seed: seed -> name -> rank from 1; mean_ranks: over these seeds.
        left_out: models without the figure, or without these seeds.
        pairs: every two of ``models`` over the seeds that both have, neighbours first.
    """

    models: tuple[Model, ...]
    seeds: tuple[int, ...]
    by_seed: dict[int, dict[str, float]]
    mean_ranks: dict[str, float]
    left_out: tuple[Model, ...]
    pairs: tuple[Pair, ...]


def ordering(family: Family, figure: str) -> Ordering | None:
    """None where fewer than two models can be ordered."""
    there = [set(model.values(figure)) for model in family.models if model.values(figure)]
    # Where no seed is common to all, those of the baseline, and the models that have them.
    seeds = tuple(sorted(set.intersection(*there) or family.models[0].values(figure))) if there else ()
    complete = [model for model in family.models if seeds and set(seeds) <= set(model.values(figure))]
    if len(complete) < 2:
        return None
    means = {m.name: statistics.fmean(m.values(figure)[seed] for seed in seeds) for m in complete}
    models = tuple(sorted(complete, key=lambda model: means[model.name]))
    by_seed = {seed: ranks({model.name: model.values(figure)[seed] for model in models}) for seed in seeds}
    mean_ranks = {
        model.name: statistics.fmean(found[model.name] for found in by_seed.values()) for model in models
    }
    pairs = []
    for low, high in itertools.combinations(models, 2):
        change = paired(high, low, figure)
        assert change is not None  # both have every seed
        pairs.append(Pair(low, high, change, sum(value > 0 for value in change.by_seed.values())))
    pairs.sort(key=lambda pair: models.index(pair.high) - models.index(pair.low))
    left_out = tuple(model for model in family.models if model not in complete)
    return Ordering(models, seeds, by_seed, mean_ranks, left_out, tuple(pairs))


# Perplexities of the paper (paper.md, section 4): padded protocol, one seed each.
_PAPER = {
    "300M": {
        ("qkv", "all"): 5.11, ("qk_eq_v", "all"): 5.27, ("q_eq_k", "all"): 5.36, ("q_eq_k_eq_v", "all"): 6.41,
        ("qkv", "some"): 5.15, ("qkv", "one"): 5.19, ("qk_eq_v", "some"): 5.32, ("qk_eq_v", "one"): 5.36,
    },
    "1.2B": {
        ("qkv", "all"): 5.004, ("qk_eq_v", "all"): 5.128, ("qkv", "some"): 5.030, ("qkv", "one"): 5.057,
        ("qk_eq_v", "one"): 5.212,
    },
    "300M, real tokens": {("qkv", "all"): 20.82, ("qk_eq_v", "all"): 21.28},
}  # fmt: skip
PAPER_SIZES = tuple(_PAPER)


def paper_changes(model: Model) -> dict[str, float]:
    """Size -> the paper's change in percent against its QKV, of the same variant and kind of groups.

    Some groups, but fewer than heads, stand beside the paper's 4 of 16 heads (300M) and 8 of 32 (1.2B).
    """
    config = model.config
    if config is None or config.position_embedding_type != "learned_absolute":
        return {}
    groups, heads = config.num_query_groups, config.num_attention_heads
    kind = "all" if groups == heads else "one" if groups == 1 else "some"
    key = config.attention_variant, kind
    return {
        size: 100 * (found[key] / found["qkv", "all"] - 1)
        for size, found in _PAPER.items()
        if key in found and key != ("qkv", "all")
    }


def padded_tokens(comparison: Comparison) -> tuple[int, int] | None:
    """Tokens that the padded protocol scores, and the real ones among them; None where none was measured."""
    for _, run in comparison.runs():
        if "padded_perplexity" in run.values:
            part = run.records["perplexity"]["padded"]
            return int(part["tokens"]), int(part["real_tokens"])
    return None


@dataclass(frozen=True)
class Shown:
    """How much of a difference in packed loss the padded loss shows.

    Attributes:
        share: slope through zero, by least squares; lowest, highest: quotients of single pairs;
        pairs: a model's checkpoint and the baseline's of the same seed, each.
    """

    share: float
    lowest: float
    highest: float
    pairs: int


def shown_when_padded(comparison: Comparison) -> Shown | None:
    """From the differences in nats of all checkpoints, whichever way they point.

    A mean that the seeds do not tell from zero has no quotient, but each of its pairs has one: padding is
    read alike by both, so that a difference on the real tokens is diluted. None below three pairs, or where
    no position that is scored holds padding.
    """
    scored = padded_tokens(comparison)
    if scored is None or scored[0] == scored[1]:
        return None
    others = {model.name: model for model in comparison.models if model is not comparison.baseline}
    packed = [paired(m, comparison.baseline, "packed_loss", percent=False) for m in others.values()]
    padded = [paired(m, comparison.baseline, "padded_loss", percent=False) for m in others.values()]
    points = [
        (real.by_seed[seed], read.by_seed[seed])
        for real, read in zip(packed, padded, strict=True)
        if real is not None and read is not None
        for seed in real.by_seed
        if seed in read.by_seed and real.by_seed[seed]
    ]
    if len(points) < 3:
        return None
    quotients = [y / x for x, y in points]
    share = sum(x * y for x, y in points) / sum(x * x for x, _ in points)
    return Shown(share, min(quotients), max(quotients), len(points))
