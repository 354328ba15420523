"""The pipeline and its command line: its bytes are Megatron's for any workers, and what goes where."""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import scripts
from megatron_sharedproj.data import readers
from megatron_sharedproj.data.corpus import PreprocessOptions
from megatron_sharedproj.data.engines import ENGINES, choose_engine
from megatron_sharedproj.data.estimate import estimate
from megatron_sharedproj.data.inspection import validate_indexed
from megatron_sharedproj.data.manifest import Manifest, load
from megatron_sharedproj.data.pool import start_method
from megatron_sharedproj.data.preprocess import preprocess
from megatron_sharedproj.data.sources import discover
from megatron_sharedproj.data.tokenizers import build_tokenizer, train_bpe

SENTENCE = "The state of the union is the sum of its parts, caf\u00e9 and \u6f22\u5b57 included. "


TOOL = scripts.load("tools/preprocess_slimpajama.py")


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


def options_for(tokenizer: str, **changes: Any) -> PreprocessOptions:
    arguments = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer}
    return replace(PreprocessOptions(arguments), **changes)


def manifest_of(prefix: Path) -> Manifest:
    manifest = load(prefix)
    assert manifest is not None
    return manifest


def oracle(texts: Iterable[str], tokenizer: str, prefix: Path) -> None:
    """What Megatron-Core writes of the ids that HF tokenizers gives."""
    torch = pytest.importorskip("torch")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    built = build_tokenizer("HuggingFaceTokenizer", tokenizer)
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for text in texts:
        ids = [*built.encode(text), built.eod]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def same_files(ours: Path, theirs: Path) -> bool:
    return all(
        Path(f"{ours}{end}").read_bytes() == Path(f"{theirs}{end}").read_bytes() for end in (".bin", ".idx")
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_bytes_are_those_of_megatron_for_any_number_of_workers(
    tree: Path,
    tokenizer_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
) -> None:
    if engine != "tokenizers":
        pytest.importorskip(engine)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(readers, "_READ_BYTES", 512)
    for workers in (1, 3):
        options = options_for(tokenizer_dir, workers=workers, unit_bytes=3000, engine=engine, verify=50)
        preprocess(discover([tree]), str(tmp_path / str(workers) / "out"), options)
    assert names(tmp_path / "1") == names(tmp_path / "3") and len(names(tmp_path / "1")) == 6
    oracle(TRAIN, tokenizer_dir, tmp_path / "oracle")
    oracle(["held out <|endoftext|> text"], tokenizer_dir, tmp_path / "held_out")
    for folder in ("1", "3"):
        assert same_files(tmp_path / folder / "out_train_text_document", tmp_path / "oracle")
        assert same_files(tmp_path / folder / "out_validation_text_document", tmp_path / "held_out")
    one, three = (manifest_of(tmp_path / folder / "out_train_text_document") for folder in ("1", "3"))
    assert replace(one, created=None) == replace(three, created=None)
    assert one.tokenizer.engine == engine
    verified = re.findall(r"(\d+) documents of this run verified", capsys.readouterr().err)
    assert len(verified) == 2 and all(50 <= int(count) <= len(TRAIN) for count in verified)


def test_tokens_read_back_as_the_text(tree: Path, tokenizer_dir: str, tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    assert run(tree, tmp_path / "out", tokenizer_dir) == 0
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    dataset = megatron.IndexedDataset(str(tmp_path / "out_train_text_document"))
    assert [tokenizer.decode(dataset[index][:-1]) for index in range(len(dataset))] == TRAIN
    held_out = megatron.IndexedDataset(str(tmp_path / "out_validation_text_document"))
    assert [int(index) for index in np.flatnonzero(held_out[0] == tokenizer.eod)] == [len(held_out[0]) - 1]


def test_special_tokens_are_parsed_on_request(tree: Path, tokenizer_dir: str, tmp_path: Path) -> None:
    assert run(tree, tmp_path / "out", tokenizer_dir, "--splits", "validation", "--parse-special-tokens") == 0
    prefix = tmp_path / "out_validation_text_document"
    ids = np.fromfile(f"{prefix}.bin", np.uint16)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    # Megatron-LM's tool encodes with a stock tokenizer, which reads the marker as the special token.
    import tokenizers

    stock = tokenizers.Tokenizer.from_file(f"{tokenizer_dir}/tokenizer.json")
    assert ids.tolist() == [*stock.encode("held out <|endoftext|> text").ids, tokenizer.eod]
    assert np.count_nonzero(ids == tokenizer.eod) == 2
    assert manifest_of(prefix).tokenizer.special_tokens == "parsed"


def test_manifest_counts_what_was_written(
    tree: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tree, tmp_path / "out", tokenizer_dir, "--splits", "train") == 0
    prefix = tmp_path / "out_train_text_document"
    manifest = manifest_of(prefix)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    documents, tokens = validate_indexed(prefix, tokenizer.vocab_size)
    size = sum(len(text.encode()) for text in TRAIN)
    assert vars(manifest.counts) == {"documents": documents, "text_bytes": size, "tokens": tokens}
    assert {name: counts.documents for name, counts in manifest.sources.items()} == {
        "RedPajamaBook": 10,
        "RedPajamaC4": 120,
    }
    assert manifest.tokenizer.sha256 == tokenizer.sha256 and manifest.eod == tokenizer.eod
    assert (manifest.dtype, manifest.rejected, manifest.tokenizer.special_tokens) == ("uint16", {}, "text")
    files = ["chunk1/a.jsonl.zst", "chunk2/a.jsonl.gz", "chunk10/a.jsonl", "chunk10/b.parquet"]
    assert [item.path for item in manifest.inputs] == files
    for item in manifest.inputs:
        data = (tree / "train" / item.path).read_bytes()
        assert (item.bytes, item.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for suffix, digest in manifest.checksums.items():
        assert hashlib.sha256(Path(f"{prefix}{suffix}").read_bytes()).hexdigest() == digest
    assert str(tmp_path) not in Path(f"{prefix}.json").read_text()
    expected = (
        f"train: {documents} documents, {tokens} tokens, {size / tokens:.3f} bytes per token, skipped 0"
    )
    assert capsys.readouterr().out == f"{expected} -> {prefix}.bin\n"


def by_source(tree: Path) -> dict[str, list[str]]:
    return {"RedPajamaC4": TRAIN[:120], "RedPajamaBook": TRAIN[120:]}


def test_split_by_source(tree: Path, tokenizer_dir: str, tmp_path: Path) -> None:
    assert run(tree, tmp_path / "out", tokenizer_dir, "--splits", "train", "--split-by-source") == 0
    blend = (tmp_path / "out_train_text_blend.txt").read_text().split()
    assert len(blend) == 4
    for source, texts in by_source(tree).items():
        prefix = tmp_path / f"out_train_{source}_text_document"
        oracle(texts, tokenizer_dir, tmp_path / "oracle")
        assert same_files(prefix, tmp_path / "oracle")
        manifest = manifest_of(prefix)
        assert list(manifest.sources) == [source]
        assert blend[blend.index(str(prefix)) - 1] == str(manifest.counts.tokens)


def test_exclude_source(tree: Path, tokenizer_dir: str, tmp_path: Path) -> None:
    flags = ["--splits", "train", "--exclude-source", "RedPajamaBook"]
    assert run(tree, tmp_path / "out", tokenizer_dir, *flags) == 0
    oracle(TRAIN[:120], tokenizer_dir, tmp_path / "oracle")
    assert same_files(tmp_path / "out_train_text_document", tmp_path / "oracle")
    assert manifest_of(tmp_path / "out_train_text_document").excluded_sources == {"RedPajamaBook": 10}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("share", [0.001, 0.4, 0.99, 1.0, 2.0])
def test_target_tokens_are_exact(
    tree: Path, tokenizer_dir: str, tmp_path: Path, share: float, workers: int
) -> None:
    oracle(TRAIN, tokenizer_dir, tmp_path / "oracle")
    whole = np.fromfile(tmp_path / "oracle.bin", np.uint16)
    target = int(whole.size * share)
    options = options_for(tokenizer_dir, target_tokens=target, unit_bytes=3000, workers=workers)
    preprocess({"train": discover([tree])["train"]}, str(tmp_path / "out"), options)
    prefix = tmp_path / "out_train_text_document"
    ids = np.fromfile(f"{prefix}.bin", np.uint16)
    assert ids.size == min(target, whole.size) and (ids == whole[:target]).all()
    manifest, tokenizer = manifest_of(prefix), build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    documents, tokens = validate_indexed(prefix, tokenizer.vocab_size)
    assert (manifest.counts.documents, manifest.counts.tokens) == (documents, tokens)
    lengths = tokenizer.byte_lengths()
    assert lengths is not None and manifest.counts.text_bytes == int(lengths[ids.astype(np.int64)].sum())
    assert manifest.cut_document == (ids[-1] != tokenizer.eod)


@pytest.mark.parametrize("size", [300, 5000])
def test_shards(tree: Path, tokenizer_dir: str, tmp_path: Path, size: int) -> None:
    flags = ["--splits", "train", "--shard-size", str(size)]
    assert run(tree, tmp_path / "out", tokenizer_dir, *flags) == 0
    prefixes = (tmp_path / "out_train_text_blend.txt").read_text().split()[1::2]
    assert prefixes == [f"{tmp_path}/out_train_text_document_{i:05d}" for i in range(len(prefixes))]
    assert len(prefixes) > 3
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    texts: list[str] = []
    for index, prefix in enumerate(prefixes):
        manifest = manifest_of(Path(prefix))
        assert (manifest.shard, manifest.shards) == (index, len(prefixes))
        documents, tokens = validate_indexed(prefix, tokenizer.vocab_size)
        assert tokens * 2 <= size or documents == 1
        pieces = np.split(
            ids := np.fromfile(f"{prefix}.bin", np.uint16), np.flatnonzero(ids == tokenizer.eod) + 1
        )
        texts += [tokenizer.decode(piece[:-1].tolist()) for piece in pieces if piece.size]
    assert texts == TRAIN


def test_an_inexact_engine_is_stopped(tree: Path, tokenizer_dir: str, tmp_path: Path) -> None:
    """The library is real, the ids are spoiled behind it: --verify has to see it."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    engine = choose_engine(tokenizer, "tokenizers")
    honest = engine.encode

    def spoiled(texts: Sequence[str]) -> tuple[Any, Any]:
        ids, lengths = honest(texts)
        return np.where(ids == ids[-1], ids - 1, ids), lengths

    engine.encode = spoiled  # type: ignore[method-assign]
    options = options_for(tokenizer_dir, verify=20)
    if start_method() != "fork":
        pytest.skip("a worker that is not forked builds its own engine")
    with pytest.raises(ValueError, match="--engine tokenizers: token .* by tokenizers"):
        preprocess(discover([tree]), str(tmp_path / "out"), options, (tokenizer, engine))
    assert names(tmp_path) == []


def test_dry_run_writes_nothing(
    tree: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tree, tmp_path / "o" / "out", tokenizer_dir, "--dry-run") == 0
    shown = capsys.readouterr().err
    assert "a SlimPajama tree" in shown and re.search(
        r"about [\d.,]+ M tokens.*\(from \d+ sampled documents\)", shown
    )
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in TRAIN)
    files, engine = {"train": discover([tree])["train"]}, choose_engine(tokenizer)
    guess = estimate(files, tokenizer, engine, str(tmp_path / "x"), thorough=True)
    assert guess.sampled == len(TRAIN) and guess.tokens == pytest.approx(tokens, rel=0.01)
    assert guess.size == 2 * guess.tokens and guess.free > 0
    assert names(tmp_path) == []


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
    kinds = [
        "invalid_utf8",
        "invalid_json",
        "missing_text",
        "non_string_text",
        "empty_document",
        "invalid_json",
    ]
    manifest = manifest_of(out / "x_text_document")
    assert manifest.rejected == dict(sorted(Counter(kinds).items()))
    rejects = [json.loads(text) for text in (out / "x_text_rejects.jsonl").read_text().splitlines()]
    assert [(item["file"], item["record"], item["kind"]) for item in rejects] == [
        (str(source), number, kind) for number, kind in enumerate(kinds, start=2)
    ]
    assert manifest.counts.documents == 2
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


def test_a_damaged_file_stops_all_splits_or_is_counted(
    tree: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "test").mkdir()
    (tmp_path / "in" / "test" / "a.jsonl").write_text(line("fine"))
    (tmp_path / "in" / "train" / "b.jsonl").write_text(line("behind it"))
    whole = (tree / "train" / "chunk1" / "a.jsonl.zst").read_bytes()
    (tmp_path / "in" / "train" / "a.jsonl.zst").write_bytes(whole[:-9])
    assert run(tmp_path / "in", tmp_path / "out" / "x", tokenizer_dir) == 2
    assert "train/a.jsonl.zst: truncated zstd file" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.bin"))
    assert run(tmp_path / "in", tmp_path / "out" / "x", tokenizer_dir, "--on-error", "skip") == 0
    assert (
        "a.jsonl.zst: truncated zstd file; fetch it again; 0 records of it were read"
        in capsys.readouterr().err
    )
    manifest = manifest_of(tmp_path / "out" / "x_train_text_document")
    assert (manifest.rejected, manifest.counts.documents) == ({"truncated_file": 1}, 1)


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


def test_overwriting_leaves_nothing_of_the_old_output(tokenizer_dir: str, tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text("{\n" + line("first " * 40) * 9)
    flags = ("--shard-size", "100", "--on-error", "skip")
    assert run(source, out / "x", tokenizer_dir, *flags) == 0
    before = names(out)
    assert len(before) > 9 and "x_text_rejects.jsonl" in before
    source.write_text(line("second"))
    assert run(source, out / "x", tokenizer_dir, *flags) == 2
    assert names(out) == before
    assert run(source, out / "x", tokenizer_dir, "--overwrite", *flags) == 0
    shard = [f"x_text_document_00000.{suffix}" for suffix in ("bin", "idx", "json")]
    assert names(out) == ["x_text_blend.txt", *shard]


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
        (["--shard-size", "lots"], "error: --shard-size lots: not a size; use one such as 10GB"),
        (["--target-tokens", "0"], "error: --target-tokens 0: use 1 or more"),
        (["--verify", "-1"], "error: --verify -1: use 0 or more"),
        (["--dataset-id", "x/y"], "error: --input: give this or --dataset-id, one of the two"),
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


def test_train_tokenizer_tool(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = scripts.load("tools/train_tokenizer.py")
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
