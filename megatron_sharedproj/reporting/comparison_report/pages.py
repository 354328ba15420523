"""One report of one or more comparisons: report.html, report.md, plots, raw figures, the runs' records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from megatron_sharedproj.config import write_json, write_text
from megatron_sharedproj.profiling.tables import write_csv
from megatron_sharedproj.reporting.comparison_report.files import (
    copy_records,
    link_records,
    model_rows,
    pair_rows,
    plain,
    run_rows,
)
from megatron_sharedproj.reporting.comparison_report.plots import Plot, write_plots
from megatron_sharedproj.reporting.comparison_report.reading import Comparison, Family
from megatron_sharedproj.reporting.comparison_report.sections import (
    method_blocks,
    ordering_blocks,
    paper_blocks,
    run_blocks,
)
from megatron_sharedproj.reporting.comparison_report.statistics import changes
from megatron_sharedproj.reporting.comparison_report.summary import ABSENT, change_text, joined, summary
from megatron_sharedproj.reporting.comparison_report.tables import (
    Chapter,
    cost_table,
    padding_blocks,
    quality_table,
    recall_blocks,
)
from megatron_sharedproj.reporting.document import (
    Block,
    Figure,
    Heading,
    Inline,
    Items,
    Link,
    Paragraph,
    Table,
    markdown,
    page,
)

_PLOTS = {
    "Perplexity by seed": ("perplexity", "change"),
    "Loss": ("loss", "loss_end", "gap"),
    "Perplexity against cache and parameters": ("cost",),
}
HTML, MARKDOWN, CSV, JSON = "report.html", "report.md", "figures.csv", "figures.json"


def write_report(comparisons: Sequence[Comparison], output: Path, *, copies: bool = True) -> list[Path]:
    """Write the report into a folder, which is made.

    Args:
        comparisons: each a chapter; the report of one alone has no chapters.
        copies: put the runs' records beside the report and link there, else link to where they are.
    Returns:
        the pages and the files of raw figures.
    Raises:
        ValueError: without a comparison or without matplotlib; OSError: where a file can't be written.
    """
    if not comparisons:
        raise ValueError("no comparison to report; give its folder")
    output.mkdir(parents=True, exist_ok=True)
    several = len(comparisons) > 1
    title = comparisons[0].title if not several else " / ".join(one.title for one in comparisons)
    blocks: list[Block] = [Heading(1, title)]
    parts: list[Block] = []
    chapters = []
    for comparison, slug in zip(comparisons, _slugs(comparisons), strict=True):
        place = f"runs/{slug}" if several else "runs"
        find = partial(copy_records, place=place) if copies else link_records
        records = find(comparison, output)
        chapter = Chapter(comparison, records, f"{slug}-" if several else "", 3 if several else 2)
        chapters.append(chapter)
        plots = {plot.file: plot for plot in write_plots(comparison, output, f"{slug}-" if several else "")}
        if several:
            parts.append(Heading(2, comparison.title, slug))
        parts += _chapter_blocks(chapter, plots)
    if several:
        blocks += _overview(chapters)
    raw: list[str | Link] = [Link(CSV, CSV), " has a row for each run; ", Link(JSON, JSON)]
    raw.append(" also the changes and pairs with their intervals.")
    blocks += [*parts, Heading(2, "Raw figures"), Paragraph(raw)]
    rows = [row for chapter in chapters for row in run_rows(chapter)]
    write_csv(output / CSV, list(rows[0]) if rows else ["model"], rows)
    models = [row for chapter in chapters for row in model_rows(chapter)]
    pairs = [row for chapter in chapters for row in pair_rows(chapter)]
    write_json(output / JSON, plain({"runs": rows, "models": models, "pairs": pairs}))
    write_text(output / MARKDOWN, markdown(blocks))
    write_text(output / HTML, page(blocks, title, output))
    return [output / name for name in (HTML, MARKDOWN, CSV, JSON)]


def problems(comparison: Comparison) -> list[str]:
    """What is missing, left out or not alike: a line for the runs of a model that have the same to say."""
    lines = []
    for model in comparison.models:
        alike: dict[str, list[int]] = {}
        for run in model.runs.values():
            if run.status != "finished" or run.problems:
                detail = "; ".join(comparison.portable(text) for text in run.problems)
                state = f"{run.status} ({detail})" if detail else run.status
                alike.setdefault(state, []).append(run.seed)
        for state, seeds in alike.items():
            named = f"seed{'s' if len(seeds) > 1 else ''} {joined([str(seed) for seed in seeds])}"
            lines.append(f"{model.title}, {named}: {state}")
    return lines


def _slugs(comparisons: Sequence[Comparison]) -> list[str]:
    """A short name for each, distinct, from its folder's."""
    found: list[str] = []
    for number, comparison in enumerate(comparisons, start=1):
        name = comparison.folder.resolve().name
        slug = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)
        found.append(slug if slug and slug not in found else f"{slug}-{number}")
    return found


def _overview(chapters: Sequence[Chapter]) -> list[Block]:
    """Each model's changes in all chapters side by side."""
    head = ["model"]
    for number, _ in enumerate(chapters, start=1):
        head += [f"{number}: packed", f"{number}: padded"]
    rows: dict[str, list[Inline]] = {}
    for number, chapter in enumerate(chapters):
        for family in chapter.comparison.families:
            found = [changes(family, f"{protocol}_perplexity") for protocol in ("packed", "padded")]
            for model in family.models[1:]:
                row = rows.setdefault(model.name, [model.title, *[ABSENT] * 2 * len(chapters)])
                for place, by_name in enumerate(found):
                    if model.name in by_name:
                        text = change_text(by_name[model.name])
                        row[1 + 2 * number + place] = chapter.linked(model, text)
    items: list[Inline] = [
        [
            f"{number}: ",
            Link(one.comparison.title, f"#{one.anchor[:-1]}"),
            f", trained on {one.comparison.protocol} rows",
        ]
        for number, one in enumerate(chapters, start=1)
    ]
    text = (
        "Change of perplexity against the baseline of the same chapter (95 % interval), by the protocol "
        "that it is read with."
    )
    return [Heading(2, "Side by side"), Items(items), Paragraph(text), Table(head, list(rows.values()))]


def _chapter_blocks(chapter: Chapter, plots: Mapping[str, Plot]) -> list[Block]:
    comparison, level = chapter.comparison, chapter.level

    def figure(name: str) -> list[Block]:
        plot = plots.get(f"{chapter.anchor}{name}.png")
        return [Figure(plot.file, plot.alternative, plot.caption)] if plot else []

    facts = comparison.facts
    line = ", ".join(facts[key] for key in ("date", "hardware") if facts.get(key))
    commit = f"commit {facts['commit']}" if facts.get("commit") else "commit unknown"
    blocks: list[Block] = [Paragraph(f"{line}; {commit}." if line else f"{commit.capitalize()}.")]
    blocks += [Heading(level, "Summary"), Items(summary(comparison))]
    lacking = problems(comparison)
    if lacking:
        blocks += [Heading(level, "Missing, left out or not alike"), Items(lacking)]
    for family in comparison.families:
        blocks += [Heading(level, family.title), *_family_blocks(chapter, family)]
    for heading, names in _PLOTS.items():
        drawn = [block for name in names for block in figure(name)]
        blocks += [Heading(level, heading), *drawn] if drawn else []
    blocks += padding_blocks(chapter)
    orders = [block for family in comparison.families for block in ordering_blocks(chapter, family)]
    blocks += [Heading(level, "Order"), *orders] if orders else []
    recall = recall_blocks(chapter)
    blocks += [*recall, *figure("recall")] if recall else []
    return [*blocks, *paper_blocks(chapter), *method_blocks(chapter), *run_blocks(chapter)]


def _family_blocks(chapter: Chapter, family: Family) -> list[Block]:
    about = {
        "architecture": "The same layers, widths and heads: sharing removes parameters.",
        "parameters": "The MLP of each model is widened until it has as many parameters as the baseline.",
    }[family.key]
    blocks: list[Block] = [Paragraph(about)]
    if not any(model.trained for model in family.models[1:]):
        return [*blocks, Paragraph("None of these models has been trained yet.")]
    for protocol in ("packed", "padded"):
        if any(model.values(f"{protocol}_perplexity") for model in family.models):
            blocks.append(quality_table(chapter, family, protocol))
    return [*blocks, cost_table(chapter, family)]
