"""Units: together they are the file, whoever reads which, and damage costs only what lies behind it."""

import gzip
import hashlib
import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_sharedproj.data import readers
from megatron_sharedproj.data.hub import HubShard
from megatron_sharedproj.data.readers import FileProblem, Input, open_reader, read_documents
from megatron_sharedproj.data.records import Documents, SourceError, parse_block


def several_frames(data: bytes) -> bytes:
    """As pzstd writes it: frames that break lines, a skippable one and an empty one among them."""
    cuts = [0, len(data) // 3, len(data) // 2, len(data)]
    frames = [zstandard.compress(data[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    return frames[0] + skippable + frames[1] + zstandard.compress(b"") + frames[2]


def several_members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:]) + bytes(100)


CODECS = {
    "a.jsonl": bytes,
    "a.jsonl.zst": zstandard.compress,
    "b.jsonl.zst": several_frames,
    "a.jsonl.gz": gzip.compress,
    "b.jsonl.gz": several_members,
}
ROWS = [f"row {index} " + "caf\u00e9 " * (index % 50) for index in range(900)]


def write_stream(path: Path, table: pa.Table, rows: int) -> None:
    """A file of record batches as `datasets` writes them."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_file(path: Path, table: pa.Table, rows: int) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def save_to_disk(path: Path, table: pa.Table, rows: int) -> None:
    """What the paper's downloader leaves: the only .arrow file of `datasets.save_to_disk`."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(path.parent / "saved")
    (found,) = (path.parent / "saved").glob("*.arrow")
    os.replace(found, path)


def write_parquet(path: Path, table: pa.Table, rows: int) -> None:
    pq.write_table(table, path, row_group_size=rows)


TABLES: dict[str, Any] = {
    "a.parquet": write_parquet,
    "a.arrow": write_stream,
    "b.arrow": write_file,
    "c.arrow": save_to_disk,
}


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_sizes(block: int = 2 << 20, read: int = 1 << 18, line: int = 1 << 28, rows: int = 256) -> None:
        monkeypatch.setattr(readers, "BLOCK_BYTES", block)
        monkeypatch.setattr(readers, "_READ_BYTES", read)
        monkeypatch.setattr(readers, "MAX_LINE_BYTES", line)
        monkeypatch.setattr(readers, "_BLOCK_ROWS", rows)

    return set_sizes


def units(source: Input, unit_bytes: int) -> Iterator[tuple[list[Any], readers.UnitReader]]:
    """The data of the blocks of each unit, and the reader behind it."""
    reader = open_reader(source, unit_bytes=unit_bytes)
    index = 0
    while not reader.ended:
        yield [block.data for block in reader.unit(index)], reader
        index += 1
    reader.close()


def shared(source: Input, unit_bytes: int, count: int) -> list[list[Any]]:
    """The same by two readers, of which one takes the even units and the other one the odd ones."""
    pair = [open_reader(source, unit_bytes=unit_bytes) for _ in range(2)]
    found = [[block.data for block in pair[index % 2].unit(index)] for index in range(count)]
    for reader in pair:
        reader.close()
    return found


def whole(source: Input, unit_bytes: int) -> tuple[Documents, readers.UnitReader]:
    """All documents of a file, unit by unit, with the record numbers of the file."""
    reader = open_reader(source, unit_bytes=unit_bytes)
    all_of_it, first, index = Documents(), 0, 0
    while not reader.ended:
        for block in reader.unit(index):
            documents = parse_block(block)
            all_of_it.texts += documents.texts
            all_of_it.records += [first + record for record in documents.records]
            all_of_it.bad += documents.bad
        first += reader.records
        index += 1
    reader.close()
    return all_of_it, reader


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.mark.parametrize("name", CODECS)
def test_units_of_lines_are_the_file_for_any_sizes_and_readers(name: str, tmp_path: Path, sizes: Any) -> None:
    path, numbers = tmp_path / name, random.Random(name)
    for _ in range(60):
        text = [
            b'{"text": "' + numbers.randbytes(numbers.choice([0, 1, 5, 30, 400, 3000])).hex().encode() + b'"}'
            for _ in range(numbers.randint(1, 60))
        ]
        for _ in range(numbers.randint(0, 2)):
            text.insert(numbers.randint(0, len(text)), b"")
        data = b"\n".join(text) + b"\n" * numbers.randint(0, 1)
        path.write_bytes(CODECS[name](data))
        sizes(numbers.choice([16, 64, 500, 10000]), numbers.choice([8, 64, 1000]))
        unit_bytes = numbers.choice([50, 300, 1000, 100000])
        joined, records, position, count = b"", 0, 0, 0
        for blocks, reader in units(path, unit_bytes):
            joined += b"".join(blocks)
            records += reader.records
            assert reader.position >= position
            position, count = reader.position, count + 1
            start = (count - 1) * unit_bytes
            assert not blocks or start <= len(joined) - sum(map(len, blocks)) < start + unit_bytes
        assert joined == data
        assert records == data.count(b"\n") + (not data.endswith(b"\n"))
        assert position == path.stat().st_size
        assert reader.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert b"".join(map(b"".join, shared(path, unit_bytes, count))) == data


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("batch", [7, 100, 5000])
def test_units_of_rows_are_the_file(name: str, batch: int, tmp_path: Path, sizes: Any) -> None:
    path = tmp_path / name
    meta = [{"redpajama_set_name": "RedPajamaBook"}] * len(ROWS)
    TABLES[name](path, pa.table({"text": ROWS, "other": range(len(ROWS)), "meta": meta}), batch)
    for unit_bytes, rows in ((1, 256), (3000, 4), (20000, 100), (1 << 30, 256)):
        sizes(rows=rows)
        texts: list[str] = []
        position, count = 0, 0
        for blocks, reader in units(path, unit_bytes):
            found = [text for block in blocks for text in block.column("text").to_pylist()]
            assert reader.records == len(found)
            texts += found
            assert position <= reader.position
            position, count = reader.position, count + 1
        assert texts == ROWS and reader.ended
        assert position == path.stat().st_size
        if unit_bytes == 1 << 30 or batch > len(ROWS):
            assert count == 1
        elif unit_bytes == 1 and name != "c.arrow":  # save_to_disk has its own batches
            assert count == -(-len(ROWS) // batch)
        again = shared(path, unit_bytes, count)
        assert [text for blocks in again for block in blocks for text in block["text"].to_pylist()] == ROWS
    assert {source for _, source in read_documents(path)} == {"RedPajamaBook"}
    assert [text for text, _ in read_documents(path)] == ROWS


def test_units_of_a_hub_shard_are_its_rows(
    tmp_path: Path, sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(lines(*ROWS))
    shard = HubShard(str(tmp_path / "data"), None, None, "train", 0, 1)
    for unit_bytes, rows in ((1, 256), (3000, 4), (1 << 30, 256)):
        sizes(rows=rows)
        found = list(units(shard, unit_bytes))
        texts = [row["text"] for blocks, _ in found for block in blocks for row in block]
        assert texts == ROWS and found[-1][1].sha256() is None
        assert len(found) == {1: len(ROWS), 1 << 30: 1}.get(unit_bytes, len(found))
    again = shared(shard, 3000, len(list(units(shard, 3000))))
    assert [row["text"] for blocks in again for block in blocks for row in block] == ROWS


def test_record_numbers_run_over_empty_and_bad_lines_and_windows_line_ends(
    tmp_path: Path, sizes: Any
) -> None:
    path = tmp_path / "a.jsonl"
    middle = b'\r\n\n{"text": "b\\u0000c"}\r\n   \n{bad\r\n{"text": "d"}'
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n' + middle)
    for unit_bytes in (1, 5, 17, 40, 1000):
        for block in (4, 30, 1000):
            sizes(block, 8)
            documents, reader = whole(path, unit_bytes)
            assert list(zip(documents.texts, documents.records, strict=True)) == [
                ("a", 1),
                ("b\0c", 4),
                ("d", 7),
            ]
            assert [bad.kind for bad in documents.bad] == ["invalid_json"] and reader.problem is None
    bad: list[Any] = []
    assert [text for text, _ in read_documents(path, on_error=bad.append)] == ["a", "b\0c", "d"]
    assert bad[0].record == 6
    with pytest.raises(SourceError, match=r"a\.jsonl:6: invalid JSON"):
        list(read_documents(path))


@pytest.mark.parametrize("name", CODECS)
def test_a_line_longer_than_several_units(name: str, tmp_path: Path, sizes: Any) -> None:
    long = random.Random(1).randbytes(30_000).hex()
    path = tmp_path / name
    path.write_bytes(CODECS[name](lines("a", long, "b", "c")))
    sizes(64, 100)
    for unit_bytes in (10, 777, 5000):
        documents, _ = whole(path, unit_bytes)
        assert documents.texts == ["a", long, "b", "c"] and documents.records == [1, 2, 3, 4]


def test_a_document_of_50_mb(tmp_path: Path) -> None:
    long = "0123456789 caf\u00e9 " * 3_200_000
    assert len(long.encode()) > 50_000_000
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(lines("a", long, "b"), 1))
    documents, reader = whole(path, 4 << 20)
    assert [len(text) for text in documents.texts] == [1, len(long), 1]
    assert documents.texts[1] == long and documents.records == [1, 2, 3]
    assert reader.overlong == [] and reader.ended


@pytest.mark.parametrize("name", CODECS)
def test_overlong_lines_are_passed_over_with_their_record(name: str, tmp_path: Path, sizes: Any) -> None:
    """The same ones for any reader: one of 101 bytes falls although a buffer happens to hold all of it."""
    path = tmp_path / name
    allowed = "x" * (100 - len('{"text": ""}'))
    texts = ["a", allowed, allowed + "y", "b", "z" * 5000, allowed + "y", "c", "z" * 300]
    for last in ("", "d"):
        data = lines(*texts) + (lines(last) if last else b"")
        path.write_bytes(CODECS[name](data[:-1]))
        for unit_bytes in (10, 50, 101, 700, 10000):
            for block, read in ((8, 8), (64, 1000), (100, 33), (4096, 64), (1 << 20, 1 << 18)):
                sizes(block, read, line=100)
                reader = open_reader(path, unit_bytes=unit_bytes)
                found, overlong, first, index = [], [], 0, 0
                while not reader.ended:
                    for piece in reader.unit(index):
                        documents = parse_block(piece)
                        found += [
                            (first + record, text)
                            for record, text in zip(documents.records, documents.texts, strict=True)
                        ]
                        assert not documents.bad
                    overlong += [first + record for record, _ in reader.overlong]
                    first, index = first + reader.records, index + 1
                expected = [(1, "a"), (2, allowed), (4, "b"), (7, "c"), *([(9, "d")] if last else [])]
                assert found == expected, (unit_bytes, block, read)
                assert overlong == [3, 5, 6, 8] and first == (9 if last else 8)
                pair = [open_reader(path, unit_bytes=unit_bytes) for _ in range(2)]
                shared_texts, overlong_count = [], 0
                for unit in range(index):
                    for piece in pair[unit % 2].unit(unit):
                        shared_texts += parse_block(piece).texts
                    overlong_count += len(pair[unit % 2].overlong)
                assert shared_texts == [text for _, text in expected] and overlong_count == 4


@pytest.mark.parametrize("name", ["a.jsonl.zst", "b.jsonl.zst", "a.jsonl.gz", "b.jsonl.gz"])
def test_whole_lines_before_the_end_of_a_truncated_file_are_given(
    name: str, tmp_path: Path, sizes: Any
) -> None:
    texts = [random.Random(index).randbytes(200).hex() for index in range(1500)]
    data = CODECS[name](lines(*texts))
    path = tmp_path / name
    numbers, counts = random.Random(2), set()
    for cut in [12, 1000, *(numbers.randrange(1000, len(data)) for _ in range(10)), len(data) - 101]:
        path.write_bytes(data[:cut])
        for block, read, unit_bytes in ((64, 1000, 20_000), (1 << 20, 1 << 18, 4096), (1000, 64, 1 << 30)):
            sizes(block, read)
            documents, reader = whole(path, unit_bytes)
            assert documents.texts == texts[: len(documents.texts)] and not documents.bad
            assert reader.problem is not None and reader.problem.kind == "truncated_file" and reader.ended
            assert str(path) in str(reader.problem) and "fetch it again" in str(reader.problem)
            counts.add((cut, len(documents.texts)))
        with pytest.raises(SourceError, match="truncated"):
            list(read_documents(path))
    # What could be read depends on the file alone. (A block of zstd is whole or lost: up to 128 KiB.)
    assert len(counts) == len(dict(counts)) and max(dict(counts).values()) > 1100


def test_a_corrupt_frame_in_the_middle_costs_what_lies_behind_it(tmp_path: Path, sizes: Any) -> None:
    texts = [random.Random(index).randbytes(100).hex() for index in range(90)]
    frames = [
        zstandard.ZstdCompressor(write_checksum=True).compress(lines(*texts[start : start + 30]))
        for start in (0, 30, 60)
    ]
    path = tmp_path / "a.jsonl.zst"
    for damaged in (b"\0\0\0\0" + frames[1][4:], frames[1][:40] + b"\xff" * 40 + frames[1][80:]):
        path.write_bytes(frames[0] + damaged + frames[2])
        for unit_bytes in (100, 3000, 1 << 20):
            sizes(64, 4 * len(frames[0]))  # in pieces of a frame
            documents, reader = whole(path, unit_bytes)
            assert documents.texts == texts[: len(documents.texts)] and 30 <= len(documents.texts) < 60
            assert reader.problem is not None and reader.problem.kind == "damaged_file"
            # The digest of a file that could not be read to its end is not known from reading it.
            assert reader.sha256() in (None, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl", b"", "empty_file"),
        ("a.jsonl.zst", b"", "empty_file"),
        ("a.parquet", b"", "empty_file"),
        ("a.jsonl.zst", b"no zstd at all", "damaged_file"),
        ("a.jsonl.gz", b"no gzip at all", "damaged_file"),
        ("a.parquet", b"no parquet at all", "damaged_file"),
        ("a.arrow", b"no arrow at all", "damaged_file"),
        ("a.jsonl", None, "unreadable_file"),
        ("a.parquet", None, "unreadable_file"),
        ("b.jsonl", "directory", "unreadable_file"),
    ],
)
def test_files_without_anything_to_read(name: str, content: Any, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is None:
        path.symlink_to(tmp_path / "absent")
    elif content == "directory":
        path.mkdir()
    else:
        path.write_bytes(content)
    try:
        reader = open_reader(path)
        assert list(reader.unit(0)) == [] and reader.ended and reader.problem is not None
        problem = reader.problem
    except FileProblem as raised:
        problem = raised
    assert problem.kind == kind and str(problem).startswith(f"{path}: ") and "\n" not in str(problem)
    with pytest.raises(SourceError, match=name):
        list(read_documents(path))


def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("a"))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises(FileProblem, match="Permission denied") as error:
        open_reader(path)
    assert error.value.kind == "unreadable_file"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow"])
def test_damaged_tables_give_the_batches_before_the_damage(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    table = pa.table({"text": [random.Random(index).randbytes(300).hex() for index in range(400)]})
    TABLES[name](path, table, 100)
    data, texts = path.read_bytes(), table["text"].to_pylist()
    path.write_bytes(data[: len(data) * 5 // 8])
    if name != "a.arrow":  # their index is at the end
        with pytest.raises(FileProblem, match="damaged or truncated") as error:
            open_reader(path)
        assert error.value.kind == "damaged_file"
    else:
        documents, reader = whole(path, 1000)
        assert documents.texts == texts[:200] and documents.records == list(range(1, 201))
        assert reader.problem is not None and reader.problem.kind == "damaged_file"
    if name == "a.parquet":
        spoiled = bytearray(data)
        start = pq.read_metadata(io.BytesIO(data)).row_group(2).column(0).data_page_offset
        spoiled[start : start + 64] = bytes(64)
        path.write_bytes(spoiled)
        documents, reader = whole(path, 1000)
        assert documents.texts == texts[:200]
        assert reader.problem is not None and reader.problem.kind == "damaged_file"


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_string_type_of_a_table_is_read(kind: Any, tmp_path: Path) -> None:
    texts = ["a", None, "caf\u00e9", "b\0c", ""]
    path = tmp_path / "a.arrow"
    column = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts, kind)
    write_stream(path, pa.table({"text": column}), 2)
    documents, _ = whole(path, 1)
    assert documents.texts == ["a", "caf\u00e9", "b\0c"] and documents.records == [1, 3, 4]
    assert [bad.kind for bad in documents.bad] == ["missing_text", "empty_document"]


def test_a_row_that_is_not_utf8_costs_only_itself(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", b"also good"], pa.binary())
    for path in (tmp_path / "a.arrow", tmp_path / "a.parquet"):
        table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())})
        (write_stream if path.suffix == ".arrow" else write_parquet)(path, table, 10)
        documents, _ = whole(path, 1000)
        assert documents.texts == ["good", "also good"]
        assert [(bad.kind, bad.record) for bad in documents.bad] == [("invalid_utf8", 2)]


def test_a_table_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, pa.table({"body": ["a"], "n": [1]}), 10)
    with pytest.raises(SourceError, match=r"a\.parquet: no column 'text'; it has body, n"):
        open_reader(path)
    with pytest.raises(SourceError, match="column 'n' is int64, not a string"):
        open_reader(path, "n")


def test_a_resumed_reader_seeks_in_a_plain_file(tmp_path: Path, sizes: Any) -> None:
    """Unit 3 of a plain file costs no reading of what is before it, and leaves the digest unknown."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*(str(index) for index in range(5000))))
    sizes(256, 256)
    reader = open_reader(path, unit_bytes=10_000)
    first = next(iter(reader.unit(3)))
    assert first.first_record == 1
    assert 30_000 <= path.read_bytes().index(first.data) < 30_000 + 256
    assert reader._digested == 0  # type: ignore[attr-defined]
    for _ in reader.unit(4):
        pass
    assert reader.sha256() is None
