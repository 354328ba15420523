"""The CPU kernels, forward and backward, against float64 and against plain PyTorch's error in bfloat16.

The ops are called as registered; what surrounds them is tested in test_extension.py and test_attention.py.

Shape legend: b sequences, s query length, t key length, h query heads, g groups, e head size.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import capability_worker
from capability_worker import Case, Result, assert_near, check, run_exact, run_kernels, run_plain
from megatron_sharedproj.ops import extension

pytestmark = pytest.mark.skipif(extension.MISSING != "", reason=extension.MISSING)

# Lane blocks are 8 to 48 query rows, key blocks 64 keys.
EQUAL = [(s, s) for s in (1, 2, 17, 48, 49, 64, 97, 193, 257)]
UNEQUAL = [(1, 64), (17, 97), (64, 193), (49, 257), (97, 17), (64, 1), (193, 64), (257, 193)]
HEAD_SIZES = [8, 16, 24, 40, 48, 64, 80, 128, 200, 256]
# (h, g); 6 query heads of one group and 257 positions make several ranges of rows in the backward.
HEADS = [(3, 3), (4, 2), (6, 1)]
DTYPES = [torch.float32, torch.bfloat16]
BOTH_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])


def enough(s: int, t: int) -> int:
    """A batch with elements enough to compare largest errors of bfloat16."""
    return max(1, 64 // (s * t))


def covering_cases() -> list[Case]:
    """Every pair of lengths, masked and not, in both dtypes; head sizes, heads and batches taken in turn."""
    cases = []
    for i, ((s, t), causal) in enumerate(itertools.product(EQUAL + UNEQUAL, (True, False))):
        h, g = HEADS[i % 3]
        e, b = HEAD_SIZES[(7 * i + i // 10) % 10], max(enough(s, t), 1 + i // 3 % 3)
        cases += [Case(s, t, h, g, e, b, causal, dtype) for dtype in DTYPES]
    for (i, e), dtype in itertools.product(enumerate(HEAD_SIZES), DTYPES):
        cases.append(Case(49, 65, *HEADS[i % 3], e, dtype=dtype))
    cases += [Case(257, 257, 6, 1, 64, dtype=dtype) for dtype in DTYPES]
    return cases


@TIED
@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_forward_and_backward(case: Case, tied: bool) -> None:
    check(case, tied)


@pytest.mark.slow
@pytest.mark.parametrize("e", HEAD_SIZES)
@pytest.mark.parametrize("s, t", EQUAL + UNEQUAL)
def test_forward_and_backward_in_all_combinations(s: int, t: int, e: int) -> None:
    for (h, g), causal, dtype, tied in itertools.product(HEADS, (True, False), DTYPES, (True, False)):
        check(Case(s, t, h, g, e, enough(s, t), causal, dtype), tied)


@pytest.mark.slow
@TIED
@BOTH_DTYPES
@pytest.mark.parametrize("e", [64, 128])
@pytest.mark.parametrize("s, t", [(1023, 1023), (1025, 1025), (2048, 2048), (300, 1500), (1500, 300)])
def test_long_sequences(s: int, t: int, e: int, dtype: torch.dtype, tied: bool) -> None:
    check(Case(s, t, 4, 2, e, dtype=dtype), tied)


CAPABILITIES = ["baseline", "avx2", "avx512", "avx512_bf16"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability: str) -> None:
    own = extension.BUILD_INFO["cpu_capability"]
    if CAPABILITIES.index(capability) > CAPABILITIES.index(own):
        pytest.skip(f"this processor has {own}")
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, capability_worker.__file__],
        env={**os.environ, "SHAREDPROJ_CPU_CAPABILITY": capability, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == capability


def rows_a_page_apart(x: Tensor) -> Tensor:
    """Positions a multiple of 4096 bytes apart, NaN between them."""
    b, s, h, e = x.shape
    page = 4096 // x.element_size()
    base = x.new_full((b, s, -(-h * e // page) * page), float("nan"))
    base[..., : h * e] = x.flatten(2)
    return base[..., : h * e].unflatten(2, (h, e))


def off_alignment(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


# Each gives the values of a contiguous tensor in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "heads apart": lambda x: torch.cat([torch.full_like(x, float("nan")), x], dim=-1)[..., x.shape[-1] :],
    "rows a page apart": rows_a_page_apart,
    "off alignment": off_alignment,
}


def assert_bitwise_equal(results: Result, expected: Result) -> None:
    assert torch.equal(results.lse, expected.lse)
    assert results.named().keys() == expected.named().keys()
    for name, tensor in results.named().items():
        assert torch.equal(tensor, expected.named()[name]), name


@TIED
@BOTH_DTYPES
@pytest.mark.parametrize("shift", range(len(LAYOUTS)), ids=LAYOUTS)
def test_every_tensor_in_another_layout(shift: int, dtype: torch.dtype, tied: bool) -> None:
    case = Case(70, 130, 4, 2, 40, b=2, dtype=dtype)
    tensors = case.inputs()
    layouts = itertools.islice(itertools.cycle(LAYOUTS.values()), shift, None)
    views = [layout(x) for layout, x in zip(layouts, tensors, strict=False)]
    for x, y in zip(views, tensors, strict=True):
        assert torch.equal(x, y) and (x.stride() != y.stride() or x.data_ptr() % 16)
    assert_bitwise_equal(run_kernels(case, views, tied), run_kernels(case, tensors, tied))


@BOTH_DTYPES
@pytest.mark.parametrize("h, g", [(3, 3), (4, 1)])
def test_views_of_a_fused_projection(h: int, g: int, dtype: torch.dtype) -> None:
    """mixed [s, b, g, (h / g + 1) * e] holds each group's queries, then its one key/value."""
    s, b, e, per_group = 130, 2, 24, h // g
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(s, b, g, (per_group + 1) * e, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(b, s, h, e, generator=random).to(dtype)

    def gradient(contiguous: bool) -> Tensor:
        query, key = mixed.split([per_group * e, e], dim=-1)
        query = query.view(s, b, h, e).transpose(0, 1)
        assert query.data_ptr() == mixed.data_ptr()
        key = key.transpose(0, 1)
        if contiguous:
            query, key = query.contiguous(), key.contiguous()
        out, _ = torch.ops.megatron_sharedproj.attention(query, key, None, True, e**-0.5)
        return torch.autograd.grad(out, mixed, weight)[0]

    assert torch.equal(gradient(contiguous=False), gradient(contiguous=True))


@TIED
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_sequence_expanded_over_the_batch(which: int, tied: bool) -> None:
    case = Case(20, 70, 4, 2, 16, b=3)
    views = list(case.inputs())
    views[which] = views[which][:1].expand_as(views[which])
    assert views[which].stride(0) == 0
    assert_bitwise_equal(
        run_kernels(case, views, tied), run_kernels(case, [x.contiguous() for x in views], tied)
    )


def test_overlapping_rows() -> None:
    """A sliding window over one vector: position i + 1 begins an element after position i."""
    case = Case(8, 8, 1, 1, 16)
    windows = torch.randn(23, generator=torch.Generator().manual_seed(0)).unfold(0, 16, 1).view(1, 8, 1, 16)
    views = (windows, windows, windows, case.inputs()[3])
    copies = [x.contiguous() for x in views]
    assert_bitwise_equal(run_kernels(case, views, True), run_kernels(case, copies, True))


@TIED
@BOTH_DTYPES
def test_layouts_of_the_output_gradient(dtype: torch.dtype, tied: bool) -> None:
    case = Case(50, 70, 4, 2, 24, b=2, dtype=dtype)
    query, key, value, grad_out = case.inputs()
    expected = run_kernels(case, (query, key, value, grad_out), tied)
    transposed = grad_out.transpose(2, 3).contiguous().transpose(2, 3)
    assert transposed.stride(-1) != 1
    for other in (transposed, LAYOUTS["heads first"](grad_out)):
        assert_bitwise_equal(run_kernels(case, (query, key, value, other), tied), expected)

    ones = run_kernels(case, (query, key, value, torch.ones_like(grad_out)), tied)
    leaves = [x.detach().requires_grad_() for x in ((query, key) if tied else (query, key, value))]
    out, _ = torch.ops.megatron_sharedproj.attention(*leaves, *([None] * tied), True, case.scale)
    grads = torch.autograd.grad(out.sum(), leaves)  # arrives expanded, all strides 0
    assert all(map(torch.equal, grads, list(ones.named().values())[1:]))


@TIED
@BOTH_DTYPES
@pytest.mark.parametrize("s, t, causal", [(50, 70, True), (70, 50, True), (50, 70, False)])
def test_gradient_through_lse(s: int, t: int, causal: bool, dtype: torch.dtype, tied: bool) -> None:
    case = Case(s, t, 4, 2, 24, causal=causal, dtype=dtype)
    tensors = case.inputs()
    weights = torch.randn(1, 4, s, generator=torch.Generator().manual_seed(1))
    for grad_out in (tensors[3], torch.zeros_like(tensors[3])):
        inputs = (*tensors[:3], grad_out)
        expected = run_exact(case, inputs, tied, grad_lse=weights).named()
        for name, result in run_kernels(case, inputs, tied, grad_lse=weights).named().items():
            if dtype == torch.float32:
                assert_near(name, result, expected[name])
            else:
                torch.testing.assert_close(result.double(), expected[name], rtol=0.02, atol=0.02)


@TIED
def test_gradient_of_the_sum_of_lse_alone(tied: bool) -> None:
    case = Case(70, 50, 4, 2, 24, b=2)
    *tensors, grad_out = case.inputs()
    inputs = (*tensors, torch.zeros_like(grad_out))
    expected = run_exact(case, inputs, tied, grad_lse=torch.ones(2, 4, 70)).named()
    leaves = [x.requires_grad_() for x in tensors[: 2 if tied else 3]]
    _, lse = torch.ops.megatron_sharedproj.attention(*leaves, *([None] * tied), True, case.scale)
    for name, grad in zip(list(expected)[1:], torch.autograd.grad(lse.sum(), leaves), strict=True):
        assert_near(name, grad, expected[name])
        assert (name == "grad_value") == (not grad.any())


@TIED
@BOTH_DTYPES
@pytest.mark.parametrize("s, t", [(70, 130), (130, 70)])
def test_large_logits(s: int, t: int, dtype: torch.dtype, tied: bool) -> None:
    """Scores of several hundred: one weight is nearly 1, the others underflow."""
    case = Case(s, t, 4, 2, 64, dtype=dtype, logits=50 * 8.0)
    tensors = case.inputs()
    expected, result = run_exact(case, tensors, tied), run_kernels(case, tensors, tied)
    # A score is a sum of 64 products of up to several hundred: float32 rounds it at that size.
    torch.testing.assert_close(result.lse.double(), expected.lse, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(result.out.double(), expected.out, rtol=4e-3, atol=4e-3)
    plain = run_plain(case, tensors, tied).named()
    for name, tensor in result.named().items():
        assert tensor.isfinite().all()
        if dtype == torch.float32:
            assert_near(name, tensor, expected.named()[name], factor=100)
        else:
            capability_worker.assert_as_exact_as_plain(name, tensor, expected.named()[name], plain[name])


@BOTH_DTYPES
def test_nan_in_a_query_spoils_its_row(dtype: torch.dtype) -> None:
    case = Case(70, 130, 4, 2, 24, b=2, dtype=dtype)
    query, *others = case.inputs()
    before = run_kernels(case, (query, *others), tied=True)
    query[1, 33, 2, 5] = float("nan")  # of group 1, sees keys up to 93
    after = run_kernels(case, (query, *others), tied=True)
    spoilt = torch.zeros(2, 70, 4, dtype=torch.bool)
    spoilt[1, 33, 2] = True
    assert torch.equal(after.lse.isnan(), spoilt.transpose(1, 2))
    for name in ("out", "grad_query"):
        result, expected = after.named()[name], before.named()[name]
        assert result[spoilt].isnan().all()
        assert torch.equal(result[~spoilt], expected[~spoilt]), name
    assert after.grad_key[1, :94, 1].isnan().all()
    assert torch.equal(after.grad_key[0], before.grad_key[0])
    assert torch.equal(after.grad_key[1, :, 0], before.grad_key[1, :, 0])


@TIED
@BOTH_DTYPES
def test_nan_in_a_key_spoils_the_rows_that_see_it(dtype: torch.dtype, tied: bool) -> None:
    case = Case(70, 130, 4, 2, 24, b=2, dtype=dtype)
    query, key, *others = case.inputs()
    before = run_kernels(case, (query, key, *others), tied)
    key[1, 100, 1, 5] = float("nan")  # of heads 2 and 3, seen from row 40 on
    after = run_kernels(case, (query, key, *others), tied)
    for name in ("out", "grad_query"):
        result, expected = after.named()[name], before.named()[name]
        assert result[1, 40:, 2:].isnan().all(), name
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1, :, :2], expected[1, :, :2]), name
    assert after.lse[1, 2:, 40:].isnan().all()


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


UNEVEN = [Case(49, 131, 4, 2, 24, b=2), Case(131, 49, 6, 1, 40), Case(257, 193, 6, 1, 200, causal=False)]


@TIED
@BOTH_DTYPES
@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_no_result_depends_on_what_memory_held(
    case: Case, dtype: torch.dtype, tied: bool, fresh_memory_is_nan: None
) -> None:
    case = replace(case, dtype=dtype)
    tensors = case.inputs()
    expected = run_kernels(case, tensors, tied)
    assert not any(x.isnan().any() for x in expected.named().values())
    # Leaves NaN in the threads' scratch memory too, at the same places.
    run_kernels(case, [torch.full_like(x, float("nan")) for x in tensors], tied)
    assert_bitwise_equal(run_kernels(case, tensors, tied), expected)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@TIED
@BOTH_DTYPES
@pytest.mark.parametrize("case", [Case(257, 257, 6, 1, 64), Case(97, 193, 4, 2, 80, b=3)], ids=str)
def test_bitwise_the_same_for_any_number_of_threads(
    case: Case, dtype: torch.dtype, tied: bool, threads: Callable[[int], None]
) -> None:
    case = replace(case, dtype=dtype)
    tensors = case.inputs()
    threads(1)
    expected = run_kernels(case, tensors, tied)
    for count in (1, 2, 2, 2, 5):
        threads(count)
        assert torch.get_num_threads() == count
        assert_bitwise_equal(run_kernels(case, tensors, tied), expected)


@TIED
@BOTH_DTYPES
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "queries, keys", [([5, 0, 70, 1], [9, 3, 70, 0]), ([0, 130], [0, 65]), ([257, 3], [193, 80])]
)
def test_packed_is_each_sequence_by_itself(
    queries: list[int], keys: list[int], causal: bool, dtype: torch.dtype, tied: bool
) -> None:
    h, g, e = 6, 1, 40
    random = torch.Generator().manual_seed(0)
    shapes = ((sum(queries), h, e), (sum(keys), g, e), (sum(keys), g, e), (sum(queries), h, e))
    query, key, value, grad_out = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    leaves = [x.requires_grad_() for x in ((query, key) if tied else (query, key, value))]
    starts = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (queries, keys)]
    out, lse = torch.ops.megatron_sharedproj.attention(
        *leaves, *([None] * tied), causal, e**-0.5, *starts, max(queries), max(keys)
    )
    assert out.shape == query.shape and lse.shape == (h, sum(queries))
    grads = torch.autograd.grad(out, leaves, grad_out)

    pieces = [
        x.detach().split(n) for x, n in ((query, queries), (key, keys), (value, keys), (grad_out, queries))
    ]
    for z, (s, t) in enumerate(zip(queries, keys, strict=True)):
        case = Case(s, t, h, g, e, causal=causal, dtype=dtype)
        alone = run_kernels(case, [x[z].unsqueeze(0) for x in pieces], tied)
        assert torch.equal(out.detach().split(queries)[z], alone.out[0])
        assert torch.equal(lse.detach().split(queries, dim=1)[z], alone.lse[0])
        for grad, n, expected in zip(
            grads, (queries, keys, keys), list(alone.named().values())[1:], strict=False
        ):
            # Sums over rows are cut by the longest sequence, so that their order may differ.
            error = 2e-5 if dtype == torch.float32 else 8e-3
            torch.testing.assert_close(grad.split(n)[z], expected[0], rtol=error, atol=error)
