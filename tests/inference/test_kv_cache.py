"""The caches under the model: every logit of a full forward, exact bytes, pages taken, given back and reused.

Shape legend: s sequence, b batch, V padded vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj import formulas
from megatron_sharedproj.variants import CACHE_POLICIES
from random_models import CASES, ROTARY, TIED, TOLERANCE, full_logits, load, random_tokens

pytestmark = pytest.mark.usefixtures("parallel_state")

POSITIONS = 200
MODELS = {f"{variant}-{groups}": (variant, groups, {}) for variant, groups in CASES} | ROTARY
# Tokens at once: prefill, steps, few-token chunks (decode kernel), long chunks (gathered keys).
PIECES = [[5, 1, 1, 1], [70, 1, 3, 16, 1], [130, 30, 1], [1, 40, 25]]
CACHES: dict[str, dict[str, Any]] = {
    "paged": {},
    "contiguous": {"page_size": None},
    "128": {"page_size": 128},
}


def build(loaded: Any, **sizes: Any) -> Any:
    """A CacheContext whose unwritten memory is NaN, and which gives all logits."""
    from megatron_sharedproj.layers.kv_cache import CacheContext, KVCache

    sizes = {"max_sequences": 4, "max_tokens": POSITIONS, **sizes}
    cache = KVCache.for_model(loaded.model, loaded.config.model, **sizes)
    context = CacheContext(cache, last_token_only=False)
    poison(cache, range(cache.pages))
    return context


def poison(cache: Any, pages: Any) -> None:
    for tensor in cache.tensors():
        tensor[list(pages)] = float("nan")


@torch.no_grad()
def feed(loaded: Any, context: Any, slots: list[int], tokens: Tensor) -> Tensor:
    """Logits [b, s, V] of the next tokens of some sequences."""
    before = set(range(context.cache.pages))
    context.prepare(slots, tokens.shape[1])
    poison(context.cache, set(range(context.cache.pages)) - before)  # what a growing pool added
    return loaded.model(
        tokens, context.positions, None, inference_context=context, runtime_gather_output=True
    )


@pytest.mark.parametrize("sizes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_a_full_forward(name: str, sizes: dict[str, Any]) -> None:
    """A ragged batch: sequences of several lengths, prefilled alone, then fed together."""
    variant, groups, shape = MODELS[name]
    check_fed(load(variant, groups, positions=POSITIONS, **shape), sizes)


@pytest.mark.parametrize("name", [name for name in ROTARY if "rotate_keys" in name])
def test_storing_both_is_the_same_function(name: str) -> None:
    variant, groups, shape = ROTARY[name]
    check_fed(load(variant, groups, positions=POSITIONS, **shape), {"policy": "store_both"})


def check_fed(loaded: Any, sizes: dict[str, Any]) -> None:
    context = build(loaded, **sizes)
    tokens = random_tokens(4, POSITIONS)
    expected = full_logits(loaded.model, tokens)
    lengths = [0] * 4
    slots = [context.cache.allocate() for _ in range(4)]

    def check(chosen: list[int], size: int) -> None:
        rows = torch.stack([tokens[i, lengths[i] : lengths[i] + size] for i in chosen])
        found = feed(loaded, context, [slots[i] for i in chosen], rows)
        for row, i in zip(found, chosen, strict=True):
            torch.testing.assert_close(row, expected[i, lengths[i] : lengths[i] + size], **TOLERANCE)
            lengths[i] += size

    for index, pieces in enumerate(PIECES):
        for size in pieces:
            check([index], size)
    assert len(set(lengths)) == 4 and lengths == context.cache.lengths
    for chosen, size in (([0, 1, 2, 3], 1), ([3, 1], 1), ([2, 0, 1], 5), ([0, 1, 2, 3], 20), ([1, 3], 1)):
        check(chosen, size)
    # The comparison sees a wrong position: neighbours differ by far more than the tolerance, unless a token
    # is repeated at the start, which rotary positions do not tell.
    assert (expected[:, 1:] - expected[:, :-1]).abs().amax(-1).quantile(0.01) > 0.05


def test_a_fresh_batch_is_prefilled_at_once() -> None:
    loaded = load(positions=POSITIONS)
    context = build(loaded, page_size=None)
    tokens = random_tokens(3, 80)
    slots = [context.cache.allocate() for _ in range(3)]
    found = torch.cat([feed(loaded, context, slots, part) for part in tokens.split([78, 1, 1], 1)], dim=1)
    torch.testing.assert_close(found, full_logits(loaded.model, tokens), **TOLERANCE)


@pytest.mark.parametrize("variant", ["qkv", "qk_eq_v"])
def test_without_the_kernel(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sharedproj.ops import extension

    monkeypatch.setattr(extension, "MISSING", "taken away by a test")
    loaded = load(variant, 2, positions=POSITIONS)
    context = build(loaded)
    tokens = random_tokens(2, 90)
    slots = [context.cache.allocate() for _ in range(2)]
    parts = [feed(loaded, context, slots, part) for part in tokens.split([60, 1, 8, 20, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full_logits(loaded.model, tokens), **TOLERANCE)


@pytest.mark.parametrize("variant", ["qkv", "qk_eq_v"])
def test_bfloat16(variant: str) -> None:
    loaded = load(variant, 2, positions=POSITIONS)
    exact = full_logits(loaded.model, random_tokens(2, 90))
    loaded.model = loaded.model.bfloat16()
    loaded.model.config.params_dtype = torch.bfloat16
    context = build(loaded)
    assert {tensor.dtype for tensor in context.cache.tensors()} == {torch.bfloat16}
    tokens = random_tokens(2, 90)
    slots = [context.cache.allocate() for _ in range(2)]
    parts = [feed(loaded, context, slots, part) for part in tokens.split([60, 1, 8, 20, 1], 1)]
    found, full = torch.cat(parts, dim=1).float(), full_logits(loaded.model, tokens).float()
    error, rounding = (found - exact).norm(), (full - exact).norm()
    assert 0 < error < 1.5 * rounding


def cache_of(variant: str = "qk_eq_v", groups: int = 4, **sizes: Any) -> Any:
    return build(load(variant, groups, positions=POSITIONS), **sizes).cache


@pytest.mark.parametrize("sizes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(("variant", "groups"), CASES)
def test_bytes_are_the_formulas(variant: str, groups: int, sizes: dict[str, Any]) -> None:
    loaded = load(variant, groups, positions=POSITIONS)
    cache = build(loaded, **sizes).cache
    slots = [cache.allocate() for _ in range(3)]
    for slot, length in zip(slots, (1, 64, 150), strict=True):
        cache.extend([slot], length)
    per_token = formulas.kv_cache_bytes_per_token(loaded.config.model, 4)
    assert cache.nbytes() == per_token * cache.tokens
    # By hand: tensors x groups x head size x layers x 4 bytes.
    assert per_token == (1 if variant in TIED else 2) * groups * 8 * 2 * 4
    assert cache.tokens >= 64 + 64 + 150
    assert len(cache.tensors()) == 2 * (1 if variant in TIED else 2)
    assert len({tensor.data_ptr() for tensor in cache.tensors()}) == len(cache.tensors())


@pytest.mark.parametrize("sizes", CACHES.values(), ids=CACHES)
def test_bytes_are_the_formulas_where_positions_are_rotary(sizes: dict[str, Any]) -> None:
    for (name, (variant, groups, shape)), policy in itertools.product(ROTARY.items(), CACHE_POLICIES):
        loaded = load(variant, groups, positions=POSITIONS, **shape)
        cache = build(loaded, policy=policy, **sizes).cache
        cache.extend([cache.allocate()], 150)
        # By hand: of a head's 8 elements 4 or 8 are rotated, in 2 layers of 4 bytes.
        elements = {"qkv": 2, "q_eq_k": 2}.get(variant, 1) * groups * 8
        if policy == "store_both" and "rotate_keys" in name:
            elements *= 2
        if "separate" in name:
            elements += 4
        per_token = formulas.kv_cache_bytes_per_token(loaded.config.model, 4, policy=policy)
        assert per_token == elements * 2 * 4, name
        assert cache.nbytes() == per_token * cache.tokens, name


@pytest.mark.parametrize("sizes", CACHES.values(), ids=CACHES)
def test_half_of_qkv_and_less_with_fewer_groups(sizes: dict[str, Any]) -> None:
    def measured(variant: str, groups: int) -> int:
        cache = cache_of(variant, groups, **sizes)
        cache.extend([cache.allocate()], 100)
        return cache.nbytes()

    whole = measured("qkv", 4)
    assert 2 * measured("qk_eq_v", 4) == 2 * measured("q_eq_k_eq_v", 4) == measured("q_eq_k", 4) == whole
    # One tensor of g groups for two of H heads: m g / (2 H).
    assert 8 * measured("qk_eq_v", 1) == 4 * measured("qk_eq_v", 2) == whole


def test_pages_are_taken_given_back_and_reused() -> None:
    cache = cache_of(pages=5)
    first, second = cache.allocate(), cache.allocate()
    cache.extend([first], 130)
    cache.extend([second], 64)
    assert (cache.pages_of(first), cache.pages_of(second), cache.free_pages) == ([0, 1, 2], [3], 1)
    assert cache.block_table[first].tolist()[:3] == [0, 1, 2]
    cache.extend([second], 1)
    assert (cache.pages_of(second), cache.free_pages) == ([3, 4], 0)
    cache.release(first)
    assert cache.free_pages == 3 and cache.lengths[first] == 0
    third = cache.allocate()
    assert third == first
    cache.extend([third, second], 63)  # fits into the page that the second has already
    assert (cache.pages_of(third), cache.pages_of(second)) == ([0], [3, 4])
    assert cache.pages == 5


def test_reused_pages_hold_nothing_of_the_sequence_before() -> None:
    loaded = load(positions=POSITIONS)
    context = build(loaded, pages=5)
    tokens = random_tokens(3, 150)
    expected = full_logits(loaded.model, tokens)
    stay, leave = context.cache.allocate(), context.cache.allocate()
    feed(loaded, context, [stay], tokens[:1, :100])
    feed(loaded, context, [leave], tokens[1:2, :150])
    freed = context.cache.pages_of(leave)
    context.cache.release(leave)
    poison(context.cache, freed)
    new = context.cache.allocate()
    found = feed(loaded, context, [new], tokens[2:, :70])
    assert set(context.cache.pages_of(new)) <= set(freed)
    torch.testing.assert_close(found, expected[2:, :70], **TOLERANCE)
    both = torch.stack([tokens[0, 100:101], tokens[2, 70:71]])
    found = feed(loaded, context, [stay, new], both)
    torch.testing.assert_close(found[0], expected[0, 100:101], **TOLERANCE)
    torch.testing.assert_close(found[1], expected[2, 70:71], **TOLERANCE)


def test_too_few_pages_is_an_error_that_changes_nothing() -> None:
    from megatron_sharedproj.layers.kv_cache import OutOfPages

    cache = cache_of(pages=4)
    first, second = cache.allocate(), cache.allocate()
    cache.extend([first], 128)
    with pytest.raises(OutOfPages, match=r"4 more page\(s\) of 64 tokens are needed, 2 of 4 are free"):
        cache.extend([first, second], 70)
    assert cache.lengths[:2] == [128, 0] and cache.free_pages == 2
    cache.extend([first, second], 64)
    assert cache.free_pages == 0
    with pytest.raises(OutOfPages, match="needs 4 pages of 64 tokens, there are 3 in all"):
        cache_of(pages=3).check_room(200)
    with pytest.raises(ValueError, match="201 tokens in one sequence, it was made for 200"):
        cache_of().extend([0], 201)


def test_too_many_sequences() -> None:
    from megatron_sharedproj.layers.kv_cache import OutOfPages

    cache = cache_of(max_sequences=1)
    cache.allocate()
    with pytest.raises(OutOfPages, match="all 1 sequences are in use"):
        cache.allocate()


def test_a_growing_pool_keeps_what_it_holds_and_stops_at_the_most_that_can_be_needed() -> None:
    loaded = load(positions=POSITIONS)
    context = build(loaded)
    assert context.cache.nbytes() == 0
    tokens = random_tokens(4, POSITIONS)
    slots = [context.cache.allocate() for _ in range(4)]
    sizes = []
    for size in (60, 10, 60, 69):
        start = context.cache.lengths[0]
        feed(loaded, context, slots, tokens[:, start : start + size])
        sizes.append(context.cache.pages)
    found = feed(loaded, context, slots, tokens[:, 199:])
    torch.testing.assert_close(found, full_logits(loaded.model, tokens)[:, 199:], **TOLERANCE)
    assert sizes[0] == 4 and sizes == sorted(sizes) and sizes[-1] == 4 * 4


@pytest.mark.parametrize("size", [0, -64, 63, 100])
def test_a_page_is_a_multiple_of_64(size: int) -> None:
    with pytest.raises(ValueError, match=rf"--page-size {size}: must be a multiple of 64"):
        cache_of(page_size=size)


def test_rotated_keys_without_a_value_are_refused() -> None:
    """A model that ModelConfig does not build, as stock Megatron-LM could."""
    loaded = load(positions=POSITIONS)
    context = build(loaded)
    context.prepare([context.cache.allocate()], 3)
    layer = loaded.model.decoder.layers[0].self_attention
    with pytest.raises(ValueError, match="--position-embedding-type rope: with .* qk_eq_v .*--kv-rotary"):
        layer(
            torch.zeros(3, 1, 32), None, inference_context=context, rotary_pos_emb=torch.zeros(200, 1, 1, 8)
        )
