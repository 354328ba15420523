"""Context-parallel attention in a group of one: what is gathered, and the result. Ranks: test_layouts.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed

from megatron_sharedproj.ops.reference import attention_reference

pytestmark = pytest.mark.usefixtures("parallel_state")

S, B, H, G, E = 8, 2, 4, 2, 8


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_gathers_one_tensor_where_key_and_value_are_one(
    monkeypatch: pytest.MonkeyPatch, tied: bool, causal: bool
) -> None:
    from megatron_sharedproj.layers.context_parallel import context_parallel_attention

    sent: dict[str, int] = {}

    def counted(name: str) -> Any:
        collective = getattr(torch.distributed, name)

        def call(output: torch.Tensor, given: torch.Tensor, **options: Any) -> Any:
            sent[name] = sent.get(name, 0) + given.numel()
            return collective(output, given, **options)

        return call

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        monkeypatch.setattr(torch.distributed, name, counted(name))
    random = torch.Generator().manual_seed(1)
    query = torch.randn(S, B, H, E, generator=random, requires_grad=True)
    key = torch.randn(S, B, G, E, generator=random, requires_grad=True)
    value = key if tied else torch.randn(S, B, G, E, generator=random, requires_grad=True)
    inputs = [query, key] if tied else [query, key, value]
    out = context_parallel_attention(
        query, key, value, torch.distributed.group.WORLD, causal=causal, scale=0.3
    )
    expected = attention_reference(query, key, value, causal=causal, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(out.shape, generator=random)
    found = torch.autograd.grad((out * weights).sum(), inputs)
    for mine, plain in zip(found, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    one = S * B * G * E * (1 if tied else 2)
    assert sent == {"all_gather_into_tensor": one, "reduce_scatter_tensor": one}
