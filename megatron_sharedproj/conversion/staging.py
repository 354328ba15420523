"""A folder that appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path


def check_output(
    output: Path, overwrite: bool, *, record: str, keep: Iterable[str | Path] = (), flag: str = "--output"
) -> None:
    """Refuse an output folder that cannot or should not be written, before any work.

    Args:
        overwrite: a folder may be replaced, if it holds ``record``: nothing but such an output is deleted.
        keep: files and folders that the work reads, which must not lie in what is replaced.
    Raises:
        ValueError: naming the flag and the folder.
    """
    target = output.resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{flag} {output}: is not a folder")
    parent = target.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {output}: {parent} is not a folder that can be written")
    if not target.exists():
        return
    # The folder is moved into place as a whole, which leaves a shell that is in it nowhere.
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"{flag} {output}: is the current folder or holds it; give a folder below it")
    if target.is_mount():
        raise ValueError(f"{flag} {output}: is a mount point and cannot be replaced; give a folder below it")
    if not os.access(target, os.R_OK | os.X_OK):
        raise ValueError(f"{flag} {output}: cannot be read")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{flag} {output}: is not empty; give another folder, or --overwrite")
    if not (target / record).is_file():
        raise ValueError(
            f"{flag} {output}: holds no export (no {record}), and --overwrite replaces nothing else; give "
            "another folder"
        )
    for path in keep:
        if Path(path).resolve().is_relative_to(target):
            raise ValueError(f"{flag} {output}: holds {path}, which --overwrite would delete")


@contextlib.contextmanager
def staged_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that takes the name ``output`` when the block ends well, else disappears.

    With ``overwrite`` what ``output`` held before is replaced as a whole (:func:`check_output` asks first).
    """
    output = output.resolve()
    with scratch_folder(output) as scratch:
        new, old = scratch / "new", scratch / _OLD
        new.mkdir()
        yield new
        _finish(new)
        if overwrite and output.exists():
            os.replace(output, old)
        try:
            os.replace(new, output)  # fails where another process has filled it meanwhile
        except OSError:
            if old.exists():
                os.replace(old, output)
            raise


_LOCK, _OLD = "lock", "old"


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, deleted at the end; those of killed processes are deleted, too."""
    prefix = f".{target.name}.tmp"
    _clean(target, prefix)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with open(scratch / _LOCK, "w") as lock:
            # Where locks are not supported nobody can tell that it was abandoned, and it stays.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _clean(target: Path, prefix: str) -> None:
    """Delete scratch folders that no process holds the lock of."""
    for left in target.parent.iterdir():
        # mkdtemp's suffix: the scratch folder of a target with a longer name is not taken for one of this.
        if not re.fullmatch(re.escape(prefix) + r"[a-z0-9_]{8}", left.name):
            continue
        with contextlib.suppress(OSError), open(left / _LOCK, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (left / _OLD).exists() and not target.exists():  # killed between the two renames
                os.replace(left / _OLD, target)
            shutil.rmtree(left, ignore_errors=True)


def _finish(folder: Path) -> None:
    """Bring files to the disk, with the usual mode: safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
