"""Every --kv-rotary against the function written out in float64, gradients included.

The reference computes one head of one query position after another: each token is projected, normed and
rotated by explicit 2 x 2 rotations, and nothing of it comes from this package.

Shape legend: s sequence, b batch, h heads, g groups, e head size, r rotated elements, d hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reference_layers import TOLERANCE, B, D, S, build, head_slices

pytestmark = pytest.mark.usefixtures("parallel_state")

E, BASE = 8, 100
SCHEMES: dict[str, tuple[str, float]] = {  # kv_rotary, rotary_percent
    "rotate_keys": ("rotate_keys", 1.0),
    "rotate_keys, half": ("rotate_keys", 0.5),
    "rotate_values": ("rotate_values", 1.0),
    "partial": ("partial", 0.75),
    "separate_rope_head": ("separate_rope_head", 0.5),
}
CASES = [
    (name, variant, groups)
    for name in SCHEMES
    for variant, groups in (("qk_eq_v", 4), ("qk_eq_v", 2), ("qk_eq_v", 1), ("q_eq_k_eq_v", 4))
    if not (name == "separate_rope_head" and variant == "q_eq_k_eq_v")
]
NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "LayerNorm": {"qk_layernorm": True},
    "RMSNorm": {"qk_layernorm": True, "normalization": "RMSNorm", "add_bias_linear": False},
}


def turned(x: Tensor, position: int, size: int) -> Tensor:
    """[..., e]: element i and i + r / 2 rotated by position * base^(-2 i / r)."""
    out = list(x.unbind(-1))
    for i in range(size // 2):
        angle = position * BASE ** (-2 * i / size)
        a, b = x[..., i], x[..., i + size // 2]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(out, dim=-1)


def normed(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    if f"{name}.weight" not in p:
        return x
    centred = x - x.mean(-1, keepdim=True) if f"{name}.bias" in p else x
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]
    return scaled + p.get(f"{name}.bias", 0.0)


def reference(x: Tensor, p: dict[str, Tensor], variant: str, groups: int, scheme: str, size: int) -> Tensor:
    """x [s, b, d] -> [s, b, d] in one sequence."""
    bias = p.get("linear_qkv.bias", torch.zeros(len(p["linear_qkv.weight"]), dtype=x.dtype))
    heads = []
    for rows_q, rows_k, _ in head_slices(variant, groups, E):
        tied = normed(x @ p["linear_qkv.weight"][rows_k].T + bias[rows_k], p, "k_layernorm")
        query = tied
        if rows_q != rows_k:
            query = normed(x @ p["linear_qkv.weight"][rows_q].T + bias[rows_q], p, "q_layernorm")
        keys, values = [], []
        for j in range(x.shape[0]):
            key = value = tied[j]
            if scheme == "separate_rope_head":
                own = x[j] @ p["linear_k_rope.weight"].T + p.get("linear_k_rope.bias", 0.0)
                key = torch.cat([turned(own, j, size), value[..., size:]], dim=-1)
            else:
                key = turned(key, j, size)
            keys.append(key)
            values.append(key if scheme in ("rotate_values", "partial") else value)
        outputs = []
        for i in range(x.shape[0]):
            scores = torch.stack(
                [(turned(query[i], i, size) * keys[j]).sum(-1) / math.sqrt(E) for j in range(i + 1)]
            )
            weights = scores.exp() / scores.exp().sum(0)
            out = sum(weights[j][:, None] * values[j] for j in range(i + 1))
            outputs.append(turned(out, -i, size) if scheme in ("rotate_values", "partial") else out)
        heads.append(torch.stack(outputs))
    out = torch.cat(heads, dim=-1) @ p["linear_proj.weight"].T
    return out + p.get("linear_proj.bias", 0.0)


def layer_and_angles(variant: str, groups: int, scheme: str, part: float, **shape: Any) -> tuple[Any, Tensor]:
    model = build(
        variant,
        groups,
        kv_channels=E,
        position_embedding_type="rope",
        rotary_base=BASE,
        rotary_percent=part,
        kv_rotary=scheme,
        **shape,
    )
    # Megatron computes them in float32; here they are to be exact.
    frequencies = BASE ** (-torch.arange(0, int(E * part), 2, dtype=torch.float64) / int(E * part))
    angles = torch.arange(2 * S, dtype=torch.float64)[:, None] * frequencies
    shown = model.rotary_pos_emb(2 * S)
    exact = torch.cat([angles, angles], -1)[:, None, None]
    torch.testing.assert_close(shown.double(), exact, rtol=1e-6, atol=1e-6)
    return model.decoder.layers[0].self_attention, exact


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name, variant, groups", CASES)
def test_attention_and_its_gradients(name: str, variant: str, groups: int, norm: str) -> None:
    scheme, part = SCHEMES[name]
    attention, angles = layer_and_angles(variant, groups, scheme, part, **NORMS[norm])
    parameters = dict(attention.named_parameters())
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(S, B, D, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(S, B, D, generator=generator, dtype=torch.float64)

    ours = x.clone().requires_grad_()
    out, bias = attention(ours, attention_mask=None, rotary_pos_emb=angles[:S])
    actual = out if bias is None else out + bias
    found = torch.autograd.grad(actual, [ours, *parameters.values()], cotangent)

    theirs = x.clone().requires_grad_()
    copies = {key: parameter.detach().clone().requires_grad_() for key, parameter in parameters.items()}
    expected = reference(theirs, copies, variant, groups, scheme, int(E * part))
    wanted = torch.autograd.grad(expected, [theirs, *copies.values()], cotangent)

    torch.testing.assert_close(actual, expected, **TOLERANCE)
    for key, got, want in zip(("input", *parameters), found, wanted, strict=True):
        assert want.abs().max() > 1e-3, f"{key}: nothing to compare"
        torch.testing.assert_close(got, want, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")
    assert ("linear_k_rope.weight" in parameters) == (scheme == "separate_rope_head")
    assert ("q_layernorm.weight" in parameters) == (norm != "plain" and variant == "qk_eq_v")


@pytest.mark.parametrize("name, variant, groups", CASES)
def test_packed_sequences_start_at_position_0(name: str, variant: str, groups: int) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    scheme, part = SCHEMES[name]
    attention, angles = layer_and_angles(variant, groups, scheme, part)
    lengths = (3, 1, 5)
    x = torch.randn(sum(lengths), 1, D, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    packed = PackedSeqParams("thd", starts, starts, max_seqlen_q=5, max_seqlen_kv=5)
    # Megatron rotates packed sequences by their own positions, with the angles of the longest.
    out, _ = attention(x, attention_mask=None, rotary_pos_emb=angles[:9], packed_seq_params=packed)
    pieces = [attention(piece, None, rotary_pos_emb=angles[: len(piece)])[0] for piece in x.split(lengths)]
    torch.testing.assert_close(out, torch.cat(pieces), **TOLERANCE)
    cotangent = torch.randn_like(out)
    both = [torch.autograd.grad(y, x, cotangent, retain_graph=True)[0] for y in (out, torch.cat(pieces))]
    torch.testing.assert_close(*both, **TOLERANCE)


@pytest.mark.parametrize("scheme, part", [("rotate_values", 1.0), ("partial", 0.5)])
def test_what_is_rotated_whole_is_one_tensor(
    scheme: str, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gets one tensor as key and value: one read, one gradient."""
    attention, angles = layer_and_angles("qk_eq_v", 2, scheme, part)
    seen = []
    monkeypatch.setattr(
        attention.core_attention, "forward",
        lambda q, k, v, *rest, **named: seen.append(v is k) or torch.zeros(S, B, D, dtype=q.dtype),
    )  # fmt: skip
    attention(torch.randn(S, B, D, dtype=torch.float64), None, rotary_pos_emb=angles[:S])
    assert seen == [True]


def test_a_scheme_without_positions_is_refused() -> None:
    attention, _ = layer_and_angles("qk_eq_v", 2, "rotate_values", 1.0)
    with pytest.raises(ValueError, match="--kv-rotary rotate_values: needs .*--position-embedding-type rope"):
        attention(torch.randn(S, B, D, dtype=torch.float64), None)


def test_megatrons_own_cache_is_refused() -> None:
    from megatron.core.inference.contexts.static_context import StaticInferenceContext

    attention, angles = layer_and_angles("qk_eq_v", 2, "rotate_values", 1.0)
    context = StaticInferenceContext(1, 16)
    with pytest.raises(ValueError, match="--kv-rotary rotate_values: StaticInferenceContext .*CacheContext"):
        attention(
            torch.randn(S, 1, D, dtype=torch.float64), None, inference_context=context, rotary_pos_emb=angles
        )
