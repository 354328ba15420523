"""The four variants: what they project, what they cache, how a group is laid out."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sharedproj.variants import (
    CACHE_POLICIES,
    VARIANTS,
    CachedTensor,
    cached_tensors,
    get_variant,
    resolve_kv_rotary,
)

# name: (paper's name, projections, cached, tied key/value, tied query/key); paper.md, section 1.
TABLE = {
    "qkv": ("QKV", ("q", "k", "v"), ("k", "v"), False, False),
    "q_eq_k": ("Q=K-V", ("k", "v"), ("k", "v"), False, True),
    "qk_eq_v": ("Q-K=V", ("q", "kv"), ("kv",), True, False),
    "q_eq_k_eq_v": ("Q=K=V", ("kv",), ("kv",), True, True),
}


def test_there_are_these_four() -> None:
    assert list(VARIANTS) == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_structure(name: str) -> None:
    paper_name, projections, cached, tied_kv, tied_qk = TABLE[name]
    variant = VARIANTS[name]
    assert variant.name == name
    assert variant.paper_name == paper_name
    assert variant.projections == projections
    assert variant.cached == cached
    assert (variant.tied_kv, variant.tied_qk) == (tied_kv, tied_qk)


@pytest.mark.parametrize(
    "name, roles",
    [
        ("qkv", ("q", "k", "v")),
        ("q_eq_k", ("k", "k", "v")),
        ("qk_eq_v", ("q", "kv", "kv")),
        ("q_eq_k_eq_v", ("kv", "kv", "kv")),
    ],
)
def test_roles(name: str, roles: tuple[str, str, str]) -> None:
    variant = VARIANTS[name]
    assert (variant.query, variant.key, variant.value) == roles
    assert set(roles) == set(variant.projections)


@pytest.mark.parametrize(
    "spelling, name",
    [
        *((name, name) for name in TABLE),
        ("QKV", "qkv"),
        ("Q=K-V", "q_eq_k"),
        ("Q=K", "q_eq_k"),
        ("Q=K, V", "q_eq_k"),
        ("Q-K=V", "qk_eq_v"),
        ("Q, K=V", "qk_eq_v"),
        ("K=V", "qk_eq_v"),
        (" k = v ", "qk_eq_v"),
        ("Q=K=V", "q_eq_k_eq_v"),
        ("QK_EQ_V", "qk_eq_v"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert get_variant(spelling) is VARIANTS[name]


@pytest.mark.parametrize("name", ["", "kv", "Q=V", "gqa"])
def test_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError) as error:
        get_variant(name)
    assert str(error.value) == (
        f"--attention-variant {name}: unknown; choose one of qkv, q_eq_k, qk_eq_v, q_eq_k_eq_v"
    )


@pytest.mark.parametrize(
    "name, heads, groups, layout",
    [
        ("qkv", 8, 8, (("q", 1), ("k", 1), ("v", 1))),
        ("qkv", 8, 2, (("q", 4), ("k", 1), ("v", 1))),
        ("qkv", 8, 1, (("q", 8), ("k", 1), ("v", 1))),
        ("q_eq_k", 8, 8, (("k", 1), ("v", 1))),
        ("qk_eq_v", 8, 8, (("q", 1), ("kv", 1))),
        ("qk_eq_v", 8, 4, (("q", 2), ("kv", 1))),
        ("qk_eq_v", 8, 1, (("q", 8), ("kv", 1))),
        ("q_eq_k_eq_v", 8, 8, (("kv", 1),)),
    ],
)
def test_group_layout(name: str, heads: int, groups: int, layout: tuple[tuple[str, int], ...]) -> None:
    variant = VARIANTS[name]
    assert variant.group_layout(heads, groups) == layout
    assert variant.heads_per_group(heads, groups) == sum(count for _, count in layout)


@pytest.mark.parametrize("groups", [3, 0, -1, 16])
@pytest.mark.parametrize("name", TABLE)
def test_groups_must_divide_the_heads(name: str, groups: int) -> None:
    with pytest.raises(ValueError) as error:
        VARIANTS[name].group_layout(8, groups)
    assert str(error.value) == (
        f"--num-query-groups {groups}: must divide --num-attention-heads 8; use one of [1, 2, 4, 8]"
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", ["q_eq_k", "q_eq_k_eq_v"])
def test_tied_query_and_key_cannot_share_heads(name: str, groups: int) -> None:
    with pytest.raises(ValueError) as error:
        VARIANTS[name].check_groups(8, groups)
    message = str(error.value)
    assert message.startswith(f"--num-query-groups {groups}: --attention-variant {name} ties query and key")
    assert "(8)" in message
    assert "drop --group-query-attention or use qkv or qk_eq_v" in message


@pytest.mark.parametrize(
    "name, line",
    [
        ("qk_eq_v", "qk_eq_v (paper: Q-K=V): 2 projection(s) [q, kv], query=q key=kv value=kv"),
        ("qkv", "qkv (paper: QKV): 3 projection(s) [q, k, v], query=q key=k value=v"),
    ],
)
def test_description(name: str, line: str) -> None:
    assert VARIANTS[name].describe() == line


TIED, UNTIED = get_variant("qk_eq_v"), get_variant("qkv")
KV, TURNED = CachedTensor("kv", 2, 16), CachedTensor("kv", 2, 16, rotated=True)


@pytest.mark.parametrize(
    "scheme, policy, expected",
    [
        ("rotate_keys", "rotate_at_read", (KV,)),
        ("rotate_keys", "store_both", (TURNED, KV)),
        ("rotate_values", "rotate_at_read", (TURNED,)),
        ("rotate_values", "store_both", (TURNED,)),
        ("partial", "rotate_at_read", (TURNED,)),
        ("separate_rope_head", "rotate_at_read", (KV, CachedTensor("k_rope", 1, 8, True, True))),
    ],
)
def test_what_is_cached_of_a_rotary_tied_value(scheme: str, policy: str, expected: tuple[Any, ...]) -> None:
    rotary = resolve_kv_rotary(TIED, scheme, rope=True)
    sizes = {"num_groups": 2, "head_size": 16, "rope_size": 8}
    assert cached_tensors(TIED, rotary, **sizes, policy=policy) == expected


def test_what_is_cached_otherwise() -> None:
    sizes: dict[str, Any] = {"num_groups": 2, "head_size": 16}
    none = resolve_kv_rotary(TIED, "", rope=False)
    assert cached_tensors(TIED, none, **sizes) == (KV,)
    keys = resolve_kv_rotary(UNTIED, "", rope=True)
    two = (CachedTensor("k", 2, 16, rotated=True), CachedTensor("v", 2, 16))
    for policy in CACHE_POLICIES:
        assert cached_tensors(UNTIED, keys, **sizes, rope_size=8, policy=policy) == two
    with pytest.raises(
        ValueError, match="--kv-cache-policy neither: choose one of rotate_at_read, store_both"
    ):
        cached_tensors(TIED, none, **sizes, policy="neither")
