"""Saving at once and behind the training: what is written, what a failure or an interruption leaves."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from checkpoint_runs import run
from megatron_sharedproj.checkpointing import files, manifest, resolve_checkpoint
from megatron_sharedproj.checkpointing.saver import CheckpointSaver, SaveError
from megatron_sharedproj.checkpointing.selection import find_damage
from megatron_sharedproj.checkpointing.sharded import load_checkpoint

TESTS = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes: as a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def start(tmp_path: Path, **changes: Any) -> Any:
    """A trainer that has not trained yet."""
    if not (tmp_path / "tiny_text_document.idx").exists():
        tiny.write_data(tmp_path)
    options = {"train_iters": 6, "save": tmp_path / "run", **changes}
    return tiny.trainer(tiny.flags(tmp_path / "tiny_text_document", **options))


def test_behind_the_training_the_same_files_are_written(parallel_state: Any, tmp_path: Path) -> None:
    for name in ("now", "behind"):
        run(tmp_path, save=tmp_path / name, train_iters=5, save_interval=2, async_save=name == "behind")
    for iteration in (2, 4, 5):
        now, behind = (files.iteration_dir(tmp_path / name, iteration) for name in ("now", "behind"))
        assert find_damage(behind, contents=True) == []
        shards = [path.name for path in now.glob("*.distcp")]
        assert shards and contents(now).keys() == contents(behind).keys()
        assert all((now / name).read_bytes() == (behind / name).read_bytes() for name in shards)
    assert files.latest_iteration(tmp_path / "behind") == 5
    assert not list((tmp_path / "behind").glob(".iter*"))


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_a_resume_from_a_save_behind_the_training_is_exact(
    parallel_state: Any, tmp_path: Path, interval: int
) -> None:
    options = {"train_iters": 6, "save_interval": interval, "async_save": True, "hidden_dropout": 0.1}
    whole = run(tmp_path, save=tmp_path / "whole", **options)
    run(tmp_path, exit_interval=3, **options)
    resumed = run(tmp_path, **options)
    for mine, theirs in zip(resumed.model.module.parameters(), whole.model.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert resumed.last_loss == whole.last_loss


def test_training_may_change_the_weights_at_once(parallel_state: Any, tmp_path: Path) -> None:
    trainer = start(tmp_path)
    saver = CheckpointSaver(trainer.config, trainer.device)
    model, state = trainer.model.module, {"iteration": 1, "consumed_samples": 0}
    expected = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for copy in (True, True, False):
        saver.begin(model=model, optimizer=None, train_state=state, copy=copy)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        saved = saver.complete()
        assert saved is not None and saver.pending is None and saver.complete() is None
        load_checkpoint(saved.folder, trainer.device, model=model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.named_parameters())


def test_one_save_at_a_time(parallel_state: Any, tmp_path: Path) -> None:
    trainer = start(tmp_path)
    arguments: dict[str, Any] = {"model": trainer.model.module, "optimizer": None, "copy": True}
    trainer.saver.begin(train_state={"iteration": 1}, **arguments)
    with pytest.raises(AssertionError, match="before the next save"):
        trainer.saver.begin(train_state={"iteration": 2}, **arguments)
    # The loop completes the first before it begins another.
    trainer.iteration = 2
    trainer.save()
    trainer.save(last=True)
    trainer.finish_save()
    assert [folder.name for folder in files.iteration_dirs(tmp_path / "run")] == [
        "iter_0000002",
        "iter_0000001",
    ]


def test_a_signal_while_a_save_is_under_way(parallel_state: Any, tmp_path: Path) -> None:
    trainer = start(tmp_path, save_interval=2, async_save=True)
    trainer.hooks.append(lambda t: t.iteration == 3 and os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.train() == 128 + signal.SIGTERM
    assert [files.iteration_of(folder) for folder in files.iteration_dirs(tmp_path / "run")] == [3, 2]
    assert all(find_damage(f, contents=True) == [] for f in files.iteration_dirs(tmp_path / "run"))


def test_a_bad_loss_keeps_the_save_under_way(parallel_state: Any, tmp_path: Path) -> None:
    trainer = start(tmp_path, save_interval=2, async_save=True, max_nan_iterations=1)

    def poison(t: Any) -> None:
        if t.iteration == 3:
            t.model.module.embedding.word_embeddings.weight.data.fill_(torch.nan)

    trainer.hooks.append(poison)
    with pytest.raises(RuntimeError, match="loss is nan at iteration 4, the last checkpoint is iteration 2"):
        trainer.train()
    assert find_damage(resolve_checkpoint(tmp_path / "run"), contents=True) == []


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("size", [100_000, 1_500])
def test_a_full_disk_is_one_line_and_the_previous_checkpoint_stays(
    parallel_state: Any, tmp_path: Path, behind: bool, size: int
) -> None:
    """The shard does not fit, or not even the JSON files."""
    trainer = start(tmp_path, async_save=behind)
    root = tmp_path / "run"
    trainer.iteration = 2
    trainer.save(last=True)
    before = contents(files.iteration_dir(root, 2))
    trainer.iteration = 3
    with largest_file(size), pytest.raises(SaveError) as error:
        trainer.save()
        trainer.finish_save()
    message = str(error.value)
    assert message.startswith(
        f"--save {root}: the checkpoint of iteration 3 cannot be written (File too large"
    )
    assert "the last complete one is iteration 2; make room" in message and "\n" not in message
    assert [path.name for path in root.iterdir() if path.is_dir()] == ["iter_0000002"]
    assert (
        contents(files.iteration_dir(root, 2)) == before
        and find_damage(root / "iter_0000002", contents=True) == []
    )
    # With room again the same trainer goes on.
    trainer.save()
    trainer.finish_save()
    assert files.latest_iteration(root) == 3


def limited(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_the_trainers_exit_code_for_a_full_disk(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path)
    line = tiny.flags(
        tmp_path / "tiny_text_document", train_iters=6, lr_warmup_iters=1, save=tmp_path / "run",
        save_interval=3, async_save=True,
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sharedproj.pretrain", *line],
        env=environment, capture_output=True, text=True, timeout=120, preexec_fn=lambda: limited(100_000),
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    # A CUDA build of torch says that there is no GPU.
    (line,) = [line for line in done.stderr.splitlines() if "No CUDA runtime" not in line]
    assert line.startswith("error: --save ")
    assert "iteration 3 cannot be written (File too large, __0_0.distcp, rank 0)" in done.stderr
    assert files.latest_iteration(tmp_path / "run") == 2
    assert run(tmp_path, train_iters=4).iteration == 4


def test_a_folder_that_cannot_be_made(parallel_state: Any, tmp_path: Path) -> None:
    trainer = start(tmp_path)
    (tmp_path / "run" / ".iter_0000001.tmp").write_text("a file in the way")
    trainer.iteration = 1
    with pytest.raises(
        SaveError, match=r"cannot be written \(File exists, .iter_0000001.tmp\), there is none yet"
    ):
        trainer.save()


def test_two_ranks_one_disk_full(tmp_path: Path) -> None:
    """Every rank hears of it, behind the training too; every file has its checksum from its own rank."""
    tiny.write_data(tmp_path)
    paths = os.pathsep.join([str(TESTS), str(Path(__file__).parent), str(TESTS.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / "saving_worker.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("now", "behind"):
        found = [json.loads((tmp_path / f"{name}.{rank}").read_text()) for rank in (0, 1)]
        assert found[0] == found[1]
        assert "iteration 2 cannot be written (File too large, __1_0.distcp, rank 1)" in found[0]["error"]
        assert "the last complete one is iteration 1" in found[0]["error"]
        assert found[0]["saved"] == [1, 3]
        assert not list((tmp_path / name).glob(".iter*"))
        for iteration in (1, 3):
            folder = files.iteration_dir(tmp_path / name, iteration)
            assert {"__0_0.distcp", "__1_0.distcp"} <= set(manifest.read_manifest(folder) or {})
            assert find_damage(folder, contents=True) == []
