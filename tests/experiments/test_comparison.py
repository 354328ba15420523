"""Comparisons: names and flags of models, the same data order for all, a folder that is gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.config import RunConfig
from megatron_sharedproj.experiments.comparison import MANIFEST, Comparison, Model, parse_model

QKV, TIED, Q_MQA = Model("qkv"), Model("qk_eq_v"), Model("qk_eq_v", 1, matched=True)


def comparison(folder: Path, **changes: Any) -> Comparison:
    return replace(Comparison(folder, [QKV, TIED, Q_MQA], [7, 8], steps=50), **changes)


def config_of(command: tuple[str, ...]) -> RunConfig:
    words = list(command[command.index("megatron_sharedproj.pretrain") + 1 :])
    return run_config(build_parser().parse_args(words), 2048, 1)


@pytest.mark.parametrize(
    "text, name, label",
    [
        ("qkv", "qkv", "QKV"),
        ("K=V", "qk_eq_v", "K=V"),
        ("q_eq_k", "q_eq_k", "Q=K"),
        ("Q=K=V", "q_eq_k_eq_v", "Q=K=V"),
        ("qkv:1", "qkv_g1", "MQA"),
        ("qkv:2", "qkv_g2", "GQA-2"),
        ("qk_eq_v:1", "qk_eq_v_g1", "Q-MQA"),
        ("qk_eq_v:4", "qk_eq_v_g4", "Q-GQA-4"),
    ],
)
def test_names(text: str, name: str, label: str) -> None:
    model = parse_model(text)
    assert (model.name, model.label) == (name, label)
    assert replace(model, matched=True).name == f"{name}_matched"


@pytest.mark.parametrize(
    "text, says",
    [("kqv", "unknown"), ("qkv:0", "no number"), ("qkv:x", "no number"), ("q_eq_k:2", "leave :2 out")],
)
def test_unknown_names_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_model(text)


def test_the_trainer_takes_the_flags_and_only_the_model_differs(tmp_path: Path) -> None:
    jobs = {job.name: job for job in comparison(tmp_path).jobs()}
    mine, theirs, matched = (config_of(jobs[f"{m.name}_7"].command) for m in (TIED, QKV, Q_MQA))
    assert mine.model == replace(theirs.model, attention_variant="qk_eq_v")
    assert (mine.train, mine.data) == (theirs.train, theirs.data)
    assert matched.model.num_query_groups == 1
    assert matched.model.ffn_hidden_size > matched.train.width_before_match == theirs.model.ffn_hidden_size
    assert config_of(jobs["qkv_8"].command).train == replace(theirs.train, seed=8)


def test_each_training_is_evaluated_and_waits_for_the_data(tmp_path: Path) -> None:
    jobs = {job.name: job for job in comparison(tmp_path).jobs()}
    assert jobs["qkv_7"].after == ("data",)
    for measure in ("perplexity", "recall"):
        job = jobs[f"qk_eq_v_g1_matched_8_{measure}"]
        run = str(tmp_path / "runs" / "qk_eq_v_g1_matched_8")
        assert job.after == ("qk_eq_v_g1_matched_8",)
        assert job.command[1:5] == ("tools/evaluate.py", measure, "--load", run)
        assert job.command[-1] == f"{run}/{measure}.json"
    assert "both" in jobs["qkv_7_perplexity"].command


def test_own_data_and_flags_win(tmp_path: Path) -> None:
    data = ["--train-data-path", "a", "--valid-data-path", "b", "--tokenizer-model", "c"]
    own = comparison(tmp_path, own_data=data, extra_flags=["--num-layers", "2"], protocol="padded")
    jobs = own.jobs()
    config = config_of(jobs[0].command)
    assert (config.data.train_data_path, config.data.valid_data_path) == (["a"], ["b"])
    assert (config.data.tokenizer_model, config.data.data_protocol, config.model.num_layers) == (
        "c",
        "padded",
        2,
    )
    assert jobs[0].name == "qkv_7" and not jobs[0].after
    assert own.validation == "b"


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--models: qkv is missing"):
        comparison(tmp_path, models=[TIED])
    with pytest.raises(ValueError, match="--models: qk_eq_v is named twice"):
        comparison(tmp_path, models=[QKV, TIED, TIED])
    with pytest.raises(ValueError, match="--steps 5: must be at least 10"):
        comparison(tmp_path, steps=5)


def test_seeds_and_models_join_a_folder_and_other_settings_do_not(tmp_path: Path) -> None:
    comparison(tmp_path, models=[QKV, TIED]).write_manifest(["first"])
    comparison(tmp_path, models=[QKV, Q_MQA], seeds=[9]).write_manifest(["second"])
    found = json.loads((tmp_path / MANIFEST).read_text())
    assert found["seeds"] == [7, 8, 9]
    runs = {model["name"]: sorted(model["runs"]) for model in found["models"]}
    assert runs == {"qkv": ["7", "8", "9"], "qk_eq_v": ["7", "8"], "qk_eq_v_g1_matched": ["9"]}
    with pytest.raises(
        ValueError, match="holds a comparison with another protocol, trainer_flags; give another"
    ):
        comparison(tmp_path, protocol="padded").write_manifest(["third"])
    with pytest.raises(ValueError, match="another steps"):
        comparison(tmp_path, steps=60).write_manifest(["third"])
    assert json.loads((tmp_path / MANIFEST).read_text()) == found


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sharedproj.experiments import places

    monkeypatch.setattr(places.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(places.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert places.places_for_runs(2) == [{"OMP_NUM_THREADS": "1"}] * 4
    assert places.places_for_runs(2, 2) == [{"OMP_NUM_THREADS": "2"}] * 2
    assert places.places_for_runs(16) == [{"OMP_NUM_THREADS": "1"}]
    monkeypatch.setattr(places.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert places.places_for_runs(2) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert len(places.places_for_runs(1, 3)) == 3
    with pytest.raises(ValueError, match="--processes 8: one for each GPU, and 4 are visible"):
        places.places_for_runs(8)
    with pytest.raises(ValueError, match="--at-once 3: 4 GPUs hold 2 run"):
        places.places_for_runs(2, 3)
