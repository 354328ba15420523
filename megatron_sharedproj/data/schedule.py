"""Which unit a worker reads next.

A worker goes on with the file that it has open, else opens the next one, else joins a file that another one
reads and that is long enough to be shared. So a tree of many files is decompressed once, and a single huge
file still occupies everybody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sharedproj.data.readers import Input

# Text bytes per file byte, to guess how many units a file has. A guess only decides who may join.
_EXPANSION = {".zst": 4.0, ".gz": 3.0, ".parquet": 2.5}


HASH = -1


@dataclass(frozen=True)
class Task:
    """Encode a unit of a file, or (unit HASH) take the sha256 of the file."""

    file: int
    unit: int


class Schedule:
    """Hands out the units of files 0, 1, ...; `done` are units that need not be read again."""

    def __init__(self, inputs: Sequence[Input], sizes: Sequence[int], unit_bytes: int) -> None:
        self._guessed = [
            max(
                1.0,
                size
                * next((f for end, f in _EXPANSION.items() if str(item).endswith(end)), 1.0)
                / unit_bytes,
            )
            for item, size in zip(inputs, sizes, strict=True)
        ]
        self._next = [0] * len(inputs)
        self._count: dict[int, int] = {}  # units of a file whose end was seen
        self._opened: set[int] = set()
        self._unopened = deque(range(len(inputs)))
        self._dropped: set[int] = set()
        self._done: set[Task] = set()
        self._again: deque[Task] = deque()

    def finished(self, task: Task, ended: bool) -> None:
        """A unit's part is there; `ended`: nothing is behind it in the file."""
        self._done.add(task)
        if ended:
            self._count[task.file] = min(task.unit + 1, self._count.get(task.file, task.unit + 1))

    def count(self, file: int) -> int | None:
        """Units of the file; None until its end was seen."""
        return self._count.get(file)

    def retry(self, task: Task) -> None:
        """Hand the task out again."""
        self._again.append(task)

    def drop(self, files: Sequence[int]) -> None:
        """Hand out nothing more of these files."""
        self._dropped |= set(files)

    def next(self, last: int | None) -> Task | None:
        """A task for a worker that read file `last`; None where there is none now."""
        while self._again:
            if (task := self._again.popleft()).file not in self._dropped:
                return task
        if last is not None and (found := self._take(last)) is not None:
            return found
        while self._unopened:
            if (found := self._take(self._unopened.popleft())) is not None:
                return found
        for file in sorted(self._opened):
            if file in self._count or file in self._dropped:
                self._opened.discard(file)
            elif self._next[file] < self._guessed[file] and (found := self._take(file)) is not None:
                return found
        return None

    def leftover(self, running: set[int]) -> Task | None:
        """A unit of a file that is longer than was guessed and that none of `running` goes on with."""
        for file in sorted(self._opened - running):
            if file not in self._count and file not in self._dropped and (task := self._take(file)):
                return task
        return None

    def _take(self, file: int) -> Task | None:
        if file in self._dropped:
            return None
        self._opened.add(file)
        while file not in self._count or self._next[file] < self._count[file]:
            task = Task(file, self._next[file])
            self._next[file] += 1
            if task not in self._done:
                return task
        return None
