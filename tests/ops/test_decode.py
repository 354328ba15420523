"""ops.decode and the CPU kernel under it, against the plain reference and against the forward kernel.

Caches are NaN behind each sequence's length, and so are pages that no table names.

Shape legend: b sequences, s query length, t cache length, h query heads, g groups, e head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from capability_worker import (
    assert_as_exact_as_plain,
    assert_near,
    assert_same_lse,
    check_decoded,
    decode_inputs,
    exact,
    paged,
)
from megatron_sharedproj.ops import extension
from megatron_sharedproj.ops.attention import attention
from megatron_sharedproj.ops.decode import decode
from megatron_sharedproj.ops.reference import attention_reference, decode_reference

needs_kernel = pytest.mark.skipif(extension.MISSING != "", reason=extension.MISSING)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
LENGTHS = [513, 0, 1, 63, 64, 65, 200]
# (h, g): a group's query rows are h / g * s; fewer than 10 and 10 or more are computed differently.
HEADS = [(3, 3), (4, 2), (8, 2), (14, 2), (20, 20), (40, 1), (22, 2)]
HEAD_SIZES = [8, 16, 24, 40, 48, 64, 80, 128, 200, 256]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
@pytest.mark.parametrize("s, h, g", [(1, 2, 2), (2, 4, 2), (5, 4, 1)])
def test_reference_is_the_formula(s: int, h: int, g: int, tied: bool) -> None:
    query, key, value, lengths = decode_inputs([7, 0, 1, s, 3], s, 7, h, g, 8, torch.float64)
    out, lse = decode_reference(query, key, None if tied else value, 0.3, lengths)
    for z, length in enumerate(lengths.tolist()):
        k, v = (x[z : z + 1, :length] for x in (key, key if tied else value))
        expected, expected_lse = exact(query[z : z + 1], k, v, causal=True, scale=0.3)
        torch.testing.assert_close(out[z : z + 1], expected, rtol=0, atol=1e-12)
        assert_same_lse(lse[z : z + 1], expected_lse)


@needs_kernel
@BOTH_DTYPES
@pytest.mark.parametrize("s", [1, 2, 5])
@pytest.mark.parametrize("h, g", HEADS)
def test_lengths(h: int, g: int, s: int, dtype: torch.dtype) -> None:
    e = HEAD_SIZES[(h + s) % 10]
    query, key, value, lengths = decode_inputs(LENGTHS, s, 513, h, g, e, dtype)
    scale = e**-0.5
    for separate in (None, value):
        out, lse = decode(query, key, separate, scale=scale, seqlens_k=lengths)
        check_decoded(out, lse, query, key, separate, lengths)
        blind = [(1, s), (2, s - 1)]  # sequences of 0 keys and of 1: rows that see none
        for z, rows in blind:
            assert not out[z, :rows].any() and (lse[z, :, :rows] == float("-inf")).all()


@needs_kernel
@BOTH_DTYPES
@pytest.mark.parametrize("h, s", [(3, 1), (4, 5)])
@pytest.mark.parametrize("e", HEAD_SIZES)
def test_head_sizes(e: int, h: int, s: int, dtype: torch.dtype) -> None:
    query, key, value, lengths = decode_inputs([70, 17], s, 70, h, 1, e, dtype)
    for separate in (None, value):
        check_decoded(
            *decode(query, key, separate, scale=e**-0.5, seqlens_k=lengths), query, key, separate, lengths
        )


@needs_kernel
@pytest.mark.slow
@BOTH_DTYPES
@pytest.mark.parametrize("e", HEAD_SIZES)
@pytest.mark.parametrize("h, g", HEADS)
def test_all_combinations(h: int, g: int, e: int, dtype: torch.dtype) -> None:
    for s, num_splits in itertools.product((1, 3, 4, 16), (0, 3)):
        query, key, value, lengths = decode_inputs(LENGTHS, s, 600, h, g, e, dtype)
        for separate in (None, value):
            out, lse = decode(query, key, separate, scale=e**-0.5, seqlens_k=lengths, num_splits=num_splits)
            check_decoded(out, lse, query, key, separate, lengths)


@needs_kernel
@BOTH_DTYPES
@pytest.mark.parametrize("h, g, s", [(4, 2, 1), (4, 2, 3), (40, 1, 1)])
def test_any_number_of_splits(h: int, g: int, s: int, dtype: torch.dtype) -> None:
    query, key, _, lengths = decode_inputs(LENGTHS, s, 1100, h, g, 64, dtype)
    lengths[-1] = 1100
    key = key.nan_to_num(0.5)
    for num_splits in (0, 1, 2, 3, 7, 256):
        out, lse = decode(query, key, scale=0.125, seqlens_k=lengths, num_splits=num_splits)
        check_decoded(out, lse, query, key, None, lengths)


@needs_kernel
@BOTH_DTYPES
@pytest.mark.parametrize("s", [1, 2, 5])
@pytest.mark.parametrize("h, g", [(4, 2), (40, 1)])
def test_equals_the_last_rows_of_forward(h: int, g: int, s: int, dtype: torch.dtype) -> None:
    e = 80
    query, key, value, _ = decode_inputs([193, 193], 193, 193, h, g, e, dtype)
    for separate in (None, value):
        expected, expected_lse = torch.ops.megatron_sharedproj.attention(query, key, separate, True, e**-0.5)
        out, lse = decode(query[:, -s:], key, separate, scale=e**-0.5)
        # Both sum in float32; weights are rounded to bfloat16 in one of them.
        error = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(out, expected[:, -s:], rtol=error, atol=error)
        torch.testing.assert_close(lse, expected_lse[..., -s:], rtol=0, atol=1e-5)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[t, b, g, e]": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "[b, g, t, e]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "[b, t, g, 2e]": lambda x: torch.cat([x, torch.full_like(x, float("nan"))], dim=-1)[..., : x.shape[-1]],
    "longer": lambda x: torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, : x.shape[1]],
    "off alignment": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@needs_kernel
@BOTH_DTYPES
@pytest.mark.parametrize("h, g, s", [(4, 2, 1), (4, 2, 3), (24, 2, 1), (20, 20, 1), (40, 10, 1)])
@pytest.mark.parametrize("shift", range(len(LAYOUTS)), ids=LAYOUTS)
def test_every_tensor_in_another_layout(shift: int, h: int, g: int, s: int, dtype: torch.dtype) -> None:
    query, key, value, lengths = decode_inputs([200, 65, 0], s, 200, h, g, 40, dtype)
    options = {"scale": 0.2, "seqlens_k": lengths, "num_splits": 2}
    in_key, in_value, in_query = ([*LAYOUTS.values()] * 2)[shift : shift + 3]
    assert in_key(key).stride() != key.stride() or in_key(key).data_ptr() % 16
    for separate in (None, value):
        expected = decode(query, key, separate, **options)
        other = None if separate is None else in_value(value)
        result = decode(in_query(query), in_key(key), other, **options)
        # Which keys a loop takes together depends on the layout, and with it the order of sums.
        error = 1e-5 if dtype == torch.float32 else 2**-7
        for got, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=error, atol=error)


@needs_kernel
@BOTH_DTYPES
@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("h, g, s", [(4, 2, 1), (4, 2, 5), (40, 1, 1)])
def test_paged_equals_contiguous(h: int, g: int, s: int, page_size: int, dtype: torch.dtype) -> None:
    query, key, value, lengths = decode_inputs(LENGTHS, s, 513, h, g, 80, dtype)
    (key_pages, value_pages), table = paged([key, value], page_size)
    assert not torch.equal(table.flatten().sort().values, table.flatten())
    wide = torch.full((len(LENGTHS), table.shape[1] + 2), -1, dtype=torch.int32)
    wide[:, : table.shape[1]] = table
    cases = itertools.product((None, value), (table, wide, wide[:, : table.shape[1]]), (0, 3))
    for separate, blocks, num_splits in cases:
        options = {"scale": 0.1, "seqlens_k": lengths, "num_splits": num_splits}
        pages = None if separate is None else value_pages
        result = decode(query, key_pages, pages, block_table=blocks, **options)
        assert all(map(torch.equal, result, decode(query, key, separate, **options)))


@needs_kernel
def test_without_lengths_the_whole_cache_counts() -> None:
    query, key, _, _ = decode_inputs([128, 128], 2, 128, 4, 2, 16, torch.float32)
    full = torch.full((2,), 128, dtype=torch.int32)
    (pages,), table = paged([key], 64)
    expected = decode(query, key, scale=0.25, seqlens_k=full)
    check_decoded(*expected, query, key, None, full)
    assert all(map(torch.equal, decode(query, key, scale=0.25), expected))
    assert all(map(torch.equal, decode(query, pages, scale=0.25, block_table=table), expected))


@needs_kernel
@BOTH_DTYPES
@pytest.mark.parametrize("h", [4, 24])
def test_large_logits(h: int, dtype: torch.dtype) -> None:
    query, key, _, lengths = decode_inputs([300, 65], 2, 300, h, 2, 64, dtype)
    expected, _ = decode_reference(query.double(), key.double(), None, 50.0, lengths)
    for num_splits in (1, 3):
        out, lse = decode(query, key, scale=50.0, seqlens_k=lengths, num_splits=num_splits)
        assert lse.isfinite().all()
        torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)


@needs_kernel
@BOTH_DTYPES
@pytest.mark.parametrize("h, s", [(4, 1), (24, 1), (4, 3)])
def test_nan_spoils_the_rows_that_see_it(h: int, s: int, dtype: torch.dtype) -> None:
    query, key, _, lengths = decode_inputs([200, 70, 200], s, 200, h, 2, 24, dtype)
    before, before_lse = decode(query, key, scale=0.2, seqlens_k=lengths, num_splits=2)
    key[2, 150, 1, 3] = float("nan")  # of the second split and the second half of the heads
    query[0, 0, 0, 7] = float("nan")
    out, lse = decode(query, key, scale=0.2, seqlens_k=lengths, num_splits=2)
    spoilt = torch.zeros(3, s, h, dtype=torch.bool)
    spoilt[2, :, h // 2 :] = True
    spoilt[0, 0, 0] = True
    assert out[spoilt].isnan().all() and torch.equal(out[~spoilt], before[~spoilt])
    spoilt = spoilt.transpose(1, 2)
    assert lse[spoilt].isnan().all() and torch.equal(lse[~spoilt], before_lse[~spoilt])


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(before)


@needs_kernel
@BOTH_DTYPES
@pytest.mark.parametrize("h, s", [(4, 1), (24, 1), (4, 3)])
def test_bitwise_the_same_whatever_memory_held_and_for_any_number_of_threads(
    h: int, s: int, dtype: torch.dtype, fresh_memory_is_nan: None
) -> None:
    query, key, _, lengths = decode_inputs([700, 0, 70, 513], s, 700, h, 2, 40, dtype)
    expected = decode(query, key, scale=0.2, seqlens_k=lengths)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            decode(torch.full_like(query, float("nan")), key, scale=0.2, seqlens_k=lengths)
            assert all(map(torch.equal, decode(query, key, scale=0.2, seqlens_k=lengths), expected))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
def test_float64_runs_the_reference(tied: bool) -> None:
    query, key, value, lengths = decode_inputs([65, 3], 2, 65, 4, 2, 12, torch.float64)
    separate = None if tied else value
    (key_pages, value_pages), table = paged([key, value], 64)
    expected = decode_reference(query, key, separate, 0.3, lengths)
    assert expected[0].abs().max() > 0.1
    contiguous = decode(query, key, separate, scale=0.3, seqlens_k=lengths, num_splits=2)
    pages = None if tied else value_pages
    tabled = decode(query, key_pages, pages, scale=0.3, seqlens_k=lengths, block_table=table)
    assert all(map(torch.equal, contiguous, expected)) and all(map(torch.equal, tabled, expected))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_gradient(which: int) -> None:
    query, key, value, _ = decode_inputs([65], 1, 65, 4, 2, 16, torch.float32)
    (query, key, value)[which].requires_grad_()
    with pytest.raises(ValueError, match=r"decode has no gradient: call it under torch.no_grad\(\)"):
        decode(query, key, value, scale=0.25)
    with torch.no_grad():
        out, lse = decode(query, key, value, scale=0.25)
    assert not out.requires_grad and not lse.requires_grad


BAD_LENGTHS_AND_PAGES = [
    ([66, 3], None, "seqlens_k gives sequence 0 the length 66; accepted: 0 to the cache's 65"),
    ([65, -1], None, "seqlens_k gives sequence 1 the length -1; accepted: 0 to the cache's 65"),
    ([129, 3], [[0, 1], [2, 3]], "seqlens_k gives sequence 0 the length 129; accepted: 0 to the cache's 128"),
    ([65, 3], [[0, 4], [2, 3]], "block_table names page 4 for sequence 0; accepted: 0 to 3"),
    ([65, 3], [[0, 1], [-1, 3]], "block_table names page -1 for sequence 1; accepted: 0 to 3"),
]


@needs_kernel
@pytest.mark.parametrize("lengths, table, message", BAD_LENGTHS_AND_PAGES)
def test_lengths_and_pages_that_do_not_fit(lengths: list[int], table: list | None, message: str) -> None:
    query = torch.zeros(2, 1, 4, 16)
    cache = torch.zeros(2, 65, 2, 16) if table is None else torch.zeros(4, 64, 2, 16)
    with pytest.raises(ValueError, match=message):
        decode(
            query,
            cache,
            scale=1.0,
            seqlens_k=torch.tensor(lengths, dtype=torch.int32),
            block_table=None if table is None else torch.tensor(table, dtype=torch.int32),
        )


@pytest.mark.parametrize("lengths, table, message", BAD_LENGTHS_AND_PAGES)
def test_the_fallback_refuses_them_too(lengths: list[int], table: list | None, message: str) -> None:
    query = torch.zeros(2, 1, 4, 16, dtype=torch.float64)
    shape = (2, 65, 2, 16) if table is None else (4, 64, 2, 16)
    blocks = None if table is None else torch.tensor(table, dtype=torch.int32)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    with pytest.raises(ValueError, match=message.split()[0]):
        decode(query, torch.zeros(shape).double(), scale=1.0, seqlens_k=seqlens, block_table=blocks)


@needs_kernel
def test_pages_behind_a_length_are_not_read() -> None:
    query, key, _, lengths = decode_inputs([64, 3], 1, 128, 4, 2, 16, torch.float32)
    (pages,), table = paged([key], 64)
    expected = decode(query, pages, scale=0.25, seqlens_k=lengths, block_table=table)
    table[:, 1] = 2**31 - 1
    result = decode(query, pages, scale=0.25, seqlens_k=lengths, block_table=table)
    assert all(map(torch.equal, result, expected))


@needs_kernel
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
@pytest.mark.parametrize("s, t, causal", [(1, 70, False), (1, 70, True), (16, 70, True), (5, 3, True)])
def test_attention_of_few_queries_without_gradients(s: int, t: int, causal: bool, tied: bool) -> None:
    """ops.attention, whose tensors are [s, b, h, e], takes the decode kernel here."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=random) for shape in ((s, 2, 4, 24), (t, 2, 2, 24), (t, 2, 2, 24))
    )
    value = key if tied else value
    expected = attention_reference(query.double(), key.double(), value.double(), causal=causal, scale=0.2)
    assert_near("out", attention(query, key, value, causal=causal, scale=0.2), expected)
    low = [x.bfloat16() for x in (query, key, value)]
    plain = attention_reference(*low, causal=causal, scale=0.2)
    exactly = attention_reference(*(x.double() for x in low), causal=causal, scale=0.2)
    tied_low = (low[0], low[1], low[1]) if tied else low
    assert_as_exact_as_plain("out", attention(*tied_low, causal=causal, scale=0.2), exactly, plain)
