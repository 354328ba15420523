"""tools/evaluate.py recall by its command line: figures of a checkpoint, tasks for lm-eval, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval_models import make_model, save

from megatron_sharedproj.data.tokenizers import train_bpe
from scripts import load

pytestmark = pytest.mark.usefixtures("parallel_state")
WORDS = [f"{first}{second}" for first in ("bade", "figo", "huka", "lemi") for second in "abcdefgh"]


def tool(*words: Any) -> None:
    """The sub-command in this process and its process group: what main does between start and end."""
    args = load("tools/evaluate.py").build_parser().parse_args(["recall", *map(str, words)])
    args.run(args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    random = np.random.default_rng(0)
    train_bpe(["List: " + " ".join(random.permutation(WORDS)) for _ in range(40)], 340, folder / "tokenizer")
    save(make_model("qk_eq_v", folder / "tokenizer", positions=64), folder / "k_eq_v")
    return folder


def test_a_checkpoints_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "recall.json"
    tool("--load", folder / "k_eq_v", "--pairs", "4,8", "--keys", 8, "--sequences", 20, "--output", output)
    printed = capsys.readouterr().out
    assert "qk_eq_v, 'KEY VALUE,'" in printed and "among the values" in printed
    record = json.loads(output.read_text())
    assert record["variant"] == "qk_eq_v" and record["checkpoint"].endswith("iter_0000007")
    assert [(cell["keys"], cell["pairs"], cell["queries"]) for cell in record["cells"]] == [
        (8, 4, 80), (8, 8, 80),
    ]  # fmt: skip
    assert record["seq_length"] == 64 and record["mean"]["chance"] == pytest.approx(3 / 16)
    again = folder / "again.json"
    tool("--load", folder / "k_eq_v", "--pairs", "4,8", "--keys", 8, "--sequences", 20, "--output", again,
         "--micro-batch-size", 7)  # fmt: skip
    assert json.loads(again.read_text())["cells"][0]["accuracy"] == record["cells"][0]["accuracy"]
    tool("--load", folder / "k_eq_v", "--pairs", 4, "--keys", 8, "--sequences", 20, "--seed", 2, "--bf16",
         "--output", again)  # fmt: skip
    other = json.loads(again.read_text())
    assert other["seed"] == 2 and other["cells"][0]["margin"] != record["cells"][0]["margin"]


def test_tasks_with_and_without_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--pairs", 4, "--keys", 8, "--sequences", 3, "--seq-length", 64)
    tool("--load", folder / "k_eq_v", *shape, "--write-task", folder / "with")
    tool("--tokenizer-model", folder / "tokenizer", *shape, "--write-task", folder / "without")
    assert "recall, recall_8_keys_4_pairs" in capsys.readouterr().out
    names = {path.name for path in (folder / "with").iterdir()}
    assert names == {
        "recall.yaml", "recall_8_keys_4_pairs.yaml", "recall_8_keys_4_pairs.jsonl", "recall_documents.py",
    }  # fmt: skip
    for name in names:
        assert (folder / "with" / name).read_text() == (folder / "without" / name).read_text()


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    load = ("--load", folder / "k_eq_v")
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((), "--load: names the model; only --write-task does without"),
        (("--write-task", tmp_path / "a", "--output", tmp_path / "b.json"), "--load: names the model"),
        (
            ("--write-task", tmp_path / "a"),
            "--tokenizer-type HuggingFaceTokenizer: .*needs --tokenizer-model",
        ),
        ((*load, "--write-task", tmp_path), "--write-task .*: exists; give a new folder, or remove it"),
        ((*load, "--output", tmp_path / "no" / "x.json"), "--output .*no is not a folder"),
        ((*load, "--pattern", "KEY"), "--pattern 'KEY': must start with KEY, and have VALUE once"),
        ((*load, "--pairs", 1), "--pairs 1: give different numbers from 2 on"),
        ((*load, "--keys", 99), r"--keys 99: the vocabulary has \d+ words"),
        ((*load, "--seq-length", 65), "--seq-length 65: must be from 1 to the model's 64 positions"),
        (("--load", tmp_path), "no checkpoint|not a checkpoint|latest"),
    ]
    for words, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            tool(*words)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
