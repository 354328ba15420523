"""The fingerprint of the training data: what changes it, what does not, and what a resume does with it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from megatron_sharedproj.config import DataConfig, TrainConfig
from megatron_sharedproj.data.datasets import resolve_blends
from megatron_sharedproj.data.fingerprint import check_same_data, differences, file_digest, fingerprint


def of(*words: object, seq_length: int = 32, seed: int = 1, **data: Any) -> dict[str, Any]:
    """The fingerprint of a --data-path."""
    config = DataConfig(data_path=[str(word) for word in words], **{"split": "90,10,0", **data})
    train = TrainConfig(seq_length=seq_length, seed=seed)
    return fingerprint(config, train, resolve_blends(config, tiny.VOCAB, validate=True))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two data sets in folders of their own."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return tiny.write_data(tmp_path / "a"), tiny.write_data(tmp_path / "b", documents=50, seed=1)


def test_a_moved_data_set_is_the_same(two: tuple[Path, Path], tmp_path: Path) -> None:
    before = of(two[0])
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    for suffix in (".bin", ".idx"):
        (tmp_path / "c" / f"tiny_text_document{suffix}").rename(tmp_path / "c" / f"renamed{suffix}")
    assert differences(before, of(tmp_path / "c" / "renamed")) == []
    assert differences(before, of(two[0], split="0.9,0.1")) == []


def test_what_differs_is_named(two: tuple[Path, Path]) -> None:
    a, b = two
    before = of(a)
    assert differences(before, of(a, seq_length=16)) == ["--seq-length was 32, now 16"]
    assert differences(before, of(a, seed=2)) == ["--seed was 1, now 2"]
    assert differences(before, of(a, split="80,20,0")) == ["--split was 0.9,0.1,0, now 0.8,0.2,0"]
    assert "--data-protocol was packed, now padded" in differences(before, of(a, data_protocol="padded"))
    (line,) = differences(before, of(b))
    assert line.startswith("data set tiny_text_document (40 documents, ") and "(50 documents, " in line
    (line,) = differences(before, of(1, a, 1, b))
    assert line.startswith("there were 1 data set(s) (tiny_text_document), now 2 (")
    lines = differences(of(1, a, 1, b), of(3, a, 1, b))
    assert lines[0] == "the share of tiny_text_document was 0.5, now 0.75" and len(lines) == 2
    assert differences(of(1, a, 1, b), of(2, a, 2, b)) == []
    assert len(differences(of(1, a, 1, b), of(1, b, 1, a))) == 2
    assert differences(before, {**before, "mock_data": True}) == ["--mock-data was False, now True"]


def test_other_tokens_of_the_same_lengths_are_seen(two: tuple[Path, Path]) -> None:
    before = of(two[0])
    path = Path(f"{two[0]}.bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    (line,) = differences(before, of(two[0]))
    assert line.endswith("as large, with other contents")


def test_a_large_file_is_looked_at_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "large"
    data = bytearray(range(256)) * 400
    path.write_bytes(data)
    whole, pieces = file_digest(path), file_digest(path, 6400)
    for place in (0, 50, len(data) // 63 + 5, len(data) - 1):
        changed = copy.copy(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert file_digest(path) != whole and file_digest(path, 6400) != pieces
    path.write_bytes(data[:-1])
    assert file_digest(path, 6400) != pieces


def test_a_checkpoint_without_one_is_taken(two: tuple[Path, Path]) -> None:
    check_same_data(None, of(two[0]), Path("folder"))


def start(prefix: Path, root: Path, **changes: Any) -> Any:
    options = {"train_iters": 4, "save": root / "run", **changes}
    return tiny.trainer(tiny.flags(prefix, **options))


def test_a_resume_with_other_data_is_refused(
    parallel_state: Any, two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(two[0], tmp_path, train_iters=3).train()
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    for prefix, changes, expected in (
        (two[1], {}, "data set tiny_text_document (40 documents"),
        (two[0], {"seq_length": 16}, "--seq-length was 32, now 16"),
        (two[0], {"split": "80,20,0"}, "--split was 0.9,0.1,0, now 0.8,0.2,0"),
    ):
        with pytest.raises(
            ValueError, match="--data-path: not what the checkpoint in .* was trained on"
        ) as error:
            start(prefix, tmp_path, **changes)
        assert expected in str(error.value) and "--override-data-fingerprint" in str(error.value)
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    # Moved: the same data, and no word of a change.
    shutil.copytree(two[0].parent, tmp_path / "moved")
    capsys.readouterr()
    assert start(tmp_path / "moved" / two[0].name, tmp_path, train_iters=3).iteration == 3
    assert "changed since" not in capsys.readouterr().out
    trainer = start(two[1], tmp_path, override_data_fingerprint=True)
    assert "changed since the checkpoint: --train-iters" in capsys.readouterr().out
    assert trainer.iteration == 3 and trainer.train() == 0
    # From here on the other data are the run's.
    assert start(two[1], tmp_path).iteration == 4
    tuned = start(two[0], tmp_path, save=tmp_path / "tuned", load=tmp_path / "run", finetune=True)
    assert tuned.iteration == 0
