"""What only a GPU runs: bf16 with master weights, Megatron's distributed optimizer, NCCL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
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


@pytest.mark.parametrize("variant", ["qkv", "qk_eq_v"])
def test_distributed_optimizer_equals_the_plain_one(
    parallel_state: Any, tmp_path: Path, variant: str
) -> None:
    plain = tiny.losses(line(tmp_path, variant, bf16=True))
    sharded = tiny.losses(line(tmp_path, variant, bf16=True, use_distributed_optimizer=True))
    assert sharded == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("distributed", [False, True])
def test_resume_in_bf16(parallel_state: Any, tmp_path: Path, distributed: bool) -> None:
    options = {"bf16": True, "use_distributed_optimizer": distributed, "save_interval": STEPS // 2}
    whole = tiny.losses(line(tmp_path, "qk_eq_v", **options, save=tmp_path / "whole"))
    first = tiny.losses(
        line(tmp_path, "qk_eq_v", **options, save=tmp_path / "parts", exit_interval=STEPS // 2)
    )
    rest = tiny.losses(line(tmp_path, "qk_eq_v", **options, save=tmp_path / "parts"))
    assert first + rest == pytest.approx(whole, rel=1e-3)
