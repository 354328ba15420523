"""The preprocessing pipeline: documents -> token ids -> <prefix>.bin/.idx and a manifest <prefix>.json.

One reader (this process) decompresses and cuts files into blocks of about 1 MB; workers parse and tokenize
blocks; results are written in the order of the blocks. So the bytes do not depend on the number of workers,
one huge file is shared by all of them, and memory is bounded by the few blocks under way.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, chain
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import megatron_sharedproj
from megatron_sharedproj.data.indexed import IndexedWriter, token_dtype
from megatron_sharedproj.data.progress import Counts, Progress, SplitSummary
from megatron_sharedproj.data.sources import BadRecord, Block, SourceError, parse_block, read_blocks
from megatron_sharedproj.data.tokenizers import Tokenizer, build_tokenizer

OUTPUT_SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class PreprocessOptions:
    """How to run; `tokenizer` holds build_tokenizer's arguments, so that each worker builds its own."""

    tokenizer: Mapping[str, Any]
    text_key: str = "text"
    append_eod: bool = True
    workers: int = 1
    on_error: str = "stop"
    max_reported_errors: int = 20
    overwrite: bool = False
    log_interval: float = 10.0


@dataclass
class _EncodedBlock:
    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    sources: dict[str, Counts]
    bad: list[BadRecord]
    position: int


def output_prefix_of(output_prefix: str, split: str, text_key: str) -> str:
    """`PREFIX_<split>_<key>_document`, or `PREFIX_<key>_document` for input without splits."""
    return "_".join(part for part in (output_prefix, split, text_key, "document") if part)


def check_new(prefixes: Iterable[str]) -> None:
    """Raises FileExistsError naming the first output file that is there already."""
    for path in (prefix + suffix for prefix in prefixes for suffix in OUTPUT_SUFFIXES):
        if os.path.exists(path):
            raise FileExistsError(f"{path} exists")


def preprocess(
    files: Mapping[str, list[Path]], output_prefix: str, options: PreprocessOptions
) -> list[SplitSummary]:
    """Tokenize the files of each split (see sources.discover) into one token file per split.

    All splits are published together at the end: an error or Ctrl-C leaves no output. Small splits go first,
    so that a problem they have in common shows early.

    Raises SourceError for unreadable input, for a bad record when on_error is "stop" and for a split without
    documents; FileExistsError for existing output; ValueError for a tokenizer that cannot be built.
    """
    if options.on_error not in ("stop", "skip"):
        raise ValueError(f"on_error {options.on_error!r} is not one of stop, skip")
    prefixes = {split: output_prefix_of(output_prefix, split, options.text_key) for split in files}
    if not options.overwrite:
        check_new(prefixes.values())
    tokenizer = build_tokenizer(**options.tokenizer)
    sizes = {path: _size(path) for paths in files.values() for path in paths}
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    by_size = sorted(files, key=lambda split: sum(sizes[path] for path in files[split]))
    order = [(split, path) for split in by_size for path in files[split]]
    summaries = {split: SplitSummary(split, prefixes[split]) for split in by_size}
    progress = Progress(sum(sizes.values()), options.log_interval)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(IndexedWriter(prefixes[split], tokenizer.vocab_size))
            for split in by_size
        }
        encoder = stack.enter_context(_BlockEncoder(tokenizer, options))
        starts = list(accumulate((sizes[path] for _, path in order), initial=0))
        for index, block in encoder.encode([path for _, path in order]):
            split = order[index][0]
            _report_bad(block.bad, summaries, summaries[split], options, progress)
            writers[split].add(block.tokens, block.lengths)
            summaries[split].add(block.sources)
            progress.update(summaries, starts[index] + block.position)
        progress.end(summaries)
        for split, writer in writers.items():
            if not summaries[split].total.documents:
                raise SourceError(f"{files[split][0]}: no documents in the {split or 'input'} files")
            writer.close()
            manifest = _manifest(summaries[split], {p: sizes[p] for p in files[split]}, tokenizer, options)
            writer.write_extra(".json", json.dumps(manifest, indent=2) + "\n")
        for writer in writers.values():
            writer.publish()
    return [summaries[split] for split in files]


class _BlockEncoder:
    """Encode a file's blocks in order: in this process for one worker, else in a pool of processes."""

    def __init__(self, tokenizer: Tokenizer, options: PreprocessOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _BlockEncoder:
        if self._options.workers > 1:
            # spawn: forking a process that has threads (tokenizers, torch) may deadlock the child.
            self._pool = ProcessPoolExecutor(
                self._options.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(dict(self._options.tokenizer),),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, paths: Sequence[Path]) -> Iterator[tuple[int, _EncodedBlock]]:
        """Yield (index of the file, encoded block) in the order of the files and of their blocks."""
        key, append_eod = self._options.text_key, self._options.append_eod
        blocks = ((index, block) for index, path in enumerate(paths) for block in read_blocks(path, key))
        if self._pool is None:
            with _OneThread():
                for index, block in blocks:
                    yield index, _encode_block(self._tokenizer, block, key, append_eod)
            return
        under_way: deque[tuple[int, Future[_EncodedBlock]]] = deque()
        try:
            for index, block in blocks:
                under_way.append((index, self._submit(_encode_in_worker, block, key, append_eod)))
                if len(under_way) > 2 * self._options.workers:
                    index, future = under_way.popleft()
                    yield index, future.result()
            for index, future in under_way:
                yield index, future.result()
        except BrokenProcessPool:
            raise RuntimeError("a worker process died (out of memory?); use fewer --workers") from None

    def _submit(self, *call: Any) -> Future[_EncodedBlock]:
        assert self._pool is not None
        # A submit may start a process, which inherits a blocked SIGINT: Ctrl-C is answered by this process
        # alone, even while a worker still imports. Blocked, not ignored: here it stays pending.
        resource_tracker.ensure_running()  # its first start would unblock SIGINT again
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(*call)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_arguments: dict[str, Any]) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_tokenizer = build_tokenizer(**tokenizer_arguments)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # workers of a killed parent would wait for ever
        parent.join()
        os._exit(1)


def _encode_in_worker(block: Block, text_key: str, append_eod: bool) -> _EncodedBlock:
    return _encode_block(_worker_tokenizer, block, text_key, append_eod)


def _encode_block(tokenizer: Tokenizer, block: Block, text_key: str, append_eod: bool) -> _EncodedBlock:
    documents = parse_block(block, text_key)
    bad = documents.bad
    encoded: list[list[int]] = []
    sources: dict[str, Counts] = {}
    encoded_texts = _encode(tokenizer, documents.texts)
    for text, source, record, ids in zip(
        documents.texts, documents.sources, documents.records, encoded_texts, strict=True
    ):
        if isinstance(ids, str):
            bad.append(BadRecord(block.path, record, "not_encodable", f"cannot be encoded: {ids}"))
            continue
        if not ids:
            bad.append(BadRecord(block.path, record, "empty_document", "no tokens in this text"))
            continue
        if append_eod:
            ids.append(tokenizer.eod)
        encoded.append(ids)
        size = len(text) if text.isascii() else len(text.encode())
        sources.setdefault(source, Counts()).add(Counts(1, size, len(ids)))
    lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
    tokens = np.fromiter(chain.from_iterable(encoded), np.int64, int(lengths.sum(dtype=np.int64)))
    if tokens.size and int(tokens.max()) >= tokenizer.vocab_size:  # before a narrower dtype would wrap it
        raise ValueError(f"{block.path}: the tokenizer gave id {tokens.max()} of {tokenizer.vocab_size}")
    bad.sort(key=lambda record: record.record)
    tokens = tokens.astype(token_dtype(tokenizer.vocab_size))
    return _EncodedBlock(tokens, lengths, sources, bad, block.position)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int] | str]:
    """Ids of each text, or why it has none."""
    try:
        return [*tokenizer.encode_batch(texts)]
    except ValueError:
        results: list[list[int] | str] = []
        for text in texts:
            try:
                results.append(tokenizer.encode(text))
            except ValueError as error:
                results.append(str(error))
        return results


def _report_bad(
    bad: list[BadRecord],
    summaries: Mapping[str, SplitSummary],
    summary: SplitSummary,
    options: PreprocessOptions,
    progress: Progress,
) -> None:
    for record in bad:
        if options.on_error == "stop":
            raise SourceError(str(record))
        done = sum(sum(item.skipped.values()) for item in summaries.values())
        if done < options.max_reported_errors:
            progress.message(f"skipped {record}")
        elif done == options.max_reported_errors:
            progress.message("further skipped records are counted, not listed")
        summary.skipped[record.kind] += 1


def _manifest(
    summary: SplitSummary, sizes: Mapping[Path, int], tokenizer: Tokenizer, options: PreprocessOptions
) -> dict[str, Any]:
    # Paths below their common folder: the manifest travels with the token file to other machines.
    folder = os.path.commonpath([os.path.abspath(path.parent) for path in sizes])
    return {
        "format": "megatron_core_indexed_dataset",
        "tool_version": megatron_sharedproj.__version__,
        "split": summary.split,
        "text_key": options.text_key,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "append_eod": options.append_eod,
        "eod": tokenizer.eod,
        "tokenizer": {
            "type": options.tokenizer["tokenizer_type"],
            "description": tokenizer.describe(),
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
        },
        "counts": vars(summary.total),
        "sources": {source: vars(counts) for source, counts in sorted(summary.sources.items())},
        "skipped": dict(sorted(summary.skipped.items())),
        "inputs": [
            {"path": os.path.relpath(os.path.abspath(path), folder), "bytes": size}
            for path, size in sizes.items()
        ],
    }


class _OneThread:
    """`--workers 1` means one core: keep the tokenizers library from starting its own threads."""

    def __enter__(self) -> None:
        self._previous = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def __exit__(self, *_: object) -> None:
        if self._previous is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = self._previous


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
