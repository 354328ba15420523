"""Finding inputs: trees, directories and files, the split of each, and what layout they have."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_sharedproj.data.records import SourceError, source_of_path

EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.zst", ".zst", ".parquet", ".arrow")
SPLITS = dict(train="train", validation="validation", valid="validation", val="validation", test="test")
# Hugging Face Hub's shard names (train-00000-of-00048.parquet) carry the split where no directory does.
_SHARD_NAME = re.compile(r"^(train|validation|valid|val|test)-\d+-of-\d+\b")


def discover(inputs: Sequence[str | Path]) -> dict[str, list[Path]]:
    """Find the input files of each split, in natural order (chunk2 before chunk10) within each input.

    The split is the first path component named train, validation (valid, val) or test, from the input
    directory's own name on; else that of a Hub shard name (train-00000-of-00048.parquet); else "" (none).

    Raises SourceError for a missing input, one without readable files, a file given twice, or a mix of files
    with and without a split.
    """
    splits: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for path in (Path(item) for item in inputs):
        if path.is_dir():
            found = sorted(_walk(path), key=lambda file: _natural_key(file.relative_to(path)))
            if not found:
                raise SourceError(f"{path}: no {', '.join(EXTENSIONS)} file in this directory")
        elif path.is_file():
            if not path.name.endswith(EXTENSIONS):
                raise SourceError(f"{path}: unknown extension; use {', '.join(EXTENSIONS)}")
            found = [path]
        else:
            raise SourceError(f"{path}: no such file or directory")
        for file in found:
            identity = os.path.realpath(file)
            if identity in seen:
                raise SourceError(f"{file}: given twice; remove one of the two inputs")
            seen.add(identity)
            splits.setdefault(_split_of(path, file), []).append(file)
    if "" in splits and len(splits) > 1:
        raise SourceError(
            f"{splits[''][0]}: outside of any split directory, while other inputs are in"
            f" {', '.join(sorted(name for name in splits if name))}; move it or run them separately"
        )
    return splits


def describe_layout(files: Mapping[str, Sequence[object]]) -> str:
    """One line: the layout that was recognized, the formats, and the files and bytes of each split."""
    paths = [Path(str(file)) for group in files.values() for file in group]
    kinds = sorted({_extension(path.name) for path in paths})
    if kinds == ["hub"]:
        layout = "a streamed data set"
    elif kinds == [".arrow"]:
        layout = "Arrow files of save_to_disk"
    elif any(source_of_path(str(path)).startswith("RedPajama") for path in paths):
        layout = "a tree split by source"
    elif any(re.search(r"/chunk\d+/", path.as_posix()) for path in paths) and any(files):
        layout = "a SlimPajama tree"
    elif any(files):
        layout = "files by split"
    else:
        layout = "files without splits"
    parts = []
    for split, group in files.items():
        size = sum(path.stat().st_size for file in group if (path := Path(str(file))).is_file())
        parts.append(f"{split or 'all'} {len(group)} ({size / 1e6:,.1f} MB)")
    return f"{layout}, {' '.join(kinds)}: {', '.join(parts)}"


def _extension(name: str) -> str:
    return next((item for item in sorted(EXTENSIONS, key=len, reverse=True) if name.endswith(item)), "hub")


def _walk(root: Path) -> Iterator[Path]:
    """Input files under root; hidden ones are skipped, links followed once (Hub caches are links)."""
    visited: set[str] = set()
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        identity = os.path.realpath(directory)
        if identity in visited:
            subdirectories.clear()
            continue
        visited.add(identity)
        subdirectories[:] = [item for item in subdirectories if not item.startswith(".")]
        for name in names:
            # cache-*.arrow is what `datasets` leaves beside its data.
            if name.endswith(EXTENSIONS) and not name.startswith((".", "cache-")):
                yield Path(directory, name)


def _natural_key(path: Path) -> list[list[tuple[int, int, str]]]:
    pieces = [re.split(r"(\d+)", part) for part in path.parts]
    return [[(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in piece if p] for piece in pieces]


def _split_of(root: Path, file: Path) -> str:
    """Split of a file found under the input `root` (or of a file given by itself)."""
    inside = file.relative_to(root).parts[:-1]
    for part in () if file == root else (Path(os.path.abspath(root)).name, *inside):
        if part in SPLITS:
            return SPLITS[part]
    shard = _SHARD_NAME.match(file.name)
    return SPLITS[shard.group(1)] if shard else ""
