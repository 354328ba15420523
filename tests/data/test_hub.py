"""Data sets by id: a local directory stands for one, and nothing reaches the network."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_sharedproj.data import hub
from megatron_sharedproj.data.hub import KNOWN_DATASETS, HubShard, dataset_table, discover_hub
from megatron_sharedproj.data.records import SourceError
from megatron_sharedproj.data.tokenizers import train_bpe

pytest.importorskip("datasets")

REPOSITORY = Path(__file__).resolve().parents[2]
GONE = "cerebras/SlimPajama-627B"


def texts(name: str, count: int) -> list[str]:
    return [f"{name} {index} of the caf\u00e9. " * (index % 5 + 1) for index in range(count)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(autouse=True)
def offline(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tools, which are run as processes; in this one `datasets` has read its settings already."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_HOME", str(root / "home"))):
        monkeypatch.setenv(name, value)


def write(path: Path, rows: list[str], source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        meta = [{"redpajama_set_name": source}] * len(rows)
        pq.write_table(pa.table({"text": rows, "meta": meta}), path, row_group_size=10)
        return
    lines = [json.dumps({"text": row, "meta": {"redpajama_set_name": source}}) + "\n" for row in rows]
    path.write_bytes(zstandard.compress("".join(lines).encode()))


@pytest.fixture(scope="module", params=["jsonl.zst", "parquet"])
def dataset(root: Path, request: pytest.FixtureRequest) -> Path:
    directory = root / request.param
    for index in range(3):
        name = f"train-{index:05d}-of-00003.{request.param}"
        write(directory / "data" / name, texts(f"train {index}", 30), f"RedPajama{index}")
    name = f"validation-00000-of-00001.{request.param}"
    write(directory / "data" / name, texts("held out", 7), "RedPajamaC4")
    return directory


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> str:
    train_bpe(texts("train", 5), 280, root / "tokenizer")
    return str(root / "tokenizer")


def tool(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_slimpajama.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_shards_are_the_files_and_their_rows_the_documents(dataset: Path) -> None:
    found = discover_hub(str(dataset))
    assert list(found) == ["train", "validation"]
    assert [len(shards) for shards in found.values()] == [3, 1]
    assert str(found["train"][1]) == f"{dataset}/train-00001-of-00003"
    for index, shard in enumerate(found["train"]):
        rows = list(shard.rows())
        assert [row["text"] for row in rows] == texts(f"train {index}", 30)
        assert {row["meta"]["redpajama_set_name"] for row in rows} == {f"RedPajama{index}"}
    assert [row["text"] for row in found["validation"][0].rows()] == texts("held out", 7)


def test_the_bytes_are_those_of_the_files(dataset: Path, tokenizer: str, tmp_path: Path) -> None:
    common = ["--tokenizer-model", tokenizer, "--workers", "2"]
    for name, flags in (("hub", ["--dataset-id", str(dataset)]), ("files", ["--input", str(dataset)])):
        result = tool(*flags, *common, "--output-prefix", str(tmp_path / name / "x"))
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "hub" / "x_train_text_document.bin").stat().st_size > 1000
    for split in ("train", "validation"):
        for suffix in (".bin", ".idx"):
            name = f"x_{split}_text_document{suffix}"
            assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()
    manifests = [
        json.loads((tmp_path / name / "x_train_text_document.json").read_text()) for name in ("hub", "files")
    ]
    for key in ("counts", "sources", "checksums", "rejected"):
        assert manifests[0][key] == manifests[1][key]
    assert manifests[0]["sources"].keys() == {"RedPajama0", "RedPajama1", "RedPajama2"}
    assert [item["sha256"] for item in manifests[0]["inputs"]] == [None] * 3
    assert [Path(item["path"]).name for item in manifests[0]["inputs"]] == [
        f"train-{index:05d}-of-00003" for index in range(3)
    ]
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == sorted(
        path.name for path in (tmp_path / "files").iterdir()
    )


def test_the_original_is_refused_and_others_are_named(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="gmongaras/SlimPajama-627B_Reupload"):
        discover_hub(GONE)
    start = time.monotonic()
    result = tool(
        *("--dataset-id", GONE, "--output-prefix", str(tmp_path / "x"), "--tokenizer-model", tokenizer)
    )
    assert result.returncode == 2 and time.monotonic() - start < 30
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: --dataset-id {GONE}: reported as not found on the Hub since ")
    for known in KNOWN_DATASETS:
        assert (known.id in line) == ("Slim" in known.id)
    assert list(tmp_path.iterdir()) == []


def test_an_id_that_cannot_be_reached_is_one_line(tokenizer: str, tmp_path: Path) -> None:
    start = time.monotonic()
    result = tool(
        *("--dataset-id", "nobody/nothing", "--output-prefix", str(tmp_path / "x")),
        *("--tokenizer-model", tokenizer),
    )
    assert result.returncode == 2 and time.monotonic() - start < 30
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --dataset-id nobody/nothing: cannot be loaded (")
    assert "--list-datasets" in line


def test_the_list_names_what_is_gone(tmp_path: Path) -> None:
    result = tool("--list-datasets")
    assert (result.returncode, result.stderr, result.stdout) == (0, "", dataset_table() + "\n")
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert rows.keys() == {known.id for known in KNOWN_DATASETS}
    assert [name for name, row in rows.items() if "GONE" in row] == [GONE]


@pytest.mark.parametrize("dataset", ["jsonl.zst"], indirect=True)
def test_a_shard_that_breaks_off_names_itself(tmp_path: Path, dataset: Path) -> None:
    """A server that fails in the middle, here a file: what came before it is given."""
    from megatron_sharedproj.data.readers import open_reader

    whole = (dataset / "data" / "train-00000-of-00003.jsonl.zst").read_bytes()
    (tmp_path / "train.jsonl.zst").write_bytes(whole[: len(whole) - 9] + b"\xff" * 9)
    reader = open_reader(HubShard(str(tmp_path), None, None, "train", 0, 1))
    found = [row["text"] for block in reader.unit(0) for row in block.data]
    assert found == texts("train 0", 30)[: len(found)]
    assert reader.problem is not None and reader.problem.kind == "unreadable_file"
    assert str(reader.problem).startswith(f"{tmp_path}/train-00000-of-00001: cannot be read: ")


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"install the \[data\] extra"):
        hub.discover_hub("some/dataset")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
