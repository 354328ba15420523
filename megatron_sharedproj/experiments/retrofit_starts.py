"""The starts of a retrofit compared on a small model, over seeds: surgery, distillation, K=V from scratch.

An interrupted comparison goes on where it was (jobs.py).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sharedproj.config import write_text
from megatron_sharedproj.experiments.jobs import Job, run_jobs, script, steps_share, torchrun
from megatron_sharedproj.experiments.speeches import data_jobs, train_data, validation_data
from megatron_sharedproj.experiments.statistics import spread
from megatron_sharedproj.profiling.tables import write_csv
from megatron_sharedproj.reporting.plots import Run, load_run
from megatron_sharedproj.reporting.retrofit_plot import plot_retrofit
from megatron_sharedproj.retrofit.surgery import MERGES

TITLES = {"mean": "mean", "keep_key": "keep K", "keep_value": "keep V", "least_squares": "least squares"}
TEACHER, SCRATCH = "teacher", "scratch"
# paper.md, section 4: perplexity after 500M tokens of distillation, the best first.
PAPER_ORDER = ("mean", "keep_value", "keep_key")


@dataclass
class Settings:
    """Sizes of the comparison; another value makes another comparison.

    Attributes:
        steps: of the teacher; distill_steps: of each distillation; K=V from scratch has the sum of both.
        eval_tokens: of the validation set, that perplexities are measured on.
    """

    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    steps: int = 300
    distill_steps: int = 100
    layers: int = 4
    hidden_size: int = 128
    heads: int = 2
    lr: float = 3e-3
    distill_lr: float = 1e-3
    temperature: float = 2.0
    alpha: float = 0.5
    calibration_tokens: int = 32768
    eval_tokens: int = 32768
    processes: int = 1

    def check(self) -> None:
        """Raise ValueError naming the flag that cannot be."""
        for name in ("steps", "distill_steps"):
            if getattr(self, name) < 10:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 10")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f"--seeds {self.seeds}: give distinct ones, at least one")
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise ValueError(
                f"--hidden-size {self.hidden_size}: must be an even multiple of --heads {self.heads}"
            )


class Comparison:
    """All trainings of a comparison in one folder."""

    def __init__(self, settings: Settings, output: Path):
        settings.check()
        self.settings, self.output = settings, output.absolute()

    def folder(self, seed: int, name: str) -> Path:
        """Of a run, or of the checkpoint that a distillation starts from."""
        return self.output / f"seed{seed}" / name

    def jobs(self) -> list[Job]:
        """Data, then seed by seed: teacher, surgery and distillation of each start, K=V from scratch."""
        found, s = data_jobs(self.output), self.settings
        for seed in s.seeds:
            found += self._run(
                seed, TEACHER, ("data",), self._trained(seed, TEACHER, "qkv", s.steps), s.steps
            )
            for merge in MERGES:
                found += self._run(
                    seed, merge, (f"seed{seed}_{TEACHER}",), self._retrofitted(seed, merge), s.distill_steps,
                    share_of_cost=1.4,
                )  # fmt: skip
            steps = s.steps + s.distill_steps
            trained = self._trained(seed, SCRATCH, "qk_eq_v", steps)
            found += self._run(seed, SCRATCH, ("data",), trained, steps)
        return found

    def _run(
        self,
        seed: int,
        name: str,
        after: tuple[str, ...],
        command: tuple[str, ...],
        steps: int,
        share_of_cost: float = 1.0,
    ) -> list[Job]:
        """A training and its perplexity."""
        run, job = self.folder(seed, name), f"seed{seed}_{name}"
        measure = script(
            "tools/evaluate.py", "perplexity", "--load", str(run),
            "--data-path", validation_data(self.output), "--max-tokens", str(self.settings.eval_tokens),
            "--output", str(run / "perplexity.json"),
        )  # fmt: skip
        return [
            Job(job, command, share_of_cost * steps + 20, after, steps_share(run, steps)),
            Job(f"{job}_perplexity", measure, 20, (job,)),
        ]

    def _trained(self, seed: int, name: str, variant: str, steps: int) -> tuple[str, ...]:
        s = self.settings
        return torchrun(
            s.processes,
            "-m", "megatron_sharedproj.pretrain", "--attention-variant", variant,
            "--num-layers", str(s.layers), "--hidden-size", str(s.hidden_size),
            "--num-attention-heads", str(s.heads), "--seq-length", "256", "--max-position-embeddings", "256",
            "--no-bias-gelu-fusion", "--no-scaled-init", "--attention-dropout", "0", "--hidden-dropout", "0",
            "--tokenizer-model", str(self.output / "tokenizer"), *self._schedule(seed, name, steps, s.lr),
        )  # fmt: skip

    def _retrofitted(self, seed: int, merge: str) -> tuple[str, ...]:
        """Surgery, then distillation by the tool itself."""
        s = self.settings
        calibration = (
            "--calibration-data", train_data(self.output), "--calibration-tokens", str(s.calibration_tokens),
        )  # fmt: skip
        return script(
            "tools/retrofit.py", "surgery",
            "--load", str(self.folder(seed, TEACHER)), "--output", str(self.folder(seed, f"start_{merge}")),
            "--overwrite", "--merge", merge, *(calibration if merge == "least_squares" else ()),
            "--eval-data", validation_data(self.output), "--eval-tokens", str(s.eval_tokens),
            "--nproc-per-node", str(s.processes), "--",
            *self._schedule(seed, merge, s.distill_steps, s.distill_lr),
            "--distill-temperature", str(s.temperature), "--distill-alpha", str(s.alpha),
        )  # fmt: skip

    def _schedule(self, seed: int, name: str, steps: int, lr: float) -> list[str]:
        return [
            "--micro-batch-size", str(16 // self.settings.processes), "--global-batch-size", "16",
            "--train-iters", str(steps), "--lr", str(lr), "--min-lr", str(lr / 10),
            "--lr-warmup-iters", str(max(1, steps // 10)),
            "--adam-beta2", "0.95", "--weight-decay", "0.1", "--weight-decay-on-all", "--seed", str(seed),
            "--train-data-path", train_data(self.output),
            "--valid-data-path", validation_data(self.output),
            "--save", str(self.folder(seed, name)), "--save-interval", "100",
            "--eval-interval", str(max(1, steps // 8)), "--eval-iters", "4", "--log-interval", "10",
            "--num-workers", "0",
        ]  # fmt: skip

    def run(self, at_once: int = 1, say: Callable[[str], None] = print) -> None:
        """Run what is not done yet. Raises ValueError as run_jobs does."""
        run_jobs(self.jobs(), self.output, at_once=at_once, say=say)


def collect(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each seed and start: perplexities before and after surgery, distilled, and from scratch."""

    def perplexity(seed: int, name: str) -> float:
        found = json.loads((comparison.folder(seed, name) / "perplexity.json").read_text())
        return float(found["packed"]["perplexity"])

    rows = []
    for seed in comparison.settings.seeds:
        teacher, scratch = perplexity(seed, TEACHER), perplexity(seed, SCRATCH)
        for merge in MERGES:
            record = json.loads((comparison.folder(seed, f"start_{merge}") / "retrofit.json").read_text())
            rows.append(
                {
                    "seed": seed,
                    "start": merge,
                    "before": record["perplexity_before"]["perplexity"],
                    "after_surgery": record["perplexity_after"]["perplexity"],
                    "after_distillation": perplexity(seed, merge),
                    "teacher": teacher,
                    "scratch": scratch,
                }
            )
    return rows


def summary(settings: Settings, rows: list[dict[str, Any]]) -> str:
    """The comparison as Markdown: means and standard deviations over seeds, and the paper's order."""

    def of(merge: str, column: str) -> list[float]:
        return [row[column] for row in rows if row["start"] == merge]

    columns = ("before", "after_surgery", "after_distillation")
    lines = ["| start | before | after surgery | after distillation |", "| --- | --- | --- | --- |"]
    for merge in MERGES:
        lines.append("| " + " | ".join([TITLES[merge], *(spread(of(merge, c)) for c in columns)]) + " |")
    lines.append(f"| K=V from scratch | | | {spread(of(MERGES[0], 'scratch'))} |")
    order = sorted(MERGES, key=lambda merge: statistics.fmean(of(merge, "after_distillation")))
    closed = tuple(merge for merge in order if merge in PAPER_ORDER)
    seeds = sum(
        tuple(sorted(PAPER_ORDER, key=lambda m: of(m, "after_distillation")[index])) == PAPER_ORDER
        for index in range(len(settings.seeds))
    )
    note = (
        f"Packed perplexity over {settings.eval_tokens:,} validation tokens, mean and standard deviation of "
        f"{len(settings.seeds)} seed(s): {settings.steps} steps of the teacher, {settings.distill_steps} of "
        f"distillation (T {settings.temperature:g}, alpha {settings.alpha:g}), "
        f"{settings.steps + settings.distill_steps} from scratch.\n\n"
        f"Order after distillation, the best first: {', '.join(TITLES[merge] for merge in order)}. The "
        f"paper's (300M model): {', '.join(TITLES[merge] for merge in PAPER_ORDER)}; here "
        f"{'the same' if closed == PAPER_ORDER else 'another'} order by means, and the same in {seeds} of "
        f"{len(settings.seeds)} seed(s)."
    )
    return "\n".join(lines) + "\n\n" + note + "\n"


def mean_run(runs: list[Run]) -> Run:
    """The validation curve of several seeds: the mean loss at each step that all have."""
    losses = [{r["iteration"]: float(r["validation_lm_loss"]) for r in run.validation} for run in runs]
    shared = sorted(set.intersection(*(set(found) for found in losses)))
    records = tuple(
        {"iteration": step, "validation_lm_loss": statistics.fmean(found[step] for found in losses)}
        for step in shared
    )
    return Run(runs[0].path, (), records)


def report(comparison: Comparison) -> str:
    """Write results.csv, results.md and retrofit.png into the folder; returns the Markdown."""
    rows, output, seeds = collect(comparison), comparison.output, comparison.settings.seeds
    write_csv(output / "results.csv", list(rows[0]), rows)
    text = summary(comparison.settings, rows)
    write_text(output / "results.md", text)
    curves = {
        name: mean_run([load_run(comparison.folder(seed, name)) for seed in seeds])
        for name in (*MERGES, TEACHER, SCRATCH)
    }
    plot_retrofit(
        {TITLES[merge]: curves[merge] for merge in MERGES},
        output / "retrofit.png",
        levels={"teacher": curves[TEACHER], "K=V from scratch": curves[SCRATCH]},
        title=f"Retrofit to K=V, mean of {len(seeds)} seed(s)",
    )
    return text
