"""The attention op against its plain reference, and the reference against a loop and gradcheck.

float64 runs on SDPA or the reference; what the compiled kernels compute is tested in test_kernels_cpu.py.

Shape legend: s query length, t key length, b batch, h query heads, g groups (key/value heads), e head size.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron_sharedproj.ops.attention import attention, attention_packed
from megatron_sharedproj.ops.reference import attention_reference

B, E = 2, 8
SCALE = 1.0 / math.sqrt(E)
TIGHT = {"rtol": 0.0, "atol": 1e-12}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(s: int, t: int, h: int, g: int, *, strided: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """query [s, b, h, e], key and value [t, b, g, e]; strided: views into one wider tensor, as projected."""
    if not strided:
        return random(s, B, h, E, seed=1), random(t, B, g, E, seed=2), random(t, B, g, E, seed=3)
    assert s == t
    mixed = random(s, B, g, (h // g + 2) * E, seed=4)
    q, k, v = mixed.split([h // g * E, E, E], dim=-1)
    key, value = k.reshape(s, B, g, E), v.reshape(s, B, g, E)
    assert not key.is_contiguous() and key.data_ptr() != value.data_ptr()
    query = random(B, h, E, s, seed=5).permute(3, 0, 1, 2)
    assert not query.is_contiguous()
    return query, key, value


def gradients(function, tensors: tuple[Tensor, ...], **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, **options)
    return out, torch.autograd.grad(out, leaves, random(*out.shape, seed=9))


def loop(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """One query at a time, over the keys that it sees."""
    s, t, h, g = query.shape[0], key.shape[0], query.shape[2], key.shape[2]
    out = torch.zeros_like(query)
    for i in range(s):
        seen = min(t, max(0, i + t - s + 1)) if causal else t
        for b in range(query.shape[1]):
            for head in range(h if seen else 0):
                k, v = key[:seen, b, head // (h // g)], value[:seen, b, head // (h // g)]
                out[i, b, head] = torch.softmax(SCALE * (k @ query[i, b, head]), 0) @ v
    return out


SHAPES = [
    (6, 6, 4, 4), (6, 6, 4, 2), (6, 6, 4, 1),
    (3, 7, 4, 4), (3, 7, 4, 2), (2, 3, 4, 1),
    (1, 7, 4, 4), (1, 7, 4, 1), (1, 1, 4, 2),
    (5, 3, 4, 2), (5, 1, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s, t, h, g", SHAPES)
def test_reference_is_the_formula(s: int, t: int, h: int, g: int, causal: bool) -> None:
    tensors = inputs(s, t, h, g)
    out = attention_reference(*tensors, causal=causal, scale=SCALE)
    torch.testing.assert_close(out, loop(*tensors, causal=causal), **TIGHT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s, t, h, g", [(3, 3, 2, 2), (2, 3, 2, 1), (1, 3, 2, 1), (3, 2, 2, 1)])
def test_reference_gradcheck(s: int, t: int, h: int, g: int, causal: bool) -> None:
    leaves = tuple(x[:, :1, :, :3].clone().requires_grad_() for x in inputs(s, t, h, g))
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention_reference(q, k, v, causal=causal, scale=SCALE), leaves
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s, t, h, g", SHAPES)
def test_op_equals_reference_gradients_included(s: int, t: int, h: int, g: int, causal: bool) -> None:
    tensors = inputs(s, t, h, g)
    out, grads = gradients(attention, tensors, causal=causal, scale=SCALE)
    expected, expected_grads = gradients(attention_reference, tensors, causal=causal, scale=SCALE)
    assert out.shape == (s, B, h, E) and out.is_contiguous()
    torch.testing.assert_close(out, expected, **TIGHT)
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert torch.isfinite(wanted).all()
        torch.testing.assert_close(got, wanted, **TIGHT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("g", [4, 2, 1])
def test_strided_inputs(g: int, causal: bool) -> None:
    tensors = inputs(6, 6, 4, g, strided=True)
    contiguous = tuple(tensor.contiguous() for tensor in tensors)
    out, grads = gradients(attention, tensors, causal=causal, scale=SCALE)
    plain, plain_grads = gradients(attention, contiguous, causal=causal, scale=SCALE)
    expected = attention_reference(*tensors, causal=causal, scale=SCALE)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, **TIGHT)
    for got, wanted in zip((out, *grads), (plain, *plain_grads), strict=True):
        torch.testing.assert_close(got, wanted, **TIGHT)


@pytest.mark.parametrize("function", [attention, attention_reference])
@pytest.mark.parametrize("s, t, h, g", [(6, 6, 4, 4), (6, 6, 4, 1), (3, 7, 4, 2), (1, 7, 4, 4)])
def test_one_tensor_as_key_and_value_gets_both_gradients(function, s: int, t: int, h: int, g: int) -> None:
    query, key, _ = inputs(s, t, h, g)
    options = {"causal": True, "scale": SCALE}
    separate, (dq, dk, dv) = gradients(function, (query, key, key.clone()), **options)
    out, (tied_dq, tied) = gradients(lambda q, kv, **o: function(q, kv, kv, **o), (query, key), **options)
    torch.testing.assert_close(out, separate, **TIGHT)
    torch.testing.assert_close(tied_dq, dq, **TIGHT)
    torch.testing.assert_close(tied, dk + dv, **TIGHT)
    assert dk.abs().max() > 1e-3 and dv.abs().max() > 1e-3


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_one_tensor_in_all_three_roles(function) -> None:
    x = random(5, B, 4, E)
    options = {"causal": True, "scale": SCALE}
    _, parts = gradients(function, (x, x.clone(), x.clone()), **options)
    _, (whole,) = gradients(lambda x, **o: function(x, x, x, **o), (x,), **options)
    torch.testing.assert_close(whole, sum(parts), **TIGHT)


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_rows_without_a_key_are_zero_and_pass_no_gradient(function) -> None:
    # 5 queries, 2 keys, aligned at the end: the first three see nothing.
    out, grads = gradients(function, inputs(5, 2, 4, 2), causal=True, scale=SCALE)
    assert not out[:3].any()
    assert out[3:].abs().min() > 0
    assert not grads[0][:3].any()
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_causal_rows_do_not_see_later_keys(function) -> None:
    query, key, value = inputs(4, 6, 4, 2)
    before = function(query, key, value, causal=True, scale=SCALE)
    key[4], value[4] = 100.0, 100.0  # seen by queries 2 and 3 only: query i sees keys up to i + 2
    after = function(query, key, value, causal=True, scale=SCALE)
    assert torch.equal(before[:2], after[:2])
    assert not torch.isclose(before[2:], after[2:]).all(-1).any()


def test_scale_is_used() -> None:
    tensors = inputs(6, 6, 4, 4)
    out = attention(*tensors, causal=True, scale=0.5)
    torch.testing.assert_close(out, attention_reference(*tensors, causal=True, scale=0.5), **TIGHT)
    assert not torch.allclose(out, attention(*tensors, causal=True, scale=SCALE))


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_dropout_zeroes_weights_and_rescales_the_rest(function) -> None:
    # Full attention over equal keys: every weight is 1/t, so an output counts the weights that are left.
    t, p = 400, 0.25
    query, key, value = torch.zeros(8, B, 4, E), torch.zeros(t, B, 4, E), torch.ones(t, B, 4, E)
    torch.manual_seed(0)
    out = function(query, key, value, causal=False, scale=SCALE, dropout_p=p)
    kept = out[..., 0] * t * (1 - p)
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-2)
    assert kept.mean().item() == pytest.approx(t * (1 - p), rel=0.02)
    assert kept.std() > 0


def test_low_precision_stays_near_the_reference() -> None:
    tensors = inputs(6, 6, 4, 2)
    expected = attention_reference(*tensors, causal=True, scale=SCALE)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        out = attention(*(x.to(dtype) for x in tensors), causal=True, scale=SCALE)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "query, key, value, expected",
    [
        ((6, 2, 32), (6, 2, 4, 8), (6, 2, 4, 8), ["(6, 2, 32)", "expected [s, b, h, e] and [t, b, g, e]"]),
        ((6, 2, 4, 8), (6, 8), (6, 8), ["(6, 8)", "expected [s, b, h, e] and [t, b, g, e]"]),
        ((6, 2, 4, 8), (6, 2, 4, 8), (5, 2, 4, 8), ["value (5, 2, 4, 8)", "key's shape (6, 2, 4, 8)"]),
        ((6, 2, 4, 8), (6, 2, 4, 8), (6, 2, 4), ["value (6, 2, 4)", "key's shape (6, 2, 4, 8)"]),
        ((6, 2, 4, 8), (6, 3, 4, 8), (6, 3, 4, 8), ["(6, 3, 4, 8)", "batch and head size must be equal"]),
        ((6, 2, 4, 8), (6, 2, 4, 4), (6, 2, 4, 4), ["(6, 2, 4, 4)", "batch and head size must be equal"]),
        ((6, 2, 4, 8), (6, 2, 3, 8), (6, 2, 3, 8), ["3 groups", "must divide the query's 4 heads"]),
    ],
)
def test_shapes_that_do_not_fit(query, key, value, expected: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        attention(torch.zeros(query), torch.zeros(key), torch.zeros(value), causal=True, scale=1.0)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_dtypes_that_do_not_fit(odd: int) -> None:
    tensors = [torch.zeros(6, 2, 4, 8) for _ in range(3)]
    tensors[odd] = tensors[odd].double()
    with pytest.raises(ValueError, match="dtypes .*float64.*: must be equal"):
        attention(*tensors, causal=True, scale=1.0)


# Lengths of the queries and of the keys, sequence by sequence.
PACKED = [
    ([6], [6]),
    ([3, 5, 1], [3, 5, 1]),
    ([2, 4, 1], [5, 4, 7]),
    ([5, 3], [2, 3]),
    ([0, 4, 0], [0, 4, 3]),
    ([3, 2], [0, 4]),
]
# dtype, dropout probability, tolerance. The kernels take float32; float64, and any dropout, runs on SDPA.
PACKED_RUNS = [
    (torch.float64, 0.0, 1e-12),
    (torch.float32, 0.0, 1e-5),
    (torch.float32, 1e-30, 1e-5),
]


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed_loop(query, key, value, queries: list[int], keys: list[int], **options) -> Tensor:
    """The reference on one sequence after another."""
    pieces = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    parts = [attention_reference(*(x.unsqueeze(1) for x in piece), **options)[:, 0] for piece in pieces]
    return torch.cat(parts)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
@pytest.mark.parametrize("dtype, dropout_p, tolerance", PACKED_RUNS, ids=["float64", "float32", "dropout"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries, keys", PACKED)
def test_packed_is_the_reference_on_each_sequence(
    queries: list[int],
    keys: list[int],
    causal: bool,
    dtype: torch.dtype,
    dropout_p: float,
    tolerance: float,
    tied: bool,
) -> None:
    query, key = random(sum(queries), 4, E, seed=1), random(sum(keys), 2, E, seed=2)
    tensors = (query, key) if tied else (query, key, random(sum(keys), 2, E, seed=3))

    def packed(query: Tensor, key: Tensor, value: Tensor | None = None) -> Tensor:
        value = key if value is None else value
        lengths = (starts(queries), starts(keys), max(queries), max(keys))
        options = {"causal": causal, "scale": SCALE, "dropout_p": dropout_p}
        return attention_packed(query, key, value, *lengths, **options)

    def expected(query: Tensor, key: Tensor, value: Tensor | None = None) -> Tensor:
        value = key if value is None else value
        return packed_loop(query, key, value, queries, keys, causal=causal, scale=SCALE)

    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = packed(*leaves)
    assert out.shape == query.shape and out.is_contiguous() and out.dtype == dtype
    grads = torch.autograd.grad(out, leaves, random(*out.shape, seed=9).to(dtype))
    wanted, wanted_grads = gradients(expected, tensors)
    for got, exactly in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(got.double(), exactly, rtol=tolerance, atol=tolerance)


def test_packed_takes_strided_views_and_long_starts() -> None:
    mixed = random(8, 2, 4 * E)
    query, key = mixed[..., : 2 * E].reshape(8, 4, E), mixed[..., 2 * E : 3 * E]
    assert not key.is_contiguous()
    lengths = starts([5, 3])
    for dtype in (torch.float64, torch.float32):
        q, k = query.to(dtype), mixed.to(dtype)[..., 2 * E : 3 * E]
        out = attention_packed(q, k, k, lengths.long(), lengths.long(), 5, 5, causal=True, scale=SCALE)
        expected = packed_loop(query, key, key, [5, 3], [5, 3], causal=True, scale=SCALE)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "query, key, value, expected",
    [
        ((6, 2, 4, 8), (6, 2, 4, 8), (6, 2, 4, 8), ["(6, 2, 4, 8)", "expected [n, h, e] and [n, g, e]"]),
        ((6, 4, 8), (6, 4, 8), (6, 2, 8), ["value (6, 2, 8)", "key's shape (6, 4, 8)"]),
        ((6, 4, 8), (6, 4, 16), (6, 4, 16), ["(6, 4, 16)", "head size must be equal"]),
        ((6, 4, 8), (6, 3, 8), (6, 3, 8), ["3 groups", "must divide the query's 4 heads"]),
        ((6, 4, 8), (6, 0, 8), (6, 0, 8), ["(6, 0, 8)", "only lengths may be 0"]),
    ],
)
def test_packed_shapes_that_do_not_fit(query, key, value, expected: list[str]) -> None:
    tensors = [torch.zeros(shape) for shape in (query, key, value)]
    with pytest.raises(ValueError) as error:
        attention_packed(*tensors, starts([6]), starts([6]), 6, 6, causal=True, scale=1.0)
    for part in expected:
        assert part in str(error.value)


# cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k over 6 queries and 6 keys, and what the message names
BAD_STARTS = [
    ([0, 2, 5], [0, 2, 6], 6, 6, "cu_seqlens_q"),
    ([0, 2, 6], [0, 2, 7], 6, 6, "cu_seqlens_k"),
    ([0, 6], [0, 2, 6], 6, 6, "cu_seqlens"),
    ([0], [0], 6, 6, "cu_seqlens_q"),
    ([1, 6], [0, 6], 6, 6, "cu_seqlens_q"),
    ([0, 6], [1, 6], 6, 6, "cu_seqlens_k"),
    ([0, 4, 2, 6], [0, 4, 4, 6], 6, 6, "cu_seqlens_q"),
    ([0, 2, 6], [0, 2, 6], 3, 6, "cu_seqlens_q"),
    ([0, 2, 6], [0, 2, 6], 6, 3, "cu_seqlens_k"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "fallback"])
@pytest.mark.parametrize("starts_q, starts_k, max_q, max_k, name", BAD_STARTS)
def test_cumulative_lengths_that_do_not_fit(
    starts_q: list[int], starts_k: list[int], max_q: int, max_k: int, name: str, dtype: torch.dtype
) -> None:
    tensor = torch.zeros(6, 4, E, dtype=dtype)
    lengths = [torch.tensor(x, dtype=torch.int32) for x in (starts_q, starts_k)]
    with pytest.raises(ValueError, match=name):
        attention_packed(tensor, tensor, tensor, *lengths, max_q, max_k, causal=True, scale=1.0)
