"""Tables of a comparison's report: perplexity, cost and recall of each family, and what padding does."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sharedproj.experiments.statistics import spread
from megatron_sharedproj.reporting.comparison_report.reading import Comparison, Family, Model
from megatron_sharedproj.reporting.comparison_report.run import SeedRun
from megatron_sharedproj.reporting.comparison_report.statistics import (
    Change,
    changes,
    padded_tokens,
    shown_when_padded,
)
from megatron_sharedproj.reporting.comparison_report.summary import (
    ABSENT,
    change_text,
    interval,
    percent,
    perplexity,
    places,
)
from megatron_sharedproj.reporting.document import Block, Heading, Inline, Link, Paragraph, Table


@dataclass(frozen=True)
class Chapter:
    """A comparison on its way into a report.

    Attributes:
        records: run's name -> kind (log, config, perplexity, recall, command) -> file, seen from the report.
        anchor: prefix of its anchors; level: of its headings.
    """

    comparison: Comparison
    records: Mapping[str, Mapping[str, str]]
    anchor: str = ""
    level: int = 2

    def target(self, model: Model) -> str:
        """Where a model's runs are."""
        return f"#{self.anchor}{model.name}"

    def linked(self, model: Model, text: str) -> str | Link:
        """A figure that leads to the runs behind it."""
        return text if text == ABSENT else Link(text, self.target(model))

    def file(self, run: SeedRun, kind: str, text: str) -> str | Link:
        """A figure that leads to the record that it was read from."""
        place = self.records.get(run.name, {}).get(kind)
        return Link(text, place) if place and text != ABSENT else text


def _values(model: Model, figure: str) -> list[float]:
    return list(model.values(figure).values())


def _change_cells(chapter: Chapter, model: Model, change: Change | None) -> list[Inline]:
    """Change, interval, verdict and Holm's p value."""
    if change is None:
        return [ABSENT] * 4
    one = change.estimate
    digits = places(one.mean)
    text = percent(one.mean)
    if one.count > 1:
        text = f"{one.mean:+.{digits}f} +- {one.deviation:.{digits}f} %"
    corrected = ABSENT if change.adjusted is None else f"{change.adjusted:.3f}"
    return [chapter.linked(model, text), chapter.linked(model, interval(change)), change.verdict, corrected]


def quality_table(chapter: Chapter, family: Family, protocol: str) -> Table:
    """Perplexity by one protocol, its change against the baseline, and bits per byte where they are known."""
    bits = protocol == "packed" and any(_values(model, "bits_per_byte") for model in family.models)
    head = ["model", f"{protocol} perplexity", "change", "95 % interval", "verdict", "p (Holm)"]
    found = changes(family, f"{protocol}_perplexity")
    rows: list[list[Inline]] = []
    for model in family.models:
        values = _values(model, f"{protocol}_perplexity")
        row: list[Inline] = [
            Link(model.label, chapter.target(model)),
            chapter.linked(model, perplexity(values)),
        ]
        if model is family.models[0]:
            row += [ABSENT, ABSENT, "baseline", ABSENT]
        else:
            row += _change_cells(chapter, model, found.get(model.name))
        if bits:
            found_bits = _values(model, "bits_per_byte")
            row.append(chapter.linked(model, spread(found_bits, 4) if found_bits else ABSENT))
        rows.append([*row, str(len(values))])
    return Table([*head, *(["bits per byte"] if bits else []), "seeds"], rows)


def cost_table(chapter: Chapter, family: Family) -> Table:
    """Parameters, cache, throughput and recall."""
    recall = any(_values(model, "recall") for model in family.models)
    head = ["model", "parameters", "of baseline", "MLP width", "cache bytes per token", "of baseline"]
    head += ["training tokens/s", *(["recall", "against baseline", "stderr", "chance"] if recall else [])]
    base, recalled = family.models[0], changes(family, "recall", percent=False)
    rows: list[list[Inline]] = []
    for model in family.models:
        width = None if model.config is None else model.config.ffn_hidden_size
        speeds = _values(model, "train_tokens_per_second")
        row: list[Inline] = [
            Link(model.label, chapter.target(model)),
            _settings_link(chapter, model, model.parameters),
            _share(model.parameters, base.parameters),
            _settings_link(chapter, model, width),
            _settings_link(chapter, model, model.cache_bytes),
            _share(model.cache_bytes, base.cache_bytes),
            chapter.linked(model, spread(speeds, 0) if speeds else ABSENT),
        ]
        if recall:
            row += _recall_cells(chapter, model, recalled.get(model.name))
        rows.append(row)
    return Table(head, rows)


def _share(value: int | None, base: int | None) -> str:
    return ABSENT if not value or not base else f"{100 * value / base:.2f} %"


def _settings_link(chapter: Chapter, model: Model, value: int | None) -> str | Link:
    """What follows from a model's settings, leading to them."""
    run = next((run for run in model.runs.values() if run.config), None)
    return ABSENT if value is None or run is None else chapter.file(run, "config", f"{value:,}")


def _recall_cells(chapter: Chapter, model: Model, change: Change | None) -> list[Inline]:
    """Recall, its paired difference, chance, and the standard error that the number of questions leaves."""
    values = _values(model, "recall")
    if not values:
        return [ABSENT] * 4
    difference = ABSENT
    if change is not None:
        one = change.estimate
        difference = f"{one.mean:+.3f}" + ("" if one.count == 1 else f" ({interval(change, '', 3)})")
    chance, error = (statistics.fmean(_values(model, f"recall_{key}")) for key in ("chance", "stderr"))
    measured = (spread(values, 3), difference, f"{error:.3f}")
    return [*(chapter.linked(model, text) for text in measured), f"{chance:.3f}"]


def recall_blocks(chapter: Chapter) -> list[Block]:
    """Recall by load and number of keys; nothing without it."""
    comparison = chapter.comparison
    measured = [model for model in comparison.models if _values(model, "recall")]
    if not measured:
        return []
    first = next(run for run in measured[0].runs.values() if "recall" in run.values)
    cells = first.records["recall"]["cells"]
    loads = [f"{cell['pairs']} pairs of {cell['keys']}" for cell in cells]
    rows: list[list[Inline]] = []
    for model in measured:
        runs = [run for run in model.runs.values() if "recall" in run.values]
        row: list[Inline] = [Link(model.title, chapter.target(model))]
        for index in range(len(cells)):
            values = [float(run.records["recall"]["cells"][index]["accuracy"]) for run in runs]
            row.append(chapter.linked(model, spread(values, 3)))
        rows.append([*row, chapter.linked(model, spread(_values(model, "recall_argmax"), 3))])
    rows.append(["guessing", *(f"{cell['chance']:.3f}" for cell in cells), ABSENT])
    pattern = first.records["recall"].get("pattern")
    text = (
        f"Multi-query associative recall: prompts of pairs of words (written {pattern!r}), then some of the "
        "keys again. Share of questions where the right value is the likeliest of those in the context, by "
        "number of pairs and of the keys that they are drawn from; mean and deviation over seeds. The last "
        "column asks for the first choice among all tokens, the mean of all loads."
    )
    head = ["model", *loads, "first choice of all tokens"]
    return [Heading(chapter.level, "Recall"), Paragraph(text), Table(head, rows)]


def padding_blocks(chapter: Chapter) -> list[Block]:
    """Each model's packed change beside the padded one of the same checkpoints, where both were measured."""
    comparison, scored = chapter.comparison, padded_tokens(chapter.comparison)
    if scored is None:
        return []
    rows: list[list[Inline]] = []
    for number, family in enumerate(comparison.families):
        packed, padded = (changes(family, f"{protocol}_perplexity") for protocol in ("packed", "padded"))
        for model in family.models if number == 0 else family.models[1:]:
            cells = [perplexity(_values(model, f"{kind}_perplexity")) for kind in ("packed", "padded")]
            cells += [change_text(found.get(model.name)) for found in (packed, padded)]
            ratio = ABSENT
            if model.name in padded and model.name in packed and packed[model.name].estimate.sign:
                ratio = f"{padded[model.name].estimate.mean / packed[model.name].estimate.mean:.2f}"
            name = Link(model.title, chapter.target(model))
            rows.append([name, *(chapter.linked(model, text) for text in (*cells, ratio))])
    text = (
        "The same checkpoints by both protocols. Packed scores every real token of the validation text "
        "once; padded is the paper's: a document per row, cut or filled up with end-of-document tokens, and "
        f"the filling scored. Of the {scored[0]:,} positions that it scores here "
        f"{100 * scored[1] / scored[0]:.1f} % are real tokens. Changes are against "
        f"{comparison.baseline.label} (95 % interval); their quotient is given where the packed one is told "
        "apart from zero."
    )
    shown = shown_when_padded(comparison)
    if shown:
        text += (
            f" Over all {shown.pairs} pairs of a checkpoint and the baseline's of the same seed, whichever "
            f"is lower, the padded losses differ by {shown.share:.2f} of what the packed ones do (least "
            f"squares through zero; single pairs {shown.lowest:.2f} to {shown.highest:.2f})."
        )
    head = ["model", "packed perplexity", "padded perplexity", "packed change", "padded change"]
    return [
        Heading(chapter.level, "What padding does to the figures"),
        Paragraph(text),
        Table([*head, "padded / packed"], rows),
    ]
