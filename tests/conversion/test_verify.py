"""What is compared, and that nothing wrong passes: a NaN, an infinity, data that moved or are no text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import models
import tiny
from megatron_sharedproj.config import RunConfig
from megatron_sharedproj.conversion.verify import verification_windows, verify
from megatron_sharedproj.data.tokenizers import build_tokenizer


@pytest.fixture
def loaded() -> Any:
    """A model whose logits are a function of the last token alone: enough for the comparison."""
    config = RunConfig(model=models.config("qk_eq_v"))
    table = torch.randn(tiny.VOCAB, models.PADDED, generator=torch.Generator().manual_seed(0))
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=tiny.VOCAB)
    return SimpleNamespace(
        config=config, tokenizer=tokenizer, table=table, model=lambda ids, positions, mask: table[ids].clone()
    )


def exported(loaded: Any, place: tuple[int, int] = (0, 0), value: float | None = None) -> Any:
    """The same model, with another logit at one place (position, id)."""

    def forward(input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = loaded.model(input_ids, None, None)[..., : tiny.VOCAB]
        if value is not None:
            logits[0, place[0], place[1]] = value
        return SimpleNamespace(logits=logits)

    return forward


def compare(loaded: Any, other: Any) -> Any:
    windows = torch.randint(tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    return verify(loaded, other, windows, "ids", check_cache=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("position", [0, 19])
def test_one_wrong_logit_fails(loaded: Any, value: float, position: int) -> None:
    """The last position is not scored: perplexity does not see it."""
    assert compare(loaded, exported(loaded)).max_difference == 0
    with pytest.raises(ValueError, match="verification failed: logits differ by"):
        compare(loaded, exported(loaded, (position, 7), value))


def test_infinite_logits_of_both_fail(loaded: Any) -> None:
    loaded.table[:, 5] = float("inf")
    with pytest.raises(ValueError, match="verification failed"):
        compare(loaded, exported(loaded))


def test_a_blend_whose_first_part_moved(loaded: Any, tmp_path: Path) -> None:
    here = tiny.write_data(tmp_path)
    loaded.config.data.data_path = ["0.3", str(tmp_path / "moved"), "0.7", str(here)]
    windows, name = verification_windows(loaded, "", 200)
    assert name == "data set tiny_text_document" and windows.shape == (3, 64)
    loaded.config.data.valid_data_path = ["0.3", str(tmp_path / "gone")]
    assert torch.equal(verification_windows(loaded, "", 200)[0], windows)
    loaded.config.data.data_path = loaded.config.data.valid_data_path
    assert "random ids" in verification_windows(loaded, "", 200)[1]


def test_a_large_data_set_is_not_read_whole(loaded: Any, tmp_path: Path) -> None:
    """Ids far behind the compared ones are none of its business."""
    prefix = tiny.write_data(tmp_path)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[-2:] = b"\xff\xff"
    Path(f"{prefix}.bin").write_bytes(content)
    assert verification_windows(loaded, str(prefix), 200)[0].shape == (3, 64)
    with pytest.raises(ValueError, match="--verify-data .*cannot be used"):
        verification_windows(loaded, str(prefix), 10**6)


def test_what_is_no_text(loaded: Any, tmp_path: Path) -> None:
    prefix = tiny.write_data(tmp_path)
    with pytest.raises(ValueError, match=r"--verify-data .*\.bin: cannot be used .*give PREFIX"):
        verification_windows(loaded, f"{prefix}.bin", 200)
    (tmp_path / "short.txt").write_text("3")
    with pytest.raises(ValueError, match=r"holds 1 token\(s\)"):
        verification_windows(loaded, str(tmp_path / "short.txt"), 200)


def test_one_position_has_nothing_to_predict(loaded: Any) -> None:
    loaded.config.model = models.config("qk_eq_v", max_position_embeddings=1)
    with pytest.raises(ValueError, match="1 position.*--no-verify"):
        verification_windows(loaded, "", 200)
