"""A folder that appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_output(output: Path, overwrite: bool, flag: str = "--output") -> None:
    """Refuse an output folder that cannot or should not be written, before any work.

    Raises:
        ValueError: naming the flag and the folder.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{flag} {output}: is not a folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{flag} {output}: is not empty; give another folder, or --overwrite")
    parent = output.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{flag} {output}: {parent} is not a folder that can be written")


@contextlib.contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A new folder beside ``output`` that takes its name when the block ends well, else disappears.

    What ``output`` held before is replaced as a whole (:func:`check_output` asks first).
    """
    output = output.absolute()
    aside, replaced = (output.with_name(f".{output.name}.{what}{os.getpid()}") for what in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        _share(aside)
        if output.exists():
            os.replace(output, replaced)
        os.replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give files the usual mode: safetensors writes for the owner alone, and others should load the model."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)
