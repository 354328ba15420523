"""Every kind of damage is made for real and reported with its place; sound files have nothing to report."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sharedproj.data import documents as texts
from megatron_sharedproj.data import inspection, token_file
from megatron_sharedproj.data.documents import decode_document, sample_documents, search_documents
from megatron_sharedproj.data.indexed import IndexedWriter
from megatron_sharedproj.data.inspection import (
    InspectionOptions,
    Report,
    check_training_data,
    inspect_indexed,
)
from megatron_sharedproj.data.manifest import Counts, Manifest, TokenizerRecord
from megatron_sharedproj.data.token_file import length_statistics, open_indexed
from megatron_sharedproj.data.tokenizers import Tokenizer, build_tokenizer, train_bpe

VOCAB, EOD = 300, 299
LENGTHS = [3, 5, 4, 2, 6]
HEADER = 34  # bytes before the lengths of an .idx


def documents_of(lengths: list[int]) -> list[list[int]]:
    ids = iter(range(1, 10**6))
    return [[*(next(ids) % EOD for _ in range(length - 1)), EOD] for length in lengths]


def write(prefix: Path, documents: list[list[int]], *, vocab_size: int = VOCAB, **changes: Any) -> Path:
    """A pair and its manifest; `changes` are fields of the manifest."""
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(np.array(document), np.array([len(document)], dtype=np.int32))
        writer.close()
        writer.publish()
    counts = Counts(len(documents), 10 * len(documents), sum(map(len, documents)))
    checksums = {
        suffix: hashlib.sha256(Path(f"{prefix}{suffix}").read_bytes()).hexdigest()
        for suffix in (".bin", ".idx")
    }
    fields: dict[str, Any] = {
        "tool_version": "1",
        "split": "train",
        "text_key": "text",
        "dtype": "uint16" if vocab_size < 65500 else "int32",
        "append_eod": True,
        "eod": EOD,
        "tokenizer": TokenizerRecord("NullTokenizer", "made by: abc", vocab_size, "a" * 64),
        "counts": counts,
        "sources": {"web": counts},
        "checksums": checksums,
    }
    Path(f"{prefix}.json").write_text(Manifest(**(fields | changes)).to_json())
    return prefix


def inspect(prefix: Path, **options: Any) -> Report:
    return inspect_indexed(prefix, InspectionOptions(**{"checksums": False, **options}))


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes; the size stays."""
    whole = bytearray(path.read_bytes())
    assert whole[offset : offset + len(data)] != data
    whole[offset : offset + len(data)] = data
    path.write_bytes(whole)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "a", documents_of(LENGTHS))


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same faults at the same places however the file is cut: borders everywhere."""
    if request.param == "many chunks":
        monkeypatch.setattr(inspection, "_SCAN_TOKENS", 3)
        monkeypatch.setattr(inspection, "SCAN_SEQUENCES", 2)
        monkeypatch.setattr(token_file, "SCAN_SEQUENCES", 2)


def test_a_sound_file(prefix: Path, chunks: None) -> None:
    report = inspect(prefix, checksums=True, seq_length=4)
    assert (report.faults, report.warnings, report.not_checked) == ([], [], [])
    assert report.sound and report.file is not None and report.lengths is not None
    assert (report.file.documents, report.file.tokens, report.max_id) == (5, 20, EOD)
    assert report.lengths.to_dict() == {
        "min": 2, "median": 4, "mean": 4.0, "p95": 6, "max": 6, "seq_length": 4, "longer_share": 0.4
    }  # fmt: skip


@pytest.mark.parametrize("vocab_size", [VOCAB, 100_000])
def test_files_of_megatron_core(tmp_path: Path, chunks: None, vocab_size: int) -> None:
    """Documents of several sequences, which the bulk writer never makes."""
    torch = pytest.importorskip("torch")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dtype = megatron.DType.optimal_dtype(vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    for lengths in ([2, 3], [4], [1, 1, 2]):
        ids = [7] * (sum(lengths) - 1) + [EOD]
        builder.add_document(torch.tensor(ids), lengths)
    builder.finalize(str(tmp_path / "a.idx"))
    report = inspect(tmp_path / "a", vocab_size=vocab_size, eod=EOD)
    assert report.sound and not report.warnings
    assert report.file is not None and (report.file.sequences, report.file.documents) == (6, 3)
    assert report.lengths is not None and report.lengths.values.tolist() == [4, 5]
    patch(tmp_path / "a.bin", 8 * dtype().itemsize, dtype(5).tobytes())
    (fault,) = inspect(tmp_path / "a", vocab_size=vocab_size, eod=EOD).faults
    assert f"a.bin: byte {8 * dtype().itemsize} (token 8): document 1 ends with id 5, not EOD 299" in fault


def test_without_a_manifest_it_says_what_was_not_checked(prefix: Path) -> None:
    Path(f"{prefix}.json").unlink()
    report = inspect(prefix, checksums=True)
    assert report.sound and [line.split(":")[0] for line in report.not_checked] == [
        "counts per source, tokenizer",
        "token range",
        "EOD at document ends",
        "sha256 of a.bin",
        "sha256 of a.idx",
    ]


def test_truncated_bin(prefix: Path) -> None:
    data = Path(f"{prefix}.bin")
    data.write_bytes(data.read_bytes()[:-3])
    report = inspect(prefix)
    assert len(report.faults) == 1 and report.lengths is None
    assert "a.bin is 37 bytes, but its index says 40 (20 uint16 tokens): truncated copy?" in report.faults[0]
    assert report.max_id == EOD  # what is there was still read


@pytest.mark.parametrize(
    ("cut", "message"),
    [(10, "is not a Megatron-Core index"), (-8, "a.idx is 134 bytes, not the 142 of its header")],
)
def test_truncated_idx(prefix: Path, cut: int, message: str) -> None:
    index = Path(f"{prefix}.idx")
    index.write_bytes(index.read_bytes()[:cut])
    report = inspect(prefix, checksums=True)
    assert message in report.faults[0] and "a.idx: sha256 is" in report.faults[1] and len(report.faults) == 2


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_of_a_pair(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}{suffix}").unlink()
    (fault,) = inspect(prefix, checksums=True).faults
    assert f"no such file: {prefix}{suffix}" in fault


def test_a_flipped_length_is_found_at_its_place(prefix: Path, chunks: None) -> None:
    patch(Path(f"{prefix}.idx"), HEADER + 4 * 2, struct.pack("<i", 5))  # of sequence 2; 4 before
    faults = inspect(prefix).faults
    assert "a.bin is 40 bytes, but its index says 42" in faults[0]
    pointer = HEADER + 4 * 5 + 8 * 3
    expected = (
        f"a.idx: byte {pointer}: sequence 3 starts at byte 24 of the .bin, but the one before it ends at 26"
    )
    assert expected in faults[1] and faults[1].endswith("copy it again, or preprocess the data again")
    assert "says tokens 20, but" in faults[2] and len(faults) == 3


def test_a_negative_length(prefix: Path) -> None:
    patch(Path(f"{prefix}.idx"), HEADER + 4 * 1, struct.pack("<i", -5))
    assert any(f"byte {HEADER + 4}: sequence 1 has the length -5" in line for line in inspect(prefix).faults)


def test_swapped_pointers(prefix: Path, chunks: None) -> None:
    index, start = Path(f"{prefix}.idx"), HEADER + 4 * 5
    pointers = struct.unpack("<5q", index.read_bytes()[start : start + 40])
    patch(index, start, struct.pack("<5q", *(pointers[i] for i in (0, 2, 1, 3, 4))))
    faults = inspect(prefix).faults
    assert [line.split(": ")[2][:10] for line in faults] == ["sequence 1", "sequence 2", "sequence 3"]
    assert "byte 62: sequence 1 starts at byte 16 of the .bin, but the one before it ends at 6" in faults[0]


def test_the_first_pointer(prefix: Path, chunks: None) -> None:
    patch(Path(f"{prefix}.idx"), HEADER + 20, struct.pack("<q", 2))
    assert (
        "sequence 0 starts at byte 2 of the .bin, but the one before it ends at 0"
        in inspect(prefix).faults[0]
    )


@pytest.mark.parametrize(
    ("i", "value", "expected"),
    [
        (0, 1, ["document boundary 0 is 1, not 0"]),
        (5, 4, ["document boundary 5 is 4, not 5"]),
        (2, 0, ["document boundary 2 is 0, below the one before it, 1"]),
        (2, 99, ["document boundary 3 is 3, below the one before it, 99"]),
    ],
)
def test_document_boundaries(prefix: Path, chunks: None, i: int, value: int, expected: list[str]) -> None:
    start = HEADER + 12 * 5
    patch(Path(f"{prefix}.idx"), start + 8 * i, struct.pack("<q", value))
    faults = inspect(prefix).faults
    assert len(faults) == len(expected)
    for line, part in zip(faults, expected, strict=True):
        number = int(part.split()[2])
        assert f"a.idx: byte {start + 8 * number}: {part}; copy it again" in line


def test_empty_documents(prefix: Path, chunks: None) -> None:
    patch(Path(f"{prefix}.idx"), HEADER + 12 * 5 + 8 * 2, struct.pack("<q", 1))  # document 1 is now nothing
    (fault,) = inspect(prefix).faults
    assert "a.idx: document 1 has no tokens; preprocess the data again, or pass --allow-empty" in fault
    report = inspect(prefix, allow_empty=True)
    # Document 2 is now two sequences, so the EOD of the first is inside it.
    assert report.sound and "byte 14 (token 7): EOD 299 inside document 2" in report.warnings[0]
    assert report.lengths is not None and report.lengths.min == 0
    patch(Path(f"{prefix}.bin"), 2 * 2, struct.pack("<H", 8))  # the end of document 0 and of the empty one
    assert len(inspect(prefix, allow_empty=True).faults) == 1


def test_an_id_beyond_the_vocabulary(prefix: Path, chunks: None) -> None:
    patch(Path(f"{prefix}.bin"), 2 * 9, struct.pack("<H", 300))
    (fault,) = inspect(prefix).faults
    assert "a.bin: byte 18 (token 9, document 2) is id 300, outside the vocabulary of 300; name the" in fault
    assert not inspect(prefix, vocab_size=10_000).sound  # a flag does not widen the manifest's
    Path(f"{prefix}.json").unlink()
    assert inspect(prefix, vocab_size=301).sound and inspect(prefix, vocab_size=301).max_id == 300
    assert len(inspect(prefix, vocab_size=EOD).faults) == 6  # that one and each EOD


def test_a_negative_id(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", documents_of(LENGTHS), vocab_size=100_000)
    patch(Path(f"{prefix}.bin"), 4 * 1, struct.pack("<i", -7))
    (fault,) = inspect(prefix).faults
    assert "byte 4 (token 1, document 0) is id -7, outside the vocabulary of 100000" in fault
    Path(f"{prefix}.json").unlink()
    assert "is id -7, below 0" in inspect(prefix).faults[0]


def test_missing_eod_and_the_cut_document(prefix: Path, chunks: None) -> None:
    for token in (7, 19):  # the ends of document 1 and of the last
        patch(Path(f"{prefix}.bin"), 2 * token, struct.pack("<H", 8))
    faults = inspect(prefix).faults
    assert "a.bin: byte 14 (token 7): document 1 ends with id 8, not EOD 299; preprocess" in faults[0]
    assert "byte 38 (token 19): document 4 ends with id 8" in faults[1] and len(faults) == 2
    path = Path(f"{prefix}.json")
    cut = dataclasses.replace(Manifest.from_json(path.read_text()), cut_document=True)
    path.write_text(cut.to_json())
    assert inspect(prefix).faults == faults[:1]
    path.write_text(dataclasses.replace(cut, append_eod=False).to_json())
    report = inspect(prefix)
    assert report.sound and report.not_checked[0].startswith("EOD at document ends: the manifest says")


def test_eod_inside_a_document_is_a_warning(prefix: Path, chunks: None) -> None:
    patch(Path(f"{prefix}.bin"), 2 * 4, struct.pack("<H", EOD))
    report = inspect(prefix)
    assert report.sound and len(report.warnings) == 1
    assert "a.bin: byte 8 (token 4): EOD 299 inside document 1; meant only where" in report.warnings[0]


@pytest.mark.parametrize(("suffix", "offset"), [(".bin", 10), (".idx", HEADER + 1)])
def test_a_changed_byte_under_the_same_size(prefix: Path, suffix: str, offset: int) -> None:
    path = Path(f"{prefix}{suffix}")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    patch(path, offset, b"\x01" if path.read_bytes()[offset] != 1 else b"\x02")
    line = inspect(prefix, checksums=True).faults[-1]
    now = hashlib.sha256(path.read_bytes()).hexdigest()
    assert line.startswith(
        f"{path}: sha256 is {now}, but the manifest says {before}: changed since it was made"
    )
    assert not any("sha256" in fault for fault in inspect(prefix).faults)


def test_checksum_of_many_chunks_and_of_an_odd_size(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_SCAN_TOKENS", 3)
    data = Path(f"{prefix}.bin")
    data.write_bytes(data.read_bytes() + b"x")
    assert hashlib.sha256(data.read_bytes()).hexdigest() in inspect(prefix, checksums=True).faults[-1]


def test_a_manifest_of_another_run(prefix: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "b", documents_of([4, 4]), vocab_size=100_000)
    Path(f"{prefix}.json").write_bytes(Path(f"{other}.json").read_bytes())
    faults = inspect(prefix).faults
    for line, part in zip(faults, ("documents 2,", "tokens 8,", "dtype int32,"), strict=True):
        assert f"{prefix}.json says {part} but {prefix}.idx has" in line and "of two runs?" in line
    with pytest.raises(ValueError, match="says documents 2, but"):
        check_training_data(prefix, VOCAB)


def test_a_damaged_manifest_does_not_stop_the_rest(prefix: Path) -> None:
    Path(f"{prefix}.json").write_text("{")
    patch(Path(f"{prefix}.bin"), 0, struct.pack("<H", 400))
    faults = inspect(prefix, vocab_size=VOCAB).faults
    assert "a.json: not JSON" in faults[0] and "is id 400" in faults[1] and len(faults) == 2
    with pytest.raises(ValueError, match=r"a\.json: not JSON"):
        check_training_data(prefix, 500)


def test_at_most_ten_of_a_kind_are_listed(tmp_path: Path, chunks: None) -> None:
    prefix = write(tmp_path / "a", documents_of([3] * 25))
    data = Path(f"{prefix}.bin")
    data.write_bytes(np.full(75, 5, np.uint16).tobytes())
    faults = inspect(prefix).faults
    assert len(faults) == 11 and faults[-1] == "and 15 more documents without EOD"
    assert "(token 29): document 9 ends" in faults[9]


def test_cheap_check_compares_tokenizers(prefix: Path) -> None:
    assert check_training_data(prefix, VOCAB) == (5, 20)
    assert check_training_data(prefix, VOCAB + 1, 3, "a" * 64) == (5, 20)
    for arguments in ((VOCAB, None, "b" * 64), (VOCAB + 7, None, "b" * 64)):
        with pytest.raises(ValueError) as caught:
            check_training_data(prefix, *arguments)
        message = str(caught.value)
        assert message.startswith(
            f"--tokenizer-model: this tokenizer (vocab_size {arguments[0]}, sha256 bbbb"
        )
        assert "(made by: abc); use that one, or preprocess" in message and "\n" not in message
    Path(f"{prefix}.bin").write_bytes(np.tile(np.array([1, 2], np.uint16), 10).tobytes())
    with pytest.raises(ValueError, match=r"this tokenizer \(vocab_size 200\) is not the one that made"):
        check_training_data(prefix, 200)
    Path(f"{prefix}.json").unlink()
    assert check_training_data(prefix, 200, None, "b" * 64) == (5, 20)


def test_length_statistics_of_many_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "SCAN_SEQUENCES", 100)
    monkeypatch.setattr(token_file, "_SHORT_LENGTHS", 20)  # most are "long" ones
    lengths = np.random.default_rng(0).integers(1, 60, size=1001)
    write(tmp_path / "a", [[1] * int(length) for length in lengths])
    found = length_statistics(open_indexed(tmp_path / "a"), seq_length=50)
    assert (found.min, found.max, found.mean) == (lengths.min(), lengths.max(), lengths.mean())
    for ours, share in ((found.median, 0.5), (found.p95, 0.95)):
        assert ours == np.quantile(lengths, share, method="inverted_cdf")
    assert found.longer_share == np.mean(lengths > 50)
    values, counts = np.unique(lengths, return_counts=True)
    assert np.array_equal(found.values, values) and np.array_equal(found.counts, counts)


SENTENCE = "The state of the union is the sum of its parts, caf\u00e9 and \u6f22\u5b57 included. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe([SENTENCE * 20], 330, tmp_path_factory.mktemp("tokenizer"))


def write_texts(prefix: Path, tokenizer: Tokenizer, documents: list[str]) -> token_file.TokenFile:
    ids = [[*tokenizer.encode(text), tokenizer.eod] for text in documents]
    with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
        for document in ids:
            writer.add(np.array(document), np.array([len(document)], dtype=np.int32))
        writer.close()
        writer.publish()
    return open_indexed(prefix)


def test_documents_decode(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [f"{i}. " + SENTENCE * i for i in range(12)]
    file = write_texts(tmp_path / "a", tokenizer, documents)
    for index, text in enumerate(documents):
        assert decode_document(file, index, tokenizer) == text
        for chars in (1, 52, 57, 10_000):  # 57 is in the two wide characters
            assert decode_document(file, index, tokenizer, chars) == text[:chars]


def test_samples_are_deterministic_and_distinct(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_texts(tmp_path / "a", tokenizer, [str(i) for i in range(50)])
    first = sample_documents(file, 10, seed=1)
    assert first == sample_documents(file, 10, seed=1) == sorted(set(first)) and len(first) == 10
    assert first != sample_documents(file, 10, seed=2)
    assert sample_documents(file, 500, seed=1) == list(range(50))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 18])
def test_search_finds_what_the_texts_hold(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Over chunk borders, inside wide characters' tokens, and wherever BPE merges over the text's ends."""
    monkeypatch.setattr(texts, "_SEARCH_TOKENS", chunk)
    documents = [SENTENCE * (i % 4) + f"word{i} " + SENTENCE * (i % 3) for i in range(20)] + ["x"]
    file = write_texts(tmp_path / "a", tokenizer, documents)
    for needle in ("word1", "union is", "ate of t", "\u00e9 and \u6f22", "\u5b57", "word19 ", "absent", "x"):
        matches = list(search_documents(file, needle, tokenizer))
        assert [match.document for match in matches] == [i for i, t in enumerate(documents) if needle in t]
        for match in matches:
            assert needle in match.excerpt and match.excerpt.strip("\ufffd") in documents[match.document]


def test_search_at_every_place_of_one_long_document(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_SEARCH_TOKENS", 16)
    body = "".join(f"{i:03d}\u6f22" for i in range(60))
    file = write_texts(tmp_path / "a", tokenizer, ["before", body, "after"])
    for i in range(50):
        needle = "".join(f"{k:03d}\u6f22" for k in range(i, i + 9))
        assert [m.document for m in search_documents(file, needle, tokenizer)] == [1]
    # Nor does a text that runs from one document into the next, or into its EOD, count.
    assert not list(search_documents(file, "before000", tokenizer))
    assert not list(search_documents(file, "<|endoftext|>", tokenizer))


def test_other_ids_than_the_tokenizers_are_left_out(tmp_path: Path) -> None:
    null = build_tokenizer("NullTokenizer", vocab_size=10)
    write(tmp_path / "a", [[1, 2, 200, 3, 9]])
    file = open_indexed(tmp_path / "a")
    assert decode_document(file, 0, null) == "1 2 3"
    assert [m.document for m in search_documents(file, "2 3", null)] == [0]


def test_progress_of_a_large_file(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(prefix)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(inspection, "_SHOW_PROGRESS_BYTES", 39)
    inspect(prefix)
    assert f"{prefix}.bin: 100.0 % | 0.00 GB | " in capsys.readouterr().err
