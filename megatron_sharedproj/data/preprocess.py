"""The pipeline: files -> units -> parts (workers) -> token files and manifests (this process).

Parts are appended in the order of the input, whoever made them, so the bytes do not depend on the number of
workers or on how often a run was interrupted. Memory holds a unit per worker, whatever the size of a file.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sharedproj.data.assembly import Assembly
from megatron_sharedproj.data.corpus import Corpus, PreprocessOptions
from megatron_sharedproj.data.encode import EncodeOptions, UnitEncoder
from megatron_sharedproj.data.engines import Engine, Verifier, choose_engine
from megatron_sharedproj.data.journal import Journal
from megatron_sharedproj.data.manifest import Counts
from megatron_sharedproj.data.pool import WorkerPool, start_method
from megatron_sharedproj.data.progress import Progress
from megatron_sharedproj.data.publish import Summary, check_new, publish
from megatron_sharedproj.data.readers import Input, sha256_of
from megatron_sharedproj.data.schedule import HASH, Schedule, Task
from megatron_sharedproj.data.tokenizers import Tokenizer, build_tokenizer

_SAVE_SECONDS = 10.0
_ATTEMPTS = 3
_RECYCLE_BYTES = 2 << 30  # text after which a worker is replaced: tokenizers keep caches


def preprocess(
    files: Mapping[str, Sequence[Input]],
    output_prefix: str,
    options: PreprocessOptions,
    prepared: tuple[Tokenizer, Engine] | None = None,
) -> list[Summary]:
    """Tokenize the files of each split (see sources.discover) into token files.

    They are published together at the end. An interrupted run leaves `PREFIX_<key>.unfinished`, and the same
    call goes on from there. Small splits go first, so that a problem that they have in common shows early.

    Args:
        prepared: the tokenizer and engine of `options`, where they have been built already.

    Raises SourceError for unreadable input, for a bad record when on_error is "stop" and for a split without
    documents; FileExistsError for existing output; ValueError for a tokenizer or engine that cannot be built,
    ids that differ from HF tokenizers' and an unfinished run with other settings; RuntimeError if workers
    keep dying; OSError where the disk is full.
    """
    if options.on_error not in ("stop", "skip"):
        raise ValueError(f"on_error {options.on_error!r} is not one of stop, skip")
    if prepared is None:
        tokenizer = build_tokenizer(**options.tokenizer)
        prepared = tokenizer, choose_engine(tokenizer, options.engine, options.parse_special_tokens)
    tokenizer, engine = prepared
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(files)
    folder = Path(f"{output_prefix}_{options.text_key}.unfinished")
    with ExitStack() as stack:
        settings = corpus.settings(options, tokenizer)
        journal = stack.enter_context(Journal(folder, settings, discard=options.overwrite))
        publishing = journal.state is not None and journal.state["phase"] == "publishing"
        if not (publishing or options.overwrite):
            try:
                check_new(output_prefix, files, options)
            except FileExistsError:
                if journal.state is None:
                    journal.remove()
                raise
        assembly = Assembly(corpus, output_prefix, tokenizer, options, journal)
        stack.callback(assembly.leave)
        if journal.state is not None:
            assembly.restore(journal.state)
        if not publishing:
            _Run(corpus, assembly, tokenizer, engine, options, journal).run()
        return publish(corpus, assembly, journal, output_prefix, tokenizer, engine.name, options)


class _Run:
    """Workers and their tasks, until every part is appended."""

    def __init__(
        self,
        corpus: Corpus,
        assembly: Assembly,
        tokenizer: Tokenizer,
        engine: Engine,
        options: PreprocessOptions,
        journal: Journal,
    ) -> None:
        self._corpus, self._assembly, self._journal = corpus, assembly, journal
        self._tokenizer, self._engine, self._options = tokenizer, engine, options
        self._counts = Counts()  # of this run
        self._verified = 0

    def run(self) -> None:
        assembly, total = self._assembly, float(sum(self._corpus.sizes))
        resumed = self._journal.state is not None
        assembly.find_parts()
        self._progress = assembly.progress = Progress(total, self._options.log_interval, assembly.done_bytes)
        if resumed:
            share = 100 * assembly.done_bytes / max(1.0, total)
            self._progress.message(f"resuming {self._journal.folder}: {share:.1f} % of the input is done")
        try:
            assembly.save("encoding")
            self._encode()
            assembly.close()
            assembly.save("publishing")
        except BaseException:
            assembly.leave_unfinished()
            raise

    def _encode(self) -> None:
        options = self._options
        per_unit = -(
            -options.verify // max(1, sum(-(-size // options.unit_bytes) for size in self._corpus.sizes))
        )
        encode_options = EncodeOptions(
            options.text_key,
            options.append_eod,
            options.by_source,
            options.exclude_sources,
            options.unit_bytes,
            per_unit,
        )
        schedule = Schedule(self._corpus.inputs, self._corpus.sizes, options.unit_bytes)
        for file in range(self._assembly.file):
            schedule.drop([file])
        for unit in range(self._assembly.unit):
            schedule.finished(Task(self._assembly.file, unit), False)
        for task, part in self._assembly.known.items():
            schedule.finished(task, part.ended)
        # A forked worker takes both from this process, any other one builds its own.
        prepared = (self._tokenizer, self._engine) if start_method() == "fork" else None
        worker = (
            self._corpus.inputs,
            prepared,
            replace(options, engine=self._engine.name),
            encode_options,
            self._journal.folder,
        )
        last: dict[int, int] = {}
        running: dict[int, Counts] = {}
        running_bytes: dict[int, float] = {}
        seen: Counter[int] = Counter()
        attempts: Counter[Task] = Counter()
        saved = time.monotonic()
        self._assembly.append_known(schedule)
        with WorkerPool(options.workers, _make_encoder, worker) as pool:
            while self._assembly.file < len(self._corpus.inputs) or self._hash_tasks():
                for number in pool.idle():
                    if seen[number] > _RECYCLE_BYTES:
                        pool.restart(number)
                        seen[number], last = 0, {n: f for n, f in last.items() if n != number}
                    active = {last[n] for n in last if n not in pool.idle()}
                    chosen = schedule.next(last.get(number)) or schedule.leftover(active)
                    if (chosen := chosen or self._next_hash(running)) is not None:
                        last[number] = chosen.file
                        running[number], running_bytes[number] = Counts(), 0.0
                        pool.give(number, chosen)
                for event in pool.wait(0.2):
                    number, task = event.worker, event.task
                    if event.kind == "progress":
                        documents, text_bytes, tokens, position = event.value
                        running[number].add(Counts(documents, text_bytes, tokens))
                        running_bytes[number] += position
                    elif event.kind == "error":
                        raise event.value
                    elif event.kind == "died":
                        running.pop(number, None)
                        running_bytes.pop(number, None)
                        self._again(event.value, task, attempts, schedule)
                    elif task.unit == HASH:
                        self._assembly.hashes[task.file] = event.value
                        running.pop(number)
                        running_bytes.pop(number)
                    else:
                        counts = running.pop(number)
                        running_bytes.pop(number)
                        seen[number] += counts.text_bytes
                        self._counts.add(counts)
                        self._verified += event.value.verified
                        schedule.finished(task, event.value.ended)
                        self._assembly.known[task] = event.value
                        self._assembly.done_bytes += event.value.position
                self._assembly.append_known(schedule)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self._assembly.save("encoding")
                    saved = time.monotonic()
                if self._progress.due():
                    self._show(running.values(), sum(running_bytes.values()))
        self._show([], 0.0, end=True)
        if options.verify:
            self._progress.message(f"{self._verified} documents of this run verified with HF tokenizers")

    def _again(self, why: str, task: Task | None, attempts: Counter[Task], schedule: Schedule) -> None:
        if task is None:
            raise RuntimeError(f"{why} before its first task")
        attempts[task] += 1
        where = f"unit {task.unit} of {self._corpus.inputs[task.file]}"
        if attempts[task] == _ATTEMPTS:
            raise RuntimeError(f"{why} on {where}, the {_ATTEMPTS}rd time; try fewer --workers")
        self._progress.message(f"{why} on {where}: it is read again")
        schedule.retry(task)

    def _hash_tasks(self) -> list[int]:
        """Files that were used and whose sha256 is not known: those that were read in pieces."""
        return [
            file
            for file in sorted(self._assembly.ended)
            if file not in self._assembly.hashes and isinstance(self._corpus.inputs[file], Path)
        ]

    def _next_hash(self, running: Mapping[int, Any]) -> Task | None:
        if self._assembly.file < len(self._corpus.inputs) or running:
            return None
        tasks = self._hash_tasks()
        return Task(tasks[0], HASH) if tasks else None

    def _show(self, running: Iterable[Counts], running_bytes: float, *, end: bool = False) -> None:
        counts = replace(self._counts)
        for item in running:
            counts.add(item)
        self._progress.show(
            counts, self._assembly.done_bytes + running_bytes, self._assembly.sources(), end=end
        )


def _make_encoder(
    inputs: Sequence[Input],
    prepared: tuple[Tokenizer, Engine] | None,
    options: PreprocessOptions,
    encode_options: EncodeOptions,
    folder: Path,
) -> Any:
    if prepared is None:
        tokenizer = build_tokenizer(**options.tokenizer)
        prepared = tokenizer, choose_engine(tokenizer, options.engine, options.parse_special_tokens)
    tokenizer, engine = prepared
    verifier = Verifier(tokenizer, engine.name, options.parse_special_tokens)
    encoder = UnitEncoder(inputs, tokenizer, engine, verifier, encode_options, folder)

    def work(task: Task, progress: Any) -> Any:
        if task.unit != HASH:
            return encoder.encode(task.file, task.unit, progress)
        try:
            return sha256_of(Path(str(inputs[task.file])))
        except OSError:  # it was skipped as unreadable
            return None

    return work
