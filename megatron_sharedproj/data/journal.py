"""The folder of an unfinished run: what it is of, how far it is, and nobody else in it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_STATE = "state.json"
_LOCK = "lock"
_LOCK_SECONDS = 2.0


class Journal:
    """`PREFIX_<key>.unfinished/`: parts, growing token files and the state that they belong to.

    Used as a context manager, which holds the folder's lock. Raises ValueError if another process has it, or
    if the folder holds a run with other settings.

    Attributes:
        state: what `save` was given last, by this run or the one that is resumed; None for a new one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, discard: bool = False) -> None:
        self.folder = folder
        self.state: dict[str, Any] | None = None
        self._settings = json.loads(json.dumps(settings))
        self._discard = discard
        self._lock: int | None = None

    def __enter__(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(self._lock):
            os.close(self._lock)
            raise ValueError(f"{self.folder} is in use by another process; wait for it")
        saved = self._saved()
        if saved is not None:
            different = _first_difference(saved["settings"], self._settings)
            if different and not self._discard:
                os.close(self._lock)
                raise ValueError(
                    f"{self.folder} holds an unfinished run with another {different}; repeat its command to "
                    "finish it, or start over with --overwrite"
                )
            self.state = None if different else saved["state"]
        if self.state is None:
            self._empty()
        return self

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state, at once and durably."""
        self.state = dict(state)
        temporary = self.folder / f"{_STATE}.tmp"
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump({"settings": self._settings, "state": self.state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.folder / _STATE)

    def remove(self) -> None:
        """The run is finished, or has nothing to keep."""
        with suppress(OSError):
            self._empty(last=_STATE)  # until all else is gone, the same command does the rest
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _saved(self) -> dict[str, Any] | None:
        try:
            saved = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return saved if isinstance(saved, dict) and {"settings", "state"} <= saved.keys() else None

    def _empty(self, last: str = "") -> None:
        """Delete all but the lock; the state first, as it must not outlive its files, unless it is `last`."""
        names = sorted(os.listdir(self.folder), key=lambda name: (name == last, name != _STATE))
        for name in names:
            if name != _LOCK:
                os.unlink(self.folder / name)


def _locked(lock: int) -> bool:
    """Take the lock. Workers of a run that was killed hold it for a moment longer."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for key in {**old, **new}:
        if old.get(key) == new.get(key):
            continue
        if key == "inputs":
            before = {tuple(item) for item in old.get(key, [])}
            changed = [item[1] for item in new[key] if tuple(item) not in before]
            return f"input ({changed[0]} is new or has changed)" if changed else "set of inputs"
        return f"{key} ({old.get(key)}, now {new.get(key)})"
    return ""
