"""Attention that projects only what its variant has, in plain PyTorch: for your own transformer.

Paper: "Do Transformers Need Three Projections?" (arXiv 2606.04032), section 3 for the four variants; the "+"
forms are in positional_term.py, rotary schemes in variants.KV_ROTARY.

Shape legend: b batch, s new tokens, t tokens seen (cached and new), d hidden size, h heads, g groups
(key/value heads), e head size, r rotated elements of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_sharedproj.ops.attention import attention, select_path
from megatron_sharedproj.ops.decode import decode
from megatron_sharedproj.torch_layers.errors import argument_names
from megatron_sharedproj.torch_layers.positional_term import PositionalTerm
from megatron_sharedproj.torch_layers.projections import (
    NORMS,
    SharedProjections,
    check_finite_positive,
    one_or_two,
    rotated_elements,
)
from megatron_sharedproj.torch_layers.rotary import Angles, angles_of
from megatron_sharedproj.variants import AttentionVariant, get_variant, resolve_kv_rotary

if TYPE_CHECKING:
    from megatron_sharedproj.torch_layers.cache import SharedProjectionCache


def parse_variant(name: str) -> tuple[AttentionVariant, bool]:
    """The variant of a name, and whether it is a "+" form: ``(Q=K)+``, ``(Q=K=V)+``, ``q_eq_k+``.

    Raises:
        ValueError: for an unknown name, or a "+" on a variant that has no such form.
    """
    bare = name.strip()
    plus = bare.endswith("+")
    if plus:
        bare = bare[:-1].strip().removeprefix("(").removesuffix(")")
    with argument_names():
        variant = get_variant(bare)
    if plus and not variant.tied_qk:
        raise ValueError(
            f"variant {name}: the + forms are (Q=K)+ and (Q=K=V)+; {variant.name} has a query of its own"
        )
    return variant, plus


class SharedProjectionAttention(SharedProjections):
    """Self-attention with shared projections, batch first.

    Args:
        hidden_size: d.
        num_heads: h.
        variant: qkv, q_eq_k, qk_eq_v or q_eq_k_eq_v, the paper's spellings of them ("Q-K=V"), or one of its +
            forms, "(Q=K)+" and "(Q=K=V)+", which are not causal.
        num_groups: g, key/value heads (GQA; 1: MQA); h by default, and always where query and key are tied.
        head_size: e; d / h by default.
        causal: a token sees itself and those before it.
        bias: of the projections; output_bias: of o_proj (default: as bias).
        qk_norm: "", "rms_norm" or "layer_norm", over each head of query and key before rotary positions. A
            tensor is normed once: a tied value is the normed key.
        norm_eps: of that norm.
        rope: rotary positions, counted from the start of the sequence.
        kv_rotary: what they do to a tied key/value, one of variants.KV_ROTARY; no default where it is needed.
        rotary_percent: part of a head that is rotated (the first elements, half-split as in ops/rotary.py).
        rotary_base: theta.
        dropout: of attention weights, in training.
        scale: factor on the scores, 1/sqrt(e) by default.
        device, dtype: as in nn.Linear.
    Raises:
        ValueError: naming the argument, its value and what would work.

    Projections are nn.Linear modules named as in this package's Hugging Face exports: a state dict of
    ``model.layers.N.self_attn`` loads as it is. ``separate_rope_head`` adds ``k_rope_proj``, a norm
    ``q_norm`` and ``k_norm``, a + form ``positional_term``.
    """

    positional_term: PositionalTerm | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        variant: str = "qk_eq_v",
        num_groups: int | None = None,
        head_size: int | None = None,
        causal: bool = True,
        bias: bool = True,
        output_bias: bool | None = None,
        qk_norm: str = "",
        norm_eps: float = 1e-5,
        rope: bool = False,
        kv_rotary: str = "",
        rotary_percent: float = 1.0,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        for name, value in (("hidden_size", hidden_size), ("num_heads", num_heads), ("head_size", head_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        if head_size is None and hidden_size % num_heads:
            raise ValueError(
                f"num_heads {num_heads}: must divide hidden_size {hidden_size}, or give head_size"
            )
        if qk_norm and qk_norm not in NORMS:
            raise ValueError(f"qk_norm {qk_norm}: unknown; choose one of {', '.join(NORMS)}, or leave it out")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout {dropout}: must be in [0, 1)")
        for name, positive in (("norm_eps", norm_eps), ("rotary_base", rotary_base), ("scale", scale)):
            if positive is not None:
                check_finite_positive(name, positive)
        shape, plus = parse_variant(variant)
        if plus and (causal or rope):
            raise ValueError(
                f"variant {variant}: the + forms have a positional term of their own and see all tokens; "
                "give causal=False and leave rope out"
            )
        size = hidden_size // num_heads if head_size is None else head_size
        groups = num_heads if num_groups is None else num_groups
        with argument_names():
            shape.check_groups(num_heads, groups)
            scheme = resolve_kv_rotary(shape, kv_rotary, rope=rope)
            if rope and shape.tied_kv:
                scheme.check_part(rotary_percent)
        if not rope and rotary_percent != 1.0:
            raise ValueError(f"rotary_percent {rotary_percent}: needs rotary positions; add rope=True")
        super().__init__(
            hidden_size,
            num_heads,
            variant=shape,
            scheme=scheme,
            num_groups=groups,
            head_size=size,
            rope_size=rotated_elements(size, rotary_percent) if rope else 0,
            bias=bias,
            output_bias=bias if output_bias is None else output_bias,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            device=device,
            dtype=dtype,
        )
        self.causal, self.dropout, self.rotary_base = causal, dropout, rotary_base
        self.scale = size**-0.5 if scale is None else scale
        self.positional_term = PositionalTerm(device, dtype) if plus else None

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cache: SharedProjectionCache | None = None
    ) -> Tensor:
        """Attend to the new tokens and to those that the cache holds.

        Args:
            x: [b, s, d].
            mask: bool [b, t], True for a real token and False for padding; or a number added to the scaled
                scores, [s, t] or [b or 1, h or 1, s, t]. Causality comes on top. A mask runs on SDPA.
            cache: holds what was seen before, and takes the new tokens; causal attention without gradients.
        Returns:
            [b, s, d]; a token that sees none gets o_proj's bias.
        Raises:
            ValueError: for shapes or options that do not fit together.
        """
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x {tuple(x.shape)}: expected [b, s, {self.hidden_size}]")
        start, policy = 0, "store_both"
        if cache is not None:
            if not self.causal:
                raise ValueError("cache: an attention that is not causal sees later tokens; use causal=True")
            start, policy = cache.length_of(self), cache.policy
        total = start + x.shape[1]
        angles = self._angles(start, total, x) if self.rope_size else None
        query, stored = self.arrange(x, angles, policy)
        seen = angles
        if cache is not None:
            stored = cache.append(self, stored)
            if start and angles is not None and self.rotates_at_read(policy):
                seen = self._angles(0, total, x)
        key, value = self.key_and_value(stored, seen, policy)
        return self.finish(self._attend(query, key, value, mask, cache is not None), angles)

    def _angles(self, start: int, end: int, x: Tensor) -> Angles:
        return angles_of(start, end, self.rope_size, self.rotary_base, x)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cached: bool) -> Tensor:
        """[b, s, h, e], [b, t, g, e] twice -> [b, s, h, e]."""
        dropout = self.dropout if self.training else 0.0
        if mask is not None or self.positional_term is not None:
            return self._attend_masked(query, key, value, mask, dropout)
        q, (k, v) = query.transpose(0, 1), one_or_two((key, value), 0, 1)
        if cached and query.shape[1] == 1 and not torch.is_grad_enabled() and not dropout:
            # Without the kernel ops.decode is its plain twin, and SDPA is faster.
            if select_path(q, k, v, causal=True).name == "extension":
                out, _ = decode(query, key, None if value is key else value, scale=self.scale)
                return out
        out = attention(q, k, v, causal=self.causal, scale=self.scale, dropout_p=dropout)
        return out.transpose(0, 1)

    def _attend_masked(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        (b, s, h, _), t = query.shape, key.shape[1]
        added = query.new_zeros(1, 1, s, t) if mask is None else _additive(mask, b, h, s, t, query.dtype)
        if self.causal:
            later = torch.ones(s, t, dtype=torch.bool, device=query.device).triu(t - s + 1)
            added = added.masked_fill(later, float("-inf"))
        if self.positional_term is not None:
            factor, term = self.positional_term(s, t)
            query, added = query * factor, added + term.to(query.dtype)
        blind = torch.isneginf(added).all(-1, keepdim=True)  # SDPA gives NaN where a token sees none
        q, (k, v) = query.transpose(1, 2), one_or_two((key, value), 1, 2)
        out = nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=added.masked_fill(blind, 0.0),
            dropout_p=dropout,
            scale=self.scale,
            enable_gqa=self.num_groups != self.num_heads,
        )
        return out.masked_fill(blind, 0.0).transpose(1, 2)

    def extra_repr(self) -> str:
        form = ", + form" if self.positional_term is not None else ""
        return f"{super().extra_repr()}{form}, causal={self.causal}"


def _additive(mask: Tensor, b: int, h: int, s: int, t: int, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to the scores, [b or 1, h or 1, s or 1, t]."""
    shape = tuple(mask.shape)
    if mask.dtype == torch.bool:
        if shape != (b, t):
            raise ValueError(f"mask {shape}: a boolean one must be [{b}, {t}], True for real tokens")
        hidden = torch.zeros(b, 1, 1, t, dtype=dtype, device=mask.device)
        return hidden.masked_fill(~mask[:, None, None], float("-inf"))
    if not mask.is_floating_point():
        raise ValueError(f"mask of {mask.dtype}: must be boolean (True for real tokens) or floating point")
    batched = len(shape) == 4 and shape[0] in (1, b) and shape[1] in (1, h)
    if shape[-2:] != (s, t) or not (batched or len(shape) == 2):
        raise ValueError(
            f"mask {shape}: one that is added to the scores must be [{s}, {t}] or "
            f"[{b} or 1, {h} or 1, {s}, {t}]"
        )
    return mask.to(dtype).view(*(1,) * (4 - len(shape)), *shape)
