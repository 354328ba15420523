"""Writing this rank's shard: planned by torch, staged in host memory if wanted, checksummed as it is written.

torch_checkpoint.save only plans here; the bytes are written by :meth:`ShardWriter.write`, which may run in a
thread while training goes on, and the index ``.metadata`` by :meth:`ShardWriter.write_index` when every rank
has written. The file format is torch's, written by torch's own writer.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import zlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_sharedproj.checkpointing.manifest import FileRecord

# Host copies of tensors by their place in the checkpoint, kept from save to save.
Buffers = dict[Any, torch.Tensor]
CopyToHost = Callable[[Mapping[Any, torch.Tensor], Buffers], Mapping[Any, torch.Tensor]]


class _ChecksummedFile(io.RawIOBase):
    """A file that knows the CRC-32 of what went through it; on leaving, it is on the disk."""

    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=1 << 20)
        self.size = self.value = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            count = self.file.write(data)
        except OSError as error:
            # torch's zip writer turns it into a RuntimeError that has lost the reason.
            self.error = self.error or error
            raise
        self.value = zlib.crc32(data, self.value)
        self.size += count
        return count

    def tell(self) -> int:
        return self.size

    def seekable(self) -> bool:
        return False


class _ChecksummedFiles(FileSystem):
    """torch's file system, whose new files are checksummed and synced."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb"
        stream = _ChecksummedFile(Path(path))
        try:
            with stream.file:
                yield stream
                stream.file.flush()
                os.fsync(stream.file.fileno())
        except Exception as error:
            first = stream.error or error
            if isinstance(first, OSError):
                first.filename = first.filename or str(path)
            raise first from None
        self.records[Path(path).name] = FileRecord(stream.size, f"{stream.value:08x}")


class _Staged:
    """What FileSystemWriter asks of a planner while it writes."""

    def __init__(self, data: Mapping[Any, Any]):
        self.data = data

    def resolve_data(self, item: Any) -> Any:
        return self.data[item.index]


@dataclass
class Written:
    """What one rank wrote: torch's index entries, and the files; or why it could not."""

    results: list[Any] = field(default_factory=list)
    records: dict[str, FileRecord] = field(default_factory=dict)
    error: str = ""


class ShardWriter(FileSystemWriter):
    """torch's FileSystemWriter in two steps: what to write, then writing it.

    Args:
        folder: existing folder of this save.
        copy_to_host: copies tensors, so that they may change before :meth:`write`; None: they will not.
        buffers: host memory of an earlier save to copy into.
    """

    def __init__(self, folder: Path, copy_to_host: CopyToHost | None = None, buffers: Buffers | None = None):
        # sync_files: torch syncs before its buffer is flushed; create_stream above syncs instead.
        super().__init__(str(folder), sync_files=False)
        self.folder = folder
        self.files = _ChecksummedFiles()
        self.fs = self.files
        self._copy, self._buffers = copy_to_host, buffers if buffers is not None else {}
        self._plan: Any = None
        self._source: Any = None
        self._metadata: Any = None
        self._thread: threading.Thread | None = None
        self.written = Written()

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Called by torch: remember the plan, copy the tensors if asked to. Writes nothing."""
        self._plan, self._source = plan, planner
        if self._copy is not None:
            tensors: dict[Any, Any] = {}
            rest: dict[Any, Any] = {}
            for item in plan.items:
                kept = rest if item.type == WriteItemType.BYTE_IO else tensors
                kept[item.index] = planner.resolve_data(item)
            self._source = _Staged({**rest, **self._copy(tensors, self._buffers)})
        done: torch.futures.Future[list[Any]] = torch.futures.Future()
        done.set_result([])
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        """Called by torch on the first rank: remember the index, which lacks the places of the bytes."""
        self._metadata = metadata

    def write(self) -> Written:
        """Write and sync this rank's files; an error is in the result."""
        try:
            results = super().write_data(self._plan, self._source).value()
            self.written = Written(results, dict(self.files.records))
        except Exception as error:
            self.written = Written(error=_reason(error))
        self._source = None
        return self.written

    def start(self) -> None:
        """:meth:`write` in a thread, which torch lets run beside the training thread."""
        # Not a daemon: an interpreter that ends while torch writes would abort.
        self._thread = threading.Thread(target=self.write, name="checkpoint-writer")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether the thread still writes."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> Written:
        """What this rank wrote, when its thread is done."""
        if self._thread is not None:
            self._thread.join()
        return self.written

    def write_index(self, results: list[list[Any]]) -> FileRecord:
        """Write ``.metadata`` from the results of every rank, on the first rank. Raises OSError."""
        super().finish(self._metadata, results)
        return self.files.records.pop(".metadata.tmp")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        name = f", {Path(str(error.filename)).name}" if error.filename else ""
        return f"{error.strerror or error}{name}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
