"""benchmarks/preprocess.py on a tiny corpus: every tool that installs here writes the same bytes."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from megatron_sharedproj.data.tokenizers import train_bpe

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "preprocess.py"
WORDS = "the state of union is sum its parts caf\u00e9 \u6f22\u5b57 x = f(y); \n\n 1234 don't".split(" ")
ROWS = ["ours-zst", "ours-jsonl", "ours-zst x2", "ours-jsonl x2", "megatron-style", "hf-batches"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fetch_corpus.py's layout with about 300 kB of random words, and a tokenizer beside it."""
    root = tmp_path_factory.mktemp("corpus")
    random.seed(1)
    train: list[str] = []
    for chunk in ("chunk1", "chunk2"):
        for file in range(2):
            texts = [" ".join(random.choices(WORDS, k=random.randint(50, 500))) for _ in range(60)]
            meta = {"redpajama_set_name": "RedPajamaC4"}
            lines = [json.dumps({"text": text, "meta": meta}, ensure_ascii=False) + "\n" for text in texts]
            path = root / "slim" / "train" / chunk / f"example_train_{file}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zstandard.compress("".join(lines).encode()))
            train += lines
    (root / "slim.jsonl").write_text("".join(train), encoding="utf-8")
    train_bpe([" ".join(WORDS)], 300, root / "tokenizer")
    return root / "slim"


def run(corpus: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--corpus", str(corpus), "--repeats", "1"]
    command += ["--tokenizer", str(corpus.parent / "tokenizer"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_tool_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "figures.csv"
    names = "ours,megatron-style,hf-batches"
    done = run(corpus, "--only", names, "--repeat-input", "2", "--output", str(output))
    assert done.returncode == 0, done.stderr + done.stdout
    with open(output, newline="", encoding="utf-8") as stream:
        rows = {row["tool"]: row for row in csv.DictReader(stream)}
    # The rate without start-up is a difference of two noisy times: at this size it may be missing.
    assert [name for name in rows if not name.endswith("steady")] == ROWS
    reference = rows["ours-jsonl"]
    for name in ROWS:
        row = rows[name]
        assert row["status"] == "ok"
        for column in ("tokens", "text_mb", "wall_s", "cpu_s", "mb_per_s", "mtok_per_cpu_s", "peak_mb"):
            assert float(row[column]) > 0, (name, column)
        copies = 2 if name.endswith("x2") else 1
        assert int(row["documents"]) == 240 * copies
        assert int(row["tokens"]) == int(reference["tokens"]) * copies
    for name in ("ours-zst", "megatron-style", "hf-batches"):
        assert rows[name]["same_as_ours"] == "yes"
        assert rows[name]["sha256"] == reference["sha256"]
    assert float(reference["peak_mb"]) > 20  # an interpreter with numpy and a tokenizer, at the very least


def test_a_failing_tool_is_a_row_and_an_exit_code(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "package_info.py").write_text("MAJOR = 0\nMINOR = 1\nPATCH = 2\n")
    (tmp_path / "tools" / "preprocess_data.py").write_text("raise SystemExit('no such thing')\n")
    output = tmp_path / "figures.csv"
    flags = ["--only", "megatron-lm", "--megatron-lm", str(tmp_path), "--output", str(output)]
    done = run(corpus, *flags)
    assert done.returncode == 1, done.stderr
    with open(output, newline="", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream)
    assert row["status"] == "failed: no such thing" and row["wall_s"] == ""
    assert "Megatron-LM checkout 0.1.2" in row["versions"]


def test_a_tool_is_ended_at_its_limit(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "package_info.py").write_text("MAJOR = 0\n")
    child = f"import time; time.sleep(1); open({str(tmp_path / 'late')!r}, 'w')"
    sleeper = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n"
    (tmp_path / "tools" / "preprocess_data.py").write_text(sleeper)
    done = run(corpus, "--only", "megatron-lm", "--megatron-lm", str(tmp_path), "--timeout", "0.5")
    assert done.returncode == 1 and "stopped after 0.5 s" in done.stdout
    time.sleep(1)
    assert not (tmp_path / "late").exists()  # its child was ended with it


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "ours,magic"], "--only magic: no such tool"),
        (["--repeats", "0"], "--repeats 0"),
        (["--only", "datatrove"], "nothing to run"),
        (["--only", "megatron-lm", "--megatron-lm", "nowhere"], "--megatron-lm nowhere: has no tools/"),
    ],
)
def test_mistakes_are_one_line(corpus: Path, flags: list[str], message: str) -> None:
    done = run(corpus, *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
