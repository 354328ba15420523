"""Sections of a comparison's report: order, the paper's figures, runs, method."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_sharedproj.reporting.comparison_report.reading import Comparison, Family
from megatron_sharedproj.reporting.comparison_report.run import TRAINING, SeedRun
from megatron_sharedproj.reporting.comparison_report.statistics import (
    METHOD,
    PAPER_SIZES,
    changes,
    ordering,
    paper_changes,
)
from megatron_sharedproj.reporting.comparison_report.summary import (
    ABSENT,
    change_text,
    count,
    joined,
    percent,
)
from megatron_sharedproj.reporting.comparison_report.tables import Chapter
from megatron_sharedproj.reporting.document import Block, Code, Heading, Inline, Items, Link, Paragraph, Table


def ordering_blocks(chapter: Chapter, family: Family) -> list[Block]:
    """Ranks by packed perplexity, every pair, and which pairs the seeds leave open."""
    found = ordering(family, "packed_perplexity")
    if found is None:
        return []
    seeds = count(len(found.seeds), "seed")
    head = ["model", "mean rank", *(f"seed {seed}" for seed in found.seeds)]
    rows: list[list[Inline]] = []
    for model in found.models:
        every = [found.mean_ranks[model.name], *(found.by_seed[seed][model.name] for seed in found.seeds)]
        cells = (chapter.linked(model, f"{value:.3g}") for value in every)
        rows.append([Link(model.label, chapter.target(model)), *cells])
    names = [model.label for model in found.models]
    blocks: list[Block] = [
        Heading(chapter.level + 1, family.title),
        Paragraph(f"By mean packed perplexity over {seeds}, the lowest first: {', '.join(names)}."),
        Table(head, rows),
    ]
    if found.left_out:
        text = joined([model.label for model in found.left_out])
        blocks.append(Paragraph(f"Not ordered, for lack of these seeds: {text}."))
    by_pair = {(pair.low.name, pair.high.name): pair for pair in found.pairs}
    matrix: list[list[Inline]] = []
    for index, low in enumerate(found.models[:-1]):
        row: list[Inline] = [Link(low.label, chapter.target(low))]
        for place, high in enumerate(found.models[1:], start=1):
            if place <= index:
                row.append("")
                continue
            pair = by_pair[low.name, high.name]
            open_ = "" if pair.change.estimate.sign else " ?"
            text = (
                f"{percent(pair.change.estimate.mean)}, {pair.agreeing}/{pair.change.estimate.count}{open_}"
            )
            row.append(chapter.linked(high, text))
        matrix.append(row)
    blocks.append(
        Paragraph(
            "By how much the column's model is above the row's, and in how many seeds it is; a question mark "
            "where the 95 % interval of the paired change holds zero."
        )
    )
    blocks.append(Table(["lower", *names[1:]], matrix))
    near = [f"{p.low.label} and {p.high.label}" for p in found.pairs if not p.change.estimate.sign]
    if len(found.seeds) == 1:
        text = "One seed orders the models once; whether another would order them so is not known."
    elif near:
        text = f"Too close to conclude an order: {'; '.join(near)}."
    else:
        text = "The seeds tell every pair apart."
    return [*blocks, Paragraph(text)]


def paper_blocks(chapter: Chapter) -> list[Block]:
    """The paper's relative changes beside ours; nothing without a model that it has."""
    family = chapter.comparison.families[0]
    packed, padded = (changes(family, f"{protocol}_perplexity") for protocol in ("packed", "padded"))
    rows: list[list[Inline]] = []
    for model in family.models[1:]:
        theirs = paper_changes(model)
        if theirs and model.name in packed:
            mine = [change_text(found.get(model.name)) for found in (packed, padded)]
            cells = [percent(theirs[size]) if size in theirs else ABSENT for size in PAPER_SIZES]
            rows.append(
                [Link(model.label, chapter.target(model)), *(chapter.linked(model, c) for c in mine), *cells]
            )
    if not rows:
        return []
    text = (
        "Changes of perplexity against QKV of the same architecture: ours (95 % interval), and those of the "
        "paper (arXiv 2606.04032), which are of another scale: 300M and 1.2B parameters, 10 billion "
        "positions, one seed each, padded protocol; the last column is a later run of the authors with the "
        "filling masked. Sizes and amounts of data this far apart need not give the same changes. Heads in "
        "groups stand beside the paper's 4 groups of 16 heads (300M) and 8 of 32 (1.2B)."
    )
    head = ["model", "here, packed", "here, padded", *(f"paper {size}" for size in PAPER_SIZES)]
    return [Heading(chapter.level, "Beside the paper's figures"), Paragraph(text), Table(head, rows)]


def run_blocks(chapter: Chapter) -> list[Block]:
    """Every run with its figures, each leading to the record it was read from, and the training command."""
    comparison = chapter.comparison
    text = (
        "Figures lead to the record that they were read from: perplexities and recall to the evaluation's "
        "JSON, loss, steps and speed to the log's JSON lines, time and commit to the commands, the seed to "
        "all settings. Paths inside the comparison's folder are given relative to it."
    )
    blocks: list[Block] = [Heading(chapter.level, "Runs"), Paragraph(text)]
    head = ["seed", "state", "packed perplexity", "padded perplexity", "bits per byte", "recall"]
    head += ["validation loss", "steps", "tokens/s", "training time", "commit"]
    for model in comparison.models:
        blocks.append(Heading(chapter.level + 1, f"{model.title} ({model.name})", chapter.target(model)[1:]))
        blocks.append(Table(head, [_run_row(chapter, run) for run in model.runs.values()], left=2))
        first = next((run for run in model.runs.values() if TRAINING in run.jobs), None)
        if first is not None:
            words = [comparison.portable(word) for word in first.jobs[TRAINING]["command"]]
            blocks.append(Code(f"python {shlex.join(words)}"))
    return blocks


def _run_row(chapter: Chapter, run: SeedRun) -> Sequence[Inline]:
    def figure(name: str, kind: str, digits: int) -> str | Link:
        return chapter.file(run, kind, f"{run.values[name]:,.{digits}f}" if name in run.values else ABSENT)

    seconds = run.jobs.get(TRAINING, {}).get("seconds")
    return [
        chapter.file(run, "config", str(run.seed)),
        run.status,
        figure("packed_perplexity", "perplexity", 3),
        figure("padded_perplexity", "perplexity", 3),
        figure("bits_per_byte", "perplexity", 4),
        figure("recall", "recall", 3),
        figure("validation_loss", "log", 4),
        chapter.file(run, "log", f"{run.steps:,}" if run.steps else ABSENT),
        figure("train_tokens_per_second", "log", 0),
        chapter.file(run, "command", ABSENT if seconds is None else f"{seconds:,.0f} s"),
        chapter.file(run, "command", (run.jobs and chapter.comparison.facts.get("commit")) or ABSENT),
    ]


def method_blocks(chapter: Chapter) -> list[Block]:
    """Data, tokens, steps, machine, versions, and what the figures do not say."""
    comparison, facts = chapter.comparison, chapter.comparison.facts
    items = [
        METHOD,
        *_training(comparison),
        "Training tokens/s is the median of the log's records. Runs share a machine with each other and with "
        "other work: an order of magnitude, no measurement of speed.",
        "Parameters and cache bytes follow from each run's settings (formulas.py), the cache with two bytes "
        "per element. Bits per byte are those of the real tokens' text.",
    ]
    names = {"commit": "commit", "date": "date", "hardware": "machine", "torch": "PyTorch"}
    names["megatron_core"] = "Megatron-Core"
    versions = [f"{title} {facts[key]}" for key, title in names.items() if facts.get(key)]
    if versions:
        items.append(f"{', '.join(versions)}.")
    command = facts.get("command")
    return [
        Heading(chapter.level, "Method and limits"),
        Items(items),
        *([Code(comparison.portable(command))] if command else []),
    ]


def _training(comparison: Comparison) -> list[str]:
    """Data, schedule and limits, from the settings of a run."""
    config = next((run.config for _, run in comparison.runs() if run.config), None)
    if config is None:
        return []
    train, model, data = config.train, config.model, config.data
    tokens = train.samples_after(train.train_iters) * train.seq_length
    paths = joined([comparison.portable(path) for path in (data.train_data_path or data.data_path)])
    total, seeds = comparison.baseline.parameters, len(comparison.baseline.values("packed_perplexity"))
    size = f"{tokens / total:.1f} training tokens per parameter of the baseline; " if total else ""
    return [
        f"Data: {comparison.facts.get('data', 'see the commands')}; trained on {paths or 'mock data'}, "
        f"{comparison.protocol} rows, a vocabulary of {model.padded_vocab_size:,}.",
        f"Training: {train.train_iters:,} steps, {tokens:,} tokens in rows of {train.seq_length}, batches of "
        f"{train.global_batch_size} rows, learning rate {train.lr:g} to {train.min_lr:g}, "
        f"{train.params_dtype}; {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"{model.num_attention_heads} heads, "
        f"{model.position_embedding_type.replace('_', ' ')} positions.",
        f"Limits: {size}{count(seeds, 'seed')}; one text for training, one for validation; "
        "one learning rate for all models, tuned for none of them.",
    ]
