"""The attention op: one entry for every variant, which picks the path (paths.py) and runs it.

Shape legend: s query length, t key length, b batch, h query heads, g groups (key/value heads), e head size,
n total tokens of packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sharedproj.ops.paths import Path, Request, choose, is_decode
from megatron_sharedproj.ops.reference import attention_reference


def _check(query: Tensor, key: Tensor, value: Tensor, dimensions: int = 4) -> None:
    if query.dim() != dimensions or key.dim() != dimensions:
        shapes = "[s, b, h, e] and [t, b, g, e]" if dimensions == 4 else "[n, h, e] and [n, g, e]"
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}: expected {shapes}")
    if key.shape != value.shape:
        raise ValueError(f"value {tuple(value.shape)}: must have the key's shape {tuple(key.shape)}")
    if query.shape[1:-2] != key.shape[1:-2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}: batch and head size must be equal"
        )
    if 0 in (key.shape[-2], query.shape[-2], query.shape[-1]) or 0 in query.shape[1:-2]:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}: only lengths may be 0")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(f"key has {key.shape[-2]} groups: must divide the query's {query.shape[-2]} heads")
    if query.dtype != key.dtype or key.dtype != value.dtype:
        raise ValueError(f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: must be equal")
    if query.device != key.device or key.device != value.device:
        raise ValueError(f"devices {query.device}, {key.device}, {value.device}: must be equal")


def _one_tensor(key: Tensor, value: Tensor, training: bool) -> bool:
    if value is key:
        return True
    # Two views of the same memory may have different gradients; without gradients they are one tensor.
    return not training and value.data_ptr() == key.data_ptr() and value.stride() == key.stride()


def _request(
    query: Tensor, key: Tensor, value: Tensor, queries: int, keys: int, causal: bool, dropout_p: float
) -> Request:
    training = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    on_gpu = query.device.type == "cuda"  # neither the CPU nor meta tensors of a simulated run
    return Request(
        device=query.device.type,
        dtype=query.dtype,
        head_size=query.shape[-1],
        tied=_one_tensor(key, value, training),
        queries=queries,
        keys=keys,
        causal=causal,
        training=training,
        dropout=dropout_p > 0.0,
        last_dimension_contiguous=query.stride(-1) == key.stride(-1) == value.stride(-1) == 1,
        capability=torch.cuda.get_device_capability(query.device) if on_gpu else None,
    )


def select_path(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True, dropout_p: float = 0.0
) -> Path:
    """The path that :func:`attention` takes for these inputs.

    Raises:
        ValueError: if the kernel is required (``--require-kernel``) and cannot run.
    """
    return choose(_request(query, key, value, query.shape[0], key.shape[0], causal, dropout_p))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Attention over strided views, without copying or expanding key and value.

    Args:
        query: [s, b, h, e], any strides whose last dimension is contiguous.
        key, value: [t, b, g, e]; the same tensor object for the variants that tie them.
        causal: bottom-right aligned causal mask: query i sees keys up to i + t - s.
        scale: factor on the scores.
        dropout_p: attention dropout probability (0 outside training).
        deterministic: bitwise the same gradients every time, at some cost on CUDA; also chosen by
            torch.use_deterministic_algorithms. The CPU kernels always are.
    Returns:
        [s, b, h, e], contiguous; a query that sees no key gives 0.
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together.
    """
    _check(query, key, value)
    s, t = query.shape[0], key.shape[0]
    request = _request(query, key, value, s, t, causal, dropout_p)
    path = choose(request)
    if path.name == "reference":
        out = attention_reference(query, key, value, causal=causal, scale=scale, dropout_p=dropout_p)
        return out.contiguous()
    if path.name == "extension":
        q, k = query.transpose(0, 1), key.transpose(0, 1)
        v = None if request.tied else value.transpose(0, 1)
        if is_decode(request):
            out, _ = torch.ops.megatron_sharedproj.attention_decode(q, k, v, scale)
        else:
            deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
            out, _ = torch.ops.megatron_sharedproj.attention(
                q, k, v, causal, scale, deterministic=deterministic
            )
        return out.transpose(0, 1).contiguous()
    mask = None
    if causal and 1 < s < t:
        mask = torch.ones(s, t, dtype=torch.bool, device=query.device).tril(t - s)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal and s == t and s > 1,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.permute(2, 0, 1, 3).contiguous()


def _starts(name: str, cumulative: Tensor, total: int, longest: int) -> list[int]:
    """The starts of packed sequences, checked as the kernels do."""
    starts = cumulative.tolist()
    if cumulative.dim() != 1 or len(starts) < 2 or starts[0] != 0 or starts[-1] != total:
        raise ValueError(f"{name}={starts}: expected at least 2 entries from 0 to the {total} rows")
    for i, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if not 0 <= end - begin <= longest:
            raise ValueError(
                f"{name} gives sequence {i} the length {end - begin}: accepted are 0 to {longest}"
            )
    return starts


def attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Attention within each of several sequences packed one after another (Megatron's "thd" format).

    Args:
        query: [n, h, e]; key, value: [n of the keys, g, e], one tensor object where they are tied.
        cu_seqlens_q, cu_seqlens_k: int32 [b + 1], starts of the sequences and the total; lengths may be 0.
        max_seqlen_q, max_seqlen_k: the longest lengths.
        causal, scale, dropout_p, deterministic: as in :func:`attention`, sequence by sequence.
    Returns:
        [n, h, e], contiguous.
    Raises:
        ValueError: for shapes, dtypes, devices or cumulative lengths that do not fit together.
    """
    _check(query, key, value, dimensions=3)
    request = _request(query, key, value, max_seqlen_q, max_seqlen_k, causal, dropout_p)
    if choose(request).name == "extension":
        starts = [x.to(device=query.device, dtype=torch.int32) for x in (cu_seqlens_q, cu_seqlens_k)]
        out, _ = torch.ops.megatron_sharedproj.attention(
            query,
            key,
            None if request.tied else value,
            causal,
            scale,
            *starts,
            max_seqlen_q,
            max_seqlen_k,
            deterministic or torch.are_deterministic_algorithms_enabled(),
        )
        return out.contiguous()
    queries = _starts("cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q)
    keys = _starts("cu_seqlens_k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    if len(queries) != len(keys):
        raise ValueError(f"cu_seqlens_q has {len(queries)} entries, cu_seqlens_k {len(keys)}: must be equal")
    tied = value is key
    outputs = []
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False):
        k = key[k0:k1, None]
        v = k if tied else value[k0:k1, None]
        q = query[q0:q1, None]
        part = attention(
            q, k, v, causal=causal, scale=scale, dropout_p=dropout_p, deterministic=deterministic
        )
        outputs.append(part[:, 0])
    return torch.cat(outputs)
