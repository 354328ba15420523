"""Stopping and resuming is bit for bit the same as not stopping, for every variant (fp32, CPU)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny

MODELS = [("qkv", 0), ("q_eq_k", 0), ("qk_eq_v", 0), ("q_eq_k_eq_v", 0), ("qk_eq_v", 1), ("qkv", 2)]
STEPS, STOP = 6, 3


def state(trainer: Any) -> dict[str, torch.Tensor]:
    """Weights, optimizer moments and the random stream."""
    found = {name: tensor.detach() for name, tensor in trainer.model.module.named_parameters()}
    for chained in trainer.optimizer.chained_optimizers:
        for index, moments in enumerate(chained.optimizer.state.values()):
            found.update({f"{index}.{name}": torch.as_tensor(value) for name, value in moments.items()})
    found["rng"] = trainer.device.rng_state()
    return {name: tensor.clone() for name, tensor in found.items()}


def losses(folder: Path) -> list[tuple[float, ...]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        (r["iteration"], r["lm_loss"], r["grad_norm"], r["learning_rate"]) for r in records if "lm_loss" in r
    ]


@pytest.mark.parametrize(("variant", "groups"), MODELS)
def test_resume_is_bit_exact(parallel_state: Any, tmp_path: Path, variant: str, groups: int) -> None:
    prefix = tiny.write_data(tmp_path)

    def start(name: str, **changes: Any) -> Any:
        line = tiny.flags(
            prefix, variant, groups, train_iters=STEPS, save=tmp_path / name, save_interval=STOP,
            hidden_dropout=0.1, attention_dropout=0.1, **changes,
        )  # fmt: skip
        trainer = tiny.trainer(line)
        assert trainer.train() == 0
        trainer.log.close()
        return trainer

    whole = start("whole")
    stopped = start("parts", exit_interval=STOP)
    assert stopped.iteration == STOP
    resumed = start("parts")
    assert resumed.iteration == STEPS
    assert resumed.consumed_samples == whole.consumed_samples

    expected, found = state(whole), state(resumed)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_resume_in_another_epoch_is_exact(parallel_state: Any, tmp_path: Path) -> None:
    """The data are read three times; each stop is in another pass over them."""
    prefix, steps = tiny.write_data(tmp_path), 40

    def start(name: str, **changes: Any) -> Any:
        line = tiny.flags(prefix, train_iters=steps, save=tmp_path / name, hidden_dropout=0.1, **changes)
        trainer = tiny.trainer(line)
        assert trainer.train() == 0
        trainer.log.close()
        return trainer

    whole = start("whole")
    tokens = sum(whole.train_data.dataset.sequence_lengths[: int(0.9 * 40)])
    assert steps * 4 * tiny.SEQ > 2.5 * tokens
    for stop in (7, 16, 33):
        assert start("parts", exit_interval=stop).iteration == stop
    resumed = start("parts")
    expected, found = state(whole), state(resumed)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_log_interval_goes_on_across_a_resume(parallel_state: Any, tmp_path: Path) -> None:
    prefix = tiny.write_data(tmp_path)
    for name, stops in (("whole", []), ("parts", [2, 3, 5])):
        for stop in [*stops, 0]:
            options = {"save": tmp_path / name, "log_interval": 4, "exit_interval": stop}
            trainer = tiny.trainer(tiny.flags(prefix, train_iters=STEPS, **options))
            assert trainer.train() == 0
            trainer.log.close()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [record[0] for record in losses(tmp_path / "whole")] == [4, 6]


def test_the_comparison_can_fail(parallel_state: Any, tmp_path: Path) -> None:
    """Without the random stream a resumed run with dropout goes another way: the test above sees that."""
    prefix = tiny.write_data(tmp_path)
    line = tiny.flags(
        prefix, train_iters=STEPS, save=tmp_path / "run", save_interval=STOP, hidden_dropout=0.1
    )
    whole = tiny.trainer([*line, "--save", str(tmp_path / "whole")])
    whole.train()
    tiny.trainer([*line, "--exit-interval", str(STOP)]).train()
    resumed = tiny.trainer([*line, "--no-load-rng"])
    resumed.train()
    expected, found = state(whole), state(resumed)
    assert any(not torch.equal(expected[name], found[name]) for name in expected)


def test_adam_flags_of_the_restart_win(parallel_state: Any, tmp_path: Path, capsys: Any) -> None:
    prefix = tiny.write_data(tmp_path)
    tiny.trainer(tiny.flags(prefix, save=tmp_path / "run", train_iters=3)).train()
    changed = {"adam_beta2": 0.5, "adam_eps": 1e-3}
    trainer = tiny.trainer(tiny.flags(prefix, save=tmp_path / "run", **changed))
    assert [(g["betas"], g["eps"]) for g in trainer.optimizer.param_groups] == [((0.9, 0.5), 1e-3)] * 2
    assert "--adam-beta2 was 0.999, now 0.5; --adam-eps was 1e-08, now 0.001" in capsys.readouterr().out


def test_other_decay_groups_are_refused(parallel_state: Any, tmp_path: Path) -> None:
    prefix = tiny.write_data(tmp_path)
    tiny.trainer(tiny.flags(prefix, save=tmp_path / "run", train_iters=3)).train()
    with pytest.raises(ValueError, match="--weight-decay-on-all: given, but .* --no-load-optim"):
        tiny.trainer(tiny.flags(prefix, save=tmp_path / "run", weight_decay_on_all=True))
    options = {"weight_decay_on_all": True, "no_load_optim": True}
    assert tiny.trainer(tiny.flags(prefix, save=tmp_path / "run", **options)).train() == 0


def test_finetune_starts_anew_with_the_weights(parallel_state: Any, tmp_path: Path) -> None:
    prefix = tiny.write_data(tmp_path)
    first = tiny.trainer(tiny.flags(prefix, save=tmp_path / "first"))
    first.train()
    tuned = tiny.trainer(tiny.flags(prefix, save=tmp_path / "second", load=tmp_path / "first", finetune=True))
    assert (tuned.iteration, tuned.consumed_samples) == (0, 0)
    weights = dict(first.model.module.named_parameters())
    for name, tensor in tuned.model.module.named_parameters():
        assert torch.equal(tensor, weights[name])
    for chained in tuned.optimizer.chained_optimizers:
        assert not chained.optimizer.state


def test_save_and_load_may_be_one_folder_spelled_differently(parallel_state: Any, tmp_path: Path) -> None:
    """Launch scripts pass both; before the first checkpoint that is a fresh start, not an error."""
    prefix = tiny.write_data(tmp_path)
    trainer = tiny.trainer(tiny.flags(prefix, save=f"{tmp_path}/run/", load=f"{tmp_path}/run"))
    assert trainer.iteration == 0
