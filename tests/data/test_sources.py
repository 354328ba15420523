"""Finding and reading inputs: layouts, formats, and every kind of bad record or file."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_sharedproj.data import readers
from megatron_sharedproj.data.readers import read_documents
from megatron_sharedproj.data.records import BadRecord, SourceError
from megatron_sharedproj.data.sources import describe_layout, discover


def record(text: object, source: str | None = "RedPajamaC4") -> str:
    meta = {} if source is None else {"meta": {"redpajama_set_name": source}}
    return json.dumps({"text": text, **meta})


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    if path.suffix == ".zst":
        raw = zstandard.compress(raw)
    elif path.suffix == ".gz":
        raw = gzip.compress(raw)
    path.write_bytes(raw)
    return path


def test_a_slimpajama_tree_is_found_in_natural_order(tmp_path: Path) -> None:
    for name in (
        "train/chunk10/example_train_0.jsonl.zst",
        "train/chunk2/example_train_10.jsonl.zst",
        "train/chunk2/example_train_9.jsonl.zst",
        "validation/chunk1/example_holdout_0.jsonl.zst",
        "test/chunk1/example_holdout_0.jsonl.zst",
    ):
        write(tmp_path / name, record("x"))
    for name in ("train/.cache/x.jsonl", "train/chunk2/.hidden.jsonl", "README.md", "train/notes.json"):
        write(tmp_path / name, "ignored")
    found = discover([tmp_path])
    assert set(found) == {"train", "validation", "test"}
    assert [str(path.relative_to(tmp_path / "train")) for path in found["train"]] == [
        "chunk2/example_train_9.jsonl.zst",
        "chunk2/example_train_10.jsonl.zst",
        "chunk10/example_train_0.jsonl.zst",
    ]


def test_other_layouts(tmp_path: Path) -> None:
    flat = write(tmp_path / "flat" / "b.jsonl", record("x")).parent
    write(flat / "a.jsonl", record("x"))
    assert [path.name for path in discover([flat])[""]] == ["a.jsonl", "b.jsonl"]
    assert discover([flat / "b.jsonl"]) == {"": [flat / "b.jsonl"]}
    hub = tmp_path / "hub" / "data"
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001-ab12"):
        write(hub / f"{name}.parquet", "x")
    assert {split: len(files) for split, files in discover([hub.parent]).items()} == {
        "train": 2,
        "validation": 1,
    }
    write(tmp_path / "tree" / "valid" / "a.jsonl", record("x"))
    assert list(discover([tmp_path / "tree" / "valid"])) == ["validation"]
    # What the paper's downloader leaves: save_to_disk folders by chunk, and a cache of datasets'.
    arrow = tmp_path / "slimpajama_data"
    for name in ("train/chunks/chunk_000", "train/chunks/chunk_001", "validation/chunks/chunk_000"):
        write(arrow / name / "data-00000-of-00001.arrow", "x")
        write(arrow / name / "cache-0123.arrow", "x")
        write(arrow / name / "state.json", "{}")
    assert {split: len(files) for split, files in discover([arrow]).items()} == {"train": 2, "validation": 1}


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (
            ["train/chunk1/a.jsonl.zst", "test/chunk1/a.jsonl.zst"],
            "a SlimPajama tree, .jsonl.zst: test 1 (0.0 MB), train 1 (",
        ),
        (["train/RedPajamaBook/chunk_0.jsonl.zst"], "a tree split by source, .jsonl.zst: train 1 ("),
        (
            ["train/chunks/chunk_000/data-00000-of-00001.arrow"],
            "Arrow files of save_to_disk, .arrow: train 1 (",
        ),
        (["train-00000-of-00001.parquet"], "files by split, .parquet: train 1 ("),
        (["a.jsonl", "b.jsonl.gz"], "files without splits, .jsonl .jsonl.gz: all 2 ("),
    ],
)
def test_the_layout_is_recognized(tmp_path: Path, names: list[str], layout: str) -> None:
    for name in names:
        write(tmp_path / name, record("x"))
    assert describe_layout(discover([tmp_path])).startswith(layout)


def test_discover_mistakes(tmp_path: Path) -> None:
    file = write(tmp_path / "train" / "a.jsonl", record("x"))
    loose = write(tmp_path / "loose.jsonl", record("x"))
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        ([tmp_path / "absent"], "absent: no such file or directory"),
        ([tmp_path / "empty"], "empty: no .jsonl"),
        ([write(tmp_path / "a.csv", "x")], "unknown extension"),
        ([file, file], "given twice"),
        ([tmp_path / "train", loose], "outside of any split"),
    ):
        with pytest.raises(SourceError, match=message):
            discover(inputs)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.zst", "a.zst"])
def test_every_line_format_reads_the_same(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 64)  # so that lines straddle reads and blocks
    expected = [("caf\u00e9 " * index + "x", "RedPajamaC4") for index in range(30)]
    lines = [record(text) for text, _ in expected]
    path = write(tmp_path / name, "\ufeff" + "\r\n".join(lines[:9]) + "\n\n" + "\n".join(lines[9:]))
    assert list(read_documents(path)) == expected


def test_zstd_frames_in_a_row_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress((record(text) + "\n").encode()) for text in "abc"))
    assert [text for text, _ in read_documents(path)] == ["a", "b", "c"]


@pytest.mark.parametrize("meta", ["struct", "json", "column", "none"])
def test_parquet(tmp_path: Path, meta: str) -> None:
    count = 600
    names = ["RedPajamaBook" if index % 2 else "RedPajamaC4" for index in range(count)]
    texts = [f"text {index}" for index in range(count)]
    table: dict[str, Any] = {"text": texts, "__index_level_0__": list(range(count))}
    if meta == "struct":
        table["meta"] = [{"redpajama_set_name": name, "other": 1} for name in names]
    elif meta == "json":
        table["meta"] = [json.dumps({"redpajama_set_name": name}) for name in names]
    elif meta == "column":
        table["redpajama_set_name"] = names
    else:
        names = ["unknown"] * count
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(table), path)
    assert list(read_documents(path)) == list(zip(texts, names, strict=True))


def test_source_comes_from_the_path_where_there_is_no_meta(tmp_path: Path) -> None:
    path = write(tmp_path / "train" / "RedPajamaBook" / "chunk_1.jsonl", record("x", None))
    assert list(read_documents(path)) == [("x", "RedPajamaBook")]
    assert list(read_documents(write(tmp_path / "a.jsonl", record("x", None)))) == [("x", "unknown")]


BAD_LINES = [
    (b'{"text": "\xff"}', "invalid_utf8"),
    (b'{"text": "\\ud800"}', "invalid_utf8"),
    (b'{"text": "cut', "invalid_json"),
    (b'["text"]', "invalid_json"),
    (b"[" * 100_000, "invalid_json"),
    (b'{"other": "x"}', "missing_text"),
    (b'{"text": null}', "missing_text"),
    (b'{"text": ["x"]}', "non_string_text"),
    (b'{"text": ""}', "empty_document"),
]


@pytest.mark.parametrize(("line", "kind"), BAD_LINES)
def test_bad_lines_are_named_or_collected(tmp_path: Path, line: bytes, kind: str) -> None:
    path = write(
        tmp_path / "a.jsonl", record("good").encode() + b"\n\n" + line + b"\n" + record("on").encode()
    )
    with pytest.raises(SourceError, match=r"a\.jsonl:3: "):
        list(read_documents(path))
    bad: list[BadRecord] = []
    assert [text for text, _ in read_documents(path, on_error=bad.append)] == ["good", "on"]
    assert [(item.kind, item.record) for item in bad] == [(kind, 3)]


def test_bad_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array([b"good", b"\xff\xfe", None, b"", b"on"], pa.binary())
    buffers = column.buffers()
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 5, buffers)}), path)
    bad: list[BadRecord] = []
    assert [text for text, _ in read_documents(path, on_error=bad.append)] == ["good", "on"]
    kinds = [(2, "invalid_utf8"), (3, "missing_text"), (4, "empty_document")]
    assert [(item.record, item.kind) for item in bad] == kinds
    with pytest.raises(SourceError, match=r"a\.parquet:2: "):
        list(read_documents(path))
    with pytest.raises(SourceError, match="no column 'body'; it has text"):
        list(read_documents(path, "body"))
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(SourceError, match="is int64, not a string"):
        list(read_documents(path))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_truncated_and_damaged_files_are_errors(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [f"text {index}" for index in range(2000)]}), path)
    else:
        write(path, "".join(record(f"text {index}") + "\n" for index in range(2000)))
    whole = path.read_bytes()
    for data in (whole[:-5], whole[: len(whole) // 2], b"\x00\x01" * 50, b""):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=name.replace(".", r"\.")):
            list(read_documents(path, on_error=lambda bad: None))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.jsonl: cannot be read: No such file"):
        list(read_documents(tmp_path / "gone.jsonl"))
