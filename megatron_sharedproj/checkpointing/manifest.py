"""What a checkpoint consists of: names, sizes and checksums, and the search for damage.

<save>/iter_0001000/manifest.json
    {"format": 1, "algorithm": "crc32", "files": {name: {"bytes": n, "checksum": hex}}, "checksum": hex}

Written last, so a folder that has one is complete. CRC-32 finds what disks and copies do: it runs at 6.8 GB/s
here, SHA-256 at 2.0, BLAKE2b at 1.4. It is no defence against a forger; nothing that is read can run code
(metadata.py). Needs neither torch.distributed nor Megatron.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
ALGORITHM = "crc32"
_CHUNK = 1 << 22
# A manifest names one line per file of each rank; this is room for a million ranks.
_LARGEST_MANIFEST = 1 << 28


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 (8 hex digits) of one file."""

    bytes: int
    checksum: str


def checksum(data: bytes) -> str:
    """CRC-32 of some bytes, 8 hex digits."""
    return f"{zlib.crc32(data):08x}"


def record_of(path: Path) -> FileRecord:
    """Read a file once, in chunks. Raises OSError."""
    value = size = 0
    with open(path, "rb", buffering=0) as stream:
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        while count := stream.readinto(buffer):
            value = zlib.crc32(view[:count], value)
            size += count
    return FileRecord(size, f"{value:08x}")


def write_durable(path: Path, data: bytes) -> None:
    """Write a file and bring it to the disk; its name needs :func:`sync_folder`. Raises OSError."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, on file systems that can."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _text(payload: Any) -> bytes:
    return (json.dumps(payload, indent=1) + "\n").encode()


def _own_checksum(files: Mapping[str, Any]) -> str:
    return checksum(json.dumps([FORMAT, ALGORITHM, files], sort_keys=True).encode())


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write the manifest over the files of a folder and sync it.

    Args:
        records: of every file but the manifest itself.
    Raises:
        OSError: if it cannot be written.
    """
    files = {name: vars(record) for name, record in sorted(records.items())}
    payload = {"format": FORMAT, "algorithm": ALGORITHM, "files": files, "checksum": _own_checksum(files)}
    write_durable(folder / MANIFEST, _text(payload))


def update_manifest(folder: Path, *names: str) -> None:
    """Record files of a checkpoint anew that a tool has rewritten on purpose.

    Raises:
        ValueError: if the manifest is not readable.
    """
    records = read_manifest(folder)
    if records is not None:
        write_manifest(folder, {**records, **{name: record_of(folder / name) for name in names}})


def read_manifest(folder: str | Path) -> dict[str, FileRecord] | None:
    """The records of a checkpoint, or None where it has no manifest.

    Raises:
        ValueError: saying what is wrong with the manifest.
    """
    path = Path(folder) / MANIFEST
    try:
        with open(path, "rb") as stream:
            text = stream.read(_LARGEST_MANIFEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{MANIFEST} (cannot be read: {error.strerror})") from None
    try:
        payload = json.loads(text)
        files = payload["files"]
        if (payload["format"], payload["algorithm"]) != (FORMAT, ALGORITHM):
            raise ValueError(f"format {payload['format']!r}, algorithm {payload['algorithm']!r} are unknown")
        if payload["checksum"] != _own_checksum(files) or text != _text(payload):
            raise ValueError("its own checksum differs")
        records = {name: FileRecord(int(r["bytes"]), str(r["checksum"])) for name, r in files.items()}
    except KeyError as error:
        raise ValueError(f"{MANIFEST} (damaged: {error} is missing)") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{MANIFEST} (damaged: {reason})") from None
    foreign = [name for name in records if Path(name).name != name]
    if foreign:
        raise ValueError(f"{MANIFEST} (damaged: {foreign[0]!r} is not a name in this folder)")
    return records


def file_damage(folder: Path, name: str, record: FileRecord, *, contents: bool) -> str | None:
    """What is wrong with one file, in words that begin with its name; None if nothing is.

    Args:
        contents: read it; otherwise look at its size only.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            what = "truncated" if size < record.bytes else "too long"
            return f"{name} ({what}: {size} of {record.bytes} bytes)"
        if contents and record_of(path) != record:
            return f"{name} (contents changed: its checksum differs)"
    except FileNotFoundError:
        return f"{name} (missing)"
    except OSError as error:
        return f"{name} (cannot be read: {error.strerror})"
    return None


def share(records: Mapping[str, FileRecord], rank: int, ranks: int) -> list[str]:
    """The files that one rank of several reads: about the same bytes for each."""
    loads = [0] * ranks
    mine = []
    for name, record in sorted(records.items(), key=lambda item: (-item[1].bytes, item[0])):
        target = loads.index(min(loads))
        loads[target] += record.bytes + 1
        if target == rank:
            mine.append(name)
    return mine


def damage(folder: Path, *, contents: bool, rank: int = 0, ranks: int = 1) -> list[str] | None:
    """Everything that is wrong with a checkpoint's files, one line of words for each damaged file.

    Args:
        contents: compare checksums of all files; otherwise of the small JSON files only, and sizes.
        rank, ranks: read this rank's share; sizes are looked at by every rank.
    Returns:
        The damage, an empty list where there is none, or None for a checkpoint without a manifest.
    """
    try:
        records = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    if records is None:
        return None
    mine = set(share(records, rank, ranks)) if contents else set()
    mine |= {name for name in records if name.endswith(".json")}
    found = (file_damage(folder, name, record, contents=name in mine) for name, record in records.items())
    return [line for line in found if line is not None]
