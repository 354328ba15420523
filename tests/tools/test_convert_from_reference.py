"""The importer of released files as a user runs it: what it prints and writes, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import load

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "convert_from_reference.py"
sys.path.insert(0, str(REPO / "tests" / "conversion"))

import released_models  # noqa: E402


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A final_model.pt of Q-MQA, alone in its folder."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "final_model.pt"
    return released_models.save(path, released_models.build("q_mqa"), "q_mqa")


@pytest.fixture
def tool(parallel_state: Any) -> Any:
    """The tool's run() in this process: main() would leave the process group of the other tests."""
    convert_from_reference = load("tools/convert_from_reference.py")

    def call(*args: object) -> None:
        convert_from_reference.run(convert_from_reference.build_parser().parse_args([str(a) for a in args]))

    return call


def command(*args: object) -> Any:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_the_command_checks_and_writes_what_loads(file: Path, tmp_path: Path) -> None:
    save = tmp_path / "out"
    done = command("--load", file, "--save", save, "--tokenizer-type", "NullTokenizer")
    assert done.returncode == 0, done.stderr
    for part in (
        "qk_eq_v (paper: Q-K=V)",
        "1 key/value head(s) for 4",
        "as the formulas say",
        "step 37",
        "tokens seen 1234",
    ):
        assert part in done.stdout
    assert "2 causal masks (h.N.attn.bias) dropped" in done.stdout and "bound 1e-05" in done.stdout
    assert sorted(os.listdir(save)) == ["iter_0000037", "latest_checkpointed_iteration.txt"]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    run = json.loads((save / "iter_0000037" / "run_config.json").read_text())
    assert run["checkpoint"]["save"] == str(save) and run["train"]["lr"] == 2e-4
    state = json.loads((save / "iter_0000037" / "train_state.json").read_text())
    assert "final_model.pt" in state["imported_from"] and state["released"]["tokens_seen"] == 1234


def test_the_checkpoint_is_the_model(
    tool: Any, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    from megatron_sharedproj.inference.loading import add_loading_args, load_model

    tool("--load", file, "--save", tmp_path / "out", "--tokenizer-type", "NullTokenizer", "--no-check")
    assert "not checked (--no-check)" in capsys.readouterr().out
    parser = argparse.ArgumentParser()
    add_loading_args(parser)
    loaded = load_model(parser.parse_args(["--load", str(tmp_path / "out")]), parallel_output=False)
    tokens = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = released_models.build("q_mqa")(tokens)
        found = loaded.model(tokens, torch.arange(30).expand_as(tokens), None)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_an_existing_checkpoint_is_kept_unless_asked(
    tool: Any, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "out"
    save.mkdir()
    (save / "notes.txt").write_text("mine")
    tool("--load", file, "--save", save)
    first = (save / "iter_0000037" / "train_state.json").stat().st_ino
    assert "no tokenizer recorded" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a checkpoint already.*--overwrite"):
        tool("--load", file, "--save", save)
    assert (save / "iter_0000037" / "train_state.json").stat().st_ino == first
    tool("--load", file, "--save", save, "--overwrite")
    assert (save / "iter_0000037" / "train_state.json").stat().st_ino != first
    assert sorted(os.listdir(save)) == ["iter_0000037", "latest_checkpointed_iteration.txt", "notes.txt"]


def test_a_failed_check_leaves_nothing(
    tool: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_sharedproj.conversion import released_forward

    monkeypatch.setattr(released_forward, "BOUND", 1e-12)
    with pytest.raises(ValueError, match="computes something else .* bound 1e-12"):
        tool("--load", file, "--save", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_a_tokenizer_that_does_not_fit(tool: Any, file: Path, tmp_path: Path) -> None:
    from megatron_sharedproj.data.tokenizers import train_bpe

    train_bpe(["some text"], 300, tmp_path / "in" / "tokenizer")
    with pytest.raises(ValueError, match=r"tokens, the model has 96 rows"):
        tool("--load", file, "--save", tmp_path / "out", "--tokenizer-model", tmp_path / "in" / "tokenizer")
    with pytest.raises(ValueError, match="--tokenizer-model .*absent"):
        tool(
            "--load", file, "--save", tmp_path / "out", "--tokenizer-model", tmp_path / "in" / "absent" / "x"
        )
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--load", "in/absent.pt"], "--load in/absent.pt: no such file"),
        (["--attention-variant", "qkv"], "--attention-variant qkv and .* contradicts"),
        (["--num-query-groups", "0"], "--num-query-groups 0: must be at least 1"),
        (["--save", "absent/out"], "--save absent/out: .*absent is not a folder"),
        (["--save", "in/final_model.pt"], "in/final_model.pt: is not a folder"),
    ],
)
def test_mistakes_leave_nothing(
    tool: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        tool("--load", file, "--save", "out", *args)
    assert os.listdir(tmp_path) == ["in"] and os.listdir(tmp_path / "in") == ["final_model.pt"]


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 no more")
    done = command("--load", tmp_path / "cut.pt", "--save", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: --load {tmp_path / 'cut.pt'}: ") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["cut.pt"]
