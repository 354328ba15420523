"""The registered ops: what they refuse, and what PyTorch needs to trace, compile and differentiate them.

Shape legend: b sequences, s query length, t key length, h query heads, g groups, e head size.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj.ops import extension
from megatron_sharedproj.ops.attention import attention, attention_packed
from megatron_sharedproj.ops.decode import decode

pytestmark = pytest.mark.skipif(extension.MISSING != "", reason=extension.MISSING)

op = torch.ops.megatron_sharedproj
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def strided(*shape: int) -> Tensor:
    """zeros(shape) with stride 2 in the last dimension."""
    return zeros(*shape, 2)[..., 0]


# Arguments that fit: b 2, s 3, t 5, h 4, g 2, e 8.
FITTING: dict[str, dict[str, Any]] = {
    "attention": {
        "query": zeros(2, 3, 4, 8), "key": zeros(2, 5, 2, 8), "value": zeros(2, 5, 2, 8),
        "causal": True, "scale": 1.0,
    },
    "packed": {
        "query": zeros(6, 4, 8), "key": zeros(10, 2, 8), "value": zeros(10, 2, 8),
        "causal": True, "scale": 1.0,
        "cu_seqlens_q": int32(0, 2, 6), "cu_seqlens_k": int32(0, 5, 10), "max_seqlen_q": 4, "max_seqlen_k": 5,
    },
    "attention_backward": {
        "grad_out": zeros(2, 3, 4, 8), "grad_lse": zeros(2, 4, 3), "query": zeros(2, 3, 4, 8),
        "key": zeros(2, 5, 2, 8), "value": zeros(2, 5, 2, 8), "out": zeros(2, 3, 4, 8), "lse": zeros(2, 4, 3),
        "causal": True, "scale": 1.0, "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": 0,
        "max_seqlen_k": 0, "deterministic": False,
    },
    "attention_decode": {
        "query": zeros(2, 3, 4, 8), "key": zeros(2, 5, 2, 8), "value": zeros(2, 5, 2, 8), "scale": 1.0,
        "seqlens_k": int32(5, 2), "num_splits": 1,
    },
    "paged": {
        "query": zeros(2, 3, 4, 8), "key": zeros(4, 64, 2, 8), "value": zeros(4, 64, 2, 8), "scale": 1.0,
        "seqlens_k": int32(5, 70), "block_table": int32(0, 1, 2, 3).view(2, 2),
    },
}  # fmt: skip


def call(name: str, **changes: Any) -> tuple[Tensor, ...]:
    operator = {"packed": "attention", "paged": "attention_decode"}.get(name, name)
    return getattr(op, operator)(**{**FITTING[name], **changes})


# What is wrong, and the parts of the message: the argument, its value, what is accepted.
ANY_OP: list[tuple[dict[str, Any], list[str]]] = [
    ({"query": zeros(2, 3, 4, 8, dtype=torch.float64)}, ["query", "Double", "accepted: float32 (CPU)"]),
    (
        {name: zeros(2, 3, 4, 8, dtype=torch.half) for name in ("query", "key", "grad_out", "out")},
        ["query", "float16 on a CPU", "accepted: float32, bfloat16"],
    ),
    ({"query": zeros(3, 4, 8)}, ["query", "[3, 4, 8]", "[b, s, h, e]"]),
    ({"key": zeros(5, 2, 8)}, ["key", "[5, 2, 8]", "[b, t, g, e]"]),
    ({"key": zeros(2, 5, 2, 8, dtype=torch.bfloat16)}, ["key", "BFloat16", "the query has Float"]),
    ({"query": strided(2, 3, 4, 8)}, ["query", "stride 2", "accepted: 1 (call .contiguous())"]),
    ({"key": strided(2, 5, 2, 8)}, ["key", "stride 2", "accepted: 1 (call .contiguous())"]),
    ({"key": zeros(2, 5, 2, 16)}, ["key", "head size 16", "the query has 8"]),
    ({"key": zeros(2, 5, 3, 8)}, ["key", "3 groups", "accepted: divisors of the query's 4 heads"]),
    ({"key": zeros(2, 5, 0, 8)}, ["key", "0 groups", "accepted: divisors of the query's 4 heads"]),
    ({"key": zeros(2, 5, 8, 8)}, ["key", "8 groups", "accepted: divisors of the query's 4 heads"]),
    ({"query": zeros(2, 3, 0, 8)}, ["key", "2 groups", "accepted: divisors of the query's 0 heads"]),
    ({"query": zeros(2, 3, 4, 12), "key": zeros(2, 5, 2, 12)}, ["head size is 12", "8 from 8 to 256"]),
    ({"query": zeros(2, 3, 4, 264), "key": zeros(2, 5, 2, 264)}, ["head size is 264", "8 from 8 to 256"]),
    ({"query": zeros(2, 3, 4, 0), "key": zeros(2, 5, 2, 0)}, ["head size is 0", "8 from 8 to 256"]),
    ({"key": zeros(3, 5, 2, 8)}, ["key", "batch 3", "the query has 2"]),
    ({"query": zeros(0, 3, 4, 8), "key": zeros(0, 5, 2, 8)}, ["query", "batch 0", "accepted: 1 or more"]),
    ({"value": zeros(2, 5, 2, 8, dtype=torch.bfloat16)}, ["value", "BFloat16", "the query has Float"]),
    ({"value": zeros(2, 5, 1, 8)}, ["value", "[2, 5, 1, 8]", "the key has [2, 5, 2, 8]"]),
    ({"value": strided(2, 5, 2, 8)}, ["value", "stride 2", "accepted: 1 (call .contiguous())"]),
]  # fmt: skip
PACKED: list[tuple[dict[str, Any], list[str]]] = [
    ({"cu_seqlens_k": None}, ["cu_seqlens_q and cu_seqlens_k", "give both", "or neither"]),
    ({"cu_seqlens_q": None}, ["cu_seqlens_q and cu_seqlens_k", "give both", "or neither"]),
    ({"query": zeros(1, 6, 4, 8)}, ["query", "[1, 6, 4, 8]", "[total_q, h, e]"]),
    ({"key": zeros(1, 10, 2, 8)}, ["key", "[1, 10, 2, 8]", "[total_k, g, e]"]),
    ({"cu_seqlens_q": int32(0, 2, 6).long()}, ["cu_seqlens_q", "Long", "accepted: int32"]),
    ({"cu_seqlens_k": int32(0, 5, 10).long()}, ["cu_seqlens_k", "Long", "accepted: int32"]),
    ({"cu_seqlens_q": int32(0, 2, 6)[None]}, ["cu_seqlens_q", "[1, 3]", "one contiguous dimension"]),
    ({"cu_seqlens_q": int32(0, 9, 2, 9, 6)[::2]}, ["cu_seqlens_q", "accepted: one contiguous dimension"]),
    ({"cu_seqlens_q": int32(0)}, ["cu_seqlens_q", "1 entries", "batch + 1, batch at least 1"]),
    ({"cu_seqlens_q": int32()}, ["cu_seqlens_q", "0 entries", "batch + 1, batch at least 1"]),
    ({"cu_seqlens_k": int32(0, 10)}, ["cu_seqlens_k", "2 entries", "expected 3"]),
    ({"max_seqlen_q": -1}, ["max_seqlen_q is -1", "max_seqlen_k is 5", "0 or more"]),
    ({"max_seqlen_k": -7}, ["max_seqlen_q is 4", "max_seqlen_k is -7", "0 or more"]),
    ({"cu_seqlens_q": int32(1, 2, 6)}, ["cu_seqlens_q", "begins with 1", "expected 0"]),
    ({"cu_seqlens_q": int32(0, 7, 6)}, ["cu_seqlens_q", "sequence 0 the length 7", "maximum 4"]),
    ({"cu_seqlens_k": int32(0, 11, 10), "max_seqlen_k": 11}, ["cu_seqlens_k", "sequence 1 the length -1"]),
    ({"max_seqlen_k": 4}, ["cu_seqlens_k", "sequence 0 the length 5", "0 to the given maximum 4"]),
    ({"cu_seqlens_q": int32(0, 2, 5)}, ["cu_seqlens_q", "ends with 5", "the tensor has 6 rows"]),
    ({"cu_seqlens_k": int32(0, 5, 9)}, ["cu_seqlens_k", "ends with 9", "the tensor has 10 rows"]),
]  # fmt: skip
BACKWARD: list[tuple[dict[str, Any], list[str]]] = [
    ({"grad_out": zeros(2, 3, 4, 8, dtype=torch.bfloat16)}, ["grad_out", "BFloat16", "the query has Float"]),
    ({"out": zeros(2, 3, 4, 8, dtype=torch.bfloat16)}, ["out", "BFloat16", "the query has Float"]),
    ({"grad_out": zeros(2, 3, 2, 8)}, ["grad_out", "[2, 3, 2, 8]", "the query has [2, 3, 4, 8]"]),
    ({"out": zeros(2, 4, 4, 8)}, ["out", "[2, 4, 4, 8]", "the query has [2, 3, 4, 8]"]),
    ({"lse": zeros(2, 4, 2)}, ["lse", "[2, 4, 2]", "expected the forward's"]),
    ({"lse": zeros(2, 4, 3, dtype=torch.float64)}, ["lse", "Double", "expected the forward's"]),
    ({"lse": zeros(2, 3, 4).transpose(1, 2)}, ["lse", "[2, 4, 3]", "expected the forward's"]),
    ({"grad_lse": zeros(1)}, ["grad_lse", "[1]", "the lse has [2, 4, 3]"]),
    ({"grad_lse": zeros(2, 3, 4)}, ["grad_lse", "[2, 3, 4]", "the lse has [2, 4, 3]"]),
]  # fmt: skip
DECODE: list[tuple[dict[str, Any], list[str]]] = [
    ({"seqlens_k": int32(5, 2).long()}, ["seqlens_k", "Long", "accepted: int32"]),
    ({"seqlens_k": int32(5, 2)[None]}, ["seqlens_k", "[1, 2]", "accepted: one contiguous dimension"]),
    ({"seqlens_k": int32(5)}, ["seqlens_k", "1 entries", "expected 2"]),
    ({"seqlens_k": int32(5, 6)}, ["seqlens_k", "sequence 1 the length 6", "accepted: 0 to the cache's 5"]),
    ({"seqlens_k": int32(-1, 5)}, ["seqlens_k", "sequence 0 the length -1", "accepted: 0 to the cache's 5"]),
    ({"num_splits": -1}, ["num_splits is -1", "accepted: 0 to 256"]),
    ({"num_splits": 257}, ["num_splits is 257", "accepted: 0 to 256"]),
]
PAGED: list[tuple[dict[str, Any], list[str]]] = [
    ({"key": zeros(256, 2, 8)}, ["key", "[256, 2, 8]", "[pages, page_size, g, e]"]),
    ({"block_table": torch.tensor([[0, 1], [2, 3]])}, ["block_table", "Long", "accepted: int32"]),
    ({"block_table": int32(0, 1)}, ["block_table", "[2]", "[b, pages of a sequence] with b = 2"]),
    ({"block_table": int32(0, 1)[None]}, ["block_table", "[1, 2]", "[b, pages of a sequence] with b = 2"]),
    ({"block_table": int32(0, 1, 2, 3).view(2, 2).t()}, ["block_table", "[2, 2]", "[b, pages"]),
    ({"key": zeros(4, 32, 2, 8), "value": None}, ["page size is 32", "accepted: multiples of 64"]),
    ({"key": zeros(4, 0, 2, 8), "value": None}, ["page size is 0", "accepted: multiples of 64"]),
    ({"seqlens_k": int32(5, 129)}, ["seqlens_k", "sequence 1 the length 129", "0 to the cache's 128"]),
    ({"block_table": int32(4, 1, 2, 3).view(2, 2)}, ["block_table", "page 4 for sequence 0", "0 to 3"]),
    ({"block_table": int32(0, 1, 2, -1).view(2, 2)}, ["block_table", "page -1 for sequence 1", "0 to 3"]),
]  # fmt: skip


def refusals() -> Iterator[Any]:
    """(op, changes, message parts) for every op that a change concerns."""
    for name in ("attention", "attention_backward", "attention_decode"):
        for changes, parts in ANY_OP:
            known = {key: value for key, value in changes.items() if key in FITTING[name]}
            # A value that no longer matches the key would be refused first.
            known |= {"value": None} if "key" in known else {}
            yield pytest.param(name, known, parts, id=f"{name}-{' '.join(parts)}")
    tables = {"packed": PACKED, "attention_backward": BACKWARD, "attention_decode": DECODE, "paged": PAGED}
    for name, table in tables.items():
        for changes, parts in table:
            yield pytest.param(name, changes, parts, id=f"{name}-{' '.join(parts)}")


@pytest.mark.parametrize("name", FITTING)
def test_what_fits_is_accepted(name: str) -> None:
    assert not any(result.isnan().any() for result in call(name))


@pytest.mark.parametrize("name, changes, parts", list(refusals()))
def test_bad_input_is_a_value_error_that_says_what_fits(name: str, changes: dict, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        call(name, **changes)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", FITTING)
def test_meta_tensors(name: str) -> None:
    inputs = {n: x.to("meta") for n, x in FITTING[name].items() if isinstance(x, Tensor)}
    for result, wanted in zip(call(name, **inputs), call(name), strict=True):
        assert result.is_meta and result.shape == wanted.shape and result.dtype == wanted.dtype


@pytest.mark.parametrize("name", ["attention", "attention_decode"])
@pytest.mark.parametrize("which", ["key", "value"])
def test_inputs_on_two_devices_are_refused(name: str, which: str) -> None:
    with pytest.raises(ValueError, match="an input is on meta; the query is on cpu"):
        call(name, **{which: FITTING[name][which].to("meta")})


@TIED
@pytest.mark.parametrize("s, t", [(0, 5), (3, 0), (0, 0)])
def test_empty_sequences(s: int, t: int, tied: bool) -> None:
    query, key = randn(2, s, 4, 8).requires_grad_(), randn(2, t, 2, 8).requires_grad_()
    value = None if tied else randn(2, t, 2, 8).requires_grad_()
    leaves = [x for x in (query, key, value) if x is not None]
    results = [op.attention(query, key, value, causal, 1.0) for causal in (True, False)]
    with torch.no_grad():
        results.append(op.attention_decode(query, key, value, 1.0))
    for out, lse in results:
        assert out.shape == query.shape and lse.shape == (2, 4, s)
        assert not out.any() and (lse == float("-inf")).all()
    for out, lse in results[:2]:
        for grad, leaf in zip(torch.autograd.grad([out.sum(), lse.sum()], leaves), leaves, strict=True):
            assert grad.shape == leaf.shape and not grad.any()


def test_lengths_beyond_32_bits_are_refused() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"key has length 2147483648; accepted: below 2\^31"):
        op.attention(zeros(1, 1, 1, 8), zeros(1, 1, 1, 8).expand(1, 2**31, 1, 8), None, False, 1.0)


def attention_arguments(kind: str, grad: bool, dtype: torch.dtype) -> tuple[tuple, dict]:
    shapes = [(2, 20, 4, 16), (2, 33, 2, 16), (2, 33, 2, 16)]
    options: dict[str, Any] = {}
    if kind == "packed":
        shapes = [shape[1:] for shape in shapes]
        starts = int32(0, 7, 7, 20), int32(0, 20, 30, 33)
        options = {
            "cu_seqlens_q": starts[0],
            "cu_seqlens_k": starts[1],
            "max_seqlen_q": 13,
            "max_seqlen_k": 20,
        }
    tensors = [randn(*shape, seed=i, dtype=dtype).requires_grad_(grad) for i, shape in enumerate(shapes)]
    if kind != "separate":
        tensors[2] = None
    return (*tensors, True, 0.25), options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("kind", ["tied", "separate", "packed"])
def test_opcheck_attention(kind: str, grad: bool, dtype: torch.dtype) -> None:
    arguments, options = attention_arguments(kind, grad, dtype)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.library.opcheck(op.attention.default, arguments, options, **tolerance)


@pytest.mark.parametrize("kind", ["tied", "separate", "packed"])
def test_opcheck_attention_of_strided_views(kind: str) -> None:
    arguments, options = attention_arguments(kind, False, torch.float32)
    views = [
        torch.cat([x, x], dim=-2)[..., x.shape[-2] :, :] if isinstance(x, Tensor) else x for x in arguments
    ]
    assert not views[0].is_contiguous()
    torch.library.opcheck(op.attention.default, tuple(views), options)


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("kind", ["tied", "separate", "packed"])
def test_opcheck_backward(kind: str, with_lse: bool) -> None:
    (query, key, value, causal, scale), options = attention_arguments(kind, False, torch.float32)
    out, lse = op.attention(query, key, value, causal, scale, **options)
    defaults = {"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": 0, "max_seqlen_k": 0}
    packed = {**defaults, **options}.values()
    grad_lse = randn(*lse.shape, seed=4) if with_lse else None
    arguments = (
        randn(*out.shape, seed=3),
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        causal,
        scale,
        *packed,
        False,
    )
    torch.library.opcheck(op.attention_backward.default, arguments)


@TIED
@pytest.mark.parametrize("paged", [False, True])
def test_opcheck_decode(paged: bool, tied: bool) -> None:
    shape = (4, 64, 2, 16) if paged else (2, 70, 2, 16)
    table = {"block_table": int32(3, 1, 0, 2).view(2, 2)} if paged else {}
    arguments = (randn(2, 3, 4, 16), randn(*shape, seed=1), None if tied else randn(*shape, seed=2), 0.25)
    torch.library.opcheck(op.attention_decode.default, arguments, {"seqlens_k": int32(65, 3), **table})


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_the_wanted_gradients(which: int) -> None:
    tensors = [randn(1, 20, 4, 8), randn(1, 20, 2, 8, seed=1), randn(1, 20, 2, 8, seed=2)]
    leaves = [x.clone().requires_grad_() for x in tensors]
    weight = randn(1, 20, 4, 8, seed=3)
    expected = torch.autograd.grad(op.attention(*leaves, True, 0.3)[0], leaves, weight)[which]
    tensors[which].requires_grad_()
    (grad,) = torch.autograd.grad(op.attention(*tensors, True, 0.3)[0], tensors[which], weight)
    assert torch.equal(grad, expected)


def test_second_derivatives_are_an_error() -> None:
    query, key = randn(1, 20, 4, 8).requires_grad_(), randn(1, 20, 2, 8, seed=1).requires_grad_()
    out, _ = op.attention(query, key, None, True, 0.3)
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use megatron_sharedproj.ops.reference"):
        grad.square().sum().backward()


def leaves_of(s: int, t: int, tied: bool) -> list[Tensor]:
    """query [s, b, h, e], key and value [t, b, g, e] as ops.attention takes them."""
    shapes = [(s, 2, 4, 16), (t, 2, 2, 16), (t, 2, 2, 16)]
    return [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes[: 2 if tied else 3])]


def step(query: Tensor, key: Tensor, value: Tensor | None = None) -> tuple[Tensor, ...]:
    out = attention(query, key, key if value is None else value, causal=True, scale=0.25)
    return out, out.square().mean()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


@TIED
@BACKENDS
def test_compiled_forward_and_backward(backend: str, tied: bool, fresh_dynamo: None) -> None:
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    leaves = leaves_of(40, 40, tied)
    results = [function(*leaves) for function in (step, compiled)]
    (out, loss), (compiled_out, compiled_loss) = results
    torch.testing.assert_close(compiled_out, out, rtol=0, atol=1e-6)
    expected, grads = (torch.autograd.grad(x, leaves) for x in (loss, compiled_loss))
    for grad, wanted in zip(grads, expected, strict=True):
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7)


@BACKENDS
def test_compiled_packed_and_decode(backend: str, fresh_dynamo: None) -> None:
    def run(query: Tensor, key: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        packed = attention_packed(query, key, key, starts, starts, 30, 30, causal=True, scale=0.25)
        return packed, *decode(query[None, :3].detach(), key[None].detach(), scale=0.25, seqlens_k=lengths)

    arguments = (randn(40, 4, 16), randn(40, 2, 16, seed=1), int32(0, 10, 40), int32(33))
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for result, expected in zip(compiled(*arguments), run(*arguments), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@TIED
def test_one_graph_for_all_lengths(tied: bool, fresh_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for s in (40, 70, 133):
        leaves = leaves_of(s, s, tied)
        for leaf in leaves:
            torch._dynamo.mark_dynamic(leaf, 0)
        (loss, expected) = compiled(*leaves)[1], step(*leaves)[1]
        grads, wanted = (torch.autograd.grad(x, leaves) for x in (loss, expected))
        for grad, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1


def test_build_info() -> None:
    info = extension.BUILD_INFO
    assert info["mode"] in ("cpu", "nvcc", "cuda")
    assert info["cpu_capability"] in ("baseline", "avx2", "avx512", "avx512_bf16")
    assert torch.__version__.startswith(info["torch"].split("+")[0])
    assert (info["cuda_architectures"] == "") == (info["mode"] == "cpu")


@pytest.mark.parametrize(
    "error, words",
    [
        (
            ModuleNotFoundError("No module named 'megatron_sharedproj._C'"),
            "the compiled extension is not installed",
        ),
        (
            ImportError("_C.so: undefined symbol: _ZN3c10\nmore"),
            f"does not load with torch {torch.__version__}",
        ),
        (
            OSError("libc10_cuda.so: cannot open shared object file"),
            "libc10_cuda.so: cannot open shared object",
        ),
    ],
)
def test_an_extension_that_does_not_load(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "megatron_sharedproj._C":
                raise error

    monkeypatch.delitem(sys.modules, "megatron_sharedproj._C")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(type(error)):
        importlib.import_module("megatron_sharedproj._C")
    missing, info = extension._load()
    assert words in missing and "\n" not in missing and info == {}
    assert re.match("the compiled extension (is not installed|does not load)", missing)
