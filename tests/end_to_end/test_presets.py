"""The paper's launch scripts: what they resolve to, without starting it."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.config import PRESETS, RunConfig
from megatron_sharedproj.formulas_memory import training_memory_bytes
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
    need = training_memory_bytes(
        config.model, config.parallel, seq_length=train.seq_length, micro_batch_size=train.micro_batch_size,
        low_precision=True,
    )["total"]  # fmt: skip
    assert need < 40e9


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
