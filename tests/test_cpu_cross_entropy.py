"""The CPU's cross-entropy equals torch's in double precision, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sharedproj import cpu_cross_entropy
from megatron_sharedproj.cpu_cross_entropy import vocab_parallel_cross_entropy


def run(logits: torch.Tensor, target: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf * 1, target)  # the op may overwrite what it is given
    loss.backward(grad)
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("rows", [1 << 20, 40, 1], ids=["one block", "uneven blocks", "a row each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_double_precision(
    parallel_state: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    monkeypatch.setattr(cpu_cross_entropy, "_BLOCK", rows * 101)
    torch.manual_seed(0)
    logits = (torch.randn(33, 3, 101) * 8).to(dtype)
    target, grad = torch.randint(101, (33, 3)), torch.rand(33, 3)
    loss, found = run(logits, target, grad)
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact.view(-1, 101), target.view(-1), reduction="none")
    expected.view(33, 3).backward(grad.double())
    assert loss.dtype == torch.float32 and loss.shape == target.shape and found.dtype == dtype
    torch.testing.assert_close(loss.double().view(-1), expected.detach(), rtol=1e-5, atol=1e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-6
    assert (found.double() - exact.grad).abs().max() <= rounding * exact.grad.abs().max()


def test_one_dominant_logit_and_very_unlikely_targets(parallel_state: Any) -> None:
    logits = torch.zeros(2, 1, 16)
    logits[:, :, 3] = 200.0
    target = torch.tensor([[3], [5]])
    loss, grad = run(logits, target, torch.ones(2, 1))
    assert loss.flatten().tolist() == [0.0, 200.0]
    assert grad[0].abs().max() == 0 and grad[1, 0, [3, 5]].tolist() == [1.0, -1.0]


def test_nan_is_not_hidden(parallel_state: Any) -> None:
    logits = torch.randn(2, 2, 16)
    logits[1, 0, 7] = float("nan")
    loss, _ = run(logits, torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))
    assert torch.isnan(loss).tolist() == [[False, False], [True, False]]


def test_megatron_calls_it_on_a_cpu(parallel_state: Any) -> None:
    from megatron.core import tensor_parallel

    if torch.cuda.is_available():
        pytest.skip("a GPU has Megatron's own")
    assert tensor_parallel.vocab_parallel_cross_entropy is vocab_parallel_cross_entropy


def test_label_smoothing_is_refused(parallel_state: Any) -> None:
    with pytest.raises(ValueError, match="label_smoothing=0.1: not supported"):
        vocab_parallel_cross_entropy(torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64), 0.1)
