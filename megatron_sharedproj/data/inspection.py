"""Checks of a token file: the cheap ones before training, all of them for tools/inspect_data.py.

numpy only, neither Megatron nor torch. The .bin is read once, in chunks, for all checks together.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sharedproj.data import manifest as manifests
from megatron_sharedproj.data.manifest import Manifest
from megatron_sharedproj.data.token_file import (
    HEADER_BYTES,
    SCAN_SEQUENCES,
    LengthStatistics,
    Progress,
    TokenFile,
    length_statistics,
    open_indexed,
)

LISTED = 10  # faults of a kind that are listed; the others are counted
_REMEDY = "preprocess the data again"
_COPY = f"copy it again, or {_REMEDY}"
_SCAN_TOKENS = 1 << 24
_SHOW_PROGRESS_BYTES = 1_000_000_000


def validate_indexed(prefix: str | Path, vocab_size: int, max_tokens: int | None = None) -> tuple[int, int]:
    """Check a token file before training; returns (documents, tokens).

    Both files exist, the index is sound at its ends and agrees with the size of the .bin, and every id (of
    the first `max_tokens`, if given) is below `vocab_size`. Reads that much of the .bin once, in chunks.

    Raises:
        ValueError: in one line, with a remedy.
    """
    file = _validate(prefix, vocab_size, max_tokens)
    return file.documents, file.tokens


def _validate(prefix: str | Path, vocab_size: int, max_tokens: int | None) -> TokenFile:
    file = open_indexed(prefix)
    itemsize = file.dtype.itemsize
    if (
        int(file.boundaries[-1]) != file.sequences
        or int(file.lengths.min()) < 0
        or int(file.pointers[0]) != 0
        or int(file.pointers[-1]) + int(file.lengths[-1]) * itemsize != file.tokens * itemsize
    ):
        raise ValueError(f"{prefix}.idx contradicts itself; {_REMEDY}")
    if message := _wrong_size(file):
        raise ValueError(message)
    _check_ids(file, min(file.tokens, max_tokens) if max_tokens is not None else file.tokens, vocab_size)
    return file


def _wrong_size(file: TokenFile) -> str:
    data = Path(f"{file.prefix}.bin")
    size, expected = data.stat().st_size, file.tokens * file.dtype.itemsize
    if size == expected:
        return ""
    return (
        f"{data} is {size} bytes, but its index says {expected} ({file.tokens} {file.dtype.name} tokens): "
        f"truncated copy? Copy it again, or {_REMEDY}"
    )


def _check_ids(file: TokenFile, count: int, vocab_size: int) -> None:
    data = Path(f"{file.prefix}.bin")
    with open(data, "rb") as stream:
        for start in range(0, count, _SCAN_TOKENS):
            ids = np.fromfile(stream, dtype=file.dtype, count=min(_SCAN_TOKENS, count - start))
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"{data} holds token id {high if high >= vocab_size else low}, outside the vocabulary of"
                    f" {vocab_size}; train with the tokenizer that made it, or preprocess with this one"
                )


def check_training_data(
    prefix: str | Path,
    vocab_size: int,
    max_tokens: int | None = None,
    tokenizer_sha256: str | None = None,
    tokenizer_type: str | None = None,
) -> tuple[int, int]:
    """What the trainer checks before step 0: :func:`validate_indexed`, and the manifest if there is one.

    Args:
        vocab_size: the tokenizer's, not the padded one.
        max_tokens: ids to check; None for all.
        tokenizer_sha256: the tokenizer's; None where it is not known.
        tokenizer_type: the tokenizer's; one of another type has other files, whose sha256 says nothing.
    Returns:
        documents, tokens.
    Raises:
        ValueError: in one line, with a remedy.
    """
    file = _validate(prefix, vocab_size, max_tokens)
    manifest = manifests.load(prefix)
    if manifest is not None:
        for message in _unequal_counts(file, manifest):
            raise ValueError(message)
        same_type = tokenizer_type in (None, manifest.tokenizer.type)
        check_tokenizer(manifest, prefix, vocab_size, tokenizer_sha256 if same_type else None)
    return file.documents, file.tokens


def check_tokenizer(
    manifest: Manifest, prefix: str | Path, vocab_size: int, tokenizer_sha256: str | None
) -> None:
    """Whether a tokenizer is the one that made a token file, as far as is known.

    Raises:
        ValueError: naming the flag, both tokenizers and the remedy.
    """
    theirs = manifest.tokenizer
    known = tokenizer_sha256 is not None and theirs.sha256 is not None
    other = known and tokenizer_sha256 != theirs.sha256
    if not other and theirs.vocab_size <= vocab_size:
        return
    digest = f", sha256 {tokenizer_sha256[:16]}" if tokenizer_sha256 else ""
    raise ValueError(
        f"--tokenizer-model: this tokenizer (vocab_size {vocab_size}{digest}) is not the one that made "
        f"{prefix} ({theirs.description}); use that one, or {_REMEDY} with this one (the same vocabulary in "
        f"another file format: set tokenizer.sha256 to null in {manifests.manifest_path(prefix)})"
    )


def _unequal_counts(file: TokenFile, manifest: Manifest) -> Iterator[str]:
    path = manifests.manifest_path(file.prefix)
    for name, said, found in (
        ("documents", manifest.counts.documents, file.documents),
        ("tokens", manifest.counts.tokens, file.tokens),
        ("dtype", manifest.dtype, file.dtype.name),
    ):
        if said != found:
            yield (
                f"{path} says {name} {said}, but {file.prefix}.idx has {found}: files of two runs? Copy all "
                f"three again, or {_REMEDY}"
            )


@dataclass
class Report:
    """What an inspection found.

    Attributes:
        faults: one line each, at most LISTED of a kind and a line that counts the rest; empty if sound.
        warnings: one line each; they do not make a file unsound.
        not_checked: what could not be checked, and why.
        max_id: the highest id in the .bin; None if none was read.
    """

    prefix: str
    file: TokenFile | None = None
    manifest: Manifest | None = None
    lengths: LengthStatistics | None = None
    max_id: int | None = None
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class InspectionOptions:
    """What to check.

    Attributes:
        vocab_size: ids must be below it and below the manifest's; None: the manifest's alone.
        eod: the id at document ends; None: the manifest's, if it says that documents end with it.
        allow_empty: documents without tokens are no fault.
        checksums: compare the manifest's sha256.
        seq_length: for the share of longer documents.
    """

    vocab_size: int | None = None
    eod: int | None = None
    allow_empty: bool = False
    checksums: bool = True
    seq_length: int | None = None


class _Findings:
    """Lines by kind: the first LISTED, and how many there are."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    def add(self, kind: str, line: str) -> None:
        self.add_places(kind, [0], lambda _: line)

    def add_places(self, kind: str, places: Any, line: Callable[[int], str]) -> None:
        """`places`: a sequence of ints; `line` makes the message of one."""
        listed = self._lines.setdefault(kind, [])
        listed += [line(int(place)) for place in places[: LISTED - len(listed)]]
        self._counts[kind] += len(places)

    def lines(self) -> list[str]:
        result: list[str] = []
        for kind, listed in self._lines.items():
            result += listed
            if more := self._counts[kind] - len(listed):
                result.append(f"and {more} more {kind}")
        return result


def inspect_indexed(prefix: str | Path, options: InspectionOptions) -> Report:
    """Check everything about a token file, its manifest included; reads the .bin once.

    Raises:
        OSError: if one cannot be read.
    """
    report = Report(str(prefix))
    faults, warnings = _Findings(), _Findings()
    try:
        report.manifest = manifests.load(prefix)
        if report.manifest is None:
            report.not_checked.append(f"counts per source, tokenizer: no {manifests.manifest_path(prefix)}")
    except ValueError as error:
        faults.add("faults of the manifest", str(error))
    sound = False
    try:
        file = open_indexed(prefix)
    except ValueError as error:
        faults.add("faults of the header", str(error))
        report.not_checked.append("tokens, document ends, lengths: the index cannot be read")
    else:
        report.file = file
        if message := _wrong_size(file):
            faults.add("faults of the size", message)
        sound = _check_index(file, faults) and not message
        if report.manifest is not None:
            for line in _unequal_counts(file, report.manifest):
                faults.add("contradictions of the manifest", line)
        if sound:
            report.lengths = length_statistics(file, options.seq_length)
            if not options.allow_empty:
                _check_empty(file, faults)
        else:
            report.not_checked.append("document ends, lengths: the index is damaged")
    if Path(f"{prefix}.bin").is_file():
        _scan(report, options, sound, faults, warnings)
    _check_sha256(report, options, ".idx", None, faults)
    report.faults, report.warnings = faults.lines(), warnings.lines()
    return report


def _check_index(file: TokenFile, faults: _Findings) -> bool:
    """Every pointer is the running sum of the lengths, and the boundaries rise from 0 to `sequences`."""
    before = len(faults)
    for first in range(0, file.sequences, SCAN_SEQUENCES):
        lengths = np.asarray(file.lengths[first : first + SCAN_SEQUENCES])
        negative = first + np.flatnonzero(lengths < 0)
        faults.add_places("negative lengths", negative, lambda i: _length_line(file, i))
        # Steps instead of sums: one wrong length is then one fault, at its place.
        start = max(first - 1, 0)
        steps = np.diff(file.pointers[start : first + len(lengths)])
        expected = file.lengths[start : first + len(lengths) - 1].astype(np.int64) * file.dtype.itemsize
        wrong = start + 1 + np.flatnonzero(steps != expected)
        if first == 0 and int(file.pointers[0]) != 0:
            wrong = np.concatenate([[0], wrong])
        faults.add_places("wrong pointers", wrong, lambda i: _pointer_line(file, i))
    for i, wanted in ((0, 0), (file.documents, file.sequences)):
        if int(file.boundaries[i]) != wanted:
            faults.add("wrong document boundaries", _boundary_line(file, i, f"not {wanted}"))
    for first in range(0, file.documents, SCAN_SEQUENCES):
        steps = np.diff(file.boundaries[first : first + SCAN_SEQUENCES + 1])
        falling = first + 1 + np.flatnonzero(steps < 0)
        faults.add_places(
            "decreasing document boundaries",
            falling,
            lambda i: _boundary_line(file, i, f"below the one before it, {file.boundaries[i - 1]}"),
        )
    return len(faults) == before


def _length_line(file: TokenFile, i: int) -> str:
    place = f"{file.prefix}.idx: byte {HEADER_BYTES + 4 * i}"
    return f"{place}: sequence {i} has the length {file.lengths[i]}; {_COPY}"


def _pointer_line(file: TokenFile, i: int) -> str:
    end = int(file.pointers[i - 1]) + int(file.lengths[i - 1]) * file.dtype.itemsize if i else 0
    return (
        f"{file.prefix}.idx: byte {HEADER_BYTES + 4 * file.sequences + 8 * i}: sequence {i} starts at byte "
        f"{file.pointers[i]} of the .bin, but the one before it ends at {end}; {_COPY}"
    )


def _boundary_line(file: TokenFile, i: int, why: str) -> str:
    return (
        f"{file.prefix}.idx: byte {HEADER_BYTES + 12 * file.sequences + 8 * i}: document boundary {i} is "
        f"{file.boundaries[i]}, {why}; {_COPY}"
    )


def _check_empty(file: TokenFile, faults: _Findings) -> None:
    for first in range(0, file.documents, SCAN_SEQUENCES):
        lengths = np.diff(file.offsets(first, min(first + SCAN_SEQUENCES, file.documents)))
        faults.add_places(
            "empty documents",
            first + np.flatnonzero(lengths == 0),
            lambda i: f"{file.prefix}.idx: document {i} has no tokens; {_REMEDY}, or pass --allow-empty",
        )


def _scan(
    report: Report, options: InspectionOptions, sound: bool, faults: _Findings, warnings: _Findings
) -> None:
    """One pass over the .bin: sha256, range of the ids, and end-of-document ids where the index is sound."""
    file, manifest = report.file, report.manifest
    path = Path(f"{report.prefix}.bin")
    limits = [options.vocab_size, manifest.tokenizer.vocab_size if manifest else None]
    limit = min((size for size in limits if size is not None), default=None)
    if file is not None and limit is None:
        report.not_checked.append("token range: no manifest; pass --vocab-size N, or the tokenizer")
    eod = options.eod
    if eod is None and manifest is not None and manifest.append_eod:
        eod = manifest.eod
    if file is not None and eod is None:
        why = "the manifest says that none was appended" if manifest else "no manifest; pass --eod ID"
        report.not_checked.append(f"EOD at document ends: {why}")
    hashed = options.checksums and manifest is not None and ".bin" in manifest.checksums
    digest = hashlib.sha256() if hashed else None
    itemsize = file.dtype.itemsize if file else 1
    size = path.stat().st_size
    buffer = np.empty(min(_SCAN_TOKENS, size // itemsize + 1) * itemsize, dtype=np.uint8)
    progress = Progress(str(path), size, _SHOW_PROGRESS_BYTES)
    done = 0
    with open(path, "rb", buffering=0) as stream:
        while count := _fill(stream, buffer):
            block = buffer[:count]
            if digest is not None:
                digest.update(block.data)
            if file is not None:
                ids = block[: count // itemsize * itemsize].view(file.dtype)
                start = done // itemsize
                if ids.size:
                    _check_range(report, ids, start, limit, sound, faults)
                if sound and eod is not None:
                    cut = manifest is not None and manifest.cut_document
                    _check_eod(file, ids, start, eod, cut, faults, warnings)
            done += count
            progress.update(done)
    progress.end()
    _check_sha256(report, options, ".bin", digest.hexdigest() if digest else "", faults)


def _fill(stream: Any, buffer: NDArray[np.uint8]) -> int:
    # A raw stream may give less than was asked for; a chunk must hold whole tokens.
    count = 0
    while count < buffer.size and (got := stream.readinto(buffer[count:].data)):
        count += got
    return count


def _check_range(
    report: Report, ids: NDArray[Any], start: int, limit: int | None, sound: bool, faults: _Findings
) -> None:
    low, high = int(ids.min()), int(ids.max())
    report.max_id = high if report.max_id is None else max(high, report.max_id)
    if low >= 0 and (limit is None or high < limit):
        return
    bad = ids < 0
    if limit is not None and high >= limit:
        bad |= ids >= limit

    def line(i: int) -> str:
        token = start + i
        where = f", document {report.file.document_at(token)}" if report.file and sound else ""
        outside = f"outside the vocabulary of {limit}" if limit is not None else "below 0"
        return (
            f"{report.prefix}.bin: byte {token * ids.itemsize} (token {token}{where}) is id {ids[i]}, "
            f"{outside}; name the tokenizer that made it, or {_COPY}"
        )

    faults.add_places("ids outside the vocabulary", np.flatnonzero(bad), line)


def _check_eod(
    file: TokenFile,
    ids: NDArray[Any],
    start: int,
    eod: int,
    cut: bool,
    faults: _Findings,
    warnings: _Findings,
) -> None:
    """Of ids [start, start + len(ids)): `eod` is at the document ends, and nowhere else."""

    def place(i: int) -> str:
        return f"{file.prefix}.bin: byte {(start + i) * ids.itemsize} (token {start + i}): "

    first, last = file.document_at(start), file.document_at(start + ids.size - 1)
    if file.end(last) > start + ids.size:
        last -= 1  # it ends in a later chunk
    is_eod = ids == eod
    if last >= first:
        offsets = file.offsets(first, last + 1)
        ends = offsets[1:][np.diff(offsets) > 0] - 1 - start  # not of documents without tokens
        missing = ends[~is_eod[ends]]
        if cut and missing.size and start + missing[-1] + 1 == file.tokens:
            missing = missing[:-1]
        is_eod[ends] = False
        faults.add_places(
            "documents without EOD",
            missing,
            lambda i: (
                f"{place(i)}document {file.document_at(start + i)} ends with id {ids[i]}, not EOD {eod}; "
                f"{_REMEDY} with --append-eod, or correct --eod"
            ),
        )
    if is_eod.any():
        warnings.add_places(
            "EOD inside documents",
            np.flatnonzero(is_eod),
            lambda i: (
                f"{place(i)}EOD {eod} inside document {file.document_at(start + i)}; meant only where the "
                "tokenizer parsed special-token text on request"
            ),
        )


def _check_sha256(
    report: Report, options: InspectionOptions, suffix: str, digest: str | None, faults: _Findings
) -> None:
    """Compare with the manifest; `digest` None: of the file, read now."""
    path = Path(f"{report.prefix}{suffix}")
    if report.manifest is None or not options.checksums or suffix not in report.manifest.checksums:
        if not options.checksums:
            why = "--no-checksums"
        else:
            why = "the manifest has none" if report.manifest else "no manifest"
        report.not_checked.append(f"sha256 of {path.name}: {why}")
        return
    if digest is None:
        if not path.is_file():
            return
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    said = report.manifest.checksums[suffix]
    if digest != said:
        line = f"{path}: sha256 is {digest}, but the manifest says {said}: changed since it was made; {_COPY}"
        faults.add("wrong checksums", line)


def report_dict(report: Report) -> dict[str, Any]:
    """A report for JSON; the manifest is as in its file."""
    file, manifest = report.file, report.manifest
    return {
        "prefix": report.prefix,
        "sound": report.sound,
        "faults": report.faults,
        "warnings": report.warnings,
        "not_checked": report.not_checked,
        "documents": file.documents if file else None,
        "sequences": file.sequences if file else None,
        "tokens": file.tokens if file else None,
        "dtype": file.dtype.name if file else None,
        "max_id": report.max_id,
        "lengths": report.lengths.to_dict() if report.lengths else None,
        "manifest": json.loads(manifest.to_json()) if manifest else None,
    }
