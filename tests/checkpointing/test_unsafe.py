"""A checkpoint cannot run code: a malicious file of each kind, with a manifest that agrees with it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_runs import Payload, run, sign
from megatron_sharedproj.checkpointing import resolve_checkpoint
from megatron_sharedproj.checkpointing.metadata import read_metadata


def test_nothing_unsafe_is_unpickled(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path)
    folder = resolve_checkpoint(tmp_path / "run")
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    sign(folder)
    with pytest.raises(ValueError, match="not checkpoint metadata"):
        run(tmp_path, train_iters=4)
    assert not (tmp_path / "pwned").exists()


def test_common_state_with_code_is_refused(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path)
    common = resolve_checkpoint(tmp_path / "run") / "common.pt"
    if not common.exists():
        pytest.skip("this Megatron-Core keeps its common state in the shards")
    torch.save(Payload(tmp_path / "pwned"), common)
    sign(common.parent)
    with pytest.raises(ValueError, match="cannot be read .*Weights only load failed"):
        run(tmp_path, train_iters=4)
    assert not (tmp_path / "pwned").exists()


def test_a_shard_with_code_is_refused(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path)
    folder = resolve_checkpoint(tmp_path / "run")
    metadata = read_metadata(folder)
    torch.save(Payload(tmp_path / "pwned"), folder / "__9_9.distcp")
    for index, stored in metadata.storage_data.items():
        if index.fqn == "decoder.final_layernorm.weight":
            size = (folder / "__9_9.distcp").stat().st_size
            stored.relative_path, stored.offset, stored.length = "__9_9.distcp", 0, size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(folder)
    with pytest.raises(ValueError, match="cannot be read .*UnpicklingError: Weights only load failed"):
        run(tmp_path, train_iters=4)
    assert not (tmp_path / "pwned").exists()


def test_byte_entries_with_code_are_never_run(parallel_state: Any, tmp_path: Path) -> None:
    """Megatron-Core 0.17 and later read some (the common state), earlier ones none; neither may run code."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    run(tmp_path)
    folder = resolve_checkpoint(tmp_path / "run")
    metadata = read_metadata(folder)
    torch.save(Payload(tmp_path / "pwned"), folder / "__9_9.distcp")
    size = (folder / "__9_9.distcp").stat().st_size
    replaced = 0
    for index, stored in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            stored.relative_path, stored.offset, stored.length = "__9_9.distcp", 0, size
            replaced += 1
    assert replaced
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(folder)
    if (folder / "common.pt").exists():
        assert run(tmp_path, train_iters=4).iteration == 4
    else:
        with pytest.raises(ValueError, match="cannot be read .*Weights only load failed"):
            run(tmp_path, train_iters=4)
    assert not (tmp_path / "pwned").exists()


FOREIGN = [
    ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
    ("torch", "load"),
    ("os", "system"),
    # A class of a known module, but one that does things when it is made.
    ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
]


@pytest.mark.parametrize(("module", "name"), FOREIGN)
def test_the_metadata_reader_takes_no_dotted_or_foreign_names(tmp_path: Path, module: str, name: str) -> None:
    strings = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + b"".join(strings) + b"\x93.")
    with pytest.raises(ValueError, match="has no place in checkpoint metadata"):
        read_metadata(tmp_path)


def test_metadata_that_points_out_of_its_folder_is_refused(parallel_state: Any, tmp_path: Path) -> None:
    run(tmp_path)
    folder = resolve_checkpoint(tmp_path / "run")
    found = read_metadata(folder)
    next(iter(found.storage_data.values())).relative_path = "../../tiny_text_document.bin"
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    sign(folder)
    with pytest.raises(ValueError, match="outside of its folder; refused"):
        run(tmp_path, train_iters=4)


@pytest.mark.parametrize("name", ["run_config.json", "train_state.json", "manifest.json"])
def test_deeply_nested_json_is_refused_in_a_line(parallel_state: Any, tmp_path: Path, name: str) -> None:
    run(tmp_path)
    folder = resolve_checkpoint(tmp_path / "run")
    (folder / name).write_text("[" * 100_000)
    if name != "manifest.json":
        sign(folder)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        run(tmp_path, train_iters=4)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
