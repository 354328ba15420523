"""SharedProjectionAttention against the paper's formulas, written out in float64, gradients included.

Shape legend: b batch, s tokens, d hidden size, h heads, g groups, e head size, r rotated elements of a head.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj.torch_layers import SharedProjectionAttention
from megatron_sharedproj.variants import KV_ROTARY, VARIANTS

B, S, D, H, E = 2, 7, 24, 4, 8
# variant -> the projections that play query, key and value, as the paper's table has them.
ROLES = {"qkv": "q k v", "q_eq_k": "k k v", "qk_eq_v": "q kv kv", "q_eq_k_eq_v": "kv kv kv"}
SHARED = [("qkv", 2), ("qkv", 1), ("qk_eq_v", 2), ("qk_eq_v", 1)]
CASES = [(name, H) for name in VARIANTS] + SHARED


def turn(x: Tensor, positions: Tensor, r: int, base: float) -> Tensor:
    """Rotate elements i and i + r / 2 of the last dimension by position * base^(-2 i / r)."""
    angles = positions[..., None] * base ** (-2 * torch.arange(r // 2, dtype=torch.float64) / r)
    turned = torch.complex(x[..., : r // 2], x[..., r // 2 : r]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat([turned.real, turned.imag, x[..., r:]], dim=-1)


def definition(
    weights: dict[str, Tensor],
    x: Tensor,
    variant: str,
    *,
    causal: bool,
    scheme: str = "",
    r: int = 0,
    base: float = 10000.0,
    norm: Any = None,
    hidden: Tensor | None = None,
    added: Tensor | None = None,
    scale: float = E**-0.5,
) -> Tensor:
    """Head by head, with a value for each pair of query and key; hidden [b, s, s] or added [b, h, s, s]."""

    def heads(name: str) -> Tensor:
        y = x @ weights[f"{name}_proj.weight"].T
        if f"{name}_proj.bias" in weights:
            y = y + weights[f"{name}_proj.bias"]
        return y.unflatten(-1, (-1, E)) if name != "k_rope" else y

    query_name, key_name, value_name = ROLES[variant].split()
    tensors = {name: heads(name) for name in {query_name, key_name, value_name}}
    if norm is not None:
        tensors[key_name] = norm(tensors[key_name], "k")
        if query_name != key_name:
            tensors[query_name] = norm(tensors[query_name], "q")
    b, s = x.shape[:2]
    at = torch.arange(s, dtype=torch.float64)
    per_group = H // tensors[key_name].shape[2]
    out = []
    for head in range(H):
        q = tensors[query_name][:, :, head]
        k, v = (tensors[name][:, :, head // per_group] for name in (key_name, value_name))
        values = v[:, None].expand(b, s, s, E)
        if r:
            q = turn(q, at, r, base)
            if scheme == "separate_rope_head":
                k = torch.cat([turn(heads("k_rope"), at, r, base), k[..., r:]], dim=-1)
            else:
                k = turn(k, at, r, base)
            if scheme in ("rotate_values", "partial"):
                values = turn(values, at[None] - at[:, None], r, base)
        scores = (q[:, :, None] * k[:, None]).sum(-1) * scale
        if "positional_term.weight" in weights:
            w = weights["positional_term.weight"]
            scores = scores * w.sum() + pairs(s) @ w + weights["positional_term.bias"]
        if added is not None:
            scores = scores + added[:, head]
        unseen = torch.zeros(b, s, s, dtype=torch.bool) if hidden is None else hidden
        if causal:
            unseen = unseen | (at[None] > at[:, None])
        attended = torch.softmax(scores.masked_fill(unseen, -1e300), -1).masked_fill(unseen, 0.0)
        out.append((attended[..., None] * values).sum(2))
    y = torch.cat(out, -1) @ weights["o_proj.weight"].T
    return y + weights["o_proj.bias"] if "o_proj.bias" in weights else y


def pairs(n: int) -> Tensor:
    """The fixed P [n, n, 10]: channel by channel, 5 of i and 5 of j."""
    p = torch.empty(n, n, 10, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            for half, position in enumerate((i, j)):
                for c in range(5):
                    phase = torch.tensor(position / 10000 ** ((c // 2) * 2 / 5), dtype=torch.float64)
                    p[i, j, 5 * half + c] = phase.cos() if c % 2 else phase.sin()
    return p


def make(variant: str, seed: int = 0, **options: Any) -> SharedProjectionAttention:
    torch.manual_seed(seed)
    options = {"head_size": E, "dtype": torch.float64, **options}
    return SharedProjectionAttention(D, H, variant=variant, **options)


def compare(
    attention: SharedProjectionAttention, variant: str, dtype: torch.dtype, mask: Any = None, **options: Any
) -> None:
    """Output and gradients of a module in a dtype, and of the definition."""
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = {name: p.detach().clone().requires_grad_() for name, p in attention.named_parameters()}
    leaves = [x.clone().requires_grad_(), *weights.values()]
    expected = definition(weights, leaves[0], variant, causal=attention.causal, **options)
    grads = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)

    attention = attention.to(dtype)
    given = x.to(dtype).requires_grad_()
    out = attention(given, mask=mask)
    found = torch.autograd.grad(
        out, [given, *attention.parameters()], upstream.to(dtype), materialize_grads=True
    )
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 5e-5}
    torch.testing.assert_close(out, expected.to(dtype), **tolerance)
    for name, got, want in zip(["x", *weights], found, grads, strict=True):
        want = torch.zeros_like(got) if want is None else want.to(dtype)
        torch.testing.assert_close(got, want, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant, groups", CASES)
def test_equals_the_definition(variant: str, groups: int, causal: bool, dtype: torch.dtype) -> None:
    attention = make(variant, num_groups=groups, causal=causal)
    names = {name.split("_proj")[0] for name, _ in attention.named_parameters()}
    assert names == {*ROLES[variant].split(), "o"}
    compare(attention, variant, dtype)


SCHEMES = [
    (variant, g, scheme, percent)
    for scheme, percent in (
        ("rotate_keys", 1.0),
        ("rotate_keys", 0.5),
        ("rotate_values", 1.0),
        ("partial", 0.5),
        ("separate_rope_head", 0.25),
    )
    for variant, g in (("qk_eq_v", 4), ("qk_eq_v", 2), ("q_eq_k_eq_v", 4))
    if not (variant == "q_eq_k_eq_v" and scheme == "separate_rope_head")
] + [("qkv", 2, "", 1.0), ("q_eq_k", 4, "", 0.5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant, groups, scheme, percent", SCHEMES)
def test_rotary_schemes(
    variant: str, groups: int, scheme: str, percent: float, causal: bool, dtype: torch.dtype
) -> None:
    attention = make(
        variant,
        num_groups=groups,
        causal=causal,
        rope=True,
        kv_rotary=scheme,
        rotary_percent=percent,
        rotary_base=50.0,
    )
    compare(attention, variant, dtype, scheme=scheme, r=int(E * percent), base=50.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name, variant", [("(Q=K)+", "q_eq_k"), ("(Q=K=V)+", "q_eq_k_eq_v")])
def test_plus_forms(name: str, variant: str, dtype: torch.dtype) -> None:
    attention = make(name, causal=False)
    assert attention.positional_term is not None
    # At its start the term leaves the scores as they are: sum(w) = 1.
    assert attention.positional_term.weight.sum().item() == pytest.approx(1.0)
    with torch.no_grad():
        attention.positional_term.weight.normal_(generator=torch.Generator().manual_seed(3))
        attention.positional_term.bias.fill_(0.3)
    compare(attention, variant, dtype)
    x = torch.randn(1, S, D, dtype=dtype)
    scores_differ = attention(x)
    attention.positional_term = None
    assert not torch.allclose(scores_differ, attention(x), atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["qkv", "qk_eq_v", "(Q=K=V)+"])
def test_padding(variant: str, side: str, causal: bool) -> None:
    plus = variant.endswith("+")
    attention = make(variant, causal=causal and not plus)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, : 3 if side == "left" else None] = False
    if side == "right":
        mask[1, :4] = True
    hidden = ~mask[:, None].expand(B, S, S)
    bare = "q_eq_k_eq_v" if plus else variant
    compare(attention, bare, torch.float64, mask=mask, hidden=hidden)
    # Padding is not seen: real tokens read nothing of it. A token that sees none is o_proj's bias.
    x = torch.randn(B, S, D, dtype=torch.float64)
    other = x.masked_fill(~mask[..., None], 7.0)
    torch.testing.assert_close(attention(x, mask=mask)[mask], attention(other, mask=mask)[mask])
    if side == "left" and attention.causal:
        torch.testing.assert_close(attention(x, mask=mask)[1, 0], attention.o_proj.bias)


@pytest.mark.parametrize("shape", [(S, S), (B, 1, S, S), (1, H, S, S), (B, H, S, S)])
@pytest.mark.parametrize("causal", [True, False])
def test_additive_masks(shape: tuple[int, ...], causal: bool) -> None:
    added = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    compare(
        make("qk_eq_v", num_groups=2, causal=causal),
        "qk_eq_v",
        torch.float64,
        mask=added,
        added=added.expand(B, H, S, S),
    )


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_a_tied_tensor_is_normed_once(kind: str, variant: str) -> None:
    attention = make(variant, qk_norm=kind, norm_eps=0.1, bias=False, scale=0.7)
    weights = dict(attention.named_parameters())
    with torch.no_grad():
        for name, parameter in weights.items():
            if "norm" in name:
                parameter.normal_()

    tied = ROLES[variant].split()[0] == ROLES[variant].split()[1]
    assert ("q_norm.weight" in weights) == (not tied)

    def normed(x: Tensor, role: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if kind == "layer_norm" else x
        x = centred / (centred.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
        x = x * weights[f"{role}_norm.weight"]
        return x + weights[f"{role}_norm.bias"] if kind == "layer_norm" else x

    x = torch.randn(B, S, D, dtype=torch.float64)
    expected = definition(weights, x, variant, causal=True, norm=normed, scale=0.7)
    torch.testing.assert_close(attention(x), expected, rtol=1e-9, atol=1e-9)


def test_dropout_and_default_sizes() -> None:
    torch.manual_seed(0)
    attention = SharedProjectionAttention(D, H, dropout=0.5)
    assert attention.head_size == D // H and attention.variant.name == "qk_eq_v"
    x = torch.randn(B, S, D)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_a_state_dict_of_an_export_loads() -> None:
    pytest.importorskip("transformers", minversion="5.8")
    from megatron_sharedproj.layers.hf.configuration_sharedproj import SharedProjConfig
    from megatron_sharedproj.layers.hf.modeling_sharedproj import SharedProjAttention

    for variant in VARIANTS:
        config = SharedProjConfig(
            attention_variant=variant, hidden_size=D, num_attention_heads=H, head_dim=E, use_bias=True
        )
        config._attn_implementation = "eager"
        exported = SharedProjAttention(config, 0)
        attention = make(variant, dtype=torch.float32)
        attention.load_state_dict(exported.state_dict())
        x = torch.randn(B, S, D)
        later = torch.full((S, S), float("-inf")).triu(1)[None, None]
        torch.testing.assert_close(attention(x), exported(x, later)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["qkv", "qk_eq_v", "q_eq_k_eq_v", "(Q=K)+"])
def test_autocast(variant: str) -> None:
    rope: dict[str, Any] = {"causal": False} if variant.endswith("+") else {"rope": True}
    if variant.endswith("v") and variant != "qkv":
        rope["kv_rotary"] = "rotate_values"
    attention = make(variant, dtype=torch.float32, qk_norm="rms_norm", **rope)
    x = torch.randn(B, S, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(x), rtol=5e-2, atol=5e-2)
    out.float().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("variant", ["qkv", "qk_eq_v", "(Q=K=V)+"])
def test_is_traced_whole(variant: str) -> None:
    attention = make(variant, dtype=torch.float32, causal=not variant.endswith("+"))
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    x = torch.randn(B, S, D)
    torch.testing.assert_close(compiled(x), attention(x))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"variant": "kqv"}, "variant kqv: unknown"),
    ({"variant": "(Q-K=V)+"}, r"variant \(Q-K=V\)\+: the \+ forms are"),
    ({"variant": "(Q=K)+"}, "give causal=False"),
    ({"variant": "(Q=K)+", "causal": False, "rope": True}, "leave rope out"),
    ({"num_heads": 5}, "num_heads 5: must divide hidden_size 24"),
    ({"num_heads": 0}, "num_heads 0: must be at least 1"),
    ({"head_size": 0}, "head_size 0: must be at least 1"),
    ({"num_groups": 3}, "num_groups 3: must divide num_heads 4"),
    ({"variant": "q_eq_k", "num_groups": 2}, "num_groups 2: variant q_eq_k ties query and key"),
    ({"qk_norm": "batch"}, "qk_norm batch: unknown"),
    ({"norm_eps": 0.0}, "norm_eps 0.0: must be positive"),
    ({"dropout": 1.0}, "dropout 1.0: must be in"),
    ({"scale": -1.0}, "scale -1.0: must be positive"),
    ({"rotary_base": 0.0}, "rotary_base 0.0: must be positive"),
    ({"kv_rotary": "rotate_values"}, "kv_rotary rotate_values: needs rotary positions; add rope=True"),
    ({"kv_rotary": "spin", "rope": True}, "kv_rotary spin: unknown"),
    ({"rope": True}, "rope=True: with variant qk_eq_v key and value are one tensor"),
    ({"rope": True, "kv_rotary": "partial"}, "rotary_percent 1.0: kv_rotary partial rotates a part"),
    ({"rope": True, "kv_rotary": "partial", "rotary_percent": 0.1}, "rotary_percent 0.1: must be in"),
    ({"rotary_percent": 0.5}, "rotary_percent 0.5: needs rotary positions"),
    (
        {"rope": True, "kv_rotary": "separate_rope_head", "rotary_percent": 0.5, "variant": "Q=K=V"},
        "has no query of its own",
    ),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    heads = options.pop("num_heads", H) if "num_heads" in options else H
    with pytest.raises(ValueError, match=message) as caught:
        SharedProjectionAttention(D, heads, **options)
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    "x, mask, message",
    [
        ((S, D), None, "expected"),
        ((B, S, D + 1), None, "expected"),
        ((B, S, D), torch.ones(B, S + 1, dtype=torch.bool), r"must be \[2, 7\]"),
        ((B, S, D), torch.ones(B, S, dtype=torch.long), "must be boolean"),
        ((B, S, D), torch.ones(B, S), r"must be \[7, 7\]"),
        ((B, S, D), torch.ones(3, 1, S, S), r"\[2 or 1, 4 or 1, 7, 7\]"),
    ],
)
def test_bad_inputs(x: tuple[int, ...], mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("qkv", dtype=torch.float32)(torch.zeros(x), mask=mask)


def test_every_scheme_is_tested() -> None:
    assert {scheme for _, _, scheme, _ in SCHEMES} | {"none"} == set(KV_ROTARY) | {""}


def test_the_import_is_light() -> None:
    code = (
        "import sys, megatron_sharedproj.torch_layers\n"
        "heavy = [m for m in ('transformers', 'megatron.core') if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
