"""profile.py compare: ratios of what is comparable, one line for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sharedproj.config import ModelConfig, RunConfig, TrainConfig, to_dict, write_json
from megatron_sharedproj.profiling import step_parts
from megatron_sharedproj.profiling.step_profile import FORMAT, KIND
from scripts import load


def model(variant: str, **changes: Any) -> ModelConfig:
    return ModelConfig(2, 64, 4, 128, 32, attention_variant=variant, **changes)


def save_profile(path: Path, config: ModelConfig, scale: float, **changes: Any) -> Path:
    parts = [
        {"part": name, "forward_ms": scale * i, "backward_ms": 2 * scale * i, "ms": 3 * scale * i}
        for i, name in enumerate(step_parts.PARTS, start=1)
    ]
    profile = {
        "kind": KIND, "format": FORMAT, "commit": "abc", "device": "cpu", "threads": 1, "torch": "2",
        "processes": 1, "tensor_model_parallel_size": 1, "dtype": "float32", "model": to_dict(config),
        "seq_length": 32, "micro_batch_size": 1, "global_batch_size": 4, "step_ms": [10 * scale] * 3,
        "tokens_per_second": 1000 / scale, "tokens_per_second_profiled": 900 / scale, "mfu": 0.5 / scale,
        "parts": parts, **changes,
    }  # fmt: skip
    write_json(path, profile)
    return path


def save_run(folder: Path, config: ModelConfig, speeds: list[float], **train: Any) -> Path:
    folder.mkdir()
    run = RunConfig(config, train=TrainConfig(seq_length=32, global_batch_size=4, **train))
    write_json(folder / "run_config.json", to_dict(run))
    records = [
        {"iteration": i, "lm_loss": 5.0, "tokens_per_second": speed, "elapsed_ms_per_iteration": 1e3 / speed}
        for i, speed in enumerate(speeds, start=1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def compare(*words: Any) -> int:
    return load("tools/profile.py").main(["compare", *map(str, words)])


def test_profiles(tmp_path: Path, capsys: Any) -> None:
    a = save_profile(tmp_path / "a.json", model("qkv"), 2.0)
    b = save_profile(tmp_path / "b.json", model("qk_eq_v", num_query_groups=2), 1.0, device="gpu")
    assert compare(a, b, "--format", "json") == 0
    printed = capsys.readouterr()
    rows = {row["quantity"]: row for row in json.loads(printed.out)}
    assert rows["tokens/s"] == {"quantity": "tokens/s", "a": 500.0, "b": 1000.0, "b_over_a": 2.0}
    assert rows["MLP, forward, ms profiled"]["b_over_a"] == 0.5
    index = step_parts.PARTS.index("optimizer update") + 1
    assert rows["optimizer update, ms profiled"]["a"] == 3 * 2.0 * index
    assert "device: cpu and gpu" in printed.err and "num_query_groups: 4 and 2" in printed.err
    assert "torch" not in printed.err
    assert compare(a, b) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert "A: qkv" in head and "B: qk_eq_v, 2 groups" in head


def test_run_folders(tmp_path: Path, capsys: Any) -> None:
    a = save_run(tmp_path / "a", model("qkv"), [1.0, 100.0, 300.0, 200.0])
    b = save_run(tmp_path / "b", model("qk_eq_v"), [250.0], micro_batch_size=2)
    assert compare(a, b, "--format", "json") == 0
    printed = capsys.readouterr()
    rows = {row["quantity"]: row for row in json.loads(printed.out)}
    assert (rows["tokens/s"]["a"], rows["tokens/s"]["b"]) == (200.0, 250.0)  # the first record is left out
    assert rows["tokens/s"]["b_over_a"] == 1.25 and list(rows) == ["tokens/s", "ms per step"]
    assert "micro_batch_size: 1 and 2" in printed.err


def test_what_is_not_comparable(tmp_path: Path, capsys: Any) -> None:
    a = save_profile(tmp_path / "a.json", model("qkv"), 1.0)
    run = save_run(tmp_path / "run", model("qkv"), [1.0])
    slow = save_run(tmp_path / "slow", model("qkv"), [])
    other = tmp_path / "other.json"
    other.write_text("[1]")
    pairs = {
        (a, save_profile(tmp_path / "b.json", model("qkv", ffn_hidden_size=99), 1.0)): (
            "ffn_hidden_size 256 and 99"
        ),
        (a, save_profile(tmp_path / "c.json", model("qkv"), 1.0, seq_length=16)): "seq_length 32 and 16",
        (a, save_profile(tmp_path / "d.json", model("qkv"), 1.0, format=0)): "saved by another version",
        (a, run): "no figure that was measured alike",
        (a, other): "not a saved profile",
        (a, tmp_path / "none.json"): "cannot be read",
        (run, tmp_path): "not a run folder",
        (run, slow): "no loss in it yet",
    }
    for (first, second), message in pairs.items():
        assert compare(first, second) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
