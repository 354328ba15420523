"""Surgery from folders to folders: checkpoints of ours, GPT-2 and Llama directories, records, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import scripts
import tiny
from megatron_sharedproj.checkpointing import files, resolve_checkpoint
from megatron_sharedproj.retrofit.conversion import Options, retrofit, table
from megatron_sharedproj.retrofit.launch import distillation_flags, model_flags, shown, torchrun

pytestmark = pytest.mark.usefixtures("parallel_state")

V = tiny.VOCAB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, parallel_state: Any) -> Path:
    """Data and a qkv model trained a little; nothing in it is changed."""
    folder = tmp_path_factory.mktemp("retrofit")
    prefix = tiny.write_data(folder)
    tiny.losses(tiny.flags(prefix, "qkv", train_iters=30, save=folder / "qkv"))
    return folder


def options(folder: Path, output: Path, merge: str = "mean", **changes: Any) -> Options:
    data = str(folder / "tiny_text_document")
    calibration = data if merge == "least_squares" else ""
    values = {"load": folder / "qkv", "calibration_data": calibration, "eval_data": data, **changes}
    return Options(output=output, merge=merge, **values)


def perplexity(load: Path, data: str) -> float:
    import argparse

    from megatron_sharedproj.evaluation.perplexity import evaluate_perplexity
    from megatron_sharedproj.inference.loading import load_model

    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    args = argparse.Namespace(load=load, tensor_model_parallel_size=1, bf16=False, **dict.fromkeys(names))
    loaded = load_model(args, parallel_output=True)
    return float(evaluate_perplexity(loaded, data)["perplexity"])


@pytest.mark.parametrize("merge", ["mean", "keep_key", "keep_value", "least_squares"])
def test_a_run_becomes_a_checkpoint_that_the_trainer_takes(folder: Path, tmp_path: Path, merge: str) -> None:
    record = retrofit(options(folder, tmp_path / "start", merge))
    assert json.loads((tmp_path / "start" / "retrofit.json").read_text()) == record
    before, after = (record[f"perplexity_{when}"]["perplexity"] for when in ("before", "after"))
    data = str(folder / "tiny_text_document")
    assert before == pytest.approx(perplexity(folder / "qkv", data), rel=1e-6)
    assert after == pytest.approx(perplexity(tmp_path / "start", data), rel=1e-6)
    assert f"| packed perplexity | {before:.2f} | {after:.2f} |" in table(record)
    checkpoint = resolve_checkpoint(tmp_path / "start")
    origin = files.train_state(checkpoint)["imported_from"]
    assert origin.startswith(
        "qkv/iter_0000030, a qkv model, by surgery to qk_eq_v: " + merge.replace("_", " ")
    )
    assert ("tokens, layer after layer" in origin) == (merge == "least_squares")

    line = tiny.flags(data, lr=1e-2, train_iters=8, load=tmp_path / "start", finetune=True)
    trainer = tiny.trainer([*line, "--distill-teacher", record["teacher"]])
    assert trainer.origin == origin
    found: list[float] = []
    trainer.hooks.append(lambda t: found.append(t.last_loss))
    assert trainer.train() == 0 and found[-1] < found[0]


def test_least_squares_is_the_best_start(folder: Path, tmp_path: Path) -> None:
    found = {
        merge: retrofit(options(folder, tmp_path / merge, merge))["perplexity_after"]["perplexity"]
        for merge in ("mean", "keep_key", "keep_value", "least_squares")
    }
    assert min(found, key=lambda merge: found[merge]) == "least_squares"


def test_the_printed_command_is_the_models(folder: Path, tmp_path: Path) -> None:
    """Flags of a checkpoint give its model again, whatever its tokenizer's size."""
    from megatron_sharedproj.arguments import build_parser, model_config

    retrofit(options(folder, tmp_path / "start", num_query_groups=2))
    flags = distillation_flags(tmp_path / "start", folder / "qkv")
    args = build_parser().parse_args(flags)
    saved = files.checkpoint_config(resolve_checkpoint(tmp_path / "start"))
    assert model_config(args, V).replace(init_method_std=saved.model.init_method_std) == saved.model
    assert saved.model.num_query_groups == 2
    assert (args.load, args.finetune, args.distill_teacher) == (
        str(tmp_path / "start"), True, str(folder / "qkv"),
    )  # fmt: skip
    assert args.seq_length == saved.train.seq_length and args.vocab_size == V
    assert shown(torchrun(flags, 2)).startswith(
        "torchrun --standalone --nproc-per-node 2 -m megatron_sharedproj.pretrain --attention-variant "
    )


def test_flags_of_other_shapes() -> None:
    from megatron_sharedproj.arguments import build_parser, model_config
    from megatron_sharedproj.config import ModelConfig

    config = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, padded_vocab_size=104,
        max_position_embeddings=64, attention_variant="qk_eq_v", position_embedding_type="rope",
        rotary_base=500, rotary_percent=0.5, kv_rotary="partial", normalization="RMSNorm",
        activation="swiglu", ffn_hidden_size=40, add_bias_linear=False, qk_layernorm=True,
        untie_embeddings_and_output_weights=True, layernorm_epsilon=1e-6, scaled_init=False,
    )  # fmt: skip
    assert model_config(build_parser().parse_args(model_flags(config)), 99) == config


def hugging_face(folder: Path, kind: str) -> Path:
    """A tiny random model of transformers, as it saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=48)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=48,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / kind)
    return folder / kind


@pytest.mark.parametrize("merge", ["mean", "least_squares"])
@pytest.mark.parametrize(("kind", "kv_rotary"), [("gpt2", ""), ("llama", "rotate_keys")])
def test_hugging_face_directories(
    folder: Path, tmp_path: Path, kind: str, kv_rotary: str, merge: str
) -> None:
    source = hugging_face(tmp_path, kind)
    said: list[str] = []
    record = retrofit(
        options(folder, tmp_path / "start", merge, load=source, kv_rotary=kv_rotary), say=said.append
    )
    teacher = tmp_path / "start" / "teacher"
    assert record["teacher"] == str(teacher) and f"{kind}, a Hugging Face directory" in record["origin"]
    # The teacher is transformers' model.
    data = str(folder / "tiny_text_document")
    assert perplexity(teacher, data) == pytest.approx(record["perplexity_before"]["perplexity"], rel=1e-6)
    flags = distillation_flags(tmp_path / "start", teacher)
    line = [*flags, "--data-path", data, "--split", "90,10,0", "--train-iters", "2", "--lr", "1e-3"]
    line += ["--lr-warmup-iters", "1", "--eval-iters", "0", "--num-workers", "0"]
    trainer = tiny.trainer(line)
    assert trainer.train() == 0


def test_what_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    source = hugging_face(tmp_path, "llama")
    with pytest.raises(ValueError, match="--kv-rotary"):
        retrofit(options(folder, tmp_path / "start", load=source), say=lambda text: None)
    assert not (tmp_path / "start").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="--num-query-groups 3"):
        retrofit(options(folder, tmp_path / "mine", num_query_groups=3))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_bad_options_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "qkv", tmp_path / "full")
    damaged: dict[str, tuple[dict[str, Any], str]] = {
        "calibrated": ({"merge": "least_squares", "calibration_data": ""}, "needs --calibration-data PREFIX"),
        "for nothing": ({"calibration_data": "x"}, "--calibration-data x: --merge mean reads no text"),
        "no data": ({"eval_data": "nowhere"}, "--eval-data nowhere: nowhere.bin does not exist"),
        "negative": ({"eval_tokens": -1}, "--eval-tokens -1: must not be negative"),
        "full": ({"output": tmp_path / "full"}, "--output .*: holds a checkpoint already"),
        "itself": (
            {"output": tmp_path / "full", "load": tmp_path / "full", "overwrite": True},
            "--output .*: is --load; give another folder",
        ),
        "too few": (
            {"merge": "least_squares", "calibration_tokens": 20},
            "--calibration-data .*: 20 tokens .* less than one sequence of 32",
        ),
        "nothing": ({"load": tmp_path / "none"}, "--load .*none: no checkpoint there"),
    }
    for changes, message in damaged.values():
        changes = dict(changes)
        values = {"output": tmp_path / "start", "merge": "mean", **changes}
        with pytest.raises(ValueError, match=message):
            retrofit(options(folder, **values))
        assert not (tmp_path / "start").exists()


# --- the tool --------------------------------------------------------------------------------------------


def test_the_tool_prints_a_table_and_a_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = scripts.load("tools/retrofit.py")
    data = str(folder / "tiny_text_document")
    line = [
        "surgery",
        "--load",
        str(folder / "qkv"),
        "--output",
        str(tmp_path / "start"),
        "--eval-data",
        data,
    ]
    args = tool.build_parser().parse_args(line)
    tool.run_surgery(args)
    out = capsys.readouterr().out
    assert "| packed perplexity |" in out and "--distill-teacher" in out
    assert tool.build_parser().parse_args([*line, "--", "--lr", "1"]).train == ["--lr", "1"]


def test_the_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    data = str(folder / "tiny_text_document")
    for name in ("a", "b", "teacher"):
        tiny.losses(tiny.flags(data, train_iters=4, eval_interval=2, eval_iters=1, save=tmp_path / name))
    tool = scripts.load("tools/retrofit.py")
    runs = [str(tmp_path / name) for name in "ab"]
    png = tmp_path / "plot.png"
    line = ["plot", *runs, "--labels", "mean,keep K", "--teacher", str(tmp_path / "teacher"), "--output"]
    tool.run_plot(tool.build_parser().parse_args([*line, str(png)]))
    assert png.read_bytes().startswith(b"\x89PNG")

    from megatron_sharedproj.reporting.plots import load_run
    from megatron_sharedproj.reporting.retrofit_plot import final_perplexity, retrofit_figure

    loaded = {name: load_run(tmp_path / name) for name in ("a", "teacher")}
    figure = retrofit_figure({"a": loaded["a"]}, levels={"teacher": loaded["teacher"]}, starts={"a": 500.0})
    axes = figure.axes[0]
    curve, level = axes.get_lines()
    assert list(curve.get_xdata()) == [0, 2, 4] and curve.get_ydata()[0] == 500.0
    assert curve.get_ydata()[-1] == pytest.approx(final_perplexity(loaded["a"]))
    assert level.get_ydata()[0] == pytest.approx(final_perplexity(loaded["teacher"]))
    with pytest.raises(ValueError, match="--labels x: give 2 distinct one"):
        tool.run_plot(tool.build_parser().parse_args(["plot", *runs, "--labels", "x", "--output", str(png)]))
    with pytest.raises(ValueError, match="no validation in it; train with --eval-iters"):
        final_perplexity(load_run(folder / "qkv"))
