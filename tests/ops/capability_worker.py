"""What the CPU kernels are held to, and a script that holds them to it under one instruction set.

test_kernels_cpu.py and test_decode.py import the checks. The former also runs this file in other processes,
``SHAREDPROJ_CPU_CAPABILITY=avx2 python capability_worker.py``: the kernels are chosen once per process.
It prints the instruction set that was chosen, after everything has passed under it.

Shape legend: b sequences, s query length, t key length, h query heads, g groups, e head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sharedproj.ops import decode, extension
from megatron_sharedproj.ops.reference import attention_reference, decode_reference

# Largest error of float32 results, relative to the largest exact value.
FLOAT32_ERROR = 2e-5
# What float32 leaves of an exact 0 that is a difference of equal numbers, up to 30 at head size 256.
CANCELLATION = 2e-5
# bfloat16: how many times plain PyTorch's largest error a result may have, and its mean error.
FACTORS = {"out": (2.0, 1.5), "gradient": (3.0, 1.5)}


@dataclass(frozen=True)
class Case:
    """Shapes of one attention, [b, s, h, e] over [b, t, g, e]; logits is a factor on the paper's scale."""

    s: int
    t: int
    h: int
    g: int
    e: int
    b: int = 1
    causal: bool = True
    dtype: torch.dtype = torch.float32
    logits: float = 1.0

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        name = str(self.dtype).removeprefix("torch.")
        return f"b{self.b}-s{self.s}-t{self.t}-h{self.h}-g{self.g}-e{self.e}-{kind}-{name}"

    @property
    def scale(self) -> float:
        return self.logits * self.e**-0.5

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random query and grad_out [b, s, h, e], key and value [b, t, g, e]."""
        generator = torch.Generator().manual_seed(self.s * 10007 + self.t * 101 + self.h * 11 + self.e)
        query, keys = (self.b, self.s, self.h, self.e), (self.b, self.t, self.g, self.e)
        tensors = [torch.randn(shape, generator=generator) for shape in (query, keys, keys, query)]
        return tuple(tensor.to(self.dtype) for tensor in tensors)


@dataclass
class Result:
    """Outputs and gradients; tied: grad_key holds both roles' gradients and grad_value is None."""

    out: Tensor
    lse: Tensor | None
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """All but lse."""
        tensors = {"out": self.out, "grad_query": self.grad_query, "grad_key": self.grad_key}
        return tensors if self.grad_value is None else {**tensors, "grad_value": self.grad_value}


def exact(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out [b, s, h, e] and lse [b, h, s] by the formula in float64, differentiable.

    Only rows that see a key are computed; the others, the first s - t, are 0 and -inf.
    """
    s, t, repeat = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    rows = min(s, t) if causal else s if t else 0
    keys, values = (x.double().repeat_interleave(repeat, dim=2) for x in (key, value))
    scores = torch.einsum("bshe,bthe->bhst", query[:, s - rows :].double(), keys) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(rows, t, dtype=torch.bool).triu(t - rows + 1), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.einsum("bhst,bthe->bshe", (scores - lse.unsqueeze(-1)).exp(), values)
    out = torch.nn.functional.pad(out, (0, 0, 0, 0, s - rows, 0))
    return out, torch.nn.functional.pad(lse, (s - rows, 0), value=float("-inf"))


def run_exact(case: Case, tensors: Sequence[Tensor], tied: bool, grad_lse: Tensor | None = None) -> Result:
    """The formula in float64 with key and value as two tensors; tied: their gradients added."""
    query, key, value, grad_out = (x.double() for x in tensors)
    leaves = [x.clone().requires_grad_() for x in (query, key, key if tied else value)]
    out, lse = exact(*leaves, causal=case.causal, scale=case.scale)
    total = (out * grad_out).sum()
    if grad_lse is not None:
        seen = lse.isfinite()
        total = total + (lse[seen] * grad_lse[seen]).sum()
    dq, dk, dv = torch.autograd.grad(total, leaves)
    return Result(out.detach(), lse.detach(), dq, dk + dv if tied else dk, None if tied else dv)


def run_plain(case: Case, tensors: Sequence[Tensor], tied: bool) -> Result:
    """The reference and its autograd gradients in the inputs' dtype."""
    query, key, value, grad_out = (x.transpose(0, 1) for x in tensors)
    leaves = [x.clone().requires_grad_() for x in ((query, key) if tied else (query, key, value))]
    out = attention_reference(leaves[0], leaves[1], leaves[-1], causal=case.causal, scale=case.scale)
    grads = [x.transpose(0, 1) for x in torch.autograd.grad(out, leaves, grad_out)]
    return Result(out.detach().transpose(0, 1), None, grads[0], grads[1], None if tied else grads[2])


def run_kernels(case: Case, tensors: Sequence[Tensor], tied: bool, grad_lse: Tensor | None = None) -> Result:
    """The extension's op and its registered gradient."""
    query, key, value, grad_out = tensors
    leaves = [x.detach().requires_grad_() for x in ((query, key) if tied else (query, key, value))]
    q, k, v = leaves[0], leaves[1], None if tied else leaves[2]
    out, lse = torch.ops.megatron_sharedproj.attention(q, k, v, case.causal, case.scale)
    outputs, seeds = ([out], [grad_out]) if grad_lse is None else ([out, lse], [grad_out, grad_lse])
    grads = torch.autograd.grad(outputs, leaves, seeds)
    return Result(out.detach(), lse.detach(), grads[0], grads[1], None if tied else grads[2])


def assert_near(name: str, result: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """float32: within FLOAT32_ERROR (times `factor`) of the largest exact value."""
    assert result.shape == expected.shape
    if result.numel():
        error = (result.double() - expected).abs().max().item()
        allowed = factor * FLOAT32_ERROR * expected.abs().max().item() + CANCELLATION
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def error_ratios(result: Tensor, expected: Tensor, plain: Tensor) -> tuple[float, float]:
    """Largest and mean error over plain PyTorch's, both beyond what rounding explains."""
    rounded = expected.float()
    rounding = CANCELLATION + 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
    error, allowed = (result.double() - expected).abs(), (plain.double() - expected).abs()
    least = torch.finfo(torch.float32).tiny
    greatest = max(0.0, error.max().item() - rounding) / max(allowed.max().item(), least)
    return greatest, max(0.0, error.mean().item() - rounding) / max(allowed.mean().item(), least)


def assert_as_exact_as_plain(name: str, result: Tensor, expected: Tensor, plain: Tensor) -> None:
    """bfloat16: the error against float64 is at most FACTORS times plain PyTorch's; name ends in its kind."""
    assert result.shape == expected.shape
    assert not result.isnan().any(), f"{name}: NaN"
    if result.numel():
        most, most_mean = FACTORS["out" if name.endswith("out") else "gradient"]
        greatest, mean = error_ratios(result, expected, plain)
        assert greatest <= most, f"{name}: {greatest:.3g} times plain PyTorch's largest error"
        assert mean <= most_mean, f"{name}: {mean:.3g} times plain PyTorch's mean error"


def assert_same_lse(lse: Tensor, expected: Tensor) -> None:
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected.double(), rtol=0.0, atol=1e-5)


def check(case: Case, tied: bool) -> None:
    """Forward and backward of one case against float64, and in bfloat16 against plain PyTorch's error."""
    tensors = case.inputs()
    expected, result = run_exact(case, tensors, tied), run_kernels(case, tensors, tied)
    assert_same_lse(result.lse, expected.lse)
    plain = None if case.dtype == torch.float32 else run_plain(case, tensors, tied)
    assert result.named().keys() == expected.named().keys()
    for name, tensor in result.named().items():
        assert tensor.dtype == case.dtype
        label = f"{case} {'tied' if tied else 'separate'} {name}"
        if plain is None:
            assert_near(label, tensor, expected.named()[name])
        else:
            assert_as_exact_as_plain(label, tensor, expected.named()[name], plain.named()[name])
    blind = case.s - case.t if case.causal else 0
    if blind > 0:
        assert not result.out[:, :blind].any() and not result.grad_query[:, :blind].any()


def decode_inputs(
    lengths: Sequence[int], s: int, t: int, h: int, g: int, e: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query [b, s, h, e]; key and value caches [b, t, g, e], NaN behind each length; the lengths."""
    generator = torch.Generator().manual_seed(s * 10007 + t * 101 + h * 11 + e)
    query = torch.randn(len(lengths), s, h, e, generator=generator).to(dtype)
    caches = torch.randn(2, len(lengths), t, g, e, generator=generator).to(dtype)
    for z, length in enumerate(lengths):
        caches[:, z, length:] = float("nan")
    return query, caches[0], caches[1], torch.tensor(lengths, dtype=torch.int32)


def paged(caches: Sequence[Tensor], page_size: int) -> tuple[list[Tensor], Tensor]:
    """Each cache [b, t, g, e] as pages in one random order with unused ones between, and the block table."""
    b, t, g, e = caches[0].shape
    per_sequence = -(-t // page_size)
    order = torch.randperm(b * per_sequence + 3, generator=torch.Generator().manual_seed(t))
    used = order[: b * per_sequence]
    results = []
    for cache in caches:
        tail = per_sequence * page_size - t
        filled = torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, tail), value=float("nan"))
        pages = torch.full((len(order), page_size, g, e), float("nan"), dtype=cache.dtype)
        pages[used] = filled.view(-1, page_size, g, e)
        results.append(pages)
    return results, used.view(b, per_sequence).int()


def check_decoded(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor | None, lengths: Tensor
) -> None:
    """Sequence by sequence against decode_reference in float64."""
    scale = query.shape[-1] ** -0.5
    caches = [key] if value is None else [key, value]
    assert out.dtype == query.dtype and out.shape == query.shape
    expected, expected_lse = decode_reference(
        query.double(), *(x.double() for x in (caches * 2)[:2]), scale=scale, seqlens_k=lengths
    )
    assert_same_lse(lse, expected_lse)
    plain, _ = decode_reference(query, key, value, scale, lengths)
    for z in range(len(lengths)):
        if query.dtype == torch.float32:
            assert_near("out", out[z], expected[z])
        else:
            assert_as_exact_as_plain("out", out[z], expected[z], plain[z])


# Every block boundary and remainder in a few cases; (6, 1) cuts the backward into several ranges of rows.
WORKER_CASES = [
    Case(s, t, h, g, e, b=2, causal=causal, dtype=dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for s, t, h, g, e, causal in (
        (17, 17, 2, 2, 8, True), (97, 97, 4, 2, 64, True), (193, 193, 6, 1, 80, True),
        (257, 257, 6, 1, 40, False), (49, 130, 4, 1, 128, True), (97, 17, 2, 1, 24, True),
        (1, 65, 3, 1, 256, False),
    )
]  # fmt: skip
# lengths, s, h, g, e: groups of fewer than 10 query rows, which are read one by one, and of more
WORKER_DECODES = [
    ([0, 1, 64, 513], 1, 4, 2, 64), ([65, 130], 5, 8, 2, 80),
    ([2, 513], 2, 40, 1, 24), ([63, 200], 1, 3, 3, 256),
]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    for case in WORKER_CASES:
        for tied in (True, False):
            check(case, tied)
    for lengths, s, h, g, e in WORKER_DECODES:
        for dtype in (torch.float32, torch.bfloat16):
            query, key, value, seqlens = decode_inputs(lengths, s, max(lengths), h, g, e, dtype)
            (pages,), table = paged([key], 64)
            for num_splits in (0, 2):
                options = {"scale": e**-0.5, "seqlens_k": seqlens, "num_splits": num_splits}
                check_decoded(*decode.decode(query, key, **options), query, key, None, seqlens)
                check_decoded(*decode.decode(query, key, value, **options), query, key, value, seqlens)
                check_decoded(
                    *decode.decode(query, pages, block_table=table, **options), query, key, None, seqlens
                )
    print(extension.BUILD_INFO["cpu_capability"])


if __name__ == "__main__":
    main()
