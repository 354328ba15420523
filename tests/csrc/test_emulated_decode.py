"""The CUDA decode kernels, executed on the CPU.

Shape legend: b sequences, s query length, t cache length, h query heads, g groups, e head size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emulator import COMPILER, NO_COMPILER, Emulator, Refused, emulator
from oracle import assert_as_exact_as_plain, exact, plain

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
HEAD_SIZES = pytest.mark.parametrize("e", [64, 80, 128])


@pytest.fixture(scope="module")
def kernels() -> Emulator:
    return emulator()


def inputs(
    lengths: list[int], s: int, t: int, h: int, g: int, e: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """The query, a cache that is NaN behind each length, and the lengths."""
    random = torch.Generator().manual_seed(s * 10007 + t * 101 + h * 11 + g + e)
    query = torch.randn(len(lengths), s, h, e, generator=random).to(dtype)
    key = torch.randn(len(lengths), t, g, e, generator=random).to(dtype)
    for cache, length in zip(key, lengths, strict=True):
        cache[length:] = float("nan")
    return query, key, torch.tensor(lengths, dtype=torch.int32)


def paged(key: Tensor, page_size: int, spare: int = 3) -> tuple[Tensor, Tensor]:
    """The cache as pages in random order, and the block table."""
    b, t, g, e = key.shape
    per_sequence = -(-t // page_size)
    pages = torch.full((b * per_sequence + spare, page_size, g, e), float("nan"), dtype=key.dtype)
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(t))[: b * per_sequence]
    padded = torch.nn.functional.pad(key, (0, 0, 0, 0, 0, per_sequence * page_size - t), value=float("nan"))
    pages[order] = padded.reshape(-1, page_size, g, e)
    return pages, order.view(b, per_sequence).int()


def check(out: Tensor, lse: Tensor, query: Tensor, key: Tensor, lengths: Tensor) -> None:
    """Per sequence: out against plain PyTorch's error; FlashMLA's tolerances for lse and out's angle."""
    for i, length in enumerate(lengths.tolist()):
        expected, expected_lse = exact(query[i : i + 1], key[i : i + 1, :length], causal=True)
        reference = plain(query[i : i + 1], key[i : i + 1, :length], causal=True)
        assert_as_exact_as_plain(out[i : i + 1], expected, reference)
        torch.testing.assert_close(lse[i].double(), expected_lse[0], atol=1e-6, rtol=8 / 65536)
        squares = out[i].double().square().sum() + expected.square().sum()
        assert (out[i].double() - expected[0]).square().sum() <= 5e-6 * squares


@BOTH_DTYPES
@HEAD_SIZES
@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_lengths(kernels: Emulator, num_splits: int, e: int, dtype: torch.dtype) -> None:
    query, key, lengths = inputs([0, 1, 63, 64, 65, 300, 17], 1, 300, 4, 2, e, dtype)
    out, lse = kernels.decode(query, key, seqlens=lengths, num_splits=num_splits, seed=1)
    assert kernels.bank_conflicts() == 0
    check(out, lse, query, key, lengths)
    assert (out[0] == 0).all() and (lse[0] == float("-inf")).all()


@HEAD_SIZES
@pytest.mark.parametrize(("h", "g"), [(2, 2), (8, 1), (16, 1), (17, 1), (32, 1), (40, 1), (32, 4)])
def test_groups(kernels: Emulator, h: int, g: int, e: int) -> None:
    query, key, lengths = inputs([257, 100], 1, 257, h, g, e)
    out, lse = kernels.decode(query, key, seqlens=lengths, num_splits=3)
    assert kernels.bank_conflicts() == 0
    check(out, lse, query, key, lengths)


@HEAD_SIZES
@pytest.mark.parametrize(("s", "h", "g"), [(2, 4, 2), (5, 2, 2), (3, 8, 1), (40, 2, 2)])
def test_several_queries_see_the_keys_before_them(kernels: Emulator, s: int, h: int, g: int, e: int) -> None:
    query, key, lengths = inputs([150, 1, 66, 0, 64, s], s, 150, h, g, e)
    for num_splits in (1, 2):
        out, lse = kernels.decode(query, key, seqlens=lengths, num_splits=num_splits)
        assert kernels.bank_conflicts() == 0
        check(out, lse, query, key, lengths)


@HEAD_SIZES
@pytest.mark.parametrize("page_size", [64, 128])
def test_paged_equals_contiguous(kernels: Emulator, page_size: int, e: int) -> None:
    query, key, lengths = inputs([0, 1, 64, 65, 450], 2, 450, 4, 2, e)
    pages, table = paged(key, page_size)
    for num_splits in (1, 3):
        expected = kernels.decode(query, key, seqlens=lengths, num_splits=num_splits)
        result = kernels.decode(query, pages, seqlens=lengths, block_table=table, num_splits=num_splits)
        assert kernels.bank_conflicts() == 0
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("bad_page", [-1, 100, 2**31 - 1])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_bad_page_spoils_its_sequence_only(kernels: Emulator, bad_page: int, num_splits: int) -> None:
    query, key, lengths = inputs([200, 200, 200], 1, 256, 2, 1, 64)
    pages, table = paged(key, 64)
    expected, expected_lse = kernels.decode(
        query, pages, seqlens=lengths, block_table=table, num_splits=num_splits
    )
    table[0, 2] = bad_page
    table[1, 3] = bad_page  # holds keys 192 to 199
    table[2] = torch.where(torch.arange(4) < 4, table[2], bad_page)
    lengths[0] = 128  # ends before its bad page
    out, lse = kernels.decode(query, pages, seqlens=lengths, block_table=table, num_splits=num_splits)
    assert out[1].isnan().all() and lse[1].isnan().all()
    assert torch.equal(out[2], expected[2]) and torch.equal(lse[2], expected_lse[2])
    check(out[:1], lse[:1], query[:1], key[:1], lengths[:1])


@HEAD_SIZES
def test_equals_the_last_row_of_forward(kernels: Emulator, e: int) -> None:
    query, key, _ = inputs([193, 193], 193, 193, 4, 2, e)
    expected, expected_lse = kernels.forward(query, key, causal=True)
    out, lse = kernels.decode(query[:, -1:], key, num_splits=1)
    torch.testing.assert_close(out, expected[:, -1:], atol=2e-3, rtol=2 / 128)
    torch.testing.assert_close(lse, expected_lse[..., -1:], atol=2e-6, rtol=0)


def test_long_cache_does_not_drift(kernels: Emulator) -> None:
    """An error per tile in the running maximum would add up over 256 tiles."""
    query, key, lengths = inputs([16384], 1, 16384, 1, 1, 64)
    query = query * 5
    out, lse = kernels.decode(query, key, num_splits=1)
    _, expected_lse = exact(query, key, causal=True)
    torch.testing.assert_close(lse.double(), expected_lse, atol=3e-6, rtol=0)


@BOTH_DTYPES
def test_large_logits(kernels: Emulator, dtype: torch.dtype) -> None:
    query, key, lengths = inputs([300], 1, 300, 4, 2, 64, dtype)
    out, lse = kernels.decode(query * 3000, key, num_splits=2)
    expected, expected_lse = exact(query * 3000, key, causal=True)
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)  # plain float16 overflows
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)


@HEAD_SIZES
def test_no_seed_changes_a_bit(kernels: Emulator, e: int) -> None:
    query, key, lengths = inputs([321, 65], 3, 330, 12, 2, e)
    pages, table = paged(key, 64)
    first = kernels.decode(query, pages, seqlens=lengths, block_table=table, num_splits=3, seed=0)
    for seed in range(1, 8):
        result = kernels.decode(query, pages, seqlens=lengths, block_table=table, num_splits=3, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))


def test_strides(kernels: Emulator) -> None:
    """A cache with heads before positions, and the query as a slice."""
    query, key, lengths = inputs([130, 90], 2, 130, 4, 2, 80)
    expected = kernels.decode(query, key, seqlens=lengths, num_splits=2)
    by_heads = key.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([query, query], dim=2)[:, :, 4:]
    result = kernels.decode(wide, by_heads, seqlens=lengths, num_splits=2)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_splits_fill_the_machine_but_are_not_short(kernels: Emulator) -> None:
    query, key, lengths = inputs([300], 1, 300, 4, 2, 64)
    for multiprocessors in (1, 4, 108):
        kernels.set_multiprocessors(multiprocessors)
        out, lse = kernels.decode(query, key, seqlens=lengths)
        check(out, lse, query, key, lengths)
        # 2 blocks per multiprocessor over 2 groups; 5 tiles of 64 keys allow 2 splits of 2 tiles or more.
        assert kernels.decode_num_splits(query, key) == min(multiprocessors, 2)
    kernels.set_multiprocessors(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("page_size", "page_size is 32; accepted: a multiple of 64"),
        ("num_splits", "num_splits is 257; accepted: 0"),
        ("head_size", "head_size is 96; accepted: 64, 80 or 128"),
    ],
)
def test_refusals(kernels: Emulator, change: str, message: str) -> None:
    query, key, lengths = inputs([64], 1, 64, 2, 1, 96 if change == "head_size" else 64)
    table = None
    if change == "page_size":
        key, table = paged(key, 32)
    with pytest.raises(Refused, match=message):
        kernels.decode(query, key, block_table=table, num_splits=257 if change == "num_splits" else 1)
