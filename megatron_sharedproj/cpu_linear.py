"""Megatron-Core's linear layers on a CPU, with oneDNN's fp32 products where MKL's are slow.

PyTorch takes fp32 products from MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN, which
PyTorch ships and uses for bf16, computes them in AVX-512: about twice the rate (benchmarks/LOG.md).

Shape legend: s sequence, b batch, m rows (s * b), k inputs, n outputs on this rank.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Multiply-accumulates below which oneDNN's call costs more than it saves.
_SMALLEST = 1 << 22
# Outputs for each input from which a layer's weight gradient stays with MKL.
_WIDE = 8


@cache
def onednn_is_faster() -> bool:
    """Whether fp32 products go to oneDNN on this machine: by a rule, so that restarts compute alike."""
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "GenuineIntel" not in vendor and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def fp32_library() -> str:
    """What computes fp32 products on this machine's CPU, and why, for the user."""
    if onednn_is_faster():
        return f"oneDNN from {_SMALLEST:,} multiply-accumulates on (MKL keeps to AVX2 here)"
    if not torch.backends.mkl.is_available():
        return "torch's own choice (no MKL in this build)"
    return "MKL (oneDNN takes over on AVX-512 processors that are not Intel's)"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.t() + bias.

    Args:
        x: [m, k]; weight: [n, k]; bias: [n]. Views with any strides.
    Returns:
        [m, n] in x's dtype; fp32 in fp32, by oneDNN or MKL.
    """
    large = x.shape[0] * weight.numel() >= _SMALLEST
    if large and x.dtype == torch.float32 and x.device.type == "cpu" and onednn_is_faster():
        # What torch.compile puts in place of a linear layer on a CPU.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """x [m, k], weight [n, k], bias [n] or None -> [m, n].

    With a group (sequence parallelism) x holds this rank's rows of m; they are gathered here and again in the
    backward pass, so that only they are kept, and their gradient is scattered.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.group = bias is not None, group
        return product(_gather(x, group), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.t())
            if ctx.group is not None:
                whole, grad_x = grad_x, torch.empty_like(x)
                torch.distributed.reduce_scatter_tensor(grad_x, whole, group=ctx.group)
        if ctx.needs_input_grad[1]:
            # oneDNN copies the gradient to turn it: not worth its memory for that of the logits.
            wide = grad.shape[1] > _WIDE * x.shape[1]
            x = _gather(x, ctx.group)
            grad_weight = grad.t() @ x if wide else product(grad.t(), x.t())
        grad_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None


def _gather(x: Tensor, group: Any) -> Tensor:
    if group is None:
        return x
    whole = x.new_empty(x.shape[0] * group.size(), x.shape[1])
    torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def linear_with_grad_accumulation_and_async_allreduce(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    *unused: Any,
    tp_group: Any = None,
    **unused_too: Any,
) -> Tensor:
    """Stands in for megatron.core.tensor_parallel.layers' function of the same name, on a CPU.

    Same arguments, collectives and result; what it overlaps or fuses on a GPU does not exist here.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    if sequence_parallel:
        tp_group = tp_group or parallel_state.get_tensor_model_parallel_group()
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, tp_group)
    rows = _Linear.apply(input.flatten(0, -2), weight, bias, tp_group if sequence_parallel else None)
    return rows.view(-1, *input.shape[1:-1], weight.shape[0])
