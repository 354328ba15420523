"""Gradient norms by group, zeros, parameter norm and memory, beside plain sums over the tensors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from megatron_sharedproj.training.metrics import GROUPS, group_of, owned

pytestmark = pytest.mark.usefixtures("parallel_state")
ALL = {"log_grad_norm_per_group": True, "log_params_norm": True, "log_num_zeros_in_grad": True}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_figures_are_plain_sums(prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {**ALL, "untie_embeddings_and_output_weights": True, "log_interval": 2, "train_iters": 3}
    trainer = tiny.trainer(
        tiny.flags(prefix, save=tmp_path / "run", lr_warmup_iters=0, clip_grad=0.0, **changes)
    )
    expected: list[dict[str, float]] = []

    def note(run: Any) -> None:
        squares = dict.fromkeys(GROUPS, 0.0)
        for name, parameter in run.model.module.named_parameters():
            squares[group_of(name)] += parameter.main_grad.double().square().sum().item()
        weights = sum(p.double().square().sum().item() for p in run.model.module.parameters())
        zeros = sum(int((p.main_grad == 0).sum()) for p in run.model.module.parameters())
        expected.append(
            {**{f"grad_norm_{k}": v**0.5 for k, v in squares.items()}, "params_norm": weights**0.5}
        )
        expected[-1]["num_zeros"] = zeros

    trainer.hooks.append(note)
    trainer.train()
    trainer.log.close()
    second, third = records(tmp_path / "run")  # of iterations 2 and 3, the last
    for record, wanted in ((second, expected[1]), (third, expected[2])):
        assert {key: record[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
        whole = math.sqrt(sum(record[f"grad_norm_{group}"] ** 2 for group in GROUPS))
        assert whole == pytest.approx(record["grad_norm"], rel=1e-5)
    assert second["num_zeros"] > 0  # rows of the embedding that no token asked for
    line = next(line for line in capsys.readouterr().out.splitlines() if "iteration        2/" in line)
    assert (
        f" params norm: {second['params_norm']:.3f} |" in line
        and f" num zeros: {second['num_zeros']} |" in line
    )
    assert f" grad norm attention: {second['grad_norm_attention']:.3f} |" in line


def test_nothing_is_computed_unless_asked_for(prefix: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.flags(prefix, save=tmp_path / "run", train_iters=1, lr_warmup_iters=0))
    trainer.train()
    trainer.log.close()
    [record] = records(tmp_path / "run")
    assert not [key for key in record if key.startswith(("grad_norm_", "params_", "num_zeros", "mem_"))]


def test_figures_do_not_change_the_training(prefix: Path) -> None:
    assert tiny.losses(tiny.flags(prefix, **ALL)) == tiny.losses(tiny.flags(prefix))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("embedding.word_embeddings.weight", "embedding"),
        ("embedding.position_embeddings.weight", "embedding"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", "attention"),
        ("decoder.layers.0.self_attention.q_layernorm.weight", "norms"),
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", "norms"),
        ("decoder.layers.0.mlp.linear_fc1.bias", "mlp"),
        ("decoder.final_layernorm.bias", "norms"),
        ("output_layer.weight", "output"),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def test_ranks_own_a_bucket_between_them() -> None:
    """Slices of the distributed optimizer: every element of every parameter once."""
    spans, size = [(0, 7), (7, 20), (20, 23)], 24  # one element of padding
    found = [i for rank in range(4) for span in spans for i in range(*owned(*span, size, rank, 4))]
    assert sorted(found) == list(range(23))


def test_memory(prefix: Path, tmp_path: Path) -> None:
    flags = tiny.flags(
        prefix, save=tmp_path / "run", train_iters=2, lr_warmup_iters=0, log_memory_to_tensorboard=True
    )
    trainer = tiny.trainer(flags)
    trainer.train()
    trainer.log.close()
    first, second = records(tmp_path / "run")
    assert first["peak_memory_bytes_per_rank"] == [first["peak_memory_bytes"]]
    assert "peak_memory_bytes_per_rank" not in second
    assert second["peak_memory_bytes"] >= first["peak_memory_bytes"]
    # A process with torch has had more than 100 MiB and less than the machine.
    assert 100 * 2**20 < first["mem_allocated_bytes"] <= first["mem_max_allocated_bytes"]
    assert first["peak_memory_bytes"] < trainer.device.total_memory_bytes()


def test_tensorboard_tags_are_megatrons(prefix: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = tmp_path / "events"
    changes = {**ALL, "log_memory_to_tensorboard": True, "tensorboard_dir": events, "save": tmp_path / "run"}
    line = tiny.flags(prefix, lr_warmup_iters=0, eval_iters=1, eval_interval=2, **changes)

    def steps(tag: str) -> list[int]:
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        assert tag in accumulator.Tags()["scalars"]
        return [event.step for event in accumulator.Scalars(tag)]

    first = tiny.trainer([*line, "--exit-interval", "4", "--save-interval", "2"])
    first.train()
    first.log.close()
    megatrons = [
        "lm loss",
        "learning-rate",
        "batch-size",
        "grad-norm",
        "params-norm",
        "num-zeros",
        "iteration-time",
    ]
    for tag in [*megatrons, "mem-allocated-bytes", "mem-max-allocated-bytes", "grad-norm mlp", "loss-scale"]:
        assert steps(tag) == [1, 2, 3, 4], tag
    assert steps("lm loss validation ppl") == [2, 4]
    # The run is killed at 4 and goes on from 2: each step is there once.
    again = tiny.trainer(line)
    again.log.open(2)
    again.log.close()
    assert steps("lm loss") == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}])
def test_two_ranks_count_what_one_does(prefix: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    changes = {**ALL, "train_iters": 3, "lr_warmup_iters": 0}
    one = tiny.trainer(tiny.flags(prefix, "qk_eq_v", 1, save=tmp_path / "one", **changes))
    one.train()
    one.log.close()
    line = tiny.flags(prefix, "qk_eq_v", 1, save=tmp_path / "two", **changes, **layout)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [*torchrun, "-m", "megatron_sharedproj.pretrain", *line], env=paths, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, theirs in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        names = [key for key in theirs if key.startswith(("grad_norm", "params_norm", "num_zeros"))]
        assert {n: mine[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-5)
    assert len(records(tmp_path / "two")[0]["peak_memory_bytes_per_rank"]) == 2
