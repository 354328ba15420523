"""Every file of a checkpoint, damaged in every way: each is detected and named before anything is loaded."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint_runs import run
from megatron_sharedproj.checkpointing import files, manifest
from megatron_sharedproj.checkpointing.selection import Choice, agree, choose, find_damage
from megatron_sharedproj.checkpointing.sharded import load_checkpoint


@pytest.fixture(scope="module")
def trained(parallel_state: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with checkpoints of iterations 2 and 4."""
    return run(tmp_path_factory.mktemp("trained"), train_iters=4, save_interval=2)


@pytest.fixture
def root(trained: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.config.checkpoint.save, tmp_path / "run"))


def flip(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def mutations(data: bytes, seed: int) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, the bytes that are there instead; None: no file)."""
    chance = random.Random(seed)
    yield "deleted", None
    yield "emptied", b""
    for size in {len(data) - 1, len(data) // 2, 1}:
        yield f"cut to {size}", data[:size]
    yield "one byte longer", data + b"\0"
    yield "zeroed", bytes(len(data))
    places = {0, len(data) // 2, len(data) - 1, *(chance.randrange(len(data)) for _ in range(9))}
    for place in sorted(places):
        bit = chance.randrange(8)
        yield f"bit {bit} of byte {place}", flip(data, place, bit)


def names_of(trained: Any) -> list[str]:
    return sorted(p.name for p in files.iteration_dir(trained.config.checkpoint.save, 4).iterdir())


def test_every_mutation_of_every_file_is_detected_and_named(trained: Any, root: Path) -> None:
    folder = files.iteration_dir(root, 4)
    silent, unnamed, count = [], [], 0
    assert find_damage(folder, contents=True) == []
    for name in names_of(trained):
        data = (folder / name).read_bytes()
        for what, changed in mutations(data, seed=len(name)):
            if changed is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(changed)
            count += 1
            try:
                # What every loader does before it reads anything else.
                agree(Choice(folder, folder))
                silent.append((name, what))
            except ValueError as error:
                if f"{name} (" not in str(error) or "iter_0000002" not in str(error):
                    unnamed.append((name, what, str(error)))
            (folder / name).write_bytes(data)
    assert (silent, unnamed) == ([], [])
    assert count > 100 and find_damage(folder, contents=True) == []


def test_every_byte_of_the_manifest_matters(trained: Any, root: Path) -> None:
    folder = files.iteration_dir(root, 4)
    data = (folder / manifest.MANIFEST).read_bytes()
    for place in range(len(data)):
        (folder / manifest.MANIFEST).write_bytes(flip(data, place, place % 8))
        assert find_damage(folder, contents=False), place


@pytest.mark.parametrize("name", [".metadata", "run_config.json", "train_state.json", "__0_0.distcp"])
def test_the_trainer_refuses_a_damaged_file(trained: Any, root: Path, name: str) -> None:
    path = files.iteration_dir(root, 4) / name
    data = path.read_bytes()
    path.write_bytes(flip(data, len(data) // 2, 3))
    before = sorted(p.relative_to(root) for p in root.rglob("*"))
    with pytest.raises(ValueError, match=r"--save .*iter_0000004 is damaged: ") as error:
        run(root.parent, train_iters=6)
    text = str(error.value)
    assert f"{name} (contents changed: its checksum differs)" in text
    assert "add --load-fallback to go on from iter_0000002" in text
    assert sorted(p.relative_to(root) for p in root.rglob("*")) == before


def test_all_damaged_files_are_named_at_once(root: Path) -> None:
    folder = files.iteration_dir(root, 4)
    (folder / ".metadata").unlink()
    (folder / "metadata.json").write_bytes(b"")
    shard = folder / "__0_0.distcp"
    shard.write_bytes(flip(shard.read_bytes(), 5000, 0))
    with pytest.raises(ValueError) as error:
        agree(Choice(folder, folder))
    for part in (".metadata (missing)", "metadata.json (truncated: 0 of ", "__0_0.distcp (contents changed"):
        assert part in str(error.value)


def test_other_loaders_verify_too(trained: Any, root: Path) -> None:
    """load_checkpoint is what evaluate, generate and the converters load with; they don't fall back."""
    folder = files.iteration_dir(root, 4)
    shard = folder / "__0_0.distcp"
    shard.write_bytes(flip(shard.read_bytes(), 5000, 0))
    with pytest.raises(ValueError, match=r"__0_0.distcp .*; load .*iter_0000002, the newest") as error:
        load_checkpoint(folder, trained.device, model=trained.model.module)
    assert "--load-fallback" not in str(error.value)
    state, _ = load_checkpoint(folder, trained.device, model=trained.model.module, verify=False)
    assert state["iteration"] == 4


def test_no_verify_integrity_loads_what_can_be_read(trained: Any, root: Path) -> None:
    path = files.iteration_dir(root, 4) / files.TRAIN_STATE
    path.write_text(path.read_text().replace('"consumed_samples": 16', '"consumed_samples": 12'))
    trainer = run(root.parent, train_iters=4, no_verify_integrity=True)
    assert (trainer.iteration, trainer.consumed_samples) == (4, 12)


def test_a_checkpoint_of_an_older_version_loads_with_a_note(
    trained: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = files.iteration_dir(root, 4)
    (folder / manifest.MANIFEST).unlink()
    path = folder / files.TRAIN_STATE
    path.write_text(path.read_text().replace('"has_manifest": true', '"has_manifest": false'))
    assert run(root.parent, train_iters=6).iteration == 6
    assert "iter_0000004 has no manifest.json: of an older version, not verified" in capsys.readouterr().out


def test_files_are_shared_out_by_size() -> None:
    sizes = {"a": 100, "b": 60, "c": 50, "d": 1, "e": 0}
    records = {name: manifest.FileRecord(size, "0") for name, size in sizes.items()}
    shares = [manifest.share(records, rank, 3) for rank in range(3)]
    assert sorted(name for mine in shares for name in mine) == sorted(records)
    assert max(sum(sizes[name] for name in mine) for mine in shares) == 100


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"crc32"', '"md5"'),
        lambda text: text.replace('"metadata.json"', '"../metadata.json"'),
        lambda text: "[]",
        lambda text: '{"format": 1}',
        lambda text: "\xff",
    ],
)
def test_an_unreadable_manifest_is_named(root: Path, change: Callable[[str], str]) -> None:
    path = files.iteration_dir(root, 4) / manifest.MANIFEST
    path.write_text(change(path.read_text()), encoding="latin-1")
    with pytest.raises(ValueError, match=r"manifest\.json \(damaged: "):
        choose(root)
