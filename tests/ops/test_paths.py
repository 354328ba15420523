"""The path rule: which implementation computes an attention, why, and what --require-kernel makes of it.

A GPU's requests need no GPU: the rule reads a description of the inputs and how the extension was built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megatron_sharedproj.ops import extension
from megatron_sharedproj.ops.attention import attention, attention_packed, select_path
from megatron_sharedproj.ops.decode import decode
from megatron_sharedproj.ops.paths import Request, choose, is_decode, refusal, require_kernel
from megatron_sharedproj.ops.reference import attention_reference, decode_reference

CPU = Request(
    device="cpu", dtype=torch.float32, head_size=64, tied=True, queries=512, keys=512, training=True
)
A100 = replace(CPU, device="cuda", dtype=torch.bfloat16, capability=(8, 0))
H200 = replace(A100, capability=(9, 0))
NO_EXTENSION = "the compiled extension is not installed"


@pytest.fixture(autouse=True)
def policy() -> Iterator[None]:
    require_kernel(False)
    yield
    require_kernel(False)


@pytest.fixture
def built_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "MISSING", "")
    info = {"mode": "cuda", "cpu_capability": "avx2", "cuda_architectures": "8.0;9.0+PTX"}
    monkeypatch.setattr(extension, "BUILD_INFO", info)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "MISSING", NO_EXTENSION)
    monkeypatch.setattr(extension, "BUILD_INFO", {})


REFUSED = [
    (replace(CPU, dropout=True), "attention dropout: the kernels have none"),
    (replace(A100, dropout=True), "attention dropout: the kernels have none"),
    (replace(CPU, last_dimension_contiguous=False), "the inputs' last dimension is not contiguous"),
    (replace(CPU, dtype=torch.float64), "float64 on a CPU: the kernels take float32 and bfloat16"),
    (replace(CPU, dtype=torch.float16), "float16 on a CPU: the kernels take float32 and bfloat16"),
    (replace(CPU, head_size=4), "head size 4 on a CPU: the kernels take multiples of 8 from 8 to 256"),
    (replace(CPU, head_size=12), "head size 12 on a CPU: the kernels take multiples of 8 from 8 to 256"),
    (replace(CPU, head_size=264), "head size 264 on a CPU: the kernels take multiples of 8 from 8 to 256"),
    (replace(CPU, device="mps"), "device mps: the kernels are for CPU and CUDA"),
    (replace(A100, capability=(7, 5)), "compute capability 7.5: the kernels need 8.0"),
    (replace(A100, tied=False), "key and value are two tensors: the CUDA kernels read one"),
    (replace(A100, dtype=torch.float32), "float32 on CUDA: the kernels take bfloat16 and float16"),
    (replace(A100, head_size=96), "head size 96 on CUDA: the kernels take 64, 80 and 128"),
]
ACCEPTED = [
    CPU,
    replace(CPU, dtype=torch.bfloat16),
    replace(CPU, head_size=8),
    replace(CPU, head_size=256),
    replace(CPU, tied=False),
    replace(CPU, causal=False),
    replace(CPU, queries=700),
    A100,
    replace(A100, dtype=torch.float16),
    replace(A100, head_size=80),
    replace(A100, head_size=128),
    replace(A100, capability=(8, 9)),
]


@pytest.mark.usefixtures("built_for_cuda")
@pytest.mark.parametrize("request_, reason", REFUSED)
def test_refused(request_: Request, reason: str) -> None:
    assert refusal(request_) == reason
    tensors = "key and value one tensor" if request_.tied else "key and value two tensors"
    assert str(choose(request_)) == f"attention path: sdpa ({reason}; SDPA with {tensors})"


@pytest.mark.usefixtures("built_for_cuda")
@pytest.mark.parametrize("request_, reason", REFUSED)
def test_refused_is_an_error_where_the_kernel_is_required(request_: Request, reason: str) -> None:
    require_kernel(True)
    with pytest.raises(ValueError) as error:
        choose(request_)
    assert str(error.value).startswith(f"--require-kernel: {reason}; ")
    assert str(error.value).endswith("drop the flag to run on PyTorch's SDPA")
    assert "pip install" not in str(error.value)


@pytest.mark.usefixtures("built_for_cuda")
@pytest.mark.parametrize("request_", ACCEPTED)
@pytest.mark.parametrize("required", [False, True])
def test_accepted(request_: Request, required: bool) -> None:
    require_kernel(required)
    assert refusal(request_) == ""
    path = choose(request_)
    assert path.name == "extension"
    assert ("avx2" if request_.device == "cpu" else "built for 8.0;9.0+PTX") in path.reason
    assert "forward and backward kernel" in path.reason
    assert ("key and value one tensor" if request_.tied else "key and value two tensors") in path.reason


@pytest.mark.parametrize("mode", ["cpu", "nvcc"])
def test_an_extension_without_cuda_tensors(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "MISSING", "")
    monkeypatch.setattr(extension, "BUILD_INFO", {"mode": mode, "cpu_capability": "avx2"})
    assert refusal(A100) == f"the extension was built in mode {mode}, without CUDA tensors"
    assert refusal(CPU) == ""


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("request_", ACCEPTED + [request_ for request_, _ in REFUSED])
def test_without_the_extension(request_: Request) -> None:
    path = choose(replace(request_, queries=512))
    assert path.name == "sdpa" and path.reason.startswith(NO_EXTENSION)
    require_kernel(True)
    with pytest.raises(ValueError) as error:
        choose(request_)
    message = str(error.value)
    assert message.startswith(f"--require-kernel: {NO_EXTENSION}; build it with `pip install")
    assert message.endswith("or drop the flag to run on PyTorch's SDPA")


@pytest.mark.usefixtures("missing")
def test_a_caller_may_overrule_the_policy() -> None:
    with pytest.raises(ValueError, match="--require-kernel: "):
        choose(CPU, required=True)
    require_kernel(True)
    assert choose(CPU, required=False).name == "sdpa"


# queries, keys, causal, training -> decode
DECODES = [
    (1, 512, True, False, True),
    (1, 512, False, False, True),
    (16, 512, True, False, True),
    (5, 3, True, False, True),
    (17, 512, True, False, False),
    (16, 512, False, False, False),
    (1, 512, True, True, False),
    (1, 0, True, False, False),
]


@pytest.mark.usefixtures("built_for_cuda")
@pytest.mark.parametrize("queries, keys, causal, training, expected", DECODES)
def test_what_the_decode_kernel_serves(
    queries: int, keys: int, causal: bool, training: bool, expected: bool
) -> None:
    request = replace(A100, queries=queries, keys=keys, causal=causal, training=training)
    assert is_decode(request) == expected
    step = "decode kernel" if expected else "forward and backward kernel" if training else "forward kernel"
    assert choose(request).reason.startswith(step)


@pytest.mark.usefixtures("built_for_cuda")
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_hopper_trains_with_the_library_and_decodes_with_the_extension(capability: tuple[int, int]) -> None:
    training = replace(A100, capability=capability)
    prefill = replace(training, training=False)
    step = replace(prefill, queries=1)
    for request in (training, prefill):
        assert refusal(request) == ""
        path = choose(request)
        assert path.name == "sdpa"
        assert "SDPA has wgmma kernels from compute capability 9.0 on" in path.reason
    assert choose(step).name == "extension" and choose(step).reason.startswith("decode kernel")
    require_kernel(True)
    assert {choose(request).name for request in (training, prefill, step)} == {"extension"}


@pytest.mark.usefixtures("built_for_cuda")
@pytest.mark.parametrize("request_", [replace(CPU, dtype=torch.float64), replace(A100, tied=False), H200])
def test_rows_without_a_key_run_the_reference_where_the_kernel_does_not(request_: Request) -> None:
    blind = replace(request_, queries=512, keys=511)
    path = choose(blind)
    assert path.name == "reference"
    assert path.reason.endswith("some queries see no key, where SDPA gives NaN")
    assert choose(replace(blind, causal=False)).name == "sdpa"
    assert choose(replace(blind, keys=512)).name == "sdpa"


def inputs(
    s: int, t: int, g: int = 2, e: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query [s, b, h, e], key and value [t, b, g, e]"""
    random = torch.Generator().manual_seed(s * 100 + t)
    shapes = ((s, 2, 4, e), (t, 2, g, e), (t, 2, g, e))
    query, key, value = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    return query, key, value


@pytest.mark.usefixtures("built_for_cuda")
def test_select_path_describes_the_inputs() -> None:
    query, key, value = inputs(20, 20)
    assert select_path(query, key, key).reason == "forward kernel, avx2; key and value one tensor"
    assert select_path(query, key, value).reason == "forward kernel, avx2; key and value two tensors"
    assert select_path(query[:1], key, value).reason.startswith("decode kernel")
    assert select_path(query[:2], key, value, causal=False).reason.startswith("forward kernel")
    assert select_path(query, key, key, dropout_p=0.1).reason.startswith("attention dropout")
    assert select_path(query[..., ::2], key[..., ::2], key[..., ::2]).reason.startswith("the inputs' last")
    assert select_path(query.double(), key.double(), key.double()).reason.startswith("float64 on a CPU")

    view = key.view_as(key)
    assert select_path(query, key, view).reason.endswith("one tensor")
    key.requires_grad_()
    assert select_path(query, key, key).reason.startswith("forward and backward kernel")
    # Two views may have different gradients; one tensor in both roles has the sum.
    assert select_path(query, key, view).reason.endswith("two tensors")
    assert select_path(query, key, key).reason.endswith("one tensor")
    with torch.no_grad():
        assert select_path(query[:1], key, view).reason == "decode kernel, avx2; key and value one tensor"


@pytest.mark.parametrize("call", ["attention", "packed"])
def test_the_ops_obey_the_policy(call: str) -> None:
    query, key, _ = inputs(20, 20, dtype=torch.float64)
    starts = torch.tensor([0, 20], dtype=torch.int32)

    def run() -> torch.Tensor:
        if call == "attention":
            return attention(query, key, key, causal=True, scale=0.25)
        return attention_packed(
            query[:, 0], key[:, 0], key[:, 0], starts, starts, 20, 20, causal=True, scale=0.25
        )

    run()
    require_kernel(True)
    with pytest.raises(ValueError, match="--require-kernel: "):
        run()


def test_decode_obeys_the_policy() -> None:
    query, key, _ = inputs(2, 20, dtype=torch.float64)
    require_kernel(True)
    with pytest.raises(ValueError, match="--require-kernel: "):
        decode(query, key, scale=0.25)


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("roles", ["qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s, t, g", [(20, 20, 4), (20, 20, 1), (5, 33, 2), (33, 5, 2), (1, 33, 2)])
def test_every_variant_without_the_extension(s: int, t: int, g: int, causal: bool, roles: str) -> None:
    """One tensor in several roles gets the sum of their gradients on SDPA and the reference too."""
    if roles in ("q_eq_k", "q_eq_k_eq_v"):
        s, g = t, 4  # a query that is the key has its shape
    query, key, value = inputs(s, t, g)
    leaves = {
        "qkv": (query, key, value), "q_eq_k": (key, value), "qk_eq_v": (query, key), "q_eq_k_eq_v": (key,),
    }[roles]  # fmt: skip
    order = {"qkv": (0, 1, 2), "q_eq_k": (0, 0, 1), "qk_eq_v": (0, 1, 1), "q_eq_k_eq_v": (0, 0, 0)}[roles]
    weight = torch.randn(s, 2, 4, 16, generator=torch.Generator().manual_seed(1)).double()
    results = []
    for function, dtype in ((attention, torch.float32), (attention_reference, torch.float64)):
        inner = [x.to(dtype).requires_grad_() for x in leaves]
        out = function(*(inner[i] for i in order), causal=causal, scale=0.25)
        results.append([out, *torch.autograd.grad(out, inner, weight.to(dtype))])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
def test_packed_and_decode_without_the_extension(tied: bool) -> None:
    query, key, value = (x[:, 0] for x in inputs(20, 33))
    value = key if tied else value
    starts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 20], [0, 9, 12, 33])]
    out = attention_packed(query, key, value, *starts, 15, 21, causal=True, scale=0.25)
    for q0, q1, k0, k1 in ((0, 5, 0, 9), (5, 20, 12, 33)):
        pieces = (query[q0:q1, None], key[k0:k1, None], value[k0:k1, None])
        expected = attention_reference(*(x.double() for x in pieces), causal=True, scale=0.25)[:, 0]
        torch.testing.assert_close(out[q0:q1].double(), expected, rtol=1e-4, atol=1e-5)

    query, key, value = inputs(2, 2)
    cache = None if tied else value
    lengths = torch.tensor([2, 1], dtype=torch.int32)
    results = decode(query, key, cache, scale=0.25, seqlens_k=lengths)
    assert all(map(torch.equal, results, decode_reference(query, key, cache, 0.25, lengths)))
