"""The attention of a trained qkv model as one of a K=V model: queries, one shared key/value, output.

Works on the Hugging Face-named tensors of conversion/weights.py. Paper: "Do Transformers Need Three
Projections?" (arXiv 2606.04032), its K=V models made by surgery; heads are pooled into groups by their mean,
as J. Ainslie et al. do (arXiv 2305.13245, section 2.1).

Shape legend: h query heads, g groups of the source, k groups of the result, m = g / k, e head size, d hidden
size, r rotated elements of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.retrofit.least_squares import Merged, Moments, merge_least_squares
from megatron_sharedproj.torch_layers import merging

LEAST_SQUARES = "least_squares"
MERGES = (*merging.MERGES, LEAST_SQUARES)

# Distances between query and key that least squares averages the rotations of.
_DISTANCES = 64


@dataclass(frozen=True)
class Plan:
    """How a model becomes another one.

    Attributes:
        source, target: shapes of both; merge: one of MERGES.
        key_weight, value_weight: of the errors of keys and values, in least squares.
    """

    source: ModelConfig
    target: ModelConfig
    merge: str
    key_weight: float = 1.0
    value_weight: float = 1.0

    @property
    def pooled(self) -> int:
        """Key heads of the source that become one, m."""
        return self.source.num_query_groups // self.target.num_query_groups

    @property
    def calibrated(self) -> bool:
        """Whether it needs the source's activations."""
        return self.merge == LEAST_SQUARES

    def describe(self) -> str:
        """For logs and a checkpoint's origin."""
        text = self.merge.replace("_", " ")
        if self.pooled > 1:
            text += (
                f", {self.source.num_query_groups} key/value heads pooled into {self.target.num_query_groups}"
            )
        return text


def make_plan(
    source: ModelConfig,
    merge: str,
    *,
    num_query_groups: int = 0,
    kv_rotary: str = "",
    rotary_percent: float | None = None,
    key_weight: float = 1.0,
    value_weight: float = 1.0,
) -> Plan:
    """Check what is asked for, and the shape of the result.

    Args:
        num_query_groups: key/value heads of the result; 0: as many as the source has.
        kv_rotary, rotary_percent: of the result; the latter None: as the source.
    Raises:
        ValueError: naming the flag, its value and what would work.
    """
    if merge not in MERGES:
        raise ValueError(f"--merge {merge}: unknown; choose one of {', '.join(MERGES)}")
    if source.attention_variant != "qkv":
        raise ValueError(
            f"--load: is a {source.attention_variant} model; surgery needs separate keys and values: a "
            "qkv model"
        )
    groups = num_query_groups or source.num_query_groups
    if groups < 1 or source.num_query_groups % groups:
        divisors = [n for n in range(1, source.num_query_groups + 1) if source.num_query_groups % n == 0]
        raise ValueError(
            f"--num-query-groups {groups}: must divide the source's {source.num_query_groups} key/value "
            f"heads; use one of {divisors}"
        )
    if rotary_percent is not None and source.position_embedding_type != "rope":
        raise ValueError(
            f"--rotary-percent {rotary_percent}: the source has no rotary positions; leave it out"
        )
    percent = source.rotary_percent if rotary_percent is None else rotary_percent
    target = source.replace(
        attention_variant="qk_eq_v", num_query_groups=groups, kv_rotary=kv_rotary, rotary_percent=percent
    )
    if target.rope_size and source.rope_size % target.rope_size:
        raise ValueError(
            f"--rotary-percent {percent}: rotates {target.rope_size} elements of a head, which must divide "
            f"the source's {source.rope_size} (a part of its frequencies is kept); try "
            f"{source.rope_size / 2 / source.kv_channels:g}"
        )
    if merge == LEAST_SQUARES:
        _check_least_squares(source, target)
    if key_weight < 0 or value_weight < 0 or key_weight + value_weight <= 0:
        raise ValueError(
            f"--key-weight {key_weight}, --value-weight {value_weight}: must be at least 0, and one above 0"
        )
    return Plan(source, target, merge, key_weight, value_weight)


def _check_least_squares(source: ModelConfig, target: ModelConfig) -> None:
    flag = f"--merge {LEAST_SQUARES}"
    if source.qk_layernorm:
        raise ValueError(
            f"{flag}: the source norms queries and keys, which lets no map of a key pass; use mean, keep_key "
            "or keep_value"
        )
    if target.kv_rotary not in ("none", "rotate_keys") or target.rope_size != source.rope_size:
        raise ValueError(
            f"{flag}: with --kv-rotary {target.kv_rotary} the value is rotated, or the key's rotation "
            "another one, and no one map makes up for it; use rotate_keys, or mean, keep_key or keep_value"
        )


def attention_names(layer: int) -> str:
    """Prefix of a layer's attention tensors."""
    return f"model.layers.{layer}.self_attn."


@dataclass(frozen=True)
class Attention:
    """The tensors of one layer's qkv attention.

    Attributes:
        query, key, value: weight [heads, e, d] and bias [heads, e] or None; heads are h, g and g.
        output: weight [d, h, e] and bias [d] or None.
    """

    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    output: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, config: ModelConfig, tensors: Mapping[str, Tensor], layer: int) -> Attention:
        """From the tensors of a whole qkv model."""
        prefix, e = attention_names(layer), config.kv_channels

        def projection(name: str) -> tuple[Tensor, Tensor | None]:
            weight, bias = tensors[f"{prefix}{name}_proj.weight"], tensors.get(f"{prefix}{name}_proj.bias")
            return weight.view(-1, e, weight.shape[1]), None if bias is None else bias.view(-1, e)

        weight = tensors[f"{prefix}o_proj.weight"]
        output = weight.view(weight.shape[0], -1, e), tensors.get(f"{prefix}o_proj.bias")
        return cls(projection("q"), projection("k"), projection("v"), output)


def _pool(pair: tuple[Tensor, Tensor | None], m: int) -> tuple[Tensor, Tensor | None]:
    """The mean of each m heads that follow each other."""
    if m == 1:
        return pair
    weight, bias = (None if x is None else x.double().unflatten(0, (-1, m)).mean(1).to(x.dtype) for x in pair)
    assert weight is not None
    return weight, bias


def rotary_order(source: ModelConfig, target: ModelConfig) -> Tensor:
    """Elements of a source's head in the order that the result's first r elements rotate as they did, [e].

    Of the source's pairs (i, i + R / 2) every (R / r)-th is kept: their frequencies base^(-2 i / R) are those
    of a head with r rotated elements. The other elements follow, no longer rotated.
    """
    e, before, after = source.kv_channels, source.rope_size, target.rope_size
    if before == after:
        return torch.arange(e)
    first = torch.arange(0, before // 2, before // after)
    kept = torch.cat([first, first + before // 2])
    rest = [i for i in range(e) if i not in set(kept.tolist())]
    return torch.cat([kept, torch.tensor(rest, dtype=torch.int64)])


def merge_closed(plan: Plan, layer: Attention) -> dict[str, Tensor]:
    """One layer by mean, keep_key or keep_value: its new tensors by the names behind attention_names.

    Queries and the output stay as they are, but for the order of a head's elements where fewer are rotated.
    """
    order = rotary_order(plan.source, plan.target)
    key, value = _pool(layer.key, plan.pooled), _pool(layer.value, plan.pooled)
    found: dict[str, Tensor] = {"o_proj.weight": layer.output[0].flatten(1)}
    if layer.output[1] is not None:
        found["o_proj.bias"] = layer.output[1]
    for kind, q, k, v in zip(("weight", "bias"), layer.query, key, value, strict=True):
        if q is None or k is None or v is None:
            continue
        k = k[:, order]
        found[f"q_proj.{kind}"] = q[:, order].flatten(0, 1)
        found[f"kv_proj.{kind}"] = merging.merge_key_value(k, v, plan.merge).flatten(0, 1)
        if plan.target.rotary_scheme.rope_head:
            # One for all groups: the mean of their keys' rotated elements.
            shared = k[:, : plan.target.rope_size].double().mean(0).to(k.dtype)
            found[f"k_rope_proj.{kind}"] = shared
    return found


def second_of(pair: tuple[Tensor, Tensor | None], moments: Moments) -> Tensor:
    """E y y^T [heads, e, e] of y = W x + b, in fp64."""
    weight = pair[0].double()
    mean = weight @ moments.mean
    bias = torch.zeros_like(mean) if pair[1] is None else pair[1].double()
    cross = mean[:, :, None] * bias[:, None, :]
    return weight @ moments.second @ weight.mT + cross + cross.mT + bias[:, :, None] * bias[:, None, :]


def rotation_angles(config: ModelConfig, length: int) -> Tensor | None:
    """[distances, r / 2]: turns of a key against a query behind it; None without rotary positions."""
    if not config.rope_size:
        return None
    pairs = torch.arange(0, config.rope_size, 2, dtype=torch.float64)
    frequencies = config.rotary_base ** (-pairs / config.rope_size)
    distances = torch.linspace(0, length - 1, min(length, _DISTANCES)).round().double()
    return -torch.outer(distances, frequencies)


def merge_calibrated(
    plan: Plan, layer: Attention, moments: Moments, length: int
) -> tuple[dict[str, Tensor], list[float]]:
    """One layer by least squares on the inputs of its projection.

    Args:
        length: of the sequences that queries look back in.
    Returns:
        Its new tensors by the names behind attention_names, and the error that is left of each group
        (least_squares.Merged).
    """
    m, groups = plan.pooled, plan.target.num_query_groups
    per_key = plan.source.num_attention_heads // plan.source.num_query_groups
    queries = second_of(layer.query, moments).unflatten(0, (-1, per_key)).sum(1)
    heads = layer.output[0].double().transpose(0, 1)  # [h, d, e]
    outputs = (heads.mT @ heads).unflatten(0, (-1, per_key)).sum(1)
    angles = rotation_angles(plan.source, length)
    merged: list[Merged] = []
    for group in range(groups):
        part = slice(group * m, (group + 1) * m)
        key, value = (
            (weight[part], None if bias is None else bias[part]) for weight, bias in (layer.key, layer.value)
        )
        merged.append(
            merge_least_squares(
                key,
                value,
                moments,
                query_second=queries[part],
                output_second=outputs[part],
                key_weight=plan.key_weight,
                value_weight=plan.value_weight,
                angles=angles,
            )
        )
    return absorbed(layer, merged, per_key), [one.error for one in merged]


def absorbed(layer: Attention, merged: list[Merged], per_key: int) -> dict[str, Tensor]:
    """The attention whose queries and output take up the maps of its shared heads.

    Args:
        merged: of each group; per_key: query heads of a key head of the source.
    """
    dtype = layer.query[0].dtype
    key_maps, value_maps, constants = (
        torch.cat([getattr(one, name) for one in merged]).repeat_interleave(per_key, 0)
        for name in ("key_maps", "value_maps", "value_constants")
    )
    heads = layer.output[0].double().transpose(0, 1)  # [h, d, e]
    found = {
        "q_proj.weight": (key_maps.mT @ layer.query[0].double()).flatten(0, 1),
        "kv_proj.weight": torch.cat([one.weight for one in merged]),
        "o_proj.weight": (heads @ value_maps).transpose(0, 1).flatten(1),
    }
    if layer.query[1] is not None and layer.output[1] is not None:
        found["q_proj.bias"] = (key_maps.mT @ layer.query[1].double()[..., None]).flatten()
        found["kv_proj.bias"] = torch.cat([one.bias for one in merged])
        moved = (heads @ constants[..., None])[..., 0].sum(0)
        found["o_proj.bias"] = layer.output[1].double() + moved
    return {name: tensor.to(dtype).contiguous() for name, tensor in found.items()}


def emulated(plan: Plan, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same attention as a qkv one of the source's shape: key and value are both the shared tensor.

    For ``none`` and ``rotate_keys``, where that is the same function.
    """
    tensors = dict(found)
    for kind in ("weight", "bias"):
        if f"kv_proj.{kind}" in tensors:
            shared = tensors.pop(f"kv_proj.{kind}").unflatten(0, (-1, plan.source.kv_channels))
            spread = shared.repeat_interleave(plan.pooled, 0).flatten(0, 1)
            tensors[f"k_proj.{kind}"] = tensors[f"v_proj.{kind}"] = spread
    return tensors


def operate(plan: Plan, tensors: Mapping[str, Tensor], layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors of the result: the new attentions, and what surgery leaves alone.

    Args:
        tensors: of the source by their Hugging Face names; layers: of each, as merge_closed returns them.
    """
    replaced = {
        f"{attention_names(layer)}{name}": tensor
        for layer, found in enumerate(layers)
        for name, tensor in found.items()
    }
    gone = ("q_proj", "k_proj", "v_proj", "o_proj")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not (".self_attn." in name and name.split(".")[-2] in gone)
    }
    order = rotary_order(plan.source, plan.target)
    for name in kept:
        if ".self_attn." in name and name.split(".")[-2] in ("q_norm", "k_norm"):
            kept[name] = kept[name][order]
    return {**kept, **replaced}
