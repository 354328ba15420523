"""What a checkpoint holds, what is refused, and that a failed save loses nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.config import RunConfig, from_dict


def run(tmp_path: Path, variant: str = "qk_eq_v", groups: int = 0, **changes: Any) -> Any:
    """A trained tiny run in tmp_path/run."""
    if not (tmp_path / "tiny_text_document.idx").exists():
        tiny.write_data(tmp_path)
    line = tiny.flags(
        tmp_path / "tiny_text_document",
        variant,
        groups,
        **{"train_iters": 2, "lr_warmup_iters": 1, "save": tmp_path / "run", **changes},
    )
    trainer = tiny.trainer(line)
    trainer.train()
    trainer.log.close()
    return trainer


@pytest.mark.parametrize(
    ("variant", "rows"), [("qkv", 96), ("q_eq_k", 64), ("qk_eq_v", 64), ("q_eq_k_eq_v", 32)]
)
def test_a_checkpoint_holds_the_variants_tensors_only(
    parallel_state: Any, tmp_path: Path, variant: str, rows: int
) -> None:
    run(tmp_path, variant)
    folder = files.resolve_checkpoint(tmp_path / "run")
    stored = files.read_metadata(folder).state_dict_metadata
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
    folder = files.resolve_checkpoint(tmp_path / "run")
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


def test_missing_and_incomplete_checkpoints_are_named(parallel_state: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--load .*no checkpoint there"):
        run(tmp_path, load=tmp_path / "nowhere", save=None)
    run(tmp_path)
    folder = files.resolve_checkpoint(tmp_path / "run")
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"\.metadata is missing, the checkpoint is not complete"):
        files.resolve_checkpoint(tmp_path / "run")
    (tmp_path / "run" / files.TRACKER).write_text("release")
    with pytest.raises(ValueError, match="not an iteration number"):
        files.latest_iteration(tmp_path / "run")


class Payload:
    """Unpickled without a check, this would create a file."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.target,))


def test_nothing_unsafe_is_unpickled(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path)
    folder = files.resolve_checkpoint(tmp_path / "run")
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    with pytest.raises(ValueError, match="not checkpoint metadata"):
        run(tmp_path, train_iters=4)
    assert not (tmp_path / "pwned").exists()


def test_common_state_with_code_is_refused(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path)
    common = files.resolve_checkpoint(tmp_path / "run") / "common.pt"
    if not common.exists():
        pytest.skip("this Megatron-Core keeps its common state in the shards")
    torch.save(Payload(tmp_path / "pwned"), common)
    with pytest.raises(ValueError, match="cannot be read .*Weights only load failed"):
        run(tmp_path, train_iters=4)
    assert not (tmp_path / "pwned").exists()


def test_a_shard_with_code_is_refused(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path)
    folder = files.resolve_checkpoint(tmp_path / "run")
    metadata = files.read_metadata(folder)
    torch.save(Payload(tmp_path / "pwned"), folder / "__9_9.distcp")
    for index, stored in metadata.storage_data.items():
        if index.fqn == "decoder.final_layernorm.weight":
            size = (folder / "__9_9.distcp").stat().st_size
            stored.relative_path, stored.offset, stored.length = "__9_9.distcp", 0, size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="cannot be read .*UnpicklingError: Weights only load failed"):
        run(tmp_path, train_iters=4)
    assert not (tmp_path / "pwned").exists()


def test_byte_entries_with_code_are_never_run(parallel_state: Any, tmp_path: Path) -> None:
    """Megatron-Core 0.17 and later read some (the common state), earlier ones none; neither may run code."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    run(tmp_path)
    folder = files.resolve_checkpoint(tmp_path / "run")
    metadata = files.read_metadata(folder)
    torch.save(Payload(tmp_path / "pwned"), folder / "__9_9.distcp")
    size = (folder / "__9_9.distcp").stat().st_size
    replaced = 0
    for index, stored in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            stored.relative_path, stored.offset, stored.length = "__9_9.distcp", 0, size
            replaced += 1
    assert replaced
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    if (folder / "common.pt").exists():
        assert run(tmp_path, train_iters=4).iteration == 4
    else:
        with pytest.raises(ValueError, match="cannot be read .*Weights only load failed"):
            run(tmp_path, train_iters=4)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("dotted", ["Metadata.__init__", "torch.load", "os.system"])
def test_the_metadata_reader_takes_no_dotted_or_foreign_names(tmp_path: Path, dotted: str) -> None:
    module = (
        "torch.distributed.checkpoint.metadata" if dotted.startswith("Metadata") else dotted.split(".")[0]
    )
    name = dotted if dotted.startswith("Metadata") else dotted.split(".")[1]
    (tmp_path / ".metadata").write_bytes(
        b"\x80\x04"
        + b"\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93."
    )
    with pytest.raises(ValueError, match="has no place in checkpoint metadata"):
        files.read_metadata(tmp_path)


def test_a_failed_save_leaves_the_previous_checkpoint(parallel_state: Any, tmp_path: Path) -> None:
    trainer = run(tmp_path)
    kept = files.resolve_checkpoint(tmp_path / "run")
    content = {path.name: path.read_bytes() for path in kept.iterdir()}
    trainer.iteration = 3
    # A folder in the way of a JSON file: the save fails after the shards were written.
    original = files.TRAIN_STATE
    try:
        files.TRAIN_STATE = "no/such/folder.json"
        with pytest.raises(OSError):
            trainer.save()
    finally:
        files.TRAIN_STATE = original
    assert files.latest_iteration(tmp_path / "run") == 2
    assert not files.iteration_dir(tmp_path / "run", 3).exists()
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == content
    trainer.save()
    assert files.latest_iteration(tmp_path / "run") == 3
    assert not list((tmp_path / "run").glob(".iter*"))


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
