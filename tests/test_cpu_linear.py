"""The CPU's linear layer computes what torch's does, gradients included, through either library."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sharedproj import cpu_linear

# Below and above the size from which oneDNN is called.
SHAPES = [(6, 8, 10), (512, 64, 128), (300, 130, 257)]


@pytest.fixture(params=[False, True], ids=["MKL", "oneDNN"])
def onednn(request: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take one library whatever this machine's rule says; counts the calls of oneDNN's product."""
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: request.param)
    return [int(request.param)]


def linear(*tensors: Any, **flags: Any) -> torch.Tensor:
    defaults = {"allreduce_dgrad": False, "sequence_parallel": False, "gradient_accumulation_fusion": False}
    return cpu_linear.linear_with_grad_accumulation_and_async_allreduce(*tensors, **{**defaults, **flags})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_double_precision(onednn: list[int], shape: tuple[int, int, int], bias: bool) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(1)
    x, weight, offset = (torch.randn(s, generator=generator) for s in ((m // 2, 2, k), (n, k), (n,)))
    grad = torch.randn(m // 2, 2, n, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [
            t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight, *([offset] if bias else []))
        ]
        own, rest = leaves[:2], leaves[2:] or [None]
        if dtype == torch.float32:
            out = linear(*own, *rest)
        else:
            out = torch.nn.functional.linear(*own, *rest)
        out.backward(grad.to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        bound = 4e-7 * max(m, k, n) ** 0.5 * expected.abs().max()
        assert found.dtype == torch.float32 and (found - expected).abs().max() <= bound


def test_which_library_computes(onednn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Ops:
        @staticmethod
        def _linear_pointwise(*args: Any) -> torch.Tensor:
            calls.append(args[0].shape)
            return original(*args)

    original = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops, "mkldnn", Ops)
    for m, k, n in SHAPES:
        cpu_linear.product(torch.randn(m, k), torch.randn(n, k))
    cpu_linear.product(torch.randn(512, 64).double(), torch.randn(128, 64).double())
    large = [torch.Size((m, k)) for m, k, n in SHAPES if m * k * n >= 1 << 22]
    assert calls == (large if onednn[0] else []) and len(large) == 2
    assert cpu_linear.fp32_library().startswith("oneDNN from 4,194,304 ") == bool(calls)


def test_views_and_what_needs_no_gradient(onednn: list[int]) -> None:
    x = torch.randn(700, 2, 96).transpose(0, 1)[:, ::2]
    weight = torch.randn(96, 64).t()
    torch.testing.assert_close(linear(x, weight, None), x @ weight.t(), rtol=1e-4, atol=1e-4)
    weight = weight.clone().requires_grad_()
    linear(x, weight, None).sum().backward()
    torch.testing.assert_close(weight.grad, x.reshape(-1, 96).sum(0).expand(64, -1), rtol=1e-4, atol=1e-3)


def test_the_result_may_be_changed_in_place(onednn: list[int]) -> None:
    """Megatron-Core's cross-entropy subtracts the maximum from the logits where they lie."""
    x, weight = torch.randn(64, 4, 64, requires_grad=True), torch.randn(300, 64, requires_grad=True)
    out = linear(x, weight, None)
    out -= out.detach().amax(-1, keepdim=True)
    out.sum().backward()
    assert weight.grad is not None and x.grad is not None


@pytest.mark.usefixtures("parallel_state")
def test_megatron_uses_it() -> None:
    from megatron.core.tensor_parallel import layers

    from megatron_sharedproj.device import get_device

    if get_device().type != "cpu":
        pytest.skip("a GPU has Megatron's own")
    ours = cpu_linear.linear_with_grad_accumulation_and_async_allreduce
    assert layers.linear_with_grad_accumulation_and_async_allreduce is ours
