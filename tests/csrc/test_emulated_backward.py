"""The CUDA backward kernels, executed on the CPU.

Shape legend: b sequences, s query length, t key length, h query heads, g groups, e head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from emulator import COMPILER, NO_COMPILER, Emulator, Refused, emulator

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
HEAD_SIZES = pytest.mark.parametrize("e", [64, 80, 128])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
MODES = pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
DIFFERENT_LENGTHS = [
    (1, 200),
    (17, 129),
    (97, 257),
    (129, 128),
    (257, 97),
    (200, 64),
    (300, 1),
    (64, 0),
    (0, 64),
]


@pytest.fixture
def kernels() -> Iterator[Emulator]:
    yield emulator()
    emulator().set_multiprocessors(4)


@dataclass
class Case:
    """query, grad_out [b, s, h, e], key [b, t, g, e], grad_lse [b, h, s]; out and lse are exact."""

    query: Tensor
    key: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    causal: bool
    scale: float

    def __post_init__(self) -> None:
        out, lse = attend(
            *(each.double() for each in (self.query, self.key, self.key)), self.causal, self.scale
        )
        self.out, self.lse = out.to(self.query.dtype), lse.float()

    def run(self, kernels: Emulator, deterministic: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
        return kernels.backward(
            *(self.grad_out, self.query, self.key, self.out, self.lse),
            **{"causal": self.causal, "scale": self.scale, "grad_lse": self.grad_lse},
            **{"deterministic": deterministic, "seed": seed},
        )


def make(
    sizes: tuple[int, int, int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    scale: float | None = None,
    grad_lse: bool = False,
    factor: float = 1.0,
) -> Case:
    b, s, t, h, g, e = sizes
    random = torch.Generator().manual_seed(s * 10007 + t * 101 + h * 11 + g + e)
    query = (torch.randn(b, s, h, e, generator=random) * factor).to(dtype)
    key = torch.randn(b, t, g, e, generator=random).to(dtype)
    grad_out = torch.randn(b, s, h, e, generator=random).to(dtype)
    of_lse = torch.randn(b, h, s, generator=random) if grad_lse else None
    return Case(query, key, grad_out, of_lse, causal, e**-0.5 if scale is None else scale)


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out [b, s, h, e] and lse [b, h, s] in the inputs' dtype; 0 and -infinity where a query sees no key."""
    (b, s, h, e), t = query.shape, key.shape[1]
    first = min(max(s - t, 0), s) if causal or t == 0 else 0  # the first query that sees a key
    keys, values = (each.repeat_interleave(h // each.shape[2], dim=2) for each in (key, value))
    scores = torch.einsum("bshe,bthe->bhst", query[:, first:], keys) * scale
    if causal:
        scores = scores.masked_fill(
            torch.ones(s - first, t, dtype=torch.bool).triu(t - s + first + 1), -torch.inf
        )
    out = torch.einsum("bhst,bthe->bshe", torch.softmax(scores, dim=-1), values)
    lse = torch.logsumexp(scores, dim=-1)
    return (
        torch.cat([query.new_zeros(b, first, h, e), out], dim=1),
        torch.cat([lse.new_full((b, h, first), -torch.inf), lse], dim=2),
    )


def gradients(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of query and of key = value: from separate ones in `dtype`, added in float64, rounded to `dtype`."""
    query, key, value = (
        x.detach().clone().to(dtype).requires_grad_() for x in (case.query, case.key, case.key)
    )
    out, lse = attend(query, key, value, case.causal, case.scale)
    loss = (out * case.grad_out.to(dtype)).sum()
    if case.grad_lse is not None:
        loss = loss + (lse * case.grad_lse.to(dtype))[lse.isfinite()].sum()
    loss.backward()
    return query.grad.double(), (key.grad.double() + value.grad.double()).to(dtype).double()


def assert_exact_enough(case: Case, results: tuple[Tensor, Tensor]) -> None:
    """At most 3 times plain PyTorch's largest and mean error."""
    exact, plain = gradients(case, torch.float64), gradients(case, case.query.dtype)
    for result, expected, reference in zip(results, exact, plain, strict=True):
        assert not result.isnan().any()
        if result.numel() == 0:
            continue
        error, allowed = (result.double() - expected).abs(), (reference - expected).abs()
        rounding = 1e-5 * (
            1 + expected.abs().max()
        )  # where one key is all there is, plain PyTorch makes no error
        assert error.max() <= 3 * allowed.max() + rounding
        assert error.mean() <= 3 * allowed.mean() + rounding


def check(kernels: Emulator, case: Case) -> None:
    """Both modes; grad_key is the same in both."""
    grad_query, grad_key = case.run(kernels, seed=3)
    assert kernels.bank_conflicts() == 0
    assert_exact_enough(case, (grad_query, grad_key))
    repeatable, same = case.run(kernels, deterministic=True, seed=4)
    assert kernels.bank_conflicts() == 0
    assert torch.equal(same, grad_key)
    assert_exact_enough(case, (repeatable, same))


@BOTH_DTYPES
@HEAD_SIZES
@CAUSAL
@pytest.mark.parametrize("length", [1, 2, 17, 97, 128, 200, 257])
def test_lengths(kernels: Emulator, length: int, causal: bool, e: int, dtype: torch.dtype) -> None:
    check(kernels, make((1, length, length, 2, 1, e), dtype, causal))


@HEAD_SIZES
@CAUSAL
@pytest.mark.parametrize(("s", "t"), DIFFERENT_LENGTHS)
def test_lengths_that_differ(kernels: Emulator, s: int, t: int, causal: bool, e: int) -> None:
    check(kernels, make((2, s, t, 2, 2, e), causal=causal))


@CAUSAL
@pytest.mark.parametrize(("h", "g"), [(4, 4), (6, 2), (6, 3), (5, 1), (9, 3)])
def test_groups(kernels: Emulator, h: int, g: int, causal: bool) -> None:
    check(kernels, make((2, 90, 90, h, g, 64), torch.float16, causal))


@HEAD_SIZES
@pytest.mark.parametrize(("s", "t"), [(130, 130), (150, 70), (40, 140)])
def test_gradient_of_lse(kernels: Emulator, s: int, t: int, e: int) -> None:
    check(kernels, make((2, s, t, 2, 1, e), grad_lse=True))


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_scale(kernels: Emulator, scale: float) -> None:
    check(kernels, make((1, 100, 100, 2, 1, 80), scale=scale))


@pytest.mark.slow
@BOTH_DTYPES
@HEAD_SIZES
@CAUSAL
@pytest.mark.parametrize("length", [1023, 1025])
def test_long(kernels: Emulator, length: int, causal: bool, e: int, dtype: torch.dtype) -> None:
    check(kernels, make((1, length, length, 2, 1, e), dtype, causal))


@HEAD_SIZES
@MODES
def test_rows_without_keys_give_zero(kernels: Emulator, e: int, deterministic: bool) -> None:
    case = make((1, 200, 70, 2, 1, e), grad_lse=True, factor=100.0)
    case.grad_lse[..., :130] = torch.nan  # lse is a constant there
    grad_query, grad_key = case.run(kernels, deterministic)
    assert (grad_query[:, :130] == 0).all() and (grad_query[:, 130:] != 0).any()
    assert not grad_query.isnan().any() and not grad_key.isnan().any()


@HEAD_SIZES
@CAUSAL
def test_strides(kernels: Emulator, e: int, causal: bool) -> None:
    """Slices of one projection, heads before positions; gradients have the strides of what they belong to."""
    case = make((2, 131, 131, 4, 2, e), causal=causal)
    expected = case.run(kernels, deterministic=True)
    b, s, h, g = 2, 131, 4, 2
    fused = torch.randn(s, b, h + g + 1, e).to(case.query.dtype)  # sequence first, and columns of others
    query, key = fused[:, :, :h].transpose(0, 1), fused[:, :, h : h + g].transpose(0, 1)
    query.copy_(case.query)
    key.copy_(case.key)
    by_heads = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.query, case.key, case.grad_out)]
    for q, k, grad_out in ((query, key, by_heads[2]), (by_heads[0], key, case.grad_out)):
        strided = replace(case, query=q, key=k, grad_out=grad_out)
        strided.out = strided.out.transpose(0, 1).contiguous().transpose(0, 1)
        for result, other in zip(strided.run(kernels, deterministic=True), expected, strict=True):
            assert torch.equal(result, other)
        assert torch.equal(strided.run(kernels)[1], expected[1])


@HEAD_SIZES
@CAUSAL
def test_packed_sequences_equal_single_ones(kernels: Emulator, e: int, causal: bool) -> None:
    lengths = [(5, 5), (0, 9), (130, 130), (64, 20), (7, 0), (0, 0), (33, 190)]
    parts = [make((1, s, t, 2, 1, e), causal=causal, grad_lse=True) for s, t in lengths]
    names = ("grad_out", "query", "key", "out")
    packed = [torch.cat([getattr(part, name)[0] for part in parts]) for name in names]
    lse, grad_lse = (
        torch.cat([getattr(part, name)[0] for part in parts], dim=1) for name in ("lse", "grad_lse")
    )
    cu = tuple(torch.tensor([0, *each]).cumsum(0).int() for each in zip(*lengths, strict=True))
    options = {"causal": causal, "cu_seqlens": cu, "grad_lse": grad_lse, "seed": 5}
    grad_query, grad_key = kernels.backward(*packed, lse, **options, deterministic=True)
    atomic_query, atomic_key = kernels.backward(*packed, lse, **options)
    assert kernels.bank_conflicts() == 0
    assert torch.equal(atomic_key, grad_key)
    for i, part in enumerate(parts):
        rows, keys = (slice(int(each[i]), int(each[i + 1])) for each in cu)
        alone_query, alone_key = part.run(kernels, deterministic=True)
        assert torch.equal(grad_query[rows], alone_query[0])
        assert torch.equal(grad_key[keys], alone_key[0])
        assert_exact_enough(part, (atomic_query[None, rows], atomic_key[None, keys]))


@MODES
@CAUSAL
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.bfloat16, 1e4), (torch.bfloat16, 1e30), (torch.float16, 1e3)]
)
def test_large_logits(
    kernels: Emulator, causal: bool, deterministic: bool, dtype: torch.dtype, factor: float
) -> None:
    case = make((1, 150, 100, 2, 1, 64), dtype, causal, factor=factor)
    grad_query, grad_key = case.run(kernels, deterministic)
    assert grad_query.isfinite().all() and grad_key.isfinite().all()
    expected, _ = gradients(case, torch.float64)
    if factor < 1e30:  # scores in float32 are worth comparing
        torch.testing.assert_close(grad_query.double(), expected, atol=0.05, rtol=0.02)


@HEAD_SIZES
@CAUSAL
def test_no_seed_changes_a_bit(kernels: Emulator, e: int, causal: bool) -> None:
    """Of grad_key in either mode, of grad_query in the deterministic one; atomics only round otherwise."""
    case = make((1, 200, 200, 2, 1, e), causal=causal)
    first_query, first_key = case.run(kernels, deterministic=True)
    first_atomic, _ = case.run(kernels)
    for seed in range(1, 8):
        grad_query, grad_key = case.run(kernels, deterministic=True, seed=seed)
        assert torch.equal(grad_query, first_query) and torch.equal(grad_key, first_key)
        grad_query, grad_key = case.run(kernels, seed=seed)
        assert torch.equal(grad_key, first_key)
        torch.testing.assert_close(grad_query, first_atomic, atol=1e-3, rtol=0.02)


@HEAD_SIZES
@CAUSAL
def test_few_keys_for_many_multiprocessors(kernels: Emulator, e: int, causal: bool) -> None:
    """The walk over heads and queries is split over blocks, whose parts of grad_key are added."""
    case = make((1, 200, 200, 8, 1, e), causal=causal)
    kernels.set_multiprocessors(1)
    _, whole_key = case.run(kernels)
    kernels.set_multiprocessors(108)
    grad_query, grad_key = case.run(kernels, seed=1)
    assert kernels.bank_conflicts() == 0
    assert not torch.equal(grad_key, whole_key)  # added in another order: it was split
    assert_exact_enough(case, (grad_query, grad_key))
    assert torch.equal(case.run(kernels, deterministic=True)[1], whole_key)


def test_split_of_packed_sequences(kernels: Emulator) -> None:
    """Splits that have nothing to do, keys that no query sees, sequences without a key."""
    lengths = [(1100, 40), (3, 3), (0, 150), (20, 0)]
    parts = [make((1, s, t, 1, 1, 64), causal=False) for s, t in lengths]
    packed = [
        torch.cat([getattr(part, name)[0] for part in parts]) for name in ("grad_out", "query", "key", "out")
    ]
    cu = tuple(torch.tensor([0, *each]).cumsum(0).int() for each in zip(*lengths, strict=True))
    lse = torch.cat([part.lse[0] for part in parts], dim=1)
    kernels.set_multiprocessors(108)
    grad_query, grad_key = kernels.backward(*packed, lse, causal=False, cu_seqlens=cu)
    for i, part in enumerate(parts):
        rows, keys = (slice(int(each[i]), int(each[i + 1])) for each in cu)
        assert_exact_enough(part, (grad_query[None, rows], grad_key[None, keys]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("head_size", "head_size is 96; accepted: 64, 80 or 128"),
        ("stride", "grad_out seq stride is 260; accepted: a multiple of 8"),
        ("address", "out address modulo 16 is 2; accepted: 0"),
    ],
)
def test_refusals_name_argument_value_and_what_works(kernels: Emulator, change: str, message: str) -> None:
    case = make((1, 16, 16, 4, 2, 96 if change == "head_size" else 64))
    if change == "stride":
        padded = torch.nn.functional.pad(case.grad_out.flatten(2), (0, 4))
        case.grad_out = padded[..., :256].unflatten(2, (4, 64))
    if change == "address":
        case.out = torch.nn.functional.pad(case.out.flatten(), (1, 0))[1:].view_as(case.out)
    with pytest.raises(Refused, match=message):
        case.run(kernels)
