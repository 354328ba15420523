"""--load-fallback: from a damaged checkpoint, or a lost tracker, to the newest one that is whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoint_runs import run
from megatron_sharedproj.checkpointing import files, manifest
from megatron_sharedproj.checkpointing.selection import choose

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def trained(parallel_state: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with checkpoints of iterations 2, 4 and 6."""
    return run(tmp_path_factory.mktemp("trained"), train_iters=6, save_interval=2)


@pytest.fixture
def root(trained: Any, tmp_path: Path) -> Path:
    for name in ("tiny_text_document.bin", "tiny_text_document.idx"):
        shutil.copy(Path(trained.config.checkpoint.save).parent / name, tmp_path)
    return Path(shutil.copytree(trained.config.checkpoint.save, tmp_path / "run"))


def damage(root: Path, iteration: int, name: str = "__0_0.distcp") -> None:
    path = files.iteration_dir(root, iteration) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_the_newest_whole_one_is_taken(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(root, 6)
    trainer = run(root.parent, train_iters=6, save_interval=2, load_fallback=True)
    assert trainer.iteration == 6
    out = capsys.readouterr().out
    assert (
        "iter_0000006 is damaged: __0_0.distcp (contents changed: its checksum differs); going on from "
        in out
    )
    assert "resumed from " in out and "iter_0000004: iteration 4" in out
    # Trained again, saved again: whole.
    assert choose(root).folder.name == "iter_0000006"
    run(root.parent, train_iters=8)


def test_damaged_candidates_are_passed_over(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(root, 6, "run_config.json")
    damage(root, 4)
    assert run(root.parent, train_iters=6, load_fallback=True).iteration == 6
    out = capsys.readouterr().out
    assert out.count("is damaged") == 2 and "iter_0000002: iteration 2" in out


def test_a_damaged_one_is_no_longer_latest_once_the_run_goes_on(root: Path) -> None:
    damage(root, 6)
    run(root.parent, train_iters=8, load_fallback=True, exit_interval=5)
    assert (root / files.TRACKER).read_text() == "5"
    shutil.rmtree(files.iteration_dir(root, 5))
    files.write_tracker(root, 4)
    assert choose(root).folder.name == "iter_0000004"


@pytest.mark.parametrize("content", [None, "", "release", "\xff\xfe", "-4", "9"])
def test_a_lost_tracker(root: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = root / files.TRACKER
    tracker.unlink()
    if content is not None:
        tracker.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="add --load-fallback to go on from iter_0000006") as error:
        run(root.parent, train_iters=8)
    assert files.TRACKER in str(error.value) or "iter_0000009" in str(error.value)
    assert run(root.parent, train_iters=8, load_fallback=True).iteration == 8
    assert "resumed from " in capsys.readouterr().out
    assert tracker.read_text() == "8"


def test_a_tracker_that_names_an_older_one_is_noted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / files.TRACKER).write_text("4")
    run(root.parent, train_iters=4)
    assert f"{files.TRACKER} names iteration 4; iter_0000006 is newer" in capsys.readouterr().out


def test_a_save_killed_before_it_was_named_counts(root: Path) -> None:
    """Announced and renamed, but the tracker is the last save's, or there was none yet."""
    files.announce_tracker(root, 6)
    (root / files.TRACKER).write_text("4")
    assert files.latest_iteration(root) == 6
    (root / files.TRACKER).unlink()
    assert choose(root).folder.name == "iter_0000006"
    shutil.rmtree(files.iteration_dir(root, 6))
    (root / files.TRACKER).write_text("4")
    assert files.latest_iteration(root) == 4


def test_nothing_whole_is_an_error(root: Path) -> None:
    for iteration in (2, 4, 6):
        damage(root, iteration)
    for fallback in (True, None):
        with pytest.raises(
            ValueError, match="iter_0000006 is damaged: .*; so is every other checkpoint there"
        ):
            run(root.parent, train_iters=8, load_fallback=fallback)
    with pytest.raises(ValueError, match="--load .*no checkpoint there"):
        run(root.parent, load=root.parent / "nowhere", save=None)


def test_load_falls_back_too_and_leaves_the_folder_alone(root: Path, tmp_path: Path) -> None:
    damage(root, 6)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    options = {"load": root, "save": tmp_path / "other", "train_iters": 6}
    with pytest.raises(ValueError, match="--load .* add --load-fallback"):
        run(tmp_path, **options)
    assert run(tmp_path, load_fallback=True, **options).iteration == 6
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def launch(folder: Path, *names: str) -> dict[str, Any]:
    """Two ranks choose, verify and save: folder -> what each rank found."""
    paths = os.pathsep.join([str(TESTS), str(Path(__file__).parent), str(TESTS.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).parent / "agreement_worker.py"), str(folder), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {name: [json.loads((folder / f"{name}.{rank}").read_text()) for rank in (0, 1)] for name in names}


def test_two_ranks_agree(trained: Any, tmp_path: Path) -> None:
    """Also where only one of them finds the damage, or sees another tracker; none waits for the other."""
    source = trained.config.checkpoint.save
    names = ["whole", "shard", "index", "lost", "nothing"]
    for name in names:
        shutil.copytree(source, tmp_path / name)
    damage(tmp_path / "shard", 6)
    damage(tmp_path / "shard", 4, "run_config.json")
    damage(tmp_path / "index", 6, ".metadata")
    (tmp_path / "lost" / files.TRACKER).unlink()
    for iteration in (2, 4, 6):
        damage(tmp_path / "nothing", iteration)
    found = launch(tmp_path, *names)
    for name in names:
        assert found[name][0] == found[name][1]
    assert found["whole"][0] == {"strict": "iter_0000006", "fallback": "iter_0000006", "verified": 1}
    assert found["shard"][0]["fallback"] == "iter_0000002"
    assert "__0_0.distcp (contents changed" in found["shard"][0]["strict"]
    assert found["index"][0]["fallback"] == "iter_0000004"
    assert found["lost"][0]["fallback"] == "iter_0000006"
    assert "so is every other" in found["nothing"][0]["fallback"]


def test_a_manifest_is_there(trained: Any) -> None:
    records = manifest.read_manifest(files.iteration_dir(trained.config.checkpoint.save, 6))
    assert records is not None
    folder = files.iteration_dir(trained.config.checkpoint.save, 6)
    assert set(records) == {path.name for path in folder.iterdir()} - {manifest.MANIFEST}
    assert all(record == manifest.record_of(folder / name) for name, record in records.items())
