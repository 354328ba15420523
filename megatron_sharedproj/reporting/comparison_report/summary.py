"""The sentences that open a comparison's report, and its words for numbers: all computed from the runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_sharedproj.experiments.statistics import spread
from megatron_sharedproj.reporting.comparison_report.reading import Comparison, Family, Model
from megatron_sharedproj.reporting.comparison_report.statistics import (
    Change,
    changes,
    padded_tokens,
    shown_when_padded,
)

ABSENT = "-"


def places(value: float) -> int:
    """Decimal places of a change in percent."""
    return 1 if abs(value) >= 10 else 2


def percent(value: float) -> str:
    """ "+2.10 %", from 10 on "+21.0 %"."""
    return f"{value:+.{places(value)}f} %"


def interval(change: Change, unit: str = " %", digits: int | None = None) -> str:
    """ "+1.03 to +3.20 %"; "-" for one seed."""
    one = change.estimate
    if one.count == 1:
        return ABSENT
    digits = places(one.mean) if digits is None else digits
    return f"{one.low:+.{digits}f} to {one.high:+.{digits}f}{unit}"


def change_text(change: Change | None) -> str:
    """ "+2.10 % (+1.03 to +3.20)", without the interval for one seed; "-" for None."""
    if change is None:
        return ABSENT
    limits = "" if change.estimate.count == 1 else f" ({interval(change, '')})"
    return f"{percent(change.estimate.mean)}{limits}"


def perplexity(values: Sequence[float]) -> str:
    """Mean and deviation of perplexities; "-" without one."""
    if not values:
        return ABSENT
    return spread(values, 2 if statistics.fmean(values) >= 20 else 3)


def joined(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def count(number: int, word: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def saved(value: float, base: float) -> str:
    """ "50 % fewer" or "0.1 % more"; "as many" where equal."""
    share = 100 * (1 - value / base)
    digits = 0 if abs(share - round(share)) < 0.005 else 1 if abs(share) >= 0.1 else 2
    if share == 0:
        return "as many"
    return f"{abs(share):.{digits}f} % {'fewer' if share > 0 else 'more'}"


def summary(comparison: Comparison) -> list[str]:
    """Up to six sentences."""
    found = [text for family in comparison.families if (text := _family(family, comparison))]
    if not found:
        return ["No run of the baseline has been trained and evaluated yet: there is nothing to compare."]
    found += filter(None, (_savings(comparison), _padding(comparison), _recall(comparison)))
    return [*found, _caution(comparison)]


def _family(family: Family, comparison: Comparison) -> str:
    base, found = family.models[0], changes(family, "packed_perplexity")
    labels = {model.name: model.label for model in family.models}
    if not found:
        return ""
    seeds = max(change.estimate.count for change in found.values())
    values = list(base.values("packed_perplexity").values())
    level = f"{base.label}'s packed perplexity"
    if family.key == comparison.families[0].key:
        level += f" of {perplexity(values)}"
    start = f"{family.title}, {count(seeds, 'seed')}: against {level}, "
    if seeds == 1:
        each = [f"{labels[name]} {percent(change.estimate.mean)}" for name, change in found.items()]
        return f"{start}{joined(each)}; one seed has no deviation, so nothing is concluded from these."
    parts = []
    for verdict, words in (
        ("higher", "higher by more than the seeds allow: "),
        ("lower", "lower by more than the seeds allow: "),
        ("not told apart", "not told apart from it: "),
        ("one seed", "with one seed only: "),
    ):
        of_kind = [name for name, change in found.items() if change.verdict == verdict]
        order = sorted(of_kind, key=lambda name: found[name].estimate.mean)
        each = [f"{labels[name]} {change_text(found[name])}" for name in order]
        if each:
            parts.append(words + joined(each))
    return f"{start}{'; '.join(parts)}."


def _savings(comparison: Comparison) -> str:
    base = comparison.baseline
    each = []
    for model in comparison.models:
        if model is base or model.matched or not model.parameters or not base.parameters:
            continue
        assert model.cache_bytes is not None and base.cache_bytes is not None
        cache = saved(model.cache_bytes, base.cache_bytes)
        each.append(f"{model.label} {saved(model.parameters, base.parameters)} and {cache}")
    if not each:
        return ""
    return (
        f"Parameters and cache bytes per token against {base.label}'s {base.parameters:,} and "
        f"{base.cache_bytes:,}: {'; '.join(each)}."
    )


def _padding(comparison: Comparison) -> str:
    base, scored = comparison.baseline, padded_tokens(comparison)
    family = comparison.families[0]
    packed, padded = changes(family, "packed_perplexity"), changes(family, "padded_perplexity")
    both = [base.values(f"{protocol}_perplexity") for protocol in ("packed", "padded")]
    if scored is None or not all(both):
        return ""
    real, read = (statistics.fmean(values.values()) for values in both)
    if scored[0] == scored[1]:
        return (
            f"The {scored[0]:,} positions that the padded protocol scores hold no padding here, so that the "
            f"paper's effect can't show: the same {base.label} checkpoints read {read:.2f} instead of "
            f"{real:.2f}, since only the beginning of each document is scored."
        )
    share = 100 * scored[1] / scored[0]
    start = (
        f"Under the paper's padded protocol, where {share:.0f} % of the scored positions are real tokens, "
        f"the same {base.label} checkpoints read {read:.2f} instead of {real:.2f}"
    )
    each = []
    for model in family.models[1:]:
        if model.name in padded and model.name in packed and packed[model.name].estimate.sign:
            new, old = padded[model.name].estimate.mean, packed[model.name].estimate.mean
            each.append(f"{model.label} {percent(new)} instead of {percent(old)}")
    shown = shown_when_padded(comparison)
    diluted = (
        f"; a difference between two checkpoints in packed loss shows in the padded one with "
        f"{shown.share:.2f} of its size ({shown.pairs} pairs)"
        if shown
        else ""
    )
    return f"{start}{', and the changes told apart above ' + joined(each) if each else ''}{diluted}."


def _recall(comparison: Comparison) -> str:
    measured = [model for model in comparison.models if model.values("recall")]
    base = comparison.baseline
    if not measured or base not in measured:
        return ""

    def mean(model: Model, figure: str = "recall") -> float:
        return statistics.fmean(model.values(figure).values())

    low, high = min(measured, key=mean), max(measured, key=mean)
    apart = [
        f"{model.title} {change.estimate.mean:+.3f}"
        for family in comparison.families
        for model in family.models[1:]
        if (change := changes(family, "recall", percent=False).get(model.name)) and change.estimate.sign
    ]
    reach = f"from {mean(low):.3f} ({low.title}) to {mean(high):.3f} ({high.title})"
    level = "" if base in (low, high) else f", {base.label} {mean(base):.3f}"
    return (
        f"Recall, where guessing scores {mean(base, 'recall_chance'):.3f}, goes {reach}{level}; told apart "
        f"from {base.label}: {joined(apart) if apart else 'none'}."
    )


def _caution(comparison: Comparison) -> str:
    every = [
        (model, change)
        for family in comparison.families
        for model in family.models
        if (change := changes(family, "packed_perplexity").get(model.name))
    ]
    tested = [(model, change) for model, change in every if change.adjusted is not None]
    runs = [run for _, run in comparison.runs()]
    lacking = sum(run.status != "finished" for run in runs)
    missing = f" Not finished: {lacking} of {count(len(runs), 'run')}." if lacking else ""
    if not tested:
        return f"With one seed, nothing can be said about other seeds.{missing}"
    halves = [(change.estimate.high - change.estimate.low) / 2 for _, change in tested]
    kept = [model.title for model, change in tested if (change.adjusted or 0.0) < 0.05]
    return (
        f"Of {count(len(tested), 'such comparison')} at 95 %, {0.05 * len(tested):.1f} would be told apart "
        f"by chance alone; Holm's correction within each family leaves {joined(kept) if kept else 'none'}, "
        f"and changes below about {statistics.median(halves):.1f} % (the median half width of an interval) "
        f"are too small to conclude from these seeds.{missing}"
    )
