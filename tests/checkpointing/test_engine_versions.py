"""Checkpoints of other versions of Megatron-Core: written_by/ holds one of each, and what was in it.

They are runs of tests/tiny.py with one layer of 8, 2 heads and 16 ids, after 3 steps; sums.json has the sum
of every weight and Adam moment at the end of training.
"""

from __future__ import annotations

import json
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from megatron_sharedproj.checkpointing import files, resolve_checkpoint
from megatron_sharedproj.checkpointing.selection import find_damage

WRITTEN = Path(__file__).parent / "written_by"
SHAPE = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 16}
OLD = version("megatron-core").startswith("0.16.")


def resume(tmp_path: Path, engine: str) -> Any:
    """A trainer that starts from the checkpoint of an engine."""
    with tarfile.open(WRITTEN / f"megatron_core_{engine}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    options = {**SHAPE, "max_position_embeddings": 8, "save": tmp_path / "run", "train_iters": 5}
    line = tiny.flags(tmp_path / "tiny_text_document", override_data_fingerprint=True, **options)
    return tiny.trainer(line)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tiny, "VOCAB", 16)
    return tiny.write_data(tmp_path)


@pytest.mark.parametrize("engine", ["0.16.1", "0.19.2"])
def test_other_engines_checkpoints(parallel_state: Any, tmp_path: Path, data: Path, engine: str) -> None:
    if OLD and not engine.startswith("0.16."):
        here = version("megatron-core")
        expected = (
            f"written with megatron-core {engine}, which megatron-core {here} cannot read; load it with"
        )
        with pytest.raises(ValueError, match=expected):
            resume(tmp_path, engine)
        assert not (tmp_path / "run" / "log.jsonl").exists()
        return
    trainer = resume(tmp_path, engine)
    found = {name: tensor for name, tensor in trainer.model.module.named_parameters()}
    for index, moments in enumerate(trainer.optimizer.chained_optimizers[0].optimizer.state.values()):
        found.update({f"{index}.{name}": torch.as_tensor(value) for name, value in moments.items()})
    expected_sums = json.loads((tmp_path / "run" / "sums.json").read_text())
    assert found.keys() == expected_sums.keys()
    for name, tensor in found.items():
        assert tensor.detach().double().sum().item() == pytest.approx(
            expected_sums[name], rel=1e-9, abs=1e-12
        )
    assert (trainer.iteration, trainer.consumed_samples) == (3, 12)
    assert trainer.train() == 0 and trainer.iteration == 5


@pytest.mark.parametrize("engine", ["0.16.1", "0.19.2"])
def test_the_files_are_whole_and_name_their_engine(tmp_path: Path, engine: str) -> None:
    with tarfile.open(WRITTEN / f"megatron_core_{engine}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = resolve_checkpoint(tmp_path / "run")
    assert find_damage(folder, contents=True) == []
    assert files.train_state(folder)["megatron_core"] == engine
    assert (folder / "common.pt").exists() == engine.startswith("0.16.")
