"""tools/generate.py: what it prints and writes, and one line for each mistake."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from scripts import load

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "generate.py"
POSITIONS = 48


@pytest.fixture(scope="module")
def run_folder(parallel_state: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for two steps, with a byte-level tokenizer: it writes almost random bytes."""
    from megatron_sharedproj.data.tokenizers import train_bpe

    folder = tmp_path_factory.mktemp("generate")
    train_bpe(["some plain words only"] * 3, 264, folder / "tok")
    line = tiny.flags(
        tiny.write_data(folder), "qk_eq_v", 2, tokenizer_type="HuggingFaceTokenizer", vocab_size=None,
        tokenizer_model=folder / "tok", train_iters=2, lr_warmup_iters=0, save=folder / "run",
        max_position_embeddings=POSITIONS,
    )  # fmt: skip
    assert len(tiny.losses(line)) == 2
    return folder / "run"


Tool = Callable[..., tuple[str, str]]


@pytest.fixture
def tool(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    """The tool's work in this process group: stdout and stderr; mistakes are raised."""
    generate = load("tools/generate.py")

    def call(*args: Any) -> tuple[str, str]:
        capsys.readouterr()
        generate.run(generate.build_parser().parse_args(["--load", str(run_folder), *map(str, args)]))
        return tuple(capsys.readouterr())

    return call


def command(run_folder: Path, *args: Any, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, str(TOOL), "--load", str(run_folder), *map(str, args)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def process(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, cwd=cwd)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_single_prompt_streams_what_it_would_print_at_the_end(tool: Tool, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ("--prompt", "some words", "--max-new-tokens", 20, "--seed", 3)
    streamed, figures = tool(*flags, "--output", out)
    printed, _ = tool(*flags, "--no-stream")
    assert streamed == printed
    record = json.loads(out.read_text())
    assert streamed == record["text"][0] + "\n" and streamed.startswith("some words")
    assert record["finish_reason"][0] in ("length", "eod")
    # 2 layers x 2 groups x 8 elements x 4 bytes, one tensor, for the room of one page.
    assert record["cache_bytes"] == record["cache_formula_bytes"] == 2 * 2 * 8 * 4 * record["cache_tokens"]
    assert record["tokens_per_second"] > 0
    assert "qk_eq_v" in figures and f"cache: {record['cache_bytes']} bytes measured (kv)" in figures


def test_the_engine_flags_change_no_text(tool: Tool, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo words\r\nplain words only, three\n")
    flags = ("--prompt-file", prompts, "--num-samples", 2, "--max-new-tokens", 8)
    expected, _ = tool(*flags, "--max-batch-size", 6)
    assert (
        expected.count("--- prompt ") == 6 and "--- prompt 3, sample 2\nplain words only, three" in expected
    )
    parts = sorted(expected.split("--- ")[1:])
    assert parts[3].startswith("prompt 2, sample 2\ntwo words")
    for other in (["--max-batch-size", 1], ["--cache", "contiguous"], ["--no-cache"], ["--page-size", 128],
                  ["--prefill-chunk-size", 3]):  # fmt: skip
        assert sorted(tool(*flags, *other)[0].split("--- ")[1:]) == parts
    assert "; no cache" in tool(*flags, "--no-cache")[1]


def test_json_lines(tool: Tool, tmp_path: Path) -> None:
    source, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    records = [{"id": 7, "prompt": "caf\u00e9 words", "nested": {"a": [1]}}, {"prompt": "", "id": 8}]
    source.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    printed, _ = tool("--prompt-file", source, "--num-samples", 3, "--max-new-tokens", 6, "--output", out)
    assert printed == ""
    found = lines(out)
    assert len(found) == 6
    assert {(r["id"], r["prompt_index"], r["sample"]) for r in found} == {
        (7 + prompt, prompt, number) for prompt in (0, 1) for number in range(3)
    }
    for record in found:
        assert record["prompt"] == records[record["prompt_index"]]["prompt"]
        assert record.get("nested") == records[record["prompt_index"]].get("nested")
        assert record["finish_reason"] in ("length", "eod")
        assert 1 <= len(record["tokens"]) <= 6 and isinstance(record["text"], str)
    assert len({tuple(record["tokens"]) for record in found}) == 6


def test_stop(tool: Tool) -> None:
    flags = ("--prompt", "some", "--max-new-tokens", 30, "--seed", 5)
    whole = tool(*flags)[0].removesuffix("\n")
    continuation = whole.removeprefix("some")
    assert len(set(continuation)) > 5
    stop = continuation[2:4]
    assert (
        tool(*flags, "--stop", stop, "--stop", "never")[0]
        == f"some{continuation[: continuation.index(stop)]}\n"
    )


MISTAKES: list[tuple[list[str], str]] = [
    (["--prompt-file", "missing.txt"], r"--prompt-file missing.txt: cannot be read \(No such file"),
    (["--prompt-file", "."], r"--prompt-file \.: cannot be read \(Is a directory\)"),
    (["--prompt-file", "latin.txt"], r"--prompt-file latin.txt: not UTF-8 text \(byte 3\)"),
    (["--prompt-file", "empty.txt"], "--prompt-file empty.txt: holds no prompt"),
    (["--prompt-file", "bad.jsonl"], "--prompt-file bad.jsonl, line 2: not valid JSON"),
    (["--prompt-file", "other.jsonl"], 'other.jsonl, line 1: no "prompt" with a text'),
    (["--prompt-file", "list.jsonl"], 'list.jsonl, line 3: no "prompt" with a text'),
    (
        ["--prompt-file", "long.txt"],
        rf"long.txt, line 3: the prompt has \d+ tokens and the model {POSITIONS}",
    ),
    (["--prompt", "x" * 100], f"--prompt: the prompt has 100 tokens and the model {POSITIONS} positions"),
    (["--num-samples", "0"], "--num-samples 0: must be at least 1"),
    (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    (["--temperature", "-1"], r"--temperature -1.0: must be at least 0"),
    (["--temperature", "nan"], r"--temperature nan: must be at least 0"),
    (["--top-k", "-1"], "--top-k -1: must be at least 0"),
    (["--top-p", "0"], r"--top-p 0.0: must be in \(0, 1\]"),
    (["--stop", ""], "--stop '': give a text"),
    (["--max-batch-size", "0"], "--max-batch-size 0: must be at least 1"),
    (["--page-size", "32"], "--page-size 32: must be a multiple of 64"),
    (["--prefill-chunk-size", "-5"], "--prefill-chunk-size -5: must be at least 0"),
    (["--output", "out.txt"], r"--output out.txt: must end in .json or .jsonl"),
    (["--output", "no/out.json"], "--output no/out.json: no is not a folder"),
    (
        ["--prompt-file", "same.jsonl", "--output", "./same.jsonl"],
        "--output same.jsonl: is the --prompt-file",
    ),
    (["--prompt", "a\udcffb"], r"--prompt: character 2 is not Unicode text \('.udcff'\)"),
    (["--stop", "\udcff"], r"--stop: character 1 is not Unicode text"),
]


@pytest.fixture
def bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "same.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "list.jsonl").write_text('{"prompt": "a"}\n\n["b"]\n')
    (tmp_path / "long.txt").write_text("short\nshort too\n" + "y" * 90 + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes(tool: Tool, bad_files: Path, flags: list[str], message: str) -> None:
    before = sorted(bad_files.iterdir())
    more = [] if "--output" in flags else ["--output", "texts.jsonl"]
    with pytest.raises(ValueError, match=message):
        tool(*flags, *more)
    assert sorted(bad_files.iterdir()) == before


def test_a_mistake_is_one_line_and_exit_code_2(run_folder: Path, bad_files: Path) -> None:
    done = process(*command(run_folder, "--prompt-file", "bad.jsonl"), cwd=bad_files)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --prompt-file bad.jsonl, line 2: not valid JSON")


def test_a_terminal_that_cannot_show_a_character_ends_no_run(run_folder: Path, tmp_path: Path) -> None:
    line = command(run_folder, "--prompt", "caf\u00e9", "--max-new-tokens", 3)
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, env=environment, capture_output=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"caf\\xe9")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_fails_is_one_line(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    done = process(*command(run_folder, "--output", "full.jsonl", "--max-new-tokens", 3), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device; texts written before are kept\n"


def test_a_reader_that_goes_away_is_no_traceback(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("some words\n")
    flags = ("--prompt-file", "prompts.txt", "--num-samples", 500, "--max-new-tokens", 20)
    started = subprocess.Popen(
        command(run_folder, *flags),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert started.stdout and started.stderr
    assert started.stdout.read(1) == b"-"
    started.stdout.close()
    assert started.stderr.read() == b""
    assert started.wait(60) == 1


def test_ctrl_c_keeps_what_is_finished(run_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    source.write_text("some words\n" * 3000)
    flags = ("--prompt-file", source, "--max-new-tokens", 30, "--output", out, "--max-batch-size", 2)
    started = subprocess.Popen(
        command(run_folder, *flags),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background job, and what it starts, ignores the signal otherwise.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (out.is_file() and out.stat().st_size):
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    stdout, stderr = started.communicate(timeout=60)
    assert started.returncode == 130, stderr
    found = lines(out)
    assert 1 <= len(found) < 3000
    assert stdout == ""
    # Libraries of other versions may warn before it.
    line = f"error: interrupted; {len(found)} of 3000 texts were complete; {out} has those\n"
    assert stderr.endswith(line) and "Traceback" not in stderr


def test_two_tensor_parallel_ranks(tool: Tool, run_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo words\nwords only\n")
    flags = ("--prompt-file", prompts, "--max-new-tokens", 6, "--output")
    tool(*flags, tmp_path / "one.json")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = command(
        run_folder, *flags, tmp_path / "two.json", "--tensor-model-parallel-size", 2, launcher=launcher
    )
    done = process(*two, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--- prompt 1, sample 1") == 1
    one, both = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert both["text"] == one["text"]
    assert both["cache_bytes"] == both["cache_formula_bytes"] == one["cache_bytes"]
    assert "over all 2 ranks" in done.stderr
