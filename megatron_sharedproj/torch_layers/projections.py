"""What the attentions here share: a variant's projections, and what a rotary scheme makes of them.

Shape legend: b batch, s new tokens, t tokens seen, d hidden size, h heads, g groups (key/value heads),
e head size, r rotated elements of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron_sharedproj.torch_layers.rotary import Angles, join_rope_head, rotate_heads
from megatron_sharedproj.variants import AttentionVariant, CachedTensor, RotaryScheme, cached_tensors

NORMS: dict[str, type[nn.Module]] = {"rms_norm": nn.RMSNorm, "layer_norm": nn.LayerNorm}


class SharedProjections(nn.Module):
    """One nn.Linear per projected tensor, named as in an export: q_proj, k_proj, v_proj, kv_proj, o_proj.

    Args:
        hidden_size: d; num_heads: h; num_groups: g; head_size: e.
        rope_size: r, 0 without rotary positions; rotary_size: elements that the rotated pairs are taken from
            (rotary.py), r by default.
        bias: of the projections; output_bias: of o_proj.
        qk_norm: "", or one of NORMS: the norm over a head of query and key, named q_norm and k_norm.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        variant: AttentionVariant,
        scheme: RotaryScheme,
        num_groups: int,
        head_size: int,
        rope_size: int = 0,
        rotary_size: int | None = None,
        bias: bool = True,
        output_bias: bool = True,
        qk_norm: str = "",
        norm_eps: float = 1e-5,
        **factory: Any,
    ):
        super().__init__()
        self.variant, self.scheme = variant, scheme
        self.hidden_size, self.num_heads, self.num_groups = hidden_size, num_heads, num_groups
        self.head_size, self.rope_size = head_size, rope_size
        self.rotary_size = rope_size if rotary_size is None else rotary_size
        heads = dict.fromkeys(variant.projections, num_groups)
        heads[variant.query] = num_heads
        for name, count in heads.items():
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, count * head_size, bias=bias, **factory))
        if scheme.rope_head:
            self.k_rope_proj = nn.Linear(hidden_size, rope_size, bias=bias, **factory)
        self.o_proj = nn.Linear(num_heads * head_size, hidden_size, bias=output_bias, **factory)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if qk_norm:
            options: dict[str, Any] = {"eps": norm_eps, **factory}
            self.k_norm = NORMS[qk_norm](head_size, **options)
            if not variant.tied_qk:
                self.q_norm = NORMS[qk_norm](head_size, **options)

    def cached_tensors(self, policy: str) -> tuple[CachedTensor, ...]:
        """What this layer caches (variants.cached_tensors)."""
        return cached_tensors(
            self.variant,
            self.scheme,
            num_groups=self.num_groups,
            head_size=self.head_size,
            rope_size=self.rope_size,
            policy=policy,
        )

    def rotates_at_read(self, policy: str) -> bool:
        """The cache holds the un-rotated tensor alone, and its keys are rotated whenever it is read."""
        return self.variant.tied_kv and self.scheme.name == "rotate_keys" and policy == "rotate_at_read"

    def project(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """[b, s, d] -> each projected tensor [b, s, heads, e], normed once if it is query or key."""
        b, s = hidden_states.shape[:2]
        projected = {
            name: getattr(self, f"{name}_proj")(hidden_states).view(b, s, -1, self.head_size)
            for name in self.variant.projections
        }
        norms = ((self.variant.query, self.q_norm), (self.variant.key, self.k_norm))
        for name, norm in norms:
            if norm is not None:
                # Under autocast a norm gives float32, beside a value that is not normed.
                projected[name] = norm(projected[name]).to(projected[name].dtype)
        return projected

    def arrange(
        self, hidden_states: Tensor, angles: Angles | None, policy: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Project, and rotate what the scheme rotates before a cache.

        Args:
            hidden_states: [b, s, d].
            angles: of the new tokens; None without rotary positions.
        Returns:
            query [b, s, h, e] and what a cache stores, [b, s, heads, size] each, in the order of
            :meth:`cached_tensors`.
        """
        projected = self.project(hidden_states)
        variant = self.variant
        query, key, value = (projected[name] for name in (variant.query, variant.key, variant.value))
        if angles is None:
            return query, (key,) if variant.tied_kv else (key, value)
        turned = rotate_heads(query, angles)
        if self.scheme.rope_head:
            rope = self.k_rope_proj(hidden_states).unsqueeze(-2)
            # Of pairs taken from a whole head, the separate one has the first.
            own = Angles(*(part[..., : self.rope_size // 2] for part in angles[:2]))
            return turned, (key, rotate_heads(rope, own))
        if self.rotates_at_read(policy):
            return turned, (key,)
        rotated = turned if variant.tied_qk else rotate_heads(key, angles)
        if self.scheme.rotates_value:
            return turned, (rotated,)
        return turned, (rotated, value)

    def key_and_value(
        self, stored: tuple[Tensor, ...], angles: Angles | None, policy: str
    ) -> tuple[Tensor, Tensor]:
        """Key and value [b, t, g, e] of what a cache holds; one tensor object where the attention sees one.

        Args:
            stored: [b, t, heads, size] each.
            angles: of all t tokens, for a cache that is rotated when it is read.
        """
        first, last = stored[0], stored[-1]
        if self.scheme.rope_head:
            return join_rope_head(first, last, self.rotary_size), first
        if angles is not None and self.rotates_at_read(policy):
            return rotate_heads(first, angles), first
        return first, last

    def finish(self, out: Tensor, angles: Angles | None) -> Tensor:
        """The attention's output [b, s, h, e] -> [b, s, d]."""
        if angles is not None and self.scheme.rotates_value:
            out = rotate_heads(out, angles, inverse=True)
        return self.o_proj(out.flatten(-2))

    def extra_repr(self) -> str:
        groups = f", num_groups={self.num_groups}" if self.num_groups != self.num_heads else ""
        rotary = f", kv_rotary={self.scheme.name}, rope_size={self.rope_size}" if self.rope_size else ""
        return f"{self.variant.name}, num_heads={self.num_heads}{groups}, head_size={self.head_size}{rotary}"


def one_or_two(tensors: tuple[Tensor, Tensor], *dimensions: int) -> tuple[Tensor, Tensor]:
    """Swap two dimensions of key and value; one tensor object stays one."""
    key, value = tensors
    swapped = key.transpose(*dimensions)
    return swapped, swapped if value is key else value.transpose(*dimensions)


def check_finite_positive(name: str, value: float) -> None:
    """Raise ValueError unless 0 < value < infinity."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} {value}: must be positive")


def rotated_elements(head_size: int, rotary_percent: float) -> int:
    """r, the rotated elements of a head.

    Raises:
        ValueError: unless it is an even number of at least 2.
    """
    size = int(head_size * rotary_percent)
    if not 0 < rotary_percent <= 1 or size < 2 or size % 2:
        raise ValueError(
            f"rotary_percent {rotary_percent}: must be in (0, 1] and leave an even number of the {head_size} "
            "elements of a head to rotate, at least 2"
        )
    return size


__all__ = ["NORMS", "SharedProjections", "check_finite_positive", "one_or_two", "rotated_elements"]
