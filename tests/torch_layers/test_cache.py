"""SharedProjectionCache: a step with it equals the whole forward, and it holds what variants.py says.

Shape legend: b batch, s tokens, d hidden size, h heads, g groups, e head size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_sharedproj.ops import extension
from megatron_sharedproj.ops.decode import decode
from megatron_sharedproj.torch_layers import SharedProjectionAttention, SharedProjectionCache, attention
from megatron_sharedproj.torch_layers.cache import BLOCK

B, S, D, H, G, E = 3, 11, 32, 4, 2, 8
# name -> the attention's options, the cache's policy, and elements cached per token and layer.
CASES: dict[str, tuple[dict[str, Any], str, int]] = {
    "qkv": ({"variant": "qkv", "num_groups": G}, "rotate_at_read", 2 * G * E),
    "q_eq_k": ({"variant": "q_eq_k"}, "rotate_at_read", 2 * H * E),
    "qk_eq_v": ({"variant": "qk_eq_v", "num_groups": G}, "rotate_at_read", G * E),
    "q_eq_k_eq_v": ({"variant": "q_eq_k_eq_v"}, "rotate_at_read", H * E),
    "rope_qkv": ({"variant": "qkv", "rope": True}, "rotate_at_read", 2 * H * E),
    "rotate_values": ({"rope": True, "kv_rotary": "rotate_values", "num_groups": 1}, "rotate_at_read", E),
    "partial": (
        {"rope": True, "kv_rotary": "partial", "rotary_percent": 0.5, "num_groups": G},
        "rotate_at_read",
        G * E,
    ),
    "at_read": ({"rope": True, "kv_rotary": "rotate_keys", "num_groups": G}, "rotate_at_read", G * E),
    "at_read_tied_query": (
        {"rope": True, "kv_rotary": "rotate_keys", "variant": "q_eq_k_eq_v"},
        "rotate_at_read",
        H * E,
    ),
    "store_both": ({"rope": True, "kv_rotary": "rotate_keys", "num_groups": G}, "store_both", 2 * G * E),
    "rope_head": (
        {"rope": True, "kv_rotary": "separate_rope_head", "rotary_percent": 0.5, "num_groups": G},
        "rotate_at_read",
        G * E + E // 2,
    ),
}


class Net(nn.Module):
    """Two residual attentions."""

    def __init__(self, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(SharedProjectionAttention(D, H, **options) for _ in range(2))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, **options)
        return x


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def tokens(b: int = B, s: int = S, seed: int = 1) -> Tensor:
    return torch.randn(b, s, D, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * S, [6] + [1] * 5, [4, 4, 3], [S]])
@pytest.mark.parametrize("max_tokens", [None, S])
@pytest.mark.parametrize("case", list(CASES))
def test_steps_equal_the_whole(case: str, max_tokens: int | None, chunks: list[int]) -> None:
    options, policy, elements = CASES[case]
    net = Net(**options)
    x = tokens()
    cache = SharedProjectionCache(net, max_tokens=max_tokens, policy=policy)
    assert cache.nbytes() == cache.length == 0
    got = torch.cat([net(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    close(got, net(x))
    assert cache.length == S
    assert cache.nbytes() == 2 * B * (max_tokens or BLOCK) * elements * 4
    assert all(x.shape[:2] == (B, S) for x in cache.tensors())


@pytest.mark.parametrize("case", list(CASES))
def test_reorder_and_crop(case: str) -> None:
    options, policy, _ = CASES[case]
    net, x = Net(**options), tokens()
    cache = SharedProjectionCache(net, policy=policy)
    net(x, cache=cache)
    cache.crop(7)
    assert cache.length == 7
    beams = torch.tensor([2, 0, 0, 1])
    cache.reorder(beams)
    more = tokens(4, 3, seed=2)
    whole = net(torch.cat([x[beams, :7], more], dim=1))
    close(net(more[:, :2], cache=cache), whole[:, 7:9])
    close(net(more[:, 2:], cache=cache), whole[:, 9:])
    cache.reset()
    assert cache.nbytes() == 0
    close(net(x, cache=cache), net(x))


@pytest.mark.parametrize("case", ["qk_eq_v", "rotate_values", "at_read", "rope_head"])
def test_left_padding(case: str) -> None:
    """A padded sequence continues as it does alone: only distances matter to rotary positions."""
    options, policy, _ = CASES[case]
    net, x = Net(**options), tokens(1)
    padded = torch.cat([tokens(1, 4, seed=3), x], dim=1)
    mask = torch.arange(S + 4)[None] >= 4
    cache = SharedProjectionCache(net, policy=policy)
    net(padded[:, :10], mask=mask[:, :10], cache=cache)
    got = [net(padded[:, i : i + 1], mask=mask[:, : i + 1], cache=cache) for i in range(10, S + 4)]
    close(torch.cat(got, dim=1), net(x)[:, 6:])


def test_grows_by_blocks_and_keeps_its_tokens() -> None:
    net = Net(num_groups=1)
    x = tokens(1, BLOCK + 5)
    cache = SharedProjectionCache(net)
    first = net(x[:, : BLOCK - 1], cache=cache)
    held = [part.clone() for part in cache.tensors()]
    rest = [net(x[:, i : i + 1], cache=cache) for i in range(BLOCK - 1, BLOCK + 5)]
    close(torch.cat([first, *rest], dim=1), net(x))
    assert cache.nbytes() == 2 * 2 * BLOCK * E * 4
    for before, now in zip(held, cache.tensors(), strict=True):
        assert torch.equal(before, now[:, : BLOCK - 1])


def test_bfloat16_and_a_batch_of_one() -> None:
    net = Net(num_groups=G).to(torch.bfloat16)
    x = tokens(1).to(torch.bfloat16)
    cache = SharedProjectionCache(net)
    got = torch.cat([net(part, cache=cache) for part in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(got, net(x), rtol=3e-2, atol=3e-2)


def test_bad_use() -> None:
    net = Net()
    with pytest.raises(ValueError, match="model Linear: has no SharedProjectionAttention"):
        SharedProjectionCache(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not causal"):
        SharedProjectionCache(Net(causal=False))
    with pytest.raises(ValueError, match="max_tokens 0"):
        SharedProjectionCache(net, max_tokens=0)
    with pytest.raises(ValueError, match="^policy both: choose one of rotate_at_read, store_both"):
        SharedProjectionCache(net, policy="both")
    cache = SharedProjectionCache(net, max_tokens=4)
    with pytest.raises(ValueError, match="max_tokens 4: the cache would hold 5"):
        net(tokens(1, 5), cache=cache)
    net(tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="the cache holds"):
        net(tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match="another model"):
        Net()(tokens(1, 1), cache=cache)
    with pytest.raises(ValueError, match="length -1"):
        cache.crop(-1)
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        net(tokens(1, 1), cache=cache)
    with pytest.raises(ValueError, match="not causal sees later"):
        SharedProjectionAttention(D, H, causal=False)(tokens(), cache=cache)
    assert cache.length == 3


def test_single_tokens_run_on_the_decode_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if extension.MISSING:
        pytest.skip(extension.MISSING)
    net, x, seen = Net(), tokens(), []

    def watched(query: Tensor, key: Tensor, value: Tensor | None, **options: Any) -> Any:
        seen.append((query.shape[1], key.shape[1], value))
        return decode(query, key, value, **options)

    monkeypatch.setattr(attention, "decode", watched)
    cache = SharedProjectionCache(net)
    net(x[:, :5], cache=cache)
    assert not seen
    net(x[:, 5:6], cache=cache)
    assert seen == [(1, 6, None)] * 2
