"""profile.py step: every moment of a step has a part, and the trainer is as it was afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.config import to_dict, write_json
from megatron_sharedproj.profiling import step_parts, step_profile
from scripts import load
from tiny import flags, trainer, write_data

REPO = Path(__file__).resolve().parents[2]


def test_backward_belongs_to_the_part_of_its_forward() -> None:
    a, b = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def step() -> None:
        with torch.profiler.record_function(step_parts.PREFIX + "MLP"):
            x = (a @ b) @ b
        with torch.no_grad():
            a @ a
        with torch.profiler.record_function(step_parts.PREFIX + "head"):
            loss = (a @ x).sum()
        loss.backward()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function(step_parts.PREFIX + step_parts.REST):
            step()
    events = profiler.events()
    of = step_parts._Attribution(events).of
    products = Counter(of(event) for event in events if event.name == "aten::mm")
    assert products == {
        ("MLP", False): 2, ("MLP", True): 4, ("head", False): 1, ("head", True): 2,
        (step_parts.REST, False): 1,
    }  # fmt: skip
    accumulated = {of(event) for event in events if event.name == "torch::autograd::AccumulateGrad"}
    assert accumulated == {(step_parts.BUFFERS, True)}
    parts, operators = step_parts.breakdown(events, 2)
    assert next(one.calls for one in operators if one.name == "aten::mm") == 5
    root = next(event for event in events if event.name == step_parts.PREFIX + step_parts.REST)
    total = sum(part.total for part in parts.values())
    assert total == pytest.approx(root.cpu_time_total * 1e-6 / 2)


@pytest.fixture
def tiny_trainer(parallel_state: Any, tmp_path: Path) -> Any:
    run = trainer(flags(write_data(tmp_path), "qkv", hidden_dropout=0.1, qk_layernorm=True, train_iters=99))
    yield run
    run.log.close()


def _state(run: Any) -> tuple[list[Any], ...]:
    owners = [run, run.model, run.model.module, run.model.config, run.optimizer, *run.model.bucket_groups]
    hooks = [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in run.model.modules()]
    return [dict(vars(owner)) for owner in owners], hooks


def test_parts_of_a_step(tiny_trainer: Any, tmp_path: Path) -> None:
    tiny_trainer.step(tiny_trainer._iterator(tiny_trainer.train_data, 0))  # makes what is made once
    before = [sorted(own) for own in _state(tiny_trainer)[0]], _state(tiny_trainer)[1]
    step, loss = tiny_trainer.step, tiny_trainer.model.config.finalize_model_grads_func
    trace = tmp_path / "trace.json"
    found = step_profile.profile_steps(tiny_trainer, steps=2, warm_up=1, trace=trace, peak=1e12)
    assert ([sorted(own) for own in _state(tiny_trainer)[0]], _state(tiny_trainer)[1]) == before
    assert tiny_trainer.step == step and tiny_trainer.model.config.finalize_model_grads_func is loss
    assert (
        tiny_trainer.iteration == 1 + 1 + 1 + 1 + 2 + 1
    )  # the one above, warm-up, plain, the profiler's first, profiled, plain
    rows = {row["part"]: row for row in found["parts"]}
    assert list(rows) == [*step_parts.PARTS, "idle", "step"]
    for name in ("embedding", "norms", "projection", "attention core", "output projection", "MLP", "head"):
        assert rows[name]["forward_ms"] > 0 and rows[name]["backward_ms"] > 0, name
    for name in (
        "loss",
        "data",
        "optimizer update",
        "gradient checks and clipping",
        "gradient communication",
    ):
        assert rows[name]["ms"] > 0, name
    for name in ("projection", "output projection", "MLP", "head"):
        assert 0 < rows[name]["products_ms"] <= rows[name]["ms"]
    assert rows["data"]["products_ms"] == rows["optimizer update"]["products_ms"] == 0
    step_ms = sum(found["profiled_step_ms"]) / 2
    assert rows["step"]["ms"] == pytest.approx(step_ms) and rows["step"]["percent"] == pytest.approx(100)
    assert abs(rows["idle"]["ms"]) < 0.5 * step_ms
    tokens = found["global_batch_size"] * found["seq_length"]
    median = sorted(found["step_ms"])[len(found["step_ms"]) // 2]
    assert len(found["step_ms"]) == 2 and found["tokens_per_second"] >= tokens / median * 1e3
    rate = found["flops_per_second_per_process"]
    assert rate == pytest.approx(found["tokens_per_second"] * found["flops_per_token"])
    assert found["mfu"] == pytest.approx(rate / 1e12)
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "name" in event}
    assert {step_parts.PREFIX + "MLP", step_parts.PREFIX + "data"} <= names
    assert sorted(path.name for path in tmp_path.iterdir() if "trace" in path.name) == ["trace.json"]


CHANGES: list[dict[str, Any]] = [
    {},
    {"swiglu": True, "no_bias_gelu_fusion": None, "disable_bias_linear": True, "normalization": "RMSNorm"},
    {"no_bias_gelu_fusion": None, "norm_epsilon": 1e-6, "no_scaled_init": True, "lr_warmup_iters": None,
     "lr_warmup_fraction": 0.5, "kv_channels": 16, "ffn_hidden_size": 48},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize(("variant", "groups"), [("qk_eq_v", 0), ("qkv", 2)])
def test_a_run_gives_back_its_flags(variant: str, groups: int, changes: dict[str, Any]) -> None:
    given = build_parser().parse_args(flags("data", variant, groups, **changes))
    config = run_config(given, 93, 1)
    again = run_config(step_profile.arguments_of(config), 93, 1)
    before, after = to_dict(config), to_dict(again)
    assert before["train"].pop("lr_warmup_fraction") == changes.get("lr_warmup_fraction")
    assert after["train"].pop("lr_warmup_fraction") is None
    assert before == after


def test_nothing_of_the_run_is_used_for_files(tmp_path: Path) -> None:
    line = flags("data", save=str(tmp_path), load="elsewhere", tensorboard_dir="tb", eval_iters=3)
    args = step_profile.training_arguments(line, 40)
    assert (args.save, args.load, args.tensorboard_dir, args.wandb_project) == ("", "", "", "")
    assert args.eval_iters == 0 and args.train_iters == 40
    assert step_profile.training_arguments(line, 3).train_iters == 6
    with pytest.raises(ValueError, match=r"RUN .*: not a run folder \(run_config.json is missing\)"):
        step_profile.training_arguments([str(tmp_path)], 3)


def profile(folder: Path, *words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *(launch if ranks > 1 else []), str(REPO / "tools" / "profile.py"), "step", *words],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=200,
    )


def test_a_run_folder_from_the_command_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    line = flags(write_data(tmp_path), save=str(run))
    config = run_config(build_parser().parse_args(line), 96, 1)
    write_json(run / "run_config.json", to_dict(config))
    files = ("--trace", "t.json", "--save-profile", "p.json", "--output", "rows.json")
    done = profile(tmp_path, str(run), "--steps", "1", "--warm-up", "1", "--peak-tflops", "1", *files)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in run.iterdir()] == ["run_config.json"]
    saved = step_profile.load_profile(tmp_path / "p.json")
    assert saved["model"] == to_dict(config.model) and saved["processes"] == 1
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["ms"] for row in rows if row["section"] == "part"] == [row["ms"] for row in saved["parts"]]
    assert rows[-1]["section"] == "operator" and rows[-1]["operator"]
    assert (tmp_path / "t.json").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_processes(tmp_path: Path, tensor_parallel: int) -> None:
    line = flags(
        write_data(tmp_path), tensor_model_parallel_size=tensor_parallel, save=str(tmp_path / "unused")
    )
    options = ["--steps", "2", "--warm-up", "1", "--peak-tflops", "1", "--save-profile", "p.json"]
    done = profile(tmp_path, *options, "--", *line, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one training step") == 1 and "ranks: the slowest is" in done.stdout
    saved = step_profile.load_profile(tmp_path / "p.json")
    assert saved["processes"] == len(saved["ranks"]) == 2
    assert next(r["ms"] for r in saved["parts"] if r["part"] == "gradient communication") > 0
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: RUN: give a run folder, or -- and the trainer's flags"),
        (["nowhere"], "error: RUN nowhere: not a run folder"),
        (["nowhere", "--trace", "no/t.json"], "error: --trace no/t.json: no is not a folder"),
        (["--save-profile", ".", "nowhere"], "error: --save-profile .: is a folder"),
        (["--", "--num-layers", "2"], "error: "),
    ],
)
def test_mistakes(
    tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tool = load("tools/profile.py")
    monkeypatch.chdir(tmp_path)
    assert tool.main(["step", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
