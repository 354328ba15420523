"""The one-tensor caches by themselves: contents, memory, and who may write where.

Shape legend: b batch, s new tokens, g groups, e head size.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj.layers.hf import BLOCK, SharedKVLayer, SharedKVStaticLayer, SharedProjCache
from tiny_hf import config

B, G, E = 3, 2, 4


def states(length: int, seed: int, batch: int = B) -> Tensor:
    """[b, g, s, e] as the model makes it: a transposed view."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, G, E, generator=generator).transpose(1, 2)


def filled(layer: Any, lengths: tuple[int, ...] = (5, 1, 1), tied: bool = True) -> list[Tensor]:
    """Update a layer; returns what it should hold: keys, and values where they are not tied."""
    keys = [states(n, seed) for seed, n in enumerate(lengths)]
    values = keys if tied else [states(n, 100 + seed) for seed, n in enumerate(lengths)]
    for key, value in zip(keys, values, strict=True):
        layer.update(key, value)
    return [torch.cat(keys, 2)] if tied else [torch.cat(keys, 2), torch.cat(values, 2)]


def held(layer: Any) -> list[Tensor]:
    """What a layer holds, without a static one's room."""
    n = int(layer.get_seq_length())
    return [x[:, :, :n] for x in ((layer.keys,) if layer.tied else (layer.keys, layer.values))]


def make(kind: str, tied: bool) -> Any:
    return SharedKVLayer(tied) if kind == "dynamic" else SharedKVStaticLayer(16, tied)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_holds_what_was_written(kind: str, tied: bool) -> None:
    layer = make(kind, tied)
    assert layer.get_seq_length() == 0
    expected = filled(layer, tied=tied)
    torch.testing.assert_close(held(layer), expected, rtol=0, atol=0)
    assert int(layer.get_seq_length()) == 7
    new = states(1, 8)
    keys, values = layer.update(new, new if tied else states(1, 9))
    assert (values is keys) == tied
    assert (values.data_ptr() == keys.data_ptr()) == tied
    limit = -1 if kind == "dynamic" else 16
    assert layer.get_max_length() == layer.get_max_cache_shape() == limit
    assert layer.get_mask_sizes(3) == ((11, 0) if kind == "dynamic" else (16, 0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_batch_operations(kind: str, tied: bool) -> None:
    operations: list[tuple[str, Any, Any]] = [
        ("reorder_cache", torch.tensor([2, 0, 0]), lambda x: x[[2, 0, 0]]),
        ("batch_repeat_interleave", 2, lambda x: x[[0, 0, 1, 1, 2, 2]]),
        ("batch_select_indices", torch.tensor([2, 0]), lambda x: x[[2, 0]]),
        ("batch_select_indices", slice(0, 2), lambda x: x[:2]),
        ("crop", -2, lambda x: x[:, :, :-2]),
        ("crop", 4, lambda x: x[:, :, :4]),
        ("crop", 40, lambda x: x),
        ("crop", 0, lambda x: x),
        ("crop", -40, lambda x: x[:, :, :0]),
    ]
    for name, argument, wanted in operations:
        layer = make(kind, tied)
        expected = [wanted(x) for x in filled(layer, tied=tied)]
        getattr(layer, name)(argument)
        torch.testing.assert_close(held(layer), expected, rtol=0, atol=0)
        more = [states(1, 50 + i, expected[0].shape[0]) for i in range(len(expected))]
        layer.update(more[0], more[-1])
        joined = [torch.cat(pair, 2) for pair in zip(expected, more, strict=True)]
        torch.testing.assert_close(held(layer), joined, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reset_offload_and_assignment(kind: str) -> None:
    for tied in (True, False):
        layer = make(kind, tied)
        expected = filled(layer, tied=tied)
        layer.offload()
        layer.prefetch()
        torch.testing.assert_close(held(layer), expected, rtol=0, atol=0)
        # As transformers' own base class changes a layer: keys, then values in the same way.
        layer.keys = layer.keys.index_select(0, torch.tensor([1, 0, 2]))
        layer.values = layer.values.index_select(0, torch.tensor([1, 0, 2]))
        torch.testing.assert_close(held(layer), [x[[1, 0, 2]] for x in expected], rtol=0, atol=0)
        layer.reset()
        assert int(layer.get_seq_length()) == 0
        again = filled(layer, (3, 2), tied)
        torch.testing.assert_close(held(layer), again, rtol=0, atol=0)


def test_memory_grows_by_blocks_and_stays_put_between() -> None:
    per_token = B * G * E * 4
    for tied in (True, False):
        layer = SharedKVLayer(tied)
        filled(layer, (5,), tied)
        assert layer.nbytes() == BLOCK * per_token * (1 if tied else 2)
        address = layer.keys.data_ptr()
        for _ in range(BLOCK - 5):
            x = states(1, 0)
            layer.update(x, x)
        assert layer.keys.data_ptr() == address
        assert layer.get_seq_length() == BLOCK
        x = states(1, 3)
        layer.update(x, x)
        assert layer.nbytes() == 2 * BLOCK * per_token * (1 if tied else 2)
        torch.testing.assert_close(layer.keys[:, :, -1:], x, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_do_not_write_into_each_other(copied: Any) -> None:
    for tied in (True, False):
        original = SharedKVLayer(tied)
        expected = filled(original, tied=tied)
        twin = copied(original)
        for seed, layer in ((70, twin), (80, original)):
            new = [states(1, seed + i) for i in range(len(expected))]
            layer.update(new[0], new[-1])
            layer.check = [torch.cat(pair, 2) for pair in zip(expected, new, strict=True)]
        for layer in (twin, original):
            torch.testing.assert_close(held(layer), layer.check, rtol=0, atol=0)


def test_selecting_by_slice_lets_go_of_the_original_memory() -> None:
    layer = SharedKVLayer(tied=True)
    filled(layer)
    before = layer.keys
    layer.batch_select_indices(slice(0, B))
    untouched = before.clone()
    layer.crop(-3)
    x = states(3, 9)
    layer.update(x, x)
    torch.testing.assert_close(before, untouched, rtol=0, atol=0)


def test_gradients_flow_through_a_cache() -> None:
    with torch.enable_grad():
        prefix = states(4, 0).clone().requires_grad_()
        layer = SharedKVLayer(tied=True)
        keys, _ = layer.update(prefix, prefix)
        first = (keys**2).sum()
        x = states(1, 1)
        keys, _ = layer.update(x, x)
        (first + (keys**3).sum()).backward()
    torch.testing.assert_close(prefix.grad, 2 * prefix.detach() + 3 * prefix.detach() ** 2)
    # And back to writing in place, in memory of its own.
    layer.update(x, x)
    assert layer.nbytes() == BLOCK * B * G * E * 4
    assert prefix.untyped_storage().data_ptr() != layer.keys.untyped_storage().data_ptr()


def test_a_graph_survives_a_crop_and_new_tokens() -> None:
    with torch.enable_grad():
        prefix = states(4, 0).clone().requires_grad_()
        layer = SharedKVLayer(tied=True)
        keys, _ = layer.update(prefix, prefix)
        loss = (keys**2).sum()
    layer.crop(-2)
    x = states(2, 1)
    layer.update(x, x)
    loss.backward()
    torch.testing.assert_close(prefix.grad, 2 * prefix.detach())


def test_tokens_from_inference_mode_can_be_continued() -> None:
    layer = SharedKVLayer(tied=True)
    with torch.inference_mode():
        expected = filled(layer)[0].clone()
    x = states(1, 5)
    layer.update(x, x)
    torch.testing.assert_close(layer.keys, torch.cat([expected, x], 2), rtol=0, atol=0)


def test_refusals() -> None:
    layer = SharedKVLayer(tied=True)
    with pytest.raises(ValueError, match="one tensor"):
        layer.update(states(1, 0), states(1, 1))
    filled(layer)
    x = states(1, 0, batch=1)
    with pytest.raises(ValueError, match="batch 1.*3 sequences"):
        layer.update(x, x)


@pytest.mark.parametrize("static", [None, 16])
def test_positions_go_with_their_tokens(static: int | None) -> None:
    cache = SharedProjCache(config("rotate_keys"), max_cache_len=static)
    assert cache.layout == "at_read" and cache.position_bytes() == 0
    given = torch.tensor([[3, 4, 5], [0, 0, 1]])
    seen = cache.append_positions(given, 2)
    for index in range(2):
        x = states(3, index, 2)
        cache.update(x, x, index)
    assert seen.dtype == torch.int32 and torch.equal(seen[:, :3], given.int())
    assert cache.position_bytes() == 2 * (static or BLOCK) * 4
    assert cache.nbytes() == 2 * 2 * (static or BLOCK) * G * E * 4
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-1)
    seen = cache.append_positions(torch.tensor([[9]]), 2)
    assert seen[:, :3].tolist() == [[0, 0, 9], [3, 4, 9]]


def test_tokens_without_positions_have_those_of_their_places() -> None:
    """Prefix tuning writes into the layers only; what a forward noted and no layer stored is forgotten."""
    cache = SharedProjCache(config("rotate_keys"))
    x = states(4, 0, 2)
    for index in range(2):
        cache.update(x, x, index)
    assert cache.append_positions(torch.tensor([[7, 8]]), 2).tolist() == [[0, 1, 2, 3, 7, 8]] * 2
    assert cache.append_positions(torch.tensor([[5]]), 2).tolist() == [[0, 1, 2, 3, 5]] * 2


@pytest.mark.parametrize("static", [None, 16])
def test_a_separate_head_lies_beside_the_tied_tensor(static: int | None) -> None:
    cache = SharedProjCache(config("separate_rope_head"), max_cache_len=static)
    assert cache.layout == "rope_head"
    early = {"num_heads": G, "head_dim": E, "dtype": torch.float32, "device": torch.device("cpu")}
    cache.early_initialization(batch_size=B, **early)
    head = torch.randn(B, 3, 1, 4).transpose(1, 2)
    for index in range(2):
        x = states(3, index)
        tied, rotated = cache.update(x, head, index)
        torch.testing.assert_close(tied[:, :, :3], x, rtol=0, atol=0)
        torch.testing.assert_close(rotated[:, :, :3], head, rtol=0, atol=0)
    assert cache.nbytes() == 2 * B * (static or BLOCK) * (G * E + 4) * 4


@pytest.mark.parametrize("static", [None, 16])
def test_cache_counts_each_storage_once(static: int | None) -> None:
    sizes = {}
    for name in ("qkv", "qk_eq_v"):
        cache = SharedProjCache(config(name), max_cache_len=static)
        assert len(cache) == 2
        for index in range(2):
            x = states(3, index)
            value = x if name == "qk_eq_v" else states(3, 10 + index)
            cache.update(x, value, index)
        sizes[name] = cache.nbytes()
        assert cache.nbytes() == sum(layer.nbytes() for layer in cache.layers)
        assert cache.is_compileable == (static is not None)
        assert cache.is_initialized
        assert cache.max_cache_len == (static or -1)
    assert sizes["qk_eq_v"] * 2 == sizes["qkv"] == 2 * 2 * (static or BLOCK) * B * G * E * 4
