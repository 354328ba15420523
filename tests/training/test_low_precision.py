"""bf16 with fp32 master weights and Megatron's distributed optimizer, on this machine's device."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from megatron_sharedproj.training import optimizer

pytestmark = pytest.mark.gpu  # runs on a CPU as well
STEPS = 12


def line(tmp_path: Path, variant: str, **changes: Any) -> list[str]:
    if not (tmp_path / "tiny_text_document.idx").exists():
        tiny.write_data(tmp_path)
    return tiny.flags(tmp_path / "tiny_text_document", variant, **{"train_iters": STEPS, **changes})


@pytest.mark.parametrize("variant", ["qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v"])
def test_bf16_follows_fp32(parallel_state: Any, tmp_path: Path, variant: str) -> None:
    single = tiny.losses(line(tmp_path, variant))
    half = tiny.losses(line(tmp_path, variant, bf16=True))
    assert half[-1] < 0.9 * half[0]
    assert half == pytest.approx(single, rel=0.03)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("variant", ["qkv", "qk_eq_v"])
def test_distributed_optimizer_equals_the_plain_one(
    parallel_state: Any, tmp_path: Path, variant: str, bf16: bool
) -> None:
    plain = tiny.losses(line(tmp_path, variant, bf16=bf16))
    sharded = tiny.losses(line(tmp_path, variant, bf16=bf16, use_distributed_optimizer=True))
    assert sharded == pytest.approx(plain, rel=1e-3 if bf16 else 1e-6)


def test_bf16_keeps_masters_and_averages_in_fp32(parallel_state: Any, tmp_path: Path) -> None:
    run = tiny.trainer(line(tmp_path, "qk_eq_v", bf16=True))
    run.train()
    weights = list(run.model.parameters())
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert {weight.main_grad.dtype for weight in weights} == {torch.float32}
    masters = [weight.main_param for weight in weights]
    assert {master.dtype for master in masters} == {torch.float32}
    # More than the weights can show is kept, and the weights are its rounding.
    assert any((master != master.bfloat16()).any() for master in masters)
    assert all(
        torch.equal(weight, master.bfloat16()) for weight, master in zip(weights, masters, strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"use_distributed_optimizer": True},
        {"bf16": True, "use_distributed_optimizer": True, "overlap_grad_reduce": True},
    ],
    ids=["bf16", "distributed", "both"],
)
def test_resume_is_exact(parallel_state: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {**options, "save_interval": STEPS // 2, "hidden_dropout": 0.1}
    whole = tiny.losses(line(tmp_path, "qk_eq_v", **options, save=tmp_path / "whole"))
    first = tiny.losses(
        line(tmp_path, "qk_eq_v", **options, save=tmp_path / "parts", exit_interval=STEPS // 2)
    )
    rest = tiny.losses(line(tmp_path, "qk_eq_v", **options, save=tmp_path / "parts"))
    assert first + rest == whole


def test_resume_is_exact_with_padded_buckets(
    parallel_state: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large models have them, and pipeline stages with tied embeddings."""
    small = partial(optimizer.DistributedDataParallelConfig, bucket_size=2000)
    monkeypatch.setattr(optimizer, "DistributedDataParallelConfig", small)
    sharded = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    options = {**sharded, "bf16": True, "save_interval": STEPS // 2, "hidden_dropout": 0.1}
    whole = tiny.losses(line(tmp_path, "qk_eq_v", **options))
    parts = line(tmp_path, "qk_eq_v", **options, save=tmp_path / "parts")
    first = tiny.trainer([*parts, "--exit-interval", str(STEPS // 2)])
    buckets = [bucket for buffer in first.model.buffers for bucket in buffer.buckets]
    assert len(buckets) > 3 and any(b.numel_unpadded < b.grad_data.numel() for b in buckets[:-1])
    assert first.train() == 0
    assert tiny.losses(parts) == whole[STEPS // 2 :]


@pytest.mark.parametrize("bf16", [False, True])
def test_optimizers_load_each_others_checkpoints_as_weights(
    parallel_state: Any, tmp_path: Path, bf16: bool
) -> None:
    """Moments are laid out differently; --no-load-optim carries the weights over."""
    saved = tmp_path / "saved"
    tiny.losses(line(tmp_path, "qk_eq_v", bf16=bf16, save=saved, use_distributed_optimizer=True))
    options = {"train_iters": STEPS + 1, "load": saved, "no_load_optim": True, "bf16": bf16}
    more = tiny.losses(line(tmp_path, "qk_eq_v", **options))
    assert len(more) == 1 and more[0] < 4.2
