"""Which checkpoints are kept, and that a kill while others are deleted leaves none by halves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from checkpoint_runs import run
from megatron_sharedproj.checkpointing import files, retention
from megatron_sharedproj.checkpointing.selection import choose
from megatron_sharedproj.config import CheckpointConfig


def kept(saved: list[int], last: int, damaged: tuple[int, ...] = (), **options: int) -> list[int]:
    folders = {n: Path(f"iter_{n:07d}") for n in sorted(saved, reverse=True)}
    bad = {folders[n] for n in damaged}
    gone = retention.superfluous([*folders.values()], CheckpointConfig(**options), folders[last], bad)
    return [n for n in saved if folders[n] not in gone]


def test_what_is_kept() -> None:
    saved = [10, 20, 30, 40, 50]
    assert kept(saved, 50) == saved
    assert kept(saved, 50, most_recent_k=1) == [50]
    assert kept(saved, 50, most_recent_k=3) == [30, 40, 50]
    assert kept(saved, 50, save_retain_interval=20) == [20, 40, 50]
    assert kept(saved, 50, save_retain_interval=30, most_recent_k=2) == [30, 40, 50]
    # A damaged one is none of the last two, and what is newer than the last belongs to another time.
    assert kept(saved, 50, damaged=(40,), most_recent_k=2) == [30, 50]
    assert kept(saved, 30, most_recent_k=1) == [30, 40, 50]


def iterations(root: Path) -> list[int]:
    return sorted(files.iteration_of(folder) or 0 for folder in files.iteration_dirs(root))


@pytest.mark.parametrize("behind", [False, True])
def test_a_run_deletes_as_it_goes(
    parallel_state: Any, tmp_path: Path, behind: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"save_interval": 1, "save_retain_interval": 3, "most_recent_k": 2, "async_save": behind}
    run(tmp_path, train_iters=8, **options)
    assert iterations(tmp_path / "run") == [3, 6, 7, 8]
    assert "deleted iter_0000001" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob(".iter*"))


def test_the_one_loaded_from_stays_until_a_newer_one_is_complete(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path, train_iters=4, save_interval=2)
    path = tmp_path / "run" / "iter_0000004" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    seen = []
    options = {"train_iters": 5, "lr_warmup_iters": 1, "save": tmp_path / "run", "most_recent_k": 1}
    trainer = tiny.trainer(tiny.flags(tmp_path / "tiny_text_document", load_fallback=True, **options))
    trainer.hooks.append(lambda t: seen.append(iterations(tmp_path / "run")))
    assert trainer.iteration == 2 and trainer.train() == 0
    assert seen == [[2, 4]] * 3 and iterations(tmp_path / "run") == [5]


def test_a_last_one_that_is_not_there_deletes_nothing(parallel_state: Any, tmp_path: Path) -> None:
    trainer = run(tmp_path, train_iters=3, save_interval=1)
    root = tmp_path / "run"
    options = CheckpointConfig(most_recent_k=1)
    (root / "iter_0000003" / "__0_0.distcp").unlink()
    assert retention.prune(root, options, root / "iter_0000003") == []
    assert iterations(root) == [1, 2, 3] and trainer.iteration == 3
    assert retention.prune(root, options, root / "iter_0000002") == [root / "iter_0000001"]


def test_leftovers_are_invisible_and_cleaned_at_the_next_save(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path)
    root = tmp_path / "run"
    for name in (".iter_0000004.tmp", ".iter_0000001.deleted", ".iter_0000002.old"):
        shutil.copytree(root / "iter_0000002", root / name)
    (root / ".iter_0000004.tmp" / "manifest.json").unlink()
    (root / "keep").mkdir()
    assert choose(root).folder.name == "iter_0000002" and choose(root).notes == []
    run(tmp_path, train_iters=3)
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == [
        "iter_0000002",
        "iter_0000003",
        "keep",
    ]


def test_a_link_is_not_deleted(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path, exit_interval=1)
    shutil.move(tmp_path / "run" / "iter_0000001", tmp_path / "elsewhere")
    (tmp_path / "run" / "iter_0000001").symlink_to(tmp_path / "elsewhere")
    run(tmp_path, train_iters=3, save_interval=1, most_recent_k=1)
    assert iterations(tmp_path / "run") == [1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_retain_interval": 3, "save_interval": 2}, "--save-retain-interval 3: must be a multiple of"),
        ({"save_retain_interval": -2, "save_interval": 2}, "--save-retain-interval -2: must be a multiple"),
        ({"most_recent_k": 0}, "--most-recent-k 0: must be at least 1, or -1"),
    ],
)
def test_mistakes(parallel_state: Any, tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
