"""The whole chain by its command lines: real text in, trained models, figures and text out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_sharedproj import pretrain
from megatron_sharedproj.device import get_device

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
SIZE = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 4 --global-batch-size 8 --train-iters 12 --lr 1e-2 "
    "--min-lr 1e-3 --lr-warmup-iters 2 --eval-iters 1 --eval-interval 6 --log-interval 2 --num-workers 0 "
    "--attention-dropout 0"
).split()


def python(*words: Any, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command from another folder, as a user would with the package installed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def write_text(folder: Path, count: int) -> None:
    """The first paragraphs of real speeches, laid out like SlimPajama."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from sotu_corpus import speeches
    finally:
        sys.path.pop(0)
    for index, (name, text) in enumerate(speeches()[:count]):
        split = "validation" if index % 10 == 9 else "train"
        path = folder / split / "chunk1" / f"{name}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"text": text[:4000], "meta": {"redpajama_set_name": "RedPajamaBook"}}
        path.write_bytes(zstandard.compress((json.dumps(record) + "\n").encode()))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, tokenizer, indexed data, and a K=V model trained by the paper's launch script."""
    folder = tmp_path_factory.mktemp("chain")
    write_text(folder / "text", 20)
    text, tokenizer = ["--input", folder / "text"], folder / "tok"
    python(TOOLS / "train_tokenizer.py", *text, "--vocab-size", 300, "--output", tokenizer)
    options = ["--output-prefix", folder / "data", "--tokenizer-model", tokenizer, "--workers", 2]
    python(TOOLS / "preprocess_slimpajama.py", *text, *options)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "NPROC": "2",
        "DATA_PATH": str(folder / "data"),
        "TOKENIZER": str(tokenizer),
        "SAVE": str(folder / "runs"),
        "PRECISION": "fp32",
    }
    script = ["bash", str(ROOT / "examples" / "pretrain_1b.sh"), "--attention-variant", "Q-K=V", *SIZE]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "train.txt").write_text(done.stdout)
    (folder / "runs" / "qk_eq_v").rename(folder / "run")
    return folder


def train(folder: Path, *flags: str, capsys: Any) -> tuple[int, str]:
    """The trainer in this process, up to its checks: exit code and stderr."""
    line = [*SIZE, "--attention-variant", "qk_eq_v", "--data-path", str(folder / "data_train_text_document")]
    line += ["--tokenizer-model", str(folder / "tok"), *flags]
    code = pretrain.main(line)
    return code, capsys.readouterr().err


def test_log_says_what_runs(chain: Path) -> None:
    text = (chain / "train.txt").read_text()
    assert "attention variant: qk_eq_v (paper: Q-K=V): 2 projection(s) [q, kv]" in text
    assert "attention path: extension (forward and backward kernel, " in text
    assert "2 process(es), tensor parallel 1, data parallel 2" in text
    assert f"{get_device().products()}\n" in text
    assert " iteration       12/      12 | consumed samples:           96 | elapsed time" in text
    assert "| variant: qk_eq_v |" in text and "tokens/s:" in text
    records = [json.loads(line) for line in (chain / "run" / "log.jsonl").read_text().splitlines()]
    losses = [r["lm_loss"] for r in records if "lm_loss" in r]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    assert [r["iteration"] for r in records if "validation_lm_loss" in r] == [6, 12]
    assert list((chain / "run").rglob("events.out.tfevents*"))


def test_evaluate_both_protocols(chain: Path) -> None:
    out = chain / "run" / "perplexity.json"
    data = ["--data-path", chain / "data_validation_text_document"]
    command = [TOOLS / "evaluate.py", "perplexity", "--load", chain / "run", *data]
    done = python(*command, "--protocol", "both", "--output", out)
    figures = json.loads(out.read_text())
    packed, padded = figures["packed"], figures["padded"]
    counts = json.loads((chain / "data_validation_text_document.json").read_text())["counts"]
    assert packed["tokens"] == packed["real_tokens"] == counts["tokens"] - 1
    assert packed["loss"] < packed["unigram_entropy"] + 0.5
    bits = packed["loss"] * packed["tokens"] / math.log(2)
    assert packed["bits_per_byte"] * packed["bytes"] == pytest.approx(bits)
    assert padded["tokens"] == 64 * counts["documents"]
    assert "packed: perplexity" in done.stdout and "padded: perplexity" in done.stdout
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    two = python(*launch, *command, "--tensor-model-parallel-size", 2, "--output", chain / "tp2.json")
    assert two.stdout.count("packed: perplexity") == 1
    loss = json.loads((chain / "tp2.json").read_text())["packed"]["loss"]
    assert loss == pytest.approx(packed["loss"], rel=1e-6)


def test_generate_plot_and_compare(chain: Path) -> None:
    out = chain / "run" / "generation.json"
    done = python(
        TOOLS / "generate.py", "--load", chain / "run", "--prompt", "The Union", "--max-new-tokens", 20,
        "--output", out,
    )  # fmt: skip
    figures = json.loads(out.read_text())
    assert figures["text"][0].startswith("The Union")
    # One tensor per layer: 2 layers x 64 elements x 4 bytes x length.
    assert figures["cache_bytes"] == figures["cache_formula_bytes"] == 2 * 64 * 4 * figures["cache_tokens"]
    assert "bytes measured (kv)" in done.stderr
    python(TOOLS / "plot_runs.py", chain / "run", "--output", chain / "loss.png")
    assert (chain / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = python(TOOLS / "compare_runs.py", chain / "run").stdout
    assert "| qk_eq_v |" in table and "unigram entropy" in table and " 512 " in table


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--attention-variant", "qvk"], ["--attention-variant qvk", "qkv, q_eq_k, qk_eq_v, q_eq_k_eq_v"]),
        (["--tensor-model-parallel-size", "3"], ["--tensor-model-parallel-size 3", "processes"]),
        (["--data-path", "missing"], ["--data-path missing", "missing.idx does not exist"]),
        (["--tokenizer-model", "./no/tokenizer"], ["no/tokenizer"]),
        (["--position-embedding-type", "rope"], ["--position-embedding-type rope", "--kv-rotary"]),
        (["--require-kernel", "--attention-dropout", "0.1"], ["--require-kernel", "attention dropout"]),
        (["--deterministic-mode", "--cross-entropy-loss-fusion"], ["--deterministic-mode", "drop one"]),
        (["--load", "nowhere"], ["--load nowhere", "no checkpoint there"]),
    ],
)
def test_a_mistake_is_one_line(chain: Path, capsys: Any, flags: list[str], expected: list[str]) -> None:
    code, error = train(chain, *flags, "--save", str(chain / "never"), capsys=capsys)
    assert code == 2
    assert len(error.strip().splitlines()) == 1 and error.startswith("error: ")
    assert all(part in error for part in expected)
    assert not (chain / "never").exists()


def test_checkpoint_of_another_variant_is_refused(chain: Path, capsys: Any) -> None:
    code, error = train(chain, "--attention-variant", "qkv", "--save", str(chain / "run"), capsys=capsys)
    assert code == 2
    assert "attention_variant is qk_eq_v there and qkv here" in error


def test_token_beyond_the_vocabulary_is_refused(chain: Path, capsys: Any) -> None:
    small = chain / "small"
    python(TOOLS / "train_tokenizer.py", "--input", chain / "text", "--vocab-size", 260, "--output", small)
    code, error = train(chain, "--tokenizer-model", str(small), capsys=capsys)
    assert code == 2
    assert "data_train_text_document" in error and "vocabulary" in error
    assert len(error.strip().splitlines()) == 1


def test_tools_report_mistakes_in_one_line(chain: Path) -> None:
    command = [TOOLS / "evaluate.py", "perplexity", "--load", chain / "run", "--data-path", "missing"]
    done = python(*command, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --data-path missing")
    done = python(TOOLS / "generate.py", "--load", chain / "text", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --load")
    assert "no checkpoint there" in done.stderr
