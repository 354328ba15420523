"""Saving: aside, checksummed, synced, renamed, named latest; at once or behind the training (--async-save).

begin    all ranks plan; with --async-save each copies its part into host memory
write    each rank its own files, in a thread with --async-save; no collectives
complete all ranks hear whether every rank has written; then the first writes index, JSON files and manifest,
         renames the hidden folder, and names it latest

An interruption at any point leaves the previous checkpoint as it was and at most a hidden folder beside it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import __version__ as megatron_core_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint

from megatron_sharedproj.checkpointing import files, manifest, retention
from megatron_sharedproj.checkpointing.sharded import state_to_save
from megatron_sharedproj.checkpointing.writer import Buffers, ShardWriter, Written
from megatron_sharedproj.config import RunConfig, to_dict
from megatron_sharedproj.device import Device

# What torch.save calls an operating system's error in a file that it opened itself.
_TORCH_WRITES = ("PytorchStreamWriter", "iostream error")
_ROOM = 1 << 16  # bytes; the common state of a model takes some kilobytes


class SaveError(RuntimeError):
    """A checkpoint could not be written: one line that names --save and what is still there.

    Attributes:
        reason: the operating system's, and the file.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint.

    Attributes:
        folder: its iteration folder, named latest.
        seconds: from the beginning until it was complete; lost: of those, the ones that training waited.
        deleted: older checkpoints that the retention flags did not keep.
    """

    folder: Path
    iteration: int
    seconds: float
    lost: float
    deleted: tuple[Path, ...] = ()


@dataclass
class _Pending:
    writer: ShardWriter
    iteration: int
    aside: Path
    jsons: dict[str, bytes]
    started: float
    lost: float = 0.0


class _PlannedSave(TorchDistSaveShardedStrategy):
    """torch_dist shards planned by torch and left to a ShardWriter, in this process.

    Megatron's default forks writer processes behind a Manager, 1.7-4 s for a small model against 0.1 s;
    the files are the same format. The key translation has no public name.
    """

    def __init__(self, writer: ShardWriter):
        super().__init__("torch_dist", 1)
        self.writer = writer

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=self.writer,
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


def _json_bytes(payload: Any) -> bytes:
    return (json.dumps(payload, indent=2) + "\n").encode()


class CheckpointSaver:
    """Saves the checkpoints of one run, one at a time. Every method is collective.

    Attributes:
        damaged: checkpoints in the --save folder that are known not to load.
    """

    def __init__(self, config: RunConfig, device: Device):
        self.config, self.device = config, device
        self.damaged: set[Path] = set()
        self._buffers: Buffers = {}
        self._pending: _Pending | None = None

    @property
    def root(self) -> Path:
        return Path(self.config.checkpoint.save)

    @property
    def pending(self) -> int | None:
        """The iteration that is being written, or None."""
        return self._pending.iteration if self._pending else None

    def begin(self, *, model: Any, optimizer: Any, train_state: dict[str, Any], copy: bool) -> None:
        """Plan a save and start writing it.

        Args:
            model: the unwrapped GPTModel, or the ModelChunks of an interleaved stage.
            optimizer: Megatron optimizer, or None to save weights only.
            train_state: JSON-ready; holds ``iteration``.
            copy: into host memory, and write in a thread, so that training may go on. Otherwise everything is
                written on return.
        Raises:
            SaveError: if the folder cannot be made.
        """
        assert self._pending is None, "complete() comes before the next save"
        started, iteration = time.perf_counter(), train_state["iteration"]
        aside = self.root / f".{files.iteration_dir(self.root, iteration).name}.tmp"
        error = ""
        if torch.distributed.get_rank() == 0:
            try:
                retention.clean_leftovers(self.root)
                aside.mkdir(parents=True)
                # Megatron-Core 0.16 writes its small files on the first rank, where no other rank would hear
                # of a full disk.
                (aside / "room").write_bytes(bytes(_ROOM))
                (aside / "room").unlink()
            except OSError as problem:
                error = _reason(problem)
                shutil.rmtree(aside, ignore_errors=True)
        self._raise_if_any(error, iteration)
        # As JSON now: the caller's dictionaries change while a thread writes.
        ranks = torch.distributed.get_world_size()
        state = {
            **train_state, "world_size": ranks, "megatron_core": megatron_core_version, "has_manifest": True
        }  # fmt: skip
        jsons = {
            files.RUN_CONFIG: _json_bytes(to_dict(self.config)),
            files.TRAIN_STATE: _json_bytes(state),
        }
        writer = ShardWriter(aside, self.device.copy_to_host if copy else None, self._buffers)
        self._pending = _Pending(writer, iteration, aside, jsons, started)
        try:
            dist_checkpointing.save(
                state_to_save(model, optimizer, self.device), str(aside), _PlannedSave(writer)
            )
        except (OSError, RuntimeError) as problem:
            # Megatron-Core 0.16 writes common.pt here, on the first rank.
            self._pending = None
            if not isinstance(problem, OSError) and not any(name in str(problem) for name in _TORCH_WRITES):
                raise
            shutil.rmtree(aside, ignore_errors=True)
            raise self._error(_reason(problem), iteration) from problem
        if copy:
            writer.start()
        else:
            writer.write()
        self._pending.lost = time.perf_counter() - started

    def poll(self) -> Saved | None:
        """Complete a save if every rank has written its part; returns it then."""
        if self._pending is None:
            return None
        busy = torch.tensor([int(self._pending.writer.busy)], device=self.device.current())
        torch.distributed.all_reduce(busy, op=torch.distributed.ReduceOp.MAX)
        return None if busy.item() else self.complete()

    def complete(self) -> Saved | None:
        """Wait for the save under way, and name it latest; None if there is none.

        Raises:
            SaveError: on every rank, if one of them could not write. The previous checkpoint stays.
        """
        if self._pending is None:
            return None
        pending, begun = self._pending, time.perf_counter()
        written = pending.writer.wait()
        self._pending = None
        first, ranks = torch.distributed.get_rank() == 0, torch.distributed.get_world_size()
        everyone: list[Any] = [None] * ranks if first else []
        torch.distributed.gather_object(written, everyone if first else None, dst=0)
        error, deleted = "", []
        if first:
            errors = [f"{w.error}, rank {rank}" for rank, w in enumerate(everyone) if w.error]
            try:
                if errors:
                    raise OSError(errno.EIO, errors[0])
                _publish(pending, self.root, everyone)
            except OSError as problem:
                error = errors[0] if errors else _reason(problem)
                shutil.rmtree(pending.aside, ignore_errors=True)
        self._raise_if_any(error, pending.iteration)
        folder = files.iteration_dir(self.root, pending.iteration)
        self.damaged.discard(folder)
        if first:
            # What cannot be deleted now is tried again after the next save.
            with contextlib.suppress(OSError):
                deleted = retention.prune(self.root, self.config.checkpoint, folder, self.damaged)
        now = time.perf_counter()
        return Saved(
            folder, pending.iteration, now - pending.started, pending.lost + now - begun, tuple(deleted)
        )

    def _raise_if_any(self, error: str, iteration: int) -> None:
        """Raise on all ranks what the first met."""
        box = [error]
        torch.distributed.broadcast_object_list(box, src=0)
        if box[0]:
            raise self._error(box[0], iteration)

    def _error(self, reason: str, iteration: int) -> SaveError:
        try:
            last = files.latest_iteration(self.root)
        except ValueError:
            last = None
        kept = f"the last complete one is iteration {last}" if last is not None else "there is none yet"
        return SaveError(
            f"--save {self.root}: the checkpoint of iteration {iteration} cannot be written ({reason}), "
            f"{kept}; make room or give another folder, and start again",
            reason,
        )


def _publish(pending: _Pending, root: Path, everyone: list[Written]) -> None:
    """Complete the hidden folder, rename it and name it latest. First rank. Raises OSError."""
    aside, final = pending.aside, files.iteration_dir(root, pending.iteration)
    records = {name: record for written in everyone for name, record in written.records.items()}
    records[".metadata"] = pending.writer.write_index([written.results for written in everyone])
    for name, data in pending.jsons.items():
        manifest.write_durable(aside / name, data)
    for path in sorted(aside.iterdir()):
        if path.name not in records:
            # Small ones: the JSON files, and Megatron-Core's metadata.json and common.pt.
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
            records[path.name] = manifest.record_of(path)
    manifest.write_manifest(aside, records)
    manifest.sync_folder(aside)
    replaced = root / f".{final.name}.old"
    if final.exists():
        os.replace(final, replaced)
    # Once announced, a folder of that name is this one: a kill before the tracker is written loses nothing.
    files.announce_tracker(root, pending.iteration)
    os.replace(aside, final)
    manifest.sync_folder(root)
    files.write_tracker(root, pending.iteration)
    shutil.rmtree(replaced, ignore_errors=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f", {Path(str(error.filename)).name}" if error.filename else "")
    return (str(error).splitlines() or [type(error).__name__])[0]


def save_checkpoint(
    config: RunConfig, device: Device, *, model: Any, optimizer: Any, train_state: dict[str, Any]
) -> Path:
    """Write ``<save>/iter_NNNNNNN`` and name it latest. Collective.

    Args:
        model, optimizer, train_state: as :meth:`CheckpointSaver.begin`.
    Raises:
        SaveError: if it cannot be written; nothing of it is left then.
    """
    saver = CheckpointSaver(config, device)
    saver.begin(model=model, optimizer=optimizer, train_state=train_state, copy=False)
    saved = saver.complete()
    assert saved is not None
    return saved.folder
