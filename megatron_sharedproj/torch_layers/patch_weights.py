"""The weights of a patched attention, made of those of the Hugging Face attention that it replaces.

Shape legend: d hidden size, h heads, g groups (key/value heads), e head size, r rotated elements of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_sharedproj.torch_layers.merging import MERGES, merge_key_value
from megatron_sharedproj.variants import AttentionVariant


class Projection(NamedTuple):
    """Weight [rows, d], its rows and bias [rows] as nn.Linear has them."""

    weight: Tensor
    bias: Tensor | None


def read_projections(name: str, attention: Any) -> dict[str, Projection]:
    """The projections q, k, v and o of a Hugging Face attention.

    Args:
        name: of the module, for errors.
        attention: with q_proj, k_proj, v_proj and o_proj, or GPT-2's c_attn and c_proj.
    Raises:
        ValueError: if they are not plain linear layers (quantized, with adapters, offloaded).
    """
    if hasattr(attention, "_hf_hook"):
        raise ValueError(f"{name}: accelerate moves its weights (device_map); load the model without")
    if not hasattr(attention, "c_attn"):
        parts: dict[str, Any] = {part: getattr(attention, f"{part}_proj") for part in "qkvo"}
        for part, linear in parts.items():
            _check_plain(f"{name}.{part}_proj", linear, nn.Linear)
        return {part: Projection(linear.weight, linear.bias) for part, linear in parts.items()}
    from transformers.pytorch_utils import Conv1D

    for part in ("c_attn", "c_proj"):
        _check_plain(f"{name}.{part}", getattr(attention, part), Conv1D)
    split = zip(
        "qkv",
        attention.c_attn.weight.t().chunk(3),
        attention.c_attn.bias.chunk(3),
        strict=True,
    )
    found = {part: Projection(weight, bias) for part, weight, bias in split}
    return {**found, "o": Projection(attention.c_proj.weight.t(), attention.c_proj.bias)}


def _check_plain(name: str, linear: Any, expected: Any) -> None:
    # A subclass computes something else: a quantized product, an adapter beside it.
    if (
        type(linear) is not expected
        or not linear.weight.is_floating_point()
        or linear.weight.dtype.itemsize < 2
    ):
        dtype = getattr(getattr(linear, "weight", None), "dtype", None)
        raise ValueError(
            f"{name}: is a {type(linear).__name__} of {dtype}, not a plain {expected.__name__}; dequantize "
            "the model and merge its adapters first"
        )
    if linear.weight.is_meta:
        raise ValueError(f"{name}: is on the meta device, without weights; load them first")


def check_merge(variant: AttentionVariant, merge: str) -> None:
    """Raise ValueError if a variant's tied tensors cannot be made by this method."""
    if merge not in MERGES:
        raise ValueError(f"merge {merge}: unknown; choose one of {', '.join(MERGES)}")
    if merge == "keep_value" and variant.tied_qk and not variant.tied_kv:
        raise ValueError(
            f"merge {merge}: variant {variant.name} makes one of query and key and keeps the value; use mean "
            "or keep_key"
        )


def _mean(tensors: list[Tensor]) -> Tensor:
    compute = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([x.to(compute) for x in tensors]).mean(0).to(tensors[0].dtype)


def _merge(roles: str, parts: dict[str, Tensor], merge: str) -> Tensor:
    """One tensor in several roles ("k", "kv", "qk", "qkv"), made of those that played them."""
    if len(roles) == 1:
        return parts[roles].clone()
    if roles == "kv":
        return merge_key_value(parts["k"], parts["v"], merge)
    if merge == "mean":
        return _mean([parts[role] for role in roles])
    return parts["k" if merge == "keep_key" else "v"].clone()


def _pool(x: Tensor, groups: int, head_size: int) -> Tensor:
    """Mean over heads that become one group (as in arXiv 2305.13245): [G * e, ...] -> [g * e, ...]."""
    have = x.shape[0] // head_size
    if have == groups:
        return x
    heads = x.view(groups, have // groups, head_size, *x.shape[1:])
    return _mean(list(heads.unbind(1))).flatten(0, 1)


def make_projections(
    source: dict[str, Projection],
    variant: AttentionVariant,
    *,
    num_groups: int,
    head_size: int,
    merge: str,
    rope_elements: list[int] | None = None,
) -> dict[str, Projection]:
    """The projections of a variant, in memory of their own.

    Args:
        source: of :func:`read_projections`.
        num_groups: g; a model with more has the mean of those that become one.
        merge: of merging.MERGES.
        rope_elements: r elements of a head; makes ``k_rope``, the separate rotary head, of these rows of the
            trained key (before it is merged), mean over groups.
    Returns:
        Of each projected tensor of the variant, of "o", and of "k_rope".
    """
    parts = dict(source)
    for part in "kv":
        parts[part] = Projection(
            *(None if x is None else _pool(x, num_groups, head_size) for x in source[part])  # type: ignore[arg-type]
        )
    made = {"o": Projection(*(None if x is None else x.clone() for x in source["o"]))}  # type: ignore[arg-type]
    playing = {"q": variant.query, "k": variant.key, "v": variant.value}
    for name in variant.projections:
        roles = "".join(role for role, tensor in playing.items() if tensor == name)
        weight = _merge(roles, {role: parts[role].weight for role in roles}, merge)
        biases = {role: bias for role in roles if (bias := parts[role].bias) is not None}
        made[name] = Projection(weight, _merge(roles, biases, merge) if biases else None)
    if rope_elements is not None:
        made["k_rope"] = Projection(
            *(
                None if x is None else _pool(x, 1, head_size)[rope_elements].clone()
                for x in source["k"]  # type: ignore[arg-type]
            )
        )
    return made


def give_parameters(linear: nn.Linear, projection: Projection, trained: bool) -> None:
    """Make a projection the parameters of a layer that was built on the meta device."""
    linear.weight = nn.Parameter(projection.weight.contiguous(), requires_grad=trained)
    if projection.bias is not None:
        linear.bias = nn.Parameter(projection.bias.contiguous(), requires_grad=trained)
