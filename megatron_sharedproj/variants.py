"""What an attention variant projects and what it caches: the only place that knows.

Paper: "Do Transformers Need Three Projections?" (arXiv 2606.04032), section 3. A variant is data: the
tensors it projects, and which of them plays query, key and value. Everything else (layers, formulas,
caches, conversion) reads it from here.

Shape legend: h heads, g groups (key/value heads), e head size, d hidden size.
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
        """One line for logs: which tensors are projected, and what is cached."""
        roles = f"query={self.query} key={self.key} value={self.value}"
        return (
            f"{self.name} (paper: {self.paper_name}): {len(self.projections)} projection(s) "
            f"[{', '.join(self.projections)}], {roles}, cached: {', '.join(self.cached)}"
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
