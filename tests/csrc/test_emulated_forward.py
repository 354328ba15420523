"""The CUDA forward kernels, executed on the CPU.

Shape legend: b sequences, s query length, t key length, h query heads, g groups, e head size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emulator import COMPILER, NO_COMPILER, Emulator, Refused, emulator
from oracle import assert_as_exact_as_plain, assert_same_lse, exact, plain

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)
SLOW = pytest.mark.slow
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
HEAD_SIZES = pytest.mark.parametrize("e", [64, 80, 128])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@pytest.fixture(scope="module")
def kernels() -> Emulator:
    return emulator()


def inputs(b: int, s: int, t: int, h: int, g: int, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(s * 10007 + t * 101 + h * 11 + g + e)
    query = torch.randn(b, s, h, e, generator=random).to(dtype)
    return query, torch.randn(b, t, g, e, generator=random).to(dtype)


def check(kernels: Emulator, query: Tensor, key: Tensor, causal: bool, scale: float | None = None) -> None:
    out, lse = kernels.forward(query, key, causal=causal, scale=scale, seed=3)
    assert kernels.bank_conflicts() == 0
    expected, expected_lse = exact(query, key, causal=causal, scale=scale)
    assert_as_exact_as_plain(out, expected, plain(query, key, causal=causal, scale=scale))
    assert_same_lse(lse, expected_lse)


@BOTH_DTYPES
@HEAD_SIZES
@CAUSAL
@pytest.mark.parametrize("length", [1, 17, 128, 257, *(pytest.param(n, marks=SLOW) for n in (2, 97, 200))])
def test_lengths(kernels: Emulator, length: int, causal: bool, e: int, dtype: torch.dtype) -> None:
    check(kernels, *inputs(2, length, length, 2, 1, e, dtype), causal)


@HEAD_SIZES
@CAUSAL
@pytest.mark.parametrize(
    ("s", "t"), [(1, 200), (17, 129), (97, 257), (129, 128), (257, 97), (200, 64), (300, 1), (64, 0), (0, 64)]
)
def test_lengths_that_differ(kernels: Emulator, s: int, t: int, causal: bool, e: int) -> None:
    check(kernels, *inputs(1, s, t, 2, 2, e, torch.bfloat16), causal)


@CAUSAL
@pytest.mark.parametrize(("h", "g"), [(4, 4), (6, 2), (6, 3), (5, 1), (9, 3)])
def test_groups(kernels: Emulator, h: int, g: int, causal: bool) -> None:
    check(kernels, *inputs(2, 150, 150, h, g, 64, torch.float16), causal)


@pytest.mark.slow
@BOTH_DTYPES
@HEAD_SIZES
@CAUSAL
@pytest.mark.parametrize("length", [1023, 1025, 2048])
def test_long(kernels: Emulator, length: int, causal: bool, e: int, dtype: torch.dtype) -> None:
    check(kernels, *inputs(1, length, length, 2, 1, e, dtype), causal)


@HEAD_SIZES
def test_rows_without_keys_give_zero(kernels: Emulator, e: int) -> None:
    query, key = inputs(1, 200, 70, 2, 1, e, torch.bfloat16)
    out, lse = kernels.forward(query, key, causal=True)
    assert (out[:, :130] == 0).all() and (lse[..., :130] == float("-inf")).all()
    assert (out[:, 130:] != 0).any() and lse[..., 130:].isfinite().all()


@HEAD_SIZES
@CAUSAL
def test_strides(kernels: Emulator, e: int, causal: bool) -> None:
    """Heads before positions, slices of one projection, and an output of yet another layout."""
    query, key = inputs(2, 131, 131, 4, 2, e, torch.bfloat16)
    expected, expected_lse = kernels.forward(query, key, causal=causal)
    by_heads = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key)]
    fused = torch.cat([query.unflatten(2, (2, 2)), key.unsqueeze(3)], dim=3)  # [b, s, g, h / g + 1, e]
    key_slice = fused[..., -1, :]
    sequence_first = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in (query, key)]
    for q, k in (by_heads, (query, key_slice), sequence_first):
        out_strides = (131 * 4 * 2 * e, 8 * e, 2 * e, 1)
        out, lse = kernels.forward(q, k, causal=causal, out_strides=out_strides)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@HEAD_SIZES
@CAUSAL
def test_packed_sequences_equal_single_ones(kernels: Emulator, e: int, causal: bool) -> None:
    query_lengths, key_lengths = [5, 0, 130, 64, 7, 33], [5, 9, 130, 20, 0, 190]
    query, key = inputs(1, sum(query_lengths), sum(key_lengths), 2, 1, e, torch.bfloat16)
    cu = tuple(torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (query_lengths, key_lengths))
    out, lse = kernels.forward(query[0], key[0], causal=causal, cu_seqlens=cu, seed=5)
    assert kernels.bank_conflicts() == 0
    assert not out.isnan().any()
    for i in range(len(query_lengths)):
        rows, keys = (slice(int(each[i]), int(each[i + 1])) for each in cu)
        if rows.stop == rows.start:
            continue
        alone, alone_lse = kernels.forward(query[:, rows], key[:, keys], causal=causal)
        assert torch.equal(out[rows], alone[0])
        assert torch.equal(lse[:, rows], alone_lse[0])


@BOTH_DTYPES
@CAUSAL
@pytest.mark.parametrize("factor", [30.0, 3000.0])
def test_large_logits(kernels: Emulator, causal: bool, dtype: torch.dtype, factor: float) -> None:
    query, key = inputs(1, 150, 150, 2, 1, 64, dtype)
    query = query * factor
    out, lse = kernels.forward(query, key * 5, causal=causal)
    expected, expected_lse = exact(query, key * 5, causal=causal)
    assert lse.isfinite().all()
    torch.testing.assert_close(out.double(), expected, atol=0.1, rtol=0.02)  # plain float16 overflows
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_scale(kernels: Emulator, scale: float) -> None:
    check(kernels, *inputs(1, 100, 100, 1, 1, 80, torch.bfloat16), True, scale)


@HEAD_SIZES
@CAUSAL
def test_no_seed_changes_a_bit(kernels: Emulator, e: int, causal: bool) -> None:
    query, key = inputs(2, 260, 260, 2, 1, e, torch.bfloat16)
    first, first_lse = kernels.forward(query, key, causal=causal, seed=0)
    for seed in range(1, 8):
        out, lse = kernels.forward(query, key, causal=causal, seed=seed)
        assert torch.equal(out, first) and torch.equal(lse, first_lse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("head_size", "head_size is 96; accepted: 64, 80 or 128"),
        ("dtype", "dtype is 0; accepted: 1"),
        ("groups", "heads is 3; accepted: a multiple of groups"),
        ("scale", "scale is 0.000000; accepted: finite and above 0"),
        ("stride", "key seq stride is 132; accepted: a multiple of 8"),
        ("address", "query address modulo 16 is 2; accepted: 0"),
    ],
)
def test_refusals_name_argument_value_and_what_works(kernels: Emulator, change: str, message: str) -> None:
    query, key = inputs(1, 16, 16, 4, 2, 96 if change == "head_size" else 64, torch.bfloat16)
    scale = 0.0 if change == "scale" else None
    if change == "dtype":
        query, key = query.float(), key.float()
    if change == "groups":
        query = query[:, :, :3]
    if change == "stride":
        key = torch.nn.functional.pad(key.flatten(2), (0, 4))[..., :128].unflatten(2, (2, 64))
    if change == "address":
        query = torch.nn.functional.pad(query.flatten(), (1, 0))[1:].view_as(query)
    with pytest.raises(Refused, match=message):
        kernels.forward(query, key, causal=False, scale=scale)
