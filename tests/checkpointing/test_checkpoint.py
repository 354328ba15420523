"""What a checkpoint holds, and which other model's is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoint_runs import run
from megatron_sharedproj.checkpointing import files, metadata, resolve_checkpoint
from megatron_sharedproj.config import RunConfig, from_dict


@pytest.mark.parametrize(
    ("variant", "rows"), [("qkv", 96), ("q_eq_k", 64), ("qk_eq_v", 64), ("q_eq_k_eq_v", 32)]
)
def test_a_checkpoint_holds_the_variants_tensors_only(
    parallel_state: Any, tmp_path: Path, variant: str, rows: int
) -> None:
    run(tmp_path, variant)
    folder = resolve_checkpoint(tmp_path / "run")
    stored = metadata.read_metadata(folder).state_dict_metadata
    attention = {
        key: value for key, value in stored.items() if "self_attention" in key and hasattr(value, "size")
    }
    weights = {key.split(".")[-2] for key in attention}
    assert weights == {"linear_qkv", "linear_proj"}
    for key, value in attention.items():
        if key.endswith("linear_qkv.weight"):
            assert tuple(value.size)[-2:] == (rows, 32)
    assert not [key for key in stored if "value" in key or key.endswith(("_v.weight", "v_proj.weight"))]


def test_arguments_are_json_and_complete(parallel_state: Any, tmp_path: Path) -> None:
    trainer = run(tmp_path)
    folder = resolve_checkpoint(tmp_path / "run")
    assert folder.name == "iter_0000002"
    assert files.checkpoint_config(folder) == trainer.config
    state = json.loads((folder / files.TRAIN_STATE).read_text())
    assert (state["iteration"], state["consumed_samples"]) == (2, 8)
    assert (
        from_dict(RunConfig, json.loads((tmp_path / "run" / files.RUN_CONFIG).read_text())) == trainer.config
    )


@pytest.mark.parametrize(
    ("variant", "groups", "expected"),
    [
        ("qkv", 0, "attention_variant is qk_eq_v there and qkv here"),
        ("qk_eq_v", 2, "num_query_groups is 4 there and 2 here"),
    ],
)
def test_another_model_is_refused(
    parallel_state: Any, tmp_path: Path, variant: str, groups: int, expected: str
) -> None:
    run(tmp_path)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match="checkpoint of another model") as error:
        run(tmp_path, variant, groups)
    assert expected in str(error.value) and "--save" in str(error.value)
    with pytest.raises(ValueError, match="checkpoint of another model"):
        run(tmp_path, variant, groups, save=tmp_path / "other", load=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    assert not (tmp_path / "other").exists()


def test_weights_only_checkpoint_resumes_when_asked(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path, no_save_optim=True)
    with pytest.raises(ValueError, match="--no-load-optim"):
        run(tmp_path, train_iters=4)
    trainer = run(tmp_path, train_iters=4, no_load_optim=True)
    assert trainer.iteration == 4


def test_a_moved_checkpoint_folder_loads(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    trainer = run(tmp_path, save=tmp_path / "new", load=tmp_path / "moved", train_iters=4)
    assert trainer.iteration == 4
