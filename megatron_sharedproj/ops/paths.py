"""Which implementation computes an attention, and why: one rule, read by the op, the start-up log and env.py.

Order: the compiled extension, SDPA (with key and value one tensor where they are tied), the plain reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_sharedproj.ops import extension

CPU_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_HEAD_SIZES = (64, 80, 128)
# Up to this many queries without gradients run on the decode kernel: it splits the keys, not the queries.
DECODE_QUERIES = 16


@dataclass(frozen=True)
class Request:
    """All that decides the path of one attention.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of query, key and value.
        head_size: elements of a head.
        tied: key and value are one tensor.
        queries: query length; keys: key length.
        causal: bottom-right aligned mask.
        training: gradients are wanted.
        dropout: attention dropout is on.
        last_dimension_contiguous: of all inputs.
        capability: compute capability of the GPU, None on a CPU.
    """

    device: str
    dtype: torch.dtype
    head_size: int
    tied: bool
    queries: int
    keys: int
    causal: bool = True
    training: bool = False
    dropout: bool = False
    last_dimension_contiguous: bool = True
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Path:
    """Which implementation runs ("extension", "sdpa" or "reference"), and the reason in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"attention path: {self.name} ({self.reason})"


class _Policy:
    require_kernel = False


def require_kernel(required: bool) -> None:
    """Make a fallback an error in this process (``--require-kernel``), one to a faster library kernel too."""
    _Policy.require_kernel = required


def is_decode(request: Request) -> bool:
    """Whether the extension's decode kernel serves this request rather than its forward kernel."""
    return (
        not request.training
        and request.queries <= DECODE_QUERIES
        and (request.causal or request.queries == 1)
        and request.keys > 0
    )


def refusal(request: Request) -> str:
    """Why the extension cannot compute this, "" if it can."""
    if extension.MISSING:
        return extension.MISSING
    name = str(request.dtype).removeprefix("torch.")
    if request.dropout:
        return "attention dropout: the kernels have none"
    if not request.last_dimension_contiguous:
        return "the inputs' last dimension is not contiguous"
    if request.device == "cpu":
        if request.dtype not in CPU_DTYPES:
            return f"{name} on a CPU: the kernels take float32 and bfloat16"
        if request.head_size % 8 or not 8 <= request.head_size <= 256:
            return f"head size {request.head_size} on a CPU: the kernels take multiples of 8 from 8 to 256"
        return ""
    if request.device != "cuda":
        return f"device {request.device}: the kernels are for CPU and CUDA"
    mode = extension.BUILD_INFO["mode"]
    if mode != "cuda":
        return f"the extension was built in mode {mode}, without CUDA tensors"
    if request.capability is not None and request.capability < (8, 0):
        return f"compute capability {request.capability[0]}.{request.capability[1]}: the kernels need 8.0"
    if not request.tied:
        return "key and value are two tensors: the CUDA kernels read one"
    if request.dtype not in CUDA_DTYPES:
        return f"{name} on CUDA: the kernels take bfloat16 and float16"
    if request.head_size not in CUDA_HEAD_SIZES:
        return f"head size {request.head_size} on CUDA: the kernels take 64, 80 and 128"
    return ""


def _library_is_faster(request: Request) -> str:
    # Hopper's library kernels use wgmma; ours are mma.sync, at half its rate. Decode is bound by memory.
    if request.device == "cuda" and request.capability is not None and request.capability >= (9, 0):
        if not is_decode(request):
            return "SDPA has wgmma kernels from compute capability 9.0 on; the extension decodes"
    return ""


def choose(request: Request, required: bool | None = None) -> Path:
    """The path of one attention.

    Args:
        required: the kernel must run; None: what :func:`require_kernel` said.
    Raises:
        ValueError: if the kernel was required (``--require-kernel``) and cannot run.
    """
    required = _Policy.require_kernel if required is None else required
    why_not = refusal(request)
    if required and why_not:
        remedy = (
            "build it with `pip install --no-build-isolation -e .`"
            if extension.MISSING
            else "change what it names"
        )
        raise ValueError(f"--require-kernel: {why_not}; {remedy}, or drop the flag to run on PyTorch's SDPA")
    if not why_not and not required:
        why_not = _library_is_faster(request)
    tensors = "key and value one tensor" if request.tied else "key and value two tensors"
    if not why_not:
        info = extension.BUILD_INFO
        kernel = (
            info["cpu_capability"] if request.device == "cpu" else f"built for {info['cuda_architectures']}"
        )
        step = "decode" if is_decode(request) else "forward and backward" if request.training else "forward"
        return Path("extension", f"{step} kernel, {kernel}; {tensors}")
    if request.causal and request.queries > request.keys:
        return Path("reference", f"{why_not}; some queries see no key, where SDPA gives NaN")
    return Path("sdpa", f"{why_not}; SDPA with {tensors}")
