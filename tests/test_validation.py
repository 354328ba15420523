"""Checks that touch the machine: memory and folders. Those of the flags are in test_arguments.py."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tiny
from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.config import RunConfig
from megatron_sharedproj.device import CpuDevice
from megatron_sharedproj.validation import check_device, check_folders


def config(folder: Path, **changes: Any) -> RunConfig:
    return run_config(build_parser().parse_args(tiny.flags(folder / "tiny", **changes)), tiny.VOCAB, 1)


def test_folders_that_can_be_written_pass_and_stay_as_they_were(tmp_path: Path) -> None:
    check_folders(config(tmp_path, save=tmp_path / "a" / "b", tensorboard_dir=tmp_path / "c"))
    assert list(tmp_path.iterdir()) == []


def test_nodes_that_check_a_folder_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As under examples/slurm, where every node checks the flags before torchrun."""
    options = config(tmp_path, save=tmp_path / "runs" / "300m" / "qkv")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check_folders, [options] * 2000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir", "--data-cache-path"])
def test_a_file_in_the_way_is_named(tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "run"
    with pytest.raises(ValueError, match=rf"^{flag} {re.escape(str(target))}: cannot be written"):
        check_folders(config(tmp_path, **{flag[2:].replace("-", "_"): target}))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    small = config(tmp_path)
    assert "GiB needed" in check_device(small, CpuDevice(), 1)
    large = config(tmp_path, hidden_size=65536, num_layers=96, num_attention_heads=64)
    with pytest.raises(ValueError, match="--micro-batch-size 1: memory per process: about .* GiB needed"):
        check_device(large, CpuDevice(), 1)


def test_changed_flags_are_reported_on_resume(parallel_state: Any, tmp_path: Path, capsys: Any) -> None:
    data = tiny.write_data(tmp_path)
    tiny.trainer(tiny.flags(data, save=tmp_path / "run", global_batch_size=8, train_iters=4)).train()
    trainer = tiny.trainer(tiny.flags(data, save=tmp_path / "run", global_batch_size=4, train_iters=12))
    out = capsys.readouterr().out
    assert "--global-batch-size was 8, now 4; --train-iters was 4, now 12" in out
    assert trainer.train() == 0
    assert (trainer.iteration, trainer.consumed_samples) == (12, 4 * 8 + 8 * 4)
    with pytest.raises(ValueError, match="--train-iters 5: the checkpoint .* is at iteration 12 already"):
        tiny.trainer(tiny.flags(data, save=tmp_path / "run", train_iters=5))
