"""Parts in the order of the input -> outputs, and the state that a resumed run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_sharedproj.data.corpus import Corpus, PreprocessOptions, Split
from megatron_sharedproj.data.encode import Part, part_documents, read_part
from megatron_sharedproj.data.indexed import token_dtype
from megatron_sharedproj.data.journal import Journal
from megatron_sharedproj.data.manifest import Counts
from megatron_sharedproj.data.outputs import Output, OutputOptions, check_free
from megatron_sharedproj.data.progress import Progress
from megatron_sharedproj.data.records import SourceError
from megatron_sharedproj.data.schedule import Schedule, Task
from megatron_sharedproj.data.tokenizers import Tokenizer


class Assembly:
    """Appends the parts of a run.

    Attributes:
        file, unit: of the part to append next.
        outputs: by split and source ("" for all).
        hashes: sha256 of files that are known so far; ended: files that were appended to their end.
        known: parts that are there and not yet appended.
        done_bytes: input bytes of all parts that are there.
        rejects_bytes: size of the list of bad records.
    """

    def __init__(
        self,
        corpus: Corpus,
        output_prefix: str,
        tokenizer: Tokenizer,
        options: PreprocessOptions,
        journal: Journal,
    ) -> None:
        self._corpus, self._options, self._tokenizer, self._journal = corpus, options, tokenizer, journal
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._output_options = OutputOptions(
            output_prefix, options.text_key, options.target_tokens, options.shard_bytes, options.append_eod
        )
        self.outputs: dict[tuple[str, str], Output] = {}
        self.file, self.unit, self._records = 0, 0, 0  # the next part, and the records of its file before it
        self.hashes: dict[int, str | None] = {}
        self.ended: set[int] = set()
        self.known: dict[Task, Part] = {}
        self.done_bytes = 0.0
        self.rejects_bytes = 0
        self._reported = 0
        self._appending = False
        self._appended: list[str] = []  # parts to delete when their state is saved
        self.progress: Progress | None = None

    @property
    def rejects(self) -> Path:
        """The list of bad records, while it grows."""
        return self._journal.folder / "rejects.jsonl"

    @property
    def is_empty(self) -> bool:
        """Nothing is there that a resumed run would use."""
        return not self.known and not any(output.tokens for output in self.outputs.values())

    def leave(self) -> None:
        """Close the open files as they are."""
        for output in self.outputs.values():
            output.leave()

    def leave_unfinished(self) -> None:
        """Save what is there for a resumed run; a folder with nothing to keep is removed."""
        if self.is_empty:
            self.leave()
            self._journal.remove()
        elif not self._appending:  # half a part is in the outputs: the last state is without it
            with suppress(OSError):  # a full disk keeps the last state, which is sound
                self.save("encoding")

    def close(self) -> None:
        """Write all indices. Raises SourceError for a split without documents."""
        for split in self._corpus.splits:
            if not any(output.tokens for key, output in self.outputs.items() if key[0] == split.name):
                first = self._corpus.inputs[split.files[0]]
                raise SourceError(f"{first}: no documents in the {split.name or 'input'} files")
        for output in self.outputs.values():
            output.close()

    def sources(self) -> dict[str, Counts]:
        """What was written, per source."""
        sources: dict[str, Counts] = {}
        for output in self.outputs.values():
            for shard in output.shards:
                for name, item in shard.sources.items():
                    sources.setdefault(name, Counts()).add(item)
        return sources

    def append_known(self, schedule: Schedule) -> None:
        """Append the parts whose turn it is. Raises SourceError at a bad record, unless they are skipped."""
        while self.file < len(self._corpus.inputs):
            task = Task(self.file, self.unit)
            if (part := self.known.get(task)) is None:
                return
            self._appending = True
            self._append(self.known.pop(task))
            split = self._corpus.split_of[part.file]
            if part.ended:
                self.ended.add(part.file)
            if self.is_complete(split):
                schedule.drop(split.files)
                self.file, self.unit, self._records = split.files[-1] + 1, 0, 0
                self.known = {task: part for task, part in self.known.items() if task.file >= self.file}
            elif part.ended:
                self.file, self.unit, self._records = self.file + 1, 0, 0
            else:
                self.unit += 1
            self._appending = False

    def is_complete(self, split: Split) -> bool:
        """Its budget of tokens is met: nothing more of its files is needed."""
        if self._options.target_tokens is None or self._options.by_source:
            return False  # of all sources the last may still come
        output = self.outputs.get((split.name, ""))
        return output is not None and output.complete

    def _append(self, part: Part) -> None:
        split, path = self._corpus.split_of[part.file], str(self._corpus.inputs[part.file])
        self._report(part, split, path)
        for name, documents in part_documents(self._journal.folder, part, self._dtype):
            if (key := (split.name, name)) not in self.outputs:
                self.outputs[key] = self._new_output(split.name, name)
            self.outputs[key].add(documents, part.sources)
        split.excluded.update(part.excluded)
        self._records += part.records
        if part.sha256 is not None:
            self.hashes[part.file] = part.sha256
        self._appended.append(part.name)

    def _new_output(self, split: str, source: str) -> Output:
        output = Output(split, source, self._tokenizer, self._output_options, self._journal.folder)
        if not self._options.overwrite:
            check_free([output.prefix(0)])
        for other in self.outputs.values():
            if other.prefix(0) == output.prefix(0):
                raise SourceError(f"sources {other.source!r} and {source!r} would share {output.prefix(0)}")
        return output

    def _report(self, part: Part, split: Split, path: str) -> None:
        """Bad records of a part: stop at the first, or list them in the rejects file."""
        problem = f"{path}: {part.problem[1]}" if part.problem else ""
        if self._options.on_error == "stop":
            if part.first_bad is not None:
                raise SourceError(f"{path}:{self._records + part.first_bad[0]}: {part.first_bad[1]}")
            if problem:
                raise SourceError(problem)
        if not part.rejected and not problem:
            return
        with open(self.rejects, "a", encoding="utf-8") as target:
            if part.rejected:
                rejects = self._journal.folder / f"{part.name}.rejects"
                with open(rejects, encoding="utf-8") as lines:
                    for line in lines:
                        bad = json.loads(line)
                        record = self._records + bad["record"]
                        target.write(json.dumps({"file": path, **bad, "record": record}) + "\n")
                        self._mention(f"{path}:{record}: {bad['reason']}")
            if part.problem is not None:
                kind, reason = part.problem
                entry = {
                    "file": path,
                    "record": self._records + part.records + 1,
                    "kind": kind,
                    "reason": reason,
                }
                target.write(json.dumps(entry) + "\n")
                self._mention(f"{problem}; {self._records + part.records} records of it were read")
                split.rejected[kind] += 1
            target.flush()
            os.fsync(target.fileno())
            self.rejects_bytes = target.tell()
        split.rejected.update(part.rejected)

    def _mention(self, text: str) -> None:
        self._reported += 1
        if self._reported <= self._options.max_reported_errors:
            self._say(f"skipped {text}")
        elif self._reported == self._options.max_reported_errors + 1:
            self._say("further skipped records are listed in the rejects file alone")

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.message(text)

    def save(self, phase: str) -> None:
        """Save the state, then delete the parts that it covers."""
        self._journal.save(
            {
                "phase": phase,
                "file": self.file,
                "unit": self.unit,
                "records": self._records,
                "reported": self._reported,
                "rejects_bytes": self.rejects_bytes,
                "done_bytes": self.done_bytes - sum(part.position for part in self.known.values()),
                "hashes": self.hashes,
                "ended": sorted(self.ended),
                "splits": {
                    split.name: {"rejected": split.rejected, "excluded": split.excluded}
                    for split in self._corpus.splits
                },
                "outputs": [output.state() for output in self.outputs.values()],
            }
        )
        for name in self._appended:
            for suffix in (".json", ".part", ".rejects"):
                (self._journal.folder / (name + suffix)).unlink(missing_ok=True)
        self._appended.clear()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises ValueError where its files are gone."""
        self.file, self.unit, self._records = state["file"], state["unit"], state["records"]
        self._reported, self.rejects_bytes = state["reported"], state["rejects_bytes"]
        self.done_bytes = state["done_bytes"]
        self.hashes = {int(file): digest for file, digest in state["hashes"].items()}
        self.ended = set(state["ended"])
        for split in self._corpus.splits:
            split.rejected.update(state["splits"][split.name]["rejected"])
            split.excluded.update(state["splits"][split.name]["excluded"])
        for saved in state["outputs"]:
            output = Output.restored(saved, self._tokenizer, self._output_options, self._journal.folder)
            self.outputs[output.split, output.source] = output
        if self.rejects.exists():
            os.truncate(self.rejects, self.rejects_bytes)

    def find_parts(self) -> None:
        """Parts that an earlier run left: those that the state covers go, those behind it are kept."""
        folder = self._journal.folder
        for path in folder.glob("*.json"):
            if path.name == "state.json":
                continue
            try:
                part = read_part(folder, path.stem)
                part_documents(folder, part, self._dtype)
            except (OSError, ValueError, TypeError):
                path.unlink()  # cut short by a power failure: it is made again
                continue
            if (part.file, part.unit) >= (self.file, self.unit):
                self.known[Task(part.file, part.unit)] = part
                self.done_bytes += part.position
            else:
                self._appended.append(part.name)
        for path in folder.glob("*.tmp"):
            path.unlink()
