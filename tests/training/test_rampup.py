"""--rampup-batch-size: the sizes of Megatron-Core's calculator, every sequence once, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.config import TrainConfig

RAMPS = [(12, [4, 4, 40]), (32, [8, 8, 100]), (32, [4, 2, 17]), (6, [2, 4, 9])]


@pytest.mark.parametrize("end, ramp", RAMPS)
def test_sizes_are_megatrons(end: int, ramp: list[int]) -> None:
    from megatron.core import num_microbatches_calculator

    if not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("this megatron-core has other ramps")
    kind = num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator
    calculator = kind(end, 1, 1, False, 1, *ramp)
    train = TrainConfig(global_batch_size=end, rampup_batch_size=ramp)
    for consumed in range(ramp[2] + 5):
        calculator.update(consumed, consistency_check=False)
        assert train.batch_size_at(consumed) == calculator.get_current_global_batch_size(), consumed


@pytest.mark.parametrize("end, ramp", [*RAMPS, (8, [])])
def test_counts_of_steps_and_sequences_agree(end: int, ramp: list[int]) -> None:
    train = TrainConfig(global_batch_size=end, rampup_batch_size=ramp)
    consumed, starts = 0, [0]
    for _ in range(40):
        consumed += train.batch_size_at(consumed)
        starts.append(consumed)
    for steps, total in enumerate(starts):
        assert train.samples_after(steps) == total
        assert train.samples_after(40 - steps, total) == starts[-1]
    for samples in range(starts[-1]):
        steps = train.steps_within(samples)
        assert starts[steps] <= samples < starts[steps + 1]


def line(tmp_path: Path, name: str, **changes: Any) -> list[str]:
    options = {
        "train_iters": None, "train_samples": 60, "lr_warmup_iters": None, "lr_warmup_samples": 12,
        "global_batch_size": 8, "micro_batch_size": 2, "save": tmp_path / name, "hidden_dropout": 0.1,
        **changes,
    }  # fmt: skip
    flags = tiny.flags(tmp_path / "tiny_text_document", **options)
    return [*flags, "--rampup-batch-size", "2", "2", "18"]


def test_a_resume_within_and_behind_the_ramp_is_exact(parallel_state: Any, tmp_path: Path) -> None:
    tiny.write_data(tmp_path)

    def run(name: str, **changes: Any) -> Any:
        trainer = tiny.trainer(line(tmp_path, name, **changes))
        assert trainer.train() == 0
        trainer.log.close()
        return trainer

    def written(name: str) -> list[dict[str, Any]]:
        records = [json.loads(text) for text in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        clock = ("elapsed_ms", "tokens_per_second", "tflops", "peak_memory")
        return [{k: v for k, v in r.items() if not k.startswith(clock)} for r in records]

    whole = run("whole")
    for exit_at in (3, 2, 1):  # of steps within the ramp, across its end, and behind it
        run("parts", exit_interval=exit_at)
    resumed = run("parts")
    sizes = [record["global_batch_size"] for record in written("whole")]
    assert sizes[:6] == [2, 2, 2, 4, 4, 6] and set(sizes[6:]) == {8}
    assert [record["consumed_samples"] for record in written("whole")][-1] == whole.consumed_samples <= 60
    assert whole.consumed_samples + 8 > 60
    assert written("parts") == written("whole")
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "ramp, changes, expected",
    [
        (
            "2 2 18",
            {"train_iters": 9, "train_samples": None, "lr_warmup_samples": None},
            "needs --train-samples",
        ),
        ("2 0 18", {}, "must be at least 1"),
        ("3 2 18", {}, "multiples of --micro-batch-size 2 x 1 data-parallel ranks"),
        ("2 4 18", {}, "must give --global-batch-size 8; take START 4"),
        ("8 2 18", {}, "must give --global-batch-size 8"),
        ("2 2 99", {}, "--train-samples 60 ends before the ramp does"),
    ],
)
def test_refusals(tmp_path: Path, ramp: str, changes: dict[str, Any], expected: str) -> None:
    tiny.write_data(tmp_path)
    flags = [*line(tmp_path, "run", **changes)[:-4], "--rampup-batch-size", *ramp.split()]
    with pytest.raises(ValueError, match=f"^--rampup-batch-size {ramp}: .*{expected}"):
        tiny.trainer(flags)


@pytest.mark.parametrize("ramp, fits", [("2 2 18", False), ("4 2 18", False), ("4 4 18", True)])
def test_the_interleaved_schedule_needs_its_micro_batches_from_the_start(
    tmp_path: Path, ramp: str, fits: bool
) -> None:
    stages = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "num_layers": 4}
    flags = [*line(tmp_path, "run", **stages)[:-4], "--rampup-batch-size", *ramp.split()]
    args = build_parser().parse_args(flags)
    if fits:
        assert run_config(args, tiny.VOCAB, 2).train.rampup_batch_size == [4, 4, 18]
        return
    with pytest.raises(
        ValueError, match=f"^--rampup-batch-size {ramp}: .* multiples of 4 for the interleaved"
    ):
        run_config(args, tiny.VOCAB, 2)
