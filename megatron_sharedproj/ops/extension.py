"""The compiled extension: loading it, and what PyTorch needs to trace and differentiate its ops.

MISSING is "" where they can be called, else why not; BUILD_INFO says how they were built.

torch.ops.megatron_sharedproj.attention          forward, differentiable
torch.ops.megatron_sharedproj.attention_backward its gradient
torch.ops.megatron_sharedproj.attention_decode   few queries over a long, contiguous or paged cache

Schemas and kernels are registered by csrc/bindings.cpp when the module is imported; the fake kernels
(shapes and strides only) and the autograd formula are registered here. Use
:mod:`megatron_sharedproj.ops.attention` and :mod:`megatron_sharedproj.ops.decode`, which choose a path,
rather than these.

Shape legend: s query length, t key length, b batch, h query heads, g groups (key/value heads), e head size.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "megatron_sharedproj"


def _lse_like(query: Tensor, packed: bool) -> Tensor:
    if packed:
        return query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=torch.float32)


def _empty_like(tensor: Tensor) -> Tensor:
    # As csrc/bindings.cpp allocates: overlapping rows have no order with a contiguous last dimension.
    result = torch.empty_like(tensor)
    return result if result.stride(-1) == 1 or result.shape[-1] <= 1 else tensor.new_empty(tensor.shape)


def _same_device(query: Tensor, *others: Tensor | None) -> None:
    # One meta tensor is enough for PyTorch to call the fake kernel on real ones too.
    for other in others:
        if other is not None and other.device != query.device:
            raise ValueError(f"an input is on {other.device}; the query is on {query.device}")


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    causal: bool,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    _same_device(query, key, value, cu_seqlens_q, cu_seqlens_k)
    return _empty_like(query), _lse_like(query, cu_seqlens_q is not None)


def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _same_device(query, grad_out, grad_lse, key, value, *(x for x in rest if isinstance(x, Tensor)))
    grad_value = key.new_empty(0) if value is None else _empty_like(value)
    return _empty_like(query), _empty_like(key), grad_value


def _attention_decode_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    _same_device(query, key, value, seqlens_k, block_table)
    return _empty_like(query), _lse_like(query, packed=False)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.causal, ctx.scale, cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.deterministic = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, cu_q, cu_k)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, cu_q, cu_k = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.megatron_sharedproj.attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, ctx.causal, ctx.scale, cu_q, cu_k, ctx.max_q,
        ctx.max_k, ctx.deterministic,
    )  # fmt: skip
    grad_query, grad_key, grad_value = grads
    return grad_query, grad_key, None if value is None else grad_value, *(None,) * 7


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "the attention kernels have no second derivative; use megatron_sharedproj.ops.reference for that"
    )


def _register() -> None:
    torch.library.register_fake(f"{NAMESPACE}::attention", _attention_fake)
    torch.library.register_fake(f"{NAMESPACE}::attention_backward", _attention_backward_fake)
    torch.library.register_fake(f"{NAMESPACE}::attention_decode", _attention_decode_fake)
    torch.library.register_autograd(f"{NAMESPACE}::attention", _backward, setup_context=_save)
    torch.library.register_autograd(f"{NAMESPACE}::attention_backward", _no_second_derivative)


def _load() -> tuple[str, dict[str, str]]:
    try:
        module = importlib.import_module("megatron_sharedproj._C")
    except ModuleNotFoundError:
        return "the compiled extension is not installed", {}
    except (ImportError, OSError) as error:
        # Built for another torch, usually: its symbols are missing then.
        first = str(error).splitlines()[0]
        return f"the compiled extension does not load with torch {torch.__version__}: {first}", {}
    _register()
    return "", dict(module.build_info())


# At import, not at first use: torch.compile cannot trace an import.
MISSING, BUILD_INFO = _load()
