"""tools/profile.py: its sub-commands, its messages, and that Python keeps its own `profile`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.config import PRESETS, RunConfig, to_dict, write_json
from megatron_sharedproj.conversion.config_map import hugging_face_config
from scripts import load

REPO = Path(__file__).resolve().parents[2]
TOOLS = REPO / "tools"
COMMANDS = ["paper", "kv-cache", "memory", "plan", "step", "compare", "roofline"]

Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """The tool's main() in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    module = load("tools/profile.py")

    def call(*args: str) -> tuple[int, str, str]:
        try:
            code = module.main(list(args))
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return call


def python(*line: str, folder: Path = REPO) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, *line], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_other_tools_import_pythons_profile() -> None:
    """A tool's folder comes first in sys.path; torch imports cProfile, which imports profile."""
    code = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
import torch._dynamo, cProfile, profile
assert profile.Profile and profile.run and cProfile.run.__doc__ == profile.run.__doc__
assert profile.__file__ != {str(TOOLS / "profile.py")!r} and sys.path[0] == {str(TOOLS)!r}
print("ok")
"""
    assert python("-c", code) == "ok\n"


def test_in_the_tools_folder_too() -> None:
    """There the first entry of sys.path is the empty string."""
    code = "import cProfile, profile; assert profile.Profile; print('ok')"
    assert python("-c", code, folder=TOOLS) == "ok\n"


def test_the_tool_itself_runs_with_pythons_profile() -> None:
    """cProfile runs the tool as __main__, and the tool imports torch."""
    line = ("paper", "--no-run", "--seq-lengths", "128", "--attention-variant", "qkv", "--format", "json")
    plain = json.loads(python(str(TOOLS / "profile.py"), *line))
    output = python("-m", "cProfile", str(TOOLS / "profile.py"), *line)
    assert json.JSONDecoder().raw_decode(output)[0] == plain
    assert "function calls" in output
    code = (
        "import runpy, sys; sys.argv = ['profile.py', '--help']\n"
        f"try: runpy.run_path({str(TOOLS / 'profile.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import torch, profile; assert profile.Profile; print('ok')"
    )
    assert python("-c", code).endswith("ok\n")


def test_help_names_every_command(tool: Tool) -> None:
    code, out, _ = tool("--help")
    assert code == 0
    assert [name for name in COMMANDS if f"  {name} " in out] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_flags_and_their_help(tool: Tool, command: str) -> None:
    code, out, _ = tool(command, "--help")
    assert code == 0
    assert "--format {table,markdown,csv,json}" in out
    assert "--output FILE" in out


@pytest.mark.parametrize("line", [[], ["papers"]])
def test_an_unknown_command_lists_the_known(tool: Tool, line: list[str]) -> None:
    code, out, err = tool(*line)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not line or all(name in err for name in COMMANDS)


@pytest.mark.parametrize("command", ["paper", "kv-cache"])
@pytest.mark.parametrize(
    "line, words",
    [
        (["--model", "7b"], ["--model", "'7b'", "'300m', '1b'"]),
        (["--num-query-groups", "3"], ["--num-query-groups 3", "[1, 2, 4, 8, 16]"]),
        (["--num-query-groups", "-4"], ["--num-query-groups", "'-4'", "above 0"]),
        (["--attention-variant", "q_eq_k", "--num-query-groups", "4"], ["--num-query-groups 4", "16"]),
        (["--attention-variant", "kv"], ["--attention-variant kv", "qkv, q_eq_k, qk_eq_v, q_eq_k_eq_v"]),
        (["--num-layers", "-1"], ["--num-layers", "'-1'", "above 0"]),
        (["--hidden-size", "1000"], ["--hidden-size 1000", "--num-attention-heads 16"]),
        (["--load", "missing"], ["--load missing", "run_config.json", "config.json"]),
        (["--load", "missing", "--model", "1b"], ["--model", "not allowed with", "--load"]),
        (["--format", "xml"], ["--format", "'xml'", "'table', 'markdown', 'csv', 'json'"]),
        (["--output", "missing/rows.json"], ["--output missing/rows.json", "missing is not a folder"]),
        (
            ["--position-embedding-type", "rope", "--attention-variant", "qk_eq_v"],
            ["--position-embedding-type rope", "qk_eq_v", "learned_absolute"],
        ),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_mistakes_are_one_line(
    tool: Tool, tmp_path: Path, command: str, line: list[str], words: list[str]
) -> None:
    code, out, err = tool(command, *line)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert [word for word in words if word not in err] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, flag", [("paper", "--seq-lengths"), ("kv-cache", "--context")])
def test_beyond_the_positions(tool: Tool, command: str, flag: str) -> None:
    code, _, err = tool(command, "--no-run", flag, "128,4096")
    assert code == 2
    assert err == (
        f"error: {flag} 4096: beyond the 2048 learned positions; use up to 2048, or "
        "--max-position-embeddings 4096\n"
    )
    assert tool(command, "--no-run", flag, "4096", "--max-position-embeddings", "4096")[0] == 0
    assert tool(command, "--no-run", flag, "4096", "--position-embedding-type", "none")[0] == 0


@pytest.mark.parametrize("flag", ["--batch", "--context", "--tensor-model-parallel-size"])
def test_sizes_of_the_cache_are_positive(tool: Tool, flag: str) -> None:
    for value in ("0", "-2", "x", "1,,2"):
        code, out, err = tool("kv-cache", flag, value)
        assert (code, out) == (2, "") and err.startswith(f"error: {flag}: "), err


def rows(tool: Tool, *line: str) -> list[dict[str, Any]]:
    code, out, err = tool(*line, "--format", "json")
    assert code == 0, err
    return json.loads(out)


def test_a_run_and_an_export_are_read_without_weights(tool: Tool, tmp_path: Path) -> None:
    config = PRESETS["300m"].replace(num_layers=3, attention_variant="qk_eq_v", num_query_groups=2)
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "run_config.json", to_dict(RunConfig(model=config)))
    (tmp_path / "export").mkdir()
    written = hugging_face_config(config, vocab_size=50257, eos_token_id=50256)
    write_json(tmp_path / "export" / "config.json", written)
    asked = ["--num-layers", "3", "--attention-variant", "qk_eq_v", "--num-query-groups", "2"]
    expected = rows(tool, "paper", "--no-run", *asked)
    for folder in ("run", "export"):
        found = rows(tool, "paper", "--no-run", "--load", folder)
        assert [row.pop("model") for row in found] == [folder] * 4
        assert found == [{key: value for key, value in row.items() if key != "model"} for row in expected]
    assert {row["model"] for row in expected} == {"300m, changed"}
    # Its shape in all variants, and with another number of layers.
    everything = rows(tool, "kv-cache", "--no-run", "--load", "run", "--attention-variant", "all")
    assert len(everything) == 8
    longer = rows(tool, "kv-cache", "--no-run", "--load", "run", "--num-layers", "6")
    assert [row["bytes_per_token"] for row in longer] == [6 * 2 * 64 * 2]
    (tmp_path / "export" / "config.json").write_text('{"model_type": "gpt2"}')
    code, _, err = tool("paper", "--load", "export")
    assert code == 2 and "'gpt2'" in err and err.count("\n") == 1


def test_variants_that_the_shape_rules_out_are_named(tool: Tool) -> None:
    code, out, err = tool("paper", "--no-run", "--format", "csv", "--position-embedding-type", "rope")
    assert code == 0
    assert {line.split(",")[2] for line in out.splitlines()[1:]} == {"qkv", "q_eq_k"}
    for name in ("Q-K=V", "Q=K=V", "Q-GQA", "Q-MQA"):
        assert f"note: {name}: left out" in err


def test_changed_sizes_are_derived_anew(tool: Tool) -> None:
    (row,) = rows(
        tool, "paper", "--no-run", "--seq-lengths", "1", "--attention-variant", "qkv",
        "--hidden-size", "32", "--num-layers", "1", "--vocab-size", "10", "--max-position-embeddings", "4",
    )  # fmt: skip
    # 16 heads of 2, an MLP of 128; every linear has a bias.
    block = 4 * (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 2 * 64
    assert row["parameters"] == 10 * 32 + 4 * 32 + block + 64
    (gated,) = rows(
        tool, "paper", "--no-run", "--seq-lengths", "1", "--attention-variant", "qkv", "--swiglu",
        "--hidden-size", "96", "--num-layers", "1", "--vocab-size", "10", "--max-position-embeddings", "4",
    )  # fmt: skip
    width = 256  # 8/3 of 96, a multiple of 64, as the trainer has it
    block = 4 * (96 * 96 + 96) + 2 * (96 * width + width) + (width * 96 + 96) + 2 * 192
    assert gated["parameters"] == 14 * 96 + block + 192
