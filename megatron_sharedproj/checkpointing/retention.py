"""Which checkpoints of a --save folder stay, and removing the others so that a kill leaves none by halves."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_sharedproj.checkpointing import files, manifest
from megatron_sharedproj.checkpointing.selection import find_damage
from megatron_sharedproj.config import CheckpointConfig

_LEFTOVER = re.compile(r"\.iter_\d+\.(tmp|old|deleted)")


def clean_leftovers(root: Path) -> list[Path]:
    """Remove what killed saves and deletions left: hidden folders that no reader looks at.

    Returns:
        What was removed.
    """
    found = [path for path in root.glob(".iter_*") if _LEFTOVER.fullmatch(path.name)] if root.is_dir() else []
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found


def superfluous(
    folders: list[Path], options: CheckpointConfig, last: Path, damaged: Collection[Path] = ()
) -> list[Path]:
    """The checkpoints that the retention flags do not keep.

    Args:
        folders: all of the --save folder, the newest first.
        last: just completed; always kept, and so is whatever is newer.
        damaged: known not to load: they do not count as one of the last N.
    """
    every, newest = options.save_retain_interval, options.most_recent_k
    if not every and newest < 1:
        return []
    number = files.iteration_of(last) or 0
    older = [path for path in folders if (files.iteration_of(path) or 0) < number]
    # The one just completed is the first of the newest N.
    kept = set([path for path in older if path not in damaged][: max(newest - 1, 0)])
    if every:
        kept |= {path for path in older if (files.iteration_of(path) or 0) % every == 0}
    # A link was made by somebody for a purpose.
    return [path for path in older if path not in kept and not path.is_symlink()]


def prune(root: Path, options: CheckpointConfig, last: Path, damaged: Collection[Path] = ()) -> list[Path]:
    """Delete the checkpoints that the retention flags do not keep, once ``last`` is found to be there.

    A folder is renamed to a hidden name first, so that at no time one is there by halves.

    Returns:
        The folders that are gone.
    """
    gone = []
    unwanted = superfluous(files.iteration_dirs(root), options, last, damaged)
    if not unwanted or find_damage(last, contents=False):
        return []
    for path in unwanted:
        hidden = root / f".{path.name}.deleted"
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        gone.append(path)
    manifest.sync_folder(root)
    for path in gone:
        shutil.rmtree(root / f".{path.name}.deleted", ignore_errors=True)
    return gone
