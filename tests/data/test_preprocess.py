"""The pipeline and its command line: same bytes for any number of workers, all or nothing on disk."""

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_sharedproj.data import preprocess as pipeline
from megatron_sharedproj.data import sources
from megatron_sharedproj.data.indexed import validate_indexed
from megatron_sharedproj.data.tokenizers import build_tokenizer, train_bpe

REPOSITORY = Path(__file__).resolve().parents[2]
SENTENCE = "The state of the union is the sum of its parts, caf\u00e9 and \u6f22\u5b57 included. "


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = load_tool("preprocess_slimpajama")


def line(text: str, source: str = "RedPajamaC4") -> str:
    return json.dumps({"text": text, "meta": {"redpajama_set_name": source}}) + "\n"


def texts_of(name: str, count: int) -> list[str]:
    return [f"{name} {index}. " + SENTENCE * (index % 7 + 1) for index in range(count)]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe([SENTENCE], 300, directory)
    return str(directory)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SlimPajama-shaped tree with every format in its train split."""
    root = tmp_path_factory.mktemp("tree")
    train = root / "train"
    for chunk in ("chunk1", "chunk2", "chunk10"):
        (train / chunk).mkdir(parents=True)
    write = {chunk: "".join(line(text) for text in texts_of(chunk, 60)) for chunk in ("chunk1", "chunk2")}
    (train / "chunk1" / "a.jsonl.zst").write_bytes(zstandard.compress(write["chunk1"].encode()))
    (train / "chunk2" / "a.jsonl.gz").write_bytes(gzip.compress(write["chunk2"].encode()))
    plain = "".join(line(text, "RedPajamaBook") for text in texts_of("plain", 5))
    (train / "chunk10" / "a.jsonl").write_text(plain)
    table = {"text": texts_of("rows", 5), "meta": [{"redpajama_set_name": "RedPajamaBook"}] * 5}
    pq.write_table(pa.table(table), train / "chunk10" / "b.parquet")
    (root / "validation").mkdir()
    (root / "validation" / "a.jsonl").write_text(line("held out <|endoftext|> text"))
    return root


TRAIN = [
    text
    for name, count in (("chunk1", 60), ("chunk2", 60), ("plain", 5), ("rows", 5))
    for text in texts_of(name, count)
]


def run(tool_input: Path, prefix: Path, tokenizer: str, *flags: str) -> int:
    required = ["--input", str(tool_input), "--output-prefix", str(prefix), "--tokenizer-model", tokenizer]
    return TOOL.main([*required, "--workers", "1", *flags])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_bytes_are_those_of_megatron_for_any_number_of_workers(
    tree: Path, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 4096)  # many blocks, so that the order is at stake
    for workers in ("1", "2"):
        assert run(tree, tmp_path / workers / "out", tokenizer_dir, "--workers", workers) == 0
    assert len(names(tmp_path / "1")) == 6
    for name in names(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()

    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "oracle.bin"), dtype=np.uint16)
    for text in TRAIN:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "oracle.idx"))
    prefix = tmp_path / "1" / "out_train_text_document"
    for suffix in (".bin", ".idx"):
        assert prefix.with_suffix(suffix).read_bytes() == (tmp_path / f"oracle{suffix}").read_bytes()
    dataset = megatron.IndexedDataset(str(prefix))
    assert [tokenizer.decode(dataset[index][:-1]) for index in range(len(dataset))] == TRAIN

    held_out = megatron.IndexedDataset(str(tmp_path / "1" / "out_validation_text_document"))
    assert [int(index) for index in np.flatnonzero(held_out[0] == tokenizer.eod)] == [len(held_out[0]) - 1]


def test_manifest_counts_what_was_written(
    tree: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tree, tmp_path / "out", tokenizer_dir, "--splits", "train") == 0
    prefix = tmp_path / "out_train_text_document"
    manifest = json.loads(prefix.with_suffix(".json").read_text())
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    documents, tokens = validate_indexed(prefix, tokenizer.vocab_size)
    size = sum(len(text.encode()) for text in TRAIN)
    assert manifest["counts"] == {"documents": documents, "text_bytes": size, "tokens": tokens}
    assert {name: counts["documents"] for name, counts in manifest["sources"].items()} == {
        "RedPajamaBook": 10,
        "RedPajamaC4": 120,
    }
    assert manifest["tokenizer"]["sha256"] == tokenizer.sha256 and manifest["eod"] == tokenizer.eod
    assert (manifest["dtype"], manifest["skipped"]) == ("uint16", {})
    assert [item["path"] for item in manifest["inputs"]] == [
        "chunk1/a.jsonl.zst",
        "chunk2/a.jsonl.gz",
        "chunk10/a.jsonl",
        "chunk10/b.parquet",
    ]
    assert str(tmp_path) not in prefix.with_suffix(".json").read_text()
    expected = (
        f"train: {documents} documents, {tokens} tokens, {size / tokens:.3f} bytes per token, skipped 0"
    )
    assert capsys.readouterr().out == f"{expected} -> {prefix}.bin\n"


def test_files_without_splits_and_no_eod(tokenizer_dir: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line("one") + line("two"))
    assert run(tmp_path / "a.jsonl", tmp_path / "out" / "x", tokenizer_dir, "--no-append-eod") == 0
    assert names(tmp_path / "out") == [f"x_text_document.{suffix}" for suffix in ("bin", "idx", "json")]
    ids = np.fromfile(tmp_path / "out" / "x_text_document.bin", np.uint16)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    assert ids.tolist() == tokenizer.encode("one") + tokenizer.encode("two")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_records_stop_or_are_skipped_and_counted(
    tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    source = tmp_path / "in" / "a.jsonl"
    source.parent.mkdir()
    bad = [b'{"text": "\xff"}', b"{", b'{"body": 1}', b'{"text": 3}', b'{"text": ""}', b"{"]
    source.write_bytes(line("good").encode() + b"\n".join(bad) + b"\n" + line("on").encode())
    out = tmp_path / "out"
    assert run(source, out / "x", tokenizer_dir, "--workers", workers) == 2
    stop = capsys.readouterr()
    assert stop.out == ""
    errors = [text for text in stop.err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: --input {source}:2: invalid UTF-8")
    assert "--on-error skip" in errors[0] and "Traceback" not in stop.err
    assert names(out) == []

    flags = ("--workers", workers, "--on-error", "skip", "--max-reported-errors", "2")
    assert run(source, out / "x", tokenizer_dir, *flags) == 0
    skip = capsys.readouterr()
    reported = [text for text in skip.err.splitlines() if text.startswith("skipped ")]
    assert [text.split(": ")[0] for text in reported] == [f"skipped {source}:{number}" for number in (2, 3)]
    manifest = json.loads((out / "x_text_document.json").read_text())
    assert manifest["skipped"] == {
        "empty_document": 1,
        "invalid_json": 2,
        "invalid_utf8": 1,
        "missing_text": 1,
        "non_string_text": 1,
    }
    assert manifest["counts"]["documents"] == 2
    assert "skipped 1 empty_document, 2 invalid_json" in skip.out


def test_text_that_a_tokenizer_refuses_is_a_bad_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(line("1 2 3") + line("1 word") + line("4"))
    flags = ["--input", str(source), "--output-prefix", str(tmp_path / "x"), "--workers", "1"]
    flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    assert TOOL.main(flags) == 2
    assert f"error: --input {source}:2: cannot be encoded" in capsys.readouterr().err
    assert TOOL.main([*flags, "--on-error", "skip"]) == 0
    assert np.fromfile(tmp_path / "x_text_document.bin", np.uint16).tolist() == [1, 2, 3, 9, 4, 9]


def test_a_damaged_file_stops_all_splits_even_when_skipping(
    tree: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "test").mkdir()
    (tmp_path / "in" / "test" / "a.jsonl").write_text(line("fine"))
    whole = (tree / "train" / "chunk1" / "a.jsonl.zst").read_bytes()
    (tmp_path / "in" / "train" / "a.jsonl.zst").write_bytes(whole[:-9])
    assert run(tmp_path / "in", tmp_path / "out" / "x", tokenizer_dir, "--on-error", "skip") == 2
    assert "train/a.jsonl.zst: truncated zstd file" in capsys.readouterr().err
    assert names(tmp_path / "out") == []


def test_existing_output_is_kept_unless_told(
    tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(line("first"))
    assert run(source, tmp_path / "x", tokenizer_dir) == 0
    before = (tmp_path / "x_text_document.bin").read_bytes()
    source.write_text(line("second, and longer"))
    assert run(source, tmp_path / "x", tokenizer_dir) == 2
    assert "x_text_document.bin exists; use another prefix or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "x_text_document.bin").read_bytes() == before
    assert run(source, tmp_path / "x", tokenizer_dir, "--overwrite") == 0
    assert (tmp_path / "x_text_document.bin").read_bytes() != before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "absent"], "error: --input absent: no such file or directory"),
        (["--workers", "0"], "error: --workers 0: "),
        (["--workers", "x"], "error: --workers: invalid int value: 'x'; see --help"),
        (["--splits", "train"], "error: --splits train: no such split"),
        (["--json-keys", "body"], "no 'body' value (keys: text, meta)"),
        (["--tokenizer-model", "./absent"], "error: --tokenizer-model ./absent: no such file"),
        (["--tokenizer-type", "NullTokenizer"], "NullTokenizer needs --vocab-size"),
        (["--output-prefix", "."], "error: --output-prefix .: is a directory; use a prefix such as "),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    tokenizer_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "a.jsonl"
    source.write_text(line("text"))
    try:
        code = run(source, tmp_path / "x", tokenizer_dir, *flags)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0]
    assert names(tmp_path) == ["a.jsonl"]


def test_interrupt_leaves_nothing(tokenizer_dir: str, tmp_path: Path) -> None:
    """A real Ctrl-C, to the whole process group, from a bare clone's command line in another folder."""
    source = tmp_path / "a.jsonl"
    # Far more than is read before the signal: a fast machine must not be done first.
    block = "".join(line(text) for text in texts_of("long", 100)) * 100
    with source.open("w") as stream:
        for _ in range(10):
            stream.write(block)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    tool = [sys.executable, str(REPOSITORY / "tools" / "preprocess_slimpajama.py"), "--input", str(source)]
    flags = ["--output-prefix", "out/x", "--tokenizer-model", tokenizer_dir, "--workers", "2"]
    process = subprocess.Popen(
        [*tool, *flags, "--log-interval", "0.1"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite that runs in the background inherits an ignored SIGINT; a user's shell does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        while "Mtok/s" not in (text := process.stderr.readline()):
            assert text, "ended before it could be interrupted"
        os.killpg(process.pid, signal.SIGINT)
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
        source.unlink()
    assert process.returncode == 130 and "Traceback" not in rest
    assert rest.splitlines()[-1] == "interrupted: no output was written"
    assert names(tmp_path / "out") == []


def test_a_dead_worker_is_reported(tokenizer_dir: str, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(line(text) for text in texts_of("long", 100)) * 100)
    options = pipeline.PreprocessOptions(
        {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer_dir}, workers=2
    )
    tokenizer = build_tokenizer(**options.tokenizer)
    with pipeline._BlockEncoder(tokenizer, options) as encoder:
        blocks = encoder.encode([source])
        next(blocks)
        assert encoder._pool is not None
        os.kill(next(iter(encoder._pool._processes)), signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(RuntimeError, match="fewer --workers"):
            list(blocks)


def test_train_tokenizer_tool(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("train_tokenizer")
    flags = ["--input", str(tree), "--vocab-size", "290", "--output", str(tmp_path / "t")]
    assert tool.main(flags) == 0
    assert "vocab_size 290, eod 0" in capsys.readouterr().out
    assert tool.main(flags) == 2
    assert "use another directory or --overwrite" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("{\n")
    flags = ["--input", str(tmp_path / "bad.jsonl"), "--vocab-size", "290", "--output", str(tmp_path / "u")]
    assert tool.main(flags) == 2
    assert "bad.jsonl:1: invalid JSON" in capsys.readouterr().err
    assert not (tmp_path / "u").exists()
