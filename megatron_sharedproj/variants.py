"""What an attention variant projects and what it caches: the only place that knows.

Paper: "Do Transformers Need Three Projections?" (arXiv 2606.04032), section 3. A variant is data: the
tensors it projects, and which of them plays query, key and value; so is a rotary scheme, which says what
becomes of a tied key/value under rotary positions. Everything else (layers, formulas, caches, conversion)
reads it from here.

Shape legend: h heads, g groups (key/value heads), e head size, r rotated elements of a head (the first),
d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionVariant:
    """The structure of one projection-sharing variant.

    Attributes:
        name: value of ``--attention-variant``.
        paper_name: the paper's notation (its hyphen is punctuation, not a subtraction).
        formula: the attention function, with a = 1/sqrt(head size).
        projections: names of the tensors that are projected, in the order in which a group stores them.
        query, key, value: which projected tensor plays each role.
    """

    name: str
    paper_name: str
    formula: str
    projections: tuple[str, ...]
    query: str
    key: str
    value: str

    @property
    def tied_kv(self) -> bool:
        """Key and value are one tensor, so the cache holds one tensor instead of two."""
        return self.key == self.value

    @property
    def tied_qk(self) -> bool:
        """Query and key are one tensor; needs as many groups as heads."""
        return self.query == self.key

    @property
    def cached(self) -> tuple[str, ...]:
        """Projected tensors that a key/value cache stores: one when tied, else key and value."""
        return (self.key,) if self.tied_kv else (self.key, self.value)

    def group_layout(self, num_heads: int, num_groups: int) -> tuple[tuple[str, int], ...]:
        """Heads that one group stores of each projected tensor, in storage order.

        A projection weight is [g * sum(heads) * e, d]: groups are contiguous, and inside a group the
        tensors follow each other (``q.. kv | q.. kv``), so an axis-0 shard by groups stays plain.

        Args:
            num_heads: query heads h.
            num_groups: key/value heads g.
        Raises:
            ValueError: if g does not divide h, or the variant cannot share heads.
        """
        self.check_groups(num_heads, num_groups)
        heads_per_group = num_heads // num_groups
        return tuple(
            (name, heads_per_group if name == self.query and not self.tied_qk else 1)
            for name in self.projections
        )

    def heads_per_group(self, num_heads: int, num_groups: int) -> int:
        """Projected heads in one group, over all tensors (the row count of a group / head size)."""
        return sum(heads for _, heads in self.group_layout(num_heads, num_groups))

    def check_groups(self, num_heads: int, num_groups: int) -> None:
        """Raise ValueError if this variant cannot use ``num_groups`` key/value heads."""
        if num_groups < 1 or num_heads % num_groups:
            divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
            raise ValueError(
                f"--num-query-groups {num_groups}: must divide --num-attention-heads {num_heads}; use one of "
                f"{divisors}"
            )
        if self.tied_qk and num_groups != num_heads:
            raise ValueError(
                f"--num-query-groups {num_groups}: --attention-variant {self.name} ties query and key, so "
                f"there must be as many groups as heads ({num_heads}); drop --group-query-attention or "
                "use qkv or qk_eq_v"
            )

    def describe(self) -> str:
        """One line for logs: which tensors are projected, and what plays which role."""
        roles = f"query={self.query} key={self.key} value={self.value}"
        return (
            f"{self.name} (paper: {self.paper_name}): {len(self.projections)} projection(s) "
            f"[{', '.join(self.projections)}], {roles}"
        )


VARIANTS: dict[str, AttentionVariant] = {
    variant.name: variant
    for variant in (
        AttentionVariant("qkv", "QKV", "softmax(a Q K^T) V", ("q", "k", "v"), "q", "k", "v"),
        AttentionVariant("q_eq_k", "Q=K-V", "softmax(a K K^T) V", ("k", "v"), "k", "k", "v"),
        AttentionVariant("qk_eq_v", "Q-K=V", "softmax(a Q K^T) K", ("q", "kv"), "q", "kv", "kv"),
        AttentionVariant("q_eq_k_eq_v", "Q=K=V", "softmax(a K K^T) K", ("kv",), "kv", "kv", "kv"),
    )
}


@dataclass(frozen=True)
class RotaryScheme:
    """What rotary positions do to a tied key/value x; R_j rotates by position j, r elements of a head.

    The paper treats learned positions only (``none``). With a norm on queries and keys
    (``--qk-layernorm``) x is normed first, once: key and value are the normed tensor.

    Attributes:
        name: value of ``--kv-rotary``.
        function: key and value of position j as the attention sees them, and its output at position i.
        rotates_value: the rotated tensor is key and value, and the output is rotated back.
        rope_head: the rotated elements of the key are not x's but one more projection's, a piece of a head
            that all groups share; x is never rotated (Grouped-Tied Attention, arXiv 2505.21487).
        partial: True: rotates a part of the head only; False: all of it; None: either.
    """

    name: str
    function: str
    rotates_value: bool = False
    rope_head: bool = False
    partial: bool | None = None

    def check_part(self, rotary_percent: float) -> None:
        """Raise ValueError if this scheme cannot rotate such a part of the head."""
        if self.partial is True and rotary_percent == 1.0:
            raise ValueError(
                f"--rotary-percent {rotary_percent}: --kv-rotary {self.name} rotates a part of the head; "
                "give one below 1, such as 0.25 or 0.5"
            )
        if self.partial is False and rotary_percent != 1.0:
            raise ValueError(
                f"--rotary-percent {rotary_percent}: --kv-rotary {self.name} rotates whole heads; leave it "
                "out, or use --kv-rotary partial"
            )


KV_ROTARY: dict[str, RotaryScheme] = {
    scheme.name: scheme
    for scheme in (
        RotaryScheme("none", "key x_j, value x_j"),
        RotaryScheme("rotate_keys", "key R_j x_j, value x_j"),
        RotaryScheme(
            "rotate_values",
            "key and value R_j x_j, output rotated by R_-i",
            rotates_value=True,
            partial=False,
        ),
        RotaryScheme(
            "partial",
            "key and value R_j x_j (R turns a part of the head), output rotated by R_-i",
            rotates_value=True,
            partial=True,
        ),
        RotaryScheme(
            "separate_rope_head",
            "key [R_j k_j | the rest of x_j] with one k for all groups, value x_j",
            rope_head=True,
            partial=True,
        ),
    )
}

# How --kv-rotary rotate_keys is cached: the same function, half the bytes or no rotation when read.
CACHE_POLICIES = ("rotate_at_read", "store_both")


@dataclass(frozen=True)
class CachedTensor:
    """One tensor of a layer's cache: [tokens, heads, size].

    Attributes:
        name: the projected tensor in it.
        heads: g, or 1 where ``shared``.
        size: elements of a head.
        rotated: it is stored rotated by its position.
        shared: one head for all groups: every tensor-parallel rank holds it.
    """

    name: str
    heads: int
    size: int
    rotated: bool = False
    shared: bool = False

    def describe(self) -> str:
        """For logs: its name, and whether it is stored rotated."""
        return f"{self.name} (rotated)" if self.rotated else self.name


def resolve_kv_rotary(variant: AttentionVariant, name: str, *, rope: bool) -> RotaryScheme:
    """The scheme of ``--kv-rotary NAME`` (empty: not given) for a variant with or without rotary positions.

    A variant that does not tie key and value rotates its keys, as everywhere. One that does has no default.

    Raises:
        ValueError: naming the flag, and what would work.
    """
    if name and name not in KV_ROTARY:
        raise ValueError(f"--kv-rotary {name}: unknown; choose one of {', '.join(KV_ROTARY)}")
    if not rope:
        if name not in ("", "none"):
            raise ValueError(
                f"--kv-rotary {name}: needs rotary positions; add --position-embedding-type rope, or leave "
                "it out"
            )
        return KV_ROTARY["none"]
    if not variant.tied_kv:
        if name not in ("", "rotate_keys"):
            raise ValueError(
                f"--kv-rotary {name}: --attention-variant {variant.name} has a value of its own, so that "
                "keys are rotated as usual; leave it out, or use rotate_keys"
            )
        return KV_ROTARY["rotate_keys"]
    if name in ("", "none"):
        choices = ", ".join(scheme for scheme in KV_ROTARY if scheme != "none")
        raise ValueError(
            f"--position-embedding-type rope: with --attention-variant {variant.name} key and value are one "
            f"tensor; choose what a rotation does to the value by --kv-rotary, one of {choices} "
            "(rotate_values keeps the cache at one tensor on the plain kernel); or use learned_absolute"
        )
    scheme = KV_ROTARY[name]
    if scheme.rope_head and variant.tied_qk:
        raise ValueError(
            f"--kv-rotary {name}: --attention-variant {variant.name} has no query of its own to meet the "
            "separate head; use qk_eq_v, or another scheme"
        )
    return scheme


def cached_tensors(
    variant: AttentionVariant,
    scheme: RotaryScheme,
    *,
    num_groups: int,
    head_size: int,
    rope_size: int = 0,
    policy: str = CACHE_POLICIES[0],
) -> tuple[CachedTensor, ...]:
    """What a layer's key/value cache stores, in the order key (or the tied tensor), then what is beside it.

    Args:
        num_groups: g, or those of one tensor-parallel rank.
        head_size: e; rope_size: r, 0 without rotary positions.
        policy: one of CACHE_POLICIES; only ``rotate_keys`` of a tied key/value has the choice.
    Raises:
        ValueError: for an unknown policy.
    """
    if policy not in CACHE_POLICIES:
        raise ValueError(f"--kv-cache-policy {policy}: choose one of {', '.join(CACHE_POLICIES)}")
    key = CachedTensor(variant.key, num_groups, head_size, rotated=bool(rope_size))
    if not variant.tied_kv:
        return key, CachedTensor(variant.value, num_groups, head_size)
    plain = CachedTensor(variant.key, num_groups, head_size)
    if scheme.rope_head:
        return plain, CachedTensor("k_rope", 1, rope_size, rotated=True, shared=True)
    if scheme.name == "rotate_keys":
        return (key, plain) if policy == "store_both" else (plain,)
    return (key,)


# The paper's spellings, and those that readers write for them.
_ALIASES = {
    "qkv": "qkv",
    "q=k-v": "q_eq_k",
    "q=k,v": "q_eq_k",
    "q=k": "q_eq_k",
    "q-k=v": "qk_eq_v",
    "q,k=v": "qk_eq_v",
    "k=v": "qk_eq_v",
    "q=k=v": "q_eq_k_eq_v",
}


def get_variant(name: str) -> AttentionVariant:
    """Look a variant up by its flag value or by the paper's spelling ("Q-K=V", "K=V").

    Raises:
        ValueError: for an unknown name, listing the accepted ones.
    """
    key = name.strip().lower().replace(" ", "")
    found = VARIANTS.get(_ALIASES.get(key, key))
    if found is None:
        raise ValueError(f"--attention-variant {name}: unknown; choose one of {', '.join(VARIANTS)}")
    return found
