"""rotate_values against its definition, through every path, gradients included.

Shape legend: s query length, t key length, b batch, h query heads, g groups, e head size, r rotated half.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sharedproj.ops.reference import attention_reference
from megatron_sharedproj.ops.rotary import attention_rotate_values, rotate

B, E = 2, 16


def angles(t: int, half: int) -> tuple[Tensor, Tensor]:
    frequencies = 10.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    phase = torch.arange(t, dtype=torch.float64)[:, None] * frequencies
    return phase.cos(), phase.sin()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(query: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, causal: bool) -> Tensor:
    """Query by query: scores from rotated query and key, values rotated by their distance to the query."""
    s, t, groups = query.shape[0], kv.shape[0], query.shape[2] // kv.shape[2]
    k = rotate(kv, cos, sin).repeat_interleave(groups, 2)
    q = rotate(query, cos[t - s :], sin[t - s :])
    rows = []
    for i in range(s):
        at = i + t - s
        seen = at + 1 if causal else t
        weights = torch.softmax(torch.einsum("bhe,tbhe->tbh", q[i], k[:seen]) * 0.3, 0)
        distance_cos = cos[:seen] * cos[at] + sin[:seen] * sin[at]
        distance_sin = sin[:seen] * cos[at] - cos[:seen] * sin[at]
        values = rotate(kv[:seen], distance_cos, distance_sin).repeat_interleave(groups, 2)
        rows.append((weights[..., None] * values).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("half", [E // 2, E // 4])
@pytest.mark.parametrize("s, t, h, g", [(7, 7, 4, 4), (3, 9, 4, 2), (1, 9, 4, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_equals_the_definition(
    s: int, t: int, h: int, g: int, half: int, causal: bool, dtype: torch.dtype, tolerance: float
) -> None:
    cos, sin = angles(t, half)
    query, kv = random(s, B, h, E, seed=1), random(t, B, g, E, seed=2)
    upstream = random(s, B, h, E, seed=3)

    leaves = [query.clone().requires_grad_(), kv.clone().requires_grad_()]
    expected = definition(*leaves, cos, sin, causal)
    expected_grads = torch.autograd.grad(expected, leaves, upstream)

    inputs = [query.to(dtype).requires_grad_(), kv.to(dtype).requires_grad_()]
    out = attention_rotate_values(
        inputs[0], rotate(inputs[1], cos, sin), cos[t - s :], sin[t - s :], causal=causal, scale=0.3
    )
    grads = torch.autograd.grad(out, inputs, upstream.to(dtype))
    for got, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=0.0, atol=tolerance)


def test_depends_on_distances_alone() -> None:
    cos, sin = angles(40, E // 2)
    query, kv = random(6, B, 4, E, seed=4), random(6, B, 2, E, seed=5)
    outputs = []
    for start in (0, 30):
        c, s = cos[start : start + 6], sin[start : start + 6]
        outputs.append(attention_rotate_values(query, rotate(kv, c, s), c, s, causal=True, scale=0.3))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.0, atol=1e-11)
    plain = attention_reference(query, kv, kv, causal=True, scale=0.3)
    assert (outputs[0] - plain).abs().max() > 0.1  # another function than without positions


def test_decode_step_equals_the_last_row() -> None:
    cos, sin = angles(33, E // 2)
    query, kv = random(33, B, 4, E, seed=6).float(), random(33, B, 2, E, seed=7).float()
    cache = rotate(kv, cos, sin)
    whole = attention_rotate_values(query, cache, cos, sin, causal=True, scale=0.3)
    step = attention_rotate_values(query[-1:], cache, cos[-1:], sin[-1:], causal=True, scale=0.3)
    torch.testing.assert_close(step, whole[-1:], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("half, rows", [(E // 2 + 1, 5), (E // 2, 4)])
def test_angles_that_do_not_fit(half: int, rows: int) -> None:
    cos, sin = angles(rows, half)
    with pytest.raises(ValueError, match=r"cos \(\d, \d\).*expected \[5, r\] with 2 r at most 16"):
        rotate(torch.zeros(5, B, 4, E), cos, sin)
