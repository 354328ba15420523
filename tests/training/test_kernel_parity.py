"""Training on the compiled kernels follows training on the plain path, loss by loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from megatron_sharedproj.ops import extension, paths

STEPS = 50

pytestmark = [
    pytest.mark.usefixtures("parallel_state"),
    pytest.mark.skipif(bool(extension.MISSING), reason=extension.MISSING),
]


def losses(folder: Path, variant: str, groups: int) -> list[float]:
    line = tiny.flags(folder / "tiny_text_document", variant, groups, train_iters=STEPS, seq_length=24)
    return tiny.losses(line)


@pytest.mark.parametrize("variant, groups", [("qk_eq_v", 0), ("qk_eq_v", 1), ("qkv", 2), ("q_eq_k_eq_v", 0)])
def test_losses_follow_the_plain_path(tmp_path: Path, monkeypatch: Any, variant: str, groups: int) -> None:
    tiny.write_data(tmp_path)
    compiled = losses(tmp_path, variant, groups)
    monkeypatch.setattr(paths.extension, "MISSING", "left out for this test")
    plain = losses(tmp_path, variant, groups)
    assert len(compiled) == STEPS and compiled[-1] < 0.8 * compiled[0]
    assert compiled == pytest.approx(plain, rel=2e-5)
    assert compiled != plain  # two implementations: equal to the last bit would mean one of them ran twice
