"""The paper's launch scripts: what they resolve to, without starting it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.config import PRESETS, RunConfig
from megatron_sharedproj.profiling.hardware import find_gpu
from megatron_sharedproj.profiling.run_plan import plan
from megatron_sharedproj.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
GPT2_VOCAB = 50257


def dry_run(preset: str, *flags: str, **environment: str) -> tuple[list[str], str]:
    """The command that a script prints, split into words, and all of its output."""
    script = ROOT / "examples" / f"pretrain_{preset}.sh"
    done = subprocess.run(
        ["bash", str(script), *flags, "--dry-run"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(done.stdout.splitlines()[-1]), done.stdout


def resolve(command: list[str]) -> tuple[RunConfig, int]:
    """The configuration that the printed command would run, and its number of processes."""
    assert command[0] == "torchrun"
    launch = get_args_parser().parse_args(command[1:])
    assert launch.module and launch.training_script == "megatron_sharedproj.pretrain"
    processes = int(launch.nproc_per_node)
    args = build_parser().parse_args(launch.training_script_args)
    return run_config(args, GPT2_VOCAB, processes), processes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_the_papers(preset: str, variant: str) -> None:
    config, processes = resolve(dry_run(preset, "--attention-variant", variant)[0])
    assert processes == 8
    assert config.model == PRESETS[preset].replace(attention_variant=variant)
    train = config.train
    expected = {
        "300m": (6, 1152, 4238, 2e-4, 2e-5, 500, 200),
        "1b": (2, 576, 8477, 6e-5, 6e-6, 1000, 500),
    }[preset]
    found = (
        train.micro_batch_size, train.global_batch_size, train.train_iters, train.lr, train.min_lr,
        train.lr_warmup_iters, train.eval_interval,
    )  # fmt: skip
    assert found == expected
    assert train.global_batch_size * train.seq_length * train.train_iters == pytest.approx(10e9, rel=1e-3)
    assert (train.adam_beta1, train.adam_beta2, train.weight_decay, train.clip_grad) == (0.9, 0.95, 0.1, 1.0)
    assert train.bf16 and train.weight_decay_on_all and train.seed == 42
    assert (config.checkpoint.save_interval, config.log.log_interval) == (1000, 10)
    assert config.parallel.use_distributed_optimizer and config.parallel.overlap_grad_reduce
    [row] = plan(config, processes, find_gpu("A100-40GB"), 0.4)
    # A tenth is left for what is not modelled.
    assert row["total_bytes"] < 0.9 * row["gpu_memory_bytes"]
    if variant in ("qkv", "qk_eq_v"):
        check_header(preset, variant, row)


def check_header(preset: str, variant: str, row: dict[str, Any]) -> None:
    """The script's comment says what --dry-run prints."""
    lines = (ROOT / "examples" / f"pretrain_{preset}.sh").read_text().splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))
    assert f"{row['tokens_per_step']:,} tokens a step" in comment
    assert f"{row['train_iters']:,} steps, {row['train_tokens']:,} tokens" in comment
    memory, hours = row["total_bytes"] / 2**30, row["assumed_hours"]
    if variant == "qkv":
        assert f"{memory:.1f} GiB a GPU (qkv;" in comment and f"{hours:.1f} hours" in comment
        if preset not in PRESETS:
            return
        paper, share = re.findall(r"The paper's (\d+) hours would be an MFU of (\d+)%", comment)[0]
        assert round(40 * hours / int(paper)) == int(share)
    else:
        assert f"K=V {memory:.1f})" in comment and f"(K=V {hours:.1f}) at an assumed MFU of 40%" in comment


@pytest.mark.parametrize(
    "variant, flags", [("qkv", ()), ("qk_eq_v", ("--kv-rotary", "rotate_values"))], ids=["qkv", "K=V"]
)
def test_llama_shaped_preset(variant: str, flags: tuple[str, ...]) -> None:
    command, _ = dry_run("1b_llama", "--attention-variant", variant, *flags)
    config, processes = resolve(command)
    model = config.model
    assert (model.normalization, model.activation, model.add_bias_linear) == ("RMSNorm", "swiglu", False)
    assert model.position_embedding_type == "rope" and model.untie_embeddings_and_output_weights
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (22, 2048, 5632)
    assert config.checkpoint.save == "runs/1b_llama/" + "_".join([variant, *flags[1:]])
    [row] = plan(config, processes, find_gpu("A100-40GB"), 0.4)
    assert row["total_bytes"] < 0.9 * row["gpu_memory_bytes"]
    check_header("1b_llama", variant, row)


def test_llama_shaped_k_eq_v_needs_a_scheme() -> None:
    script = ROOT / "examples" / "pretrain_1b_llama.sh"
    flags = ["--attention-variant", "qk_eq_v", "--dry-run"]
    done = subprocess.run(["bash", script, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --position-embedding-type rope") and "--kv-rotary" in done.stderr


def test_dry_run_prints_the_plan() -> None:
    _, text = dry_run("300m", "--attention-variant", "qk_eq_v", "--tensor-model-parallel-size", "2")
    assert "Run: 8 x A100-40GB, TP 2, DP 4; time at an assumed MFU of 40%" in text
    figures = next(line.split() for line in text.splitlines() if "2,359,296" in line)
    assert figures[0] == "284,542,976"


def test_mistake_is_one_line() -> None:
    script = ROOT / "examples" / "pretrain_300m.sh"
    flags = ["--tensor-model-parallel-size", "3", "--dry-run"]
    done = subprocess.run(["bash", script, *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: --tensor-model-parallel-size 3: must divide the number of processes"
    )
    assert len(done.stderr.splitlines()) == 1


def test_elastic_restarts() -> None:
    command, _ = dry_run("300m", MAX_RESTARTS="2")
    assert get_args_parser().parse_args(command[1:]).max_restarts == 2


def test_user_flags_and_environment_win() -> None:
    flags = "--attention-variant qk_eq_v --group-query-attention --num-query-groups 4 --train-iters 10"
    environment = {"NPROC": "2", "DATA_PATH": "d/x", "TOKENIZER": "tok", "SAVE": "out"}
    command, text = dry_run("300m", *flags.split(), "--lr-warmup-iters", "2", **environment)
    config, processes = resolve(command)
    assert processes == 2
    assert (config.model.num_query_groups, config.train.train_iters) == (4, 10)
    assert config.checkpoint.save == "out/qk_eq_v_g4"
    assert config.data.train_data_path == ["d/x_train_text_document"]
    assert config.data.tokenizer_model == "tok"
    assert "out/qk_eq_v_g4" in text.splitlines()[-2]


def test_each_variant_has_its_own_folder() -> None:
    folders = {resolve(dry_run("1b", "--attention-variant", v)[0])[0].checkpoint.save for v in VARIANTS}
    assert len(folders) == len(VARIANTS)


def test_own_data_flag_replaces_the_presets() -> None:
    config, _ = resolve(dry_run("1b", "--data-path", "0.7", "a", "0.3", "b")[0])
    assert config.data.data_path == ["0.7", "a", "0.3", "b"]
    assert not config.data.train_data_path


def test_bad_precision_is_refused() -> None:
    script = ROOT / "examples" / "pretrain_1b.sh"
    environment = {**os.environ, "PRECISION": "int4"}
    done = subprocess.run(["bash", script, "--dry-run"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: PRECISION=int4: choose bf16 or fp32"
