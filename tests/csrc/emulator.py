"""Runs the CUDA kernels of csrc on the CPU: builds the emulated library, calls it with ctypes.

Shape legend: b sequences, s query length, t key length, h query heads, g groups, e head size.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which("g++")
NO_COMPILER = "g++ is not installed; the emulated kernels cannot be built"
FLAGS = ["-std=c++17", "-march=native", "-fno-strict-aliasing", "-fPIC", "-DSHAREDPROJ_EMULATION"]
EMULATION_UNITS = ("emulation/scheduler.cpp", "emulation/emulation.cpp")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GUARD = 4096  # elements before and behind every tensor that a kernel sees

_i32, _i64, _u64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


class Strides(ctypes.Structure):
    _fields_ = [("batch", _i64), ("seq", _i64), ("head", _i64)]


class Problem(ctypes.Structure):
    _fields_ = [
        *[(name, _i32) for name in ("dtype", "batch", "heads", "groups", "head_size")],
        *[("max_seqlen_q", _i64), ("max_seqlen_k", _i64)],
        *[("cu_seqlens_q", _pointer), ("cu_seqlens_k", _pointer)],
        *[("total_q", _i64), ("causal", ctypes.c_bool), ("scale", ctypes.c_float)],
    ]


class ForwardParams(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        *[(name, _pointer) for name in ("query", "key", "value", "out", "lse")],
        *[(name + "_strides", Strides) for name in ("query", "key", "value", "out")],
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        *[(name, _pointer) for name in ("grad_out", "grad_lse", "query", "key", "value", "out", "lse")],
        *[(name, _pointer) for name in ("grad_query", "grad_key", "grad_value")],
        *[(name + "_strides", Strides) for name in ("grad_out", "query", "key", "value", "out")],
        *[(name + "_strides", Strides) for name in ("grad_query", "grad_key", "grad_value")],
        *[("deterministic", ctypes.c_bool), ("workspace", _pointer)],
    ]


class DecodeParams(ctypes.Structure):
    _fields_ = [
        *[(name, _i32) for name in ("dtype", "batch", "heads", "groups", "head_size")],
        *[("seqlen_q", _i64), ("max_seqlen_k", _i64), ("seqlens_k", _pointer), ("scale", ctypes.c_float)],
        *[(name, _pointer) for name in ("query", "key", "value", "out", "lse")],
        *[(name + "_strides", Strides) for name in ("query", "key", "value", "out")],
        *[("block_table", _pointer), ("table_stride", _i64)],
        *[("page_size", _i32), ("num_pages", _i32), ("num_splits", _i32), ("workspace", _pointer)],
    ]


class Refused(Exception):
    """The launch was refused, or the emulation found an error in the kernel."""


def read_sources(root: Path = SOURCES) -> dict[str, str]:
    """The kernels' and the emulation's sources: path inside csrc -> text."""
    paths = [path for pattern in ("*.h", "*.cuh", "*.cu", "emulation/*") for path in root.glob(pattern)]
    return {str(path.relative_to(root)): path.read_text() for path in sorted(paths)}


def _compile(folder: Path, sources: Mapping[str, str], unit: str) -> Path:
    """The object of one source file, unless one of the same text is there already."""
    assert COMPILER is not None, NO_COMPILER
    texts = sorted((name, text) for name, text in sources.items() if not name.startswith("cpu/"))
    if unit.startswith("emulation/"):
        texts = [
            (name, text) for name, text in texts if name.startswith("emulation/") or name.endswith("n.h")
        ]
    digest = hashlib.sha256(repr((unit, texts, FLAGS, _compiler_version())).encode()).hexdigest()[:20]
    target = folder / f"{digest}.o"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for name, text in texts:
            path = Path(work, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        # Kernels compile twice as fast with -O1 and run as fast: the time goes into the emulation.
        optimisation = "-O2" if unit in EMULATION_UNITS else "-O1"
        command = [COMPILER, "-x", "c++", *FLAGS, optimisation, "-c", unit, "-o", "built.o"]
        result = subprocess.run(command, cwd=work, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        os.replace(Path(work, "built.o"), target)
    return target


@functools.cache
def _compiler_version() -> str:
    assert COMPILER is not None, NO_COMPILER
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def build(sources: Mapping[str, str], unit: str = "shared_kv_attention.cu") -> Path:
    """The library of the kernels in `unit` and the emulation; objects of unchanged sources are used again."""
    assert COMPILER is not None, NO_COMPILER
    folder = Path(tempfile.gettempdir()) / f"sharedproj-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    objects = [_compile(folder, sources, name) for name in (unit, *EMULATION_UNITS)]
    library = folder / ("-".join(path.stem[:8] for path in objects) + ".so")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work, "built.so")
            subprocess.run([COMPILER, "-shared", *map(str, objects), "-o", str(built)], check=True)
            os.replace(built, library)
    return library


def _strides(tensor: Tensor) -> Strides:
    """Of [b, s, h, e], or [total, h, e] where sequences are packed."""
    assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    batch = tensor.stride(0) if tensor.dim() == 4 else 0
    return Strides(batch, tensor.stride(-3), tensor.stride(-2))


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last of a strided tensor."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def guarded(tensor: Tensor) -> Tensor:
    """A copy with the same strides and what the storage holds besides, between guards of NaN."""
    low, size = tensor.storage_offset(), tensor.untyped_storage().size() // tensor.element_size()
    flat = torch.as_strided(tensor, (size,), (1,), 0) if size else tensor.reshape(-1)
    buffer = torch.full((size + 2 * GUARD,), float("nan"), dtype=tensor.dtype)
    buffer[GUARD : GUARD + size] = flat
    return torch.as_strided(buffer, tensor.shape, tensor.stride(), GUARD + low)


class Output:
    """A tensor of NaN that a kernel fills, and around it what no kernel may write."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        strides: Sequence[int] | None = None,
        alignment: int = 16,  # bytes
    ) -> None:
        plain = torch.empty(tuple(shape), dtype=dtype, device="meta")
        strides = strides or plain.stride()
        size = _extent(torch.as_strided(plain, plain.shape, strides)) + 2 * GUARD + alignment
        self.buffer = torch.full((size,), float("nan"), dtype=dtype)
        start = GUARD + -(self.buffer.data_ptr() + GUARD * dtype.itemsize) % alignment // dtype.itemsize
        self.tensor = torch.as_strided(self.buffer, plain.shape, strides, start)

    def check(self) -> Tensor:
        """The result; raises if something was written outside it."""
        untouched = torch.ones_like(self.buffer, dtype=torch.bool)
        start = self.tensor.storage_offset()
        torch.as_strided(untouched, self.tensor.shape, self.tensor.stride(), start).fill_(False)
        assert self.buffer[untouched].isnan().all(), "a kernel wrote outside its output"
        return self.tensor


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Emulator:
    """The kernels of one library. Tensors are [b, s, h, e]; packed ones [total, h, e] with cu_seqlens."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        for name in ("forward", "backward", "decode"):
            getattr(self.c, f"emulated_{name}").restype = ctypes.c_char_p
        for name in ("backward_workspace_bytes", "decode_workspace_bytes", "struct_bytes"):
            getattr(self.c, f"emulated_{name}").restype = ctypes.c_uint64
        self.c.emulated_bank_conflicts.restype = ctypes.c_int64
        for which, struct in enumerate((ForwardParams, BackwardParams, DecodeParams)):
            assert self.c.emulated_struct_bytes(which) == ctypes.sizeof(struct), struct.__name__

    def _call(self, name: str, params: ctypes.Structure, seed: int, *inputs: Tensor) -> None:
        self.c.emulated_allow_reads(None, _u64(0))
        for tensor in inputs:
            self.c.emulated_allow_reads(
                _pointer(tensor.data_ptr()), _u64(_extent(tensor) * tensor.element_size())
            )
        message = getattr(self.c, f"emulated_{name}")(ctypes.byref(params), _u64(seed))
        if message is not None:
            raise Refused(message.decode())

    def bank_conflicts(self) -> int:
        """Extra turns of shared memory in the last call: ldmatrix, loads, stores and asynchronous copies."""
        return sum(self.c.emulated_bank_conflicts(kind) for kind in range(4))

    def set_multiprocessors(self, count: int) -> None:
        self.c.emulated_set_multiprocessors(count)

    @staticmethod
    def _problem(
        query: Tensor, key: Tensor, causal: bool, scale: float, cu_seqlens: tuple[Tensor, Tensor] | None
    ) -> Problem:
        heads, head_size, groups = query.shape[-2], query.shape[-1], key.shape[-2]
        if cu_seqlens is None:
            batch, longest, total = (
                query.shape[0],
                [query.shape[1], key.shape[1]],
                query.shape[0] * query.shape[1],
            )
        else:
            lengths = [cu.diff() for cu in cu_seqlens]
            batch, total = len(lengths[0]), query.shape[0]
            longest = [int(each.max()) if batch else 0 for each in lengths]
        cu_q, cu_k = cu_seqlens or (None, None)
        sizes = (DTYPES[query.dtype], batch, heads, groups, head_size, *longest)
        return Problem(*sizes, _address(cu_q), _address(cu_k), total, causal, scale)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        cu_seqlens: tuple[Tensor, Tensor] | None = None,
        out_strides: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Returns out like query and lse [b, h, s], or [h, total] where sequences are packed."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query, key = guarded(query), guarded(key)
        out = Output(tuple(query.shape), query.dtype, out_strides)
        packed = cu_seqlens is not None
        lse_shape = (
            (query.shape[1], query.shape[0]) if packed else (query.shape[0], query.shape[2], query.shape[1])
        )
        lse = Output(lse_shape, torch.float32)
        params = ForwardParams(
            self._problem(query, key, causal, scale, cu_seqlens),
            *(_address(tensor) for tensor in (query, key, None, out.tensor, lse.tensor)),
            *(_strides(tensor) for tensor in (query, key, key, out.tensor)),
        )
        self._call("forward", params, seed, query, key)
        return out.check(), lse.check()

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        grad_lse: Tensor | None = None,
        cu_seqlens: tuple[Tensor, Tensor] | None = None,
        deterministic: bool = False,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of query and of key (as key and as value), shaped and strided like them."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        grad_out, query, key, out, lse = (guarded(each) for each in (grad_out, query, key, out, lse))
        grad_lse = None if grad_lse is None else guarded(grad_lse)
        grad_query = Output(tuple(query.shape), query.dtype, tuple(query.stride()))
        grad_key = Output(tuple(key.shape), key.dtype, tuple(key.stride()))
        pointers = (grad_out, grad_lse, query, key, None, out, lse, grad_query.tensor, grad_key.tensor, None)
        strided = (grad_out, query, key, key, out, grad_query.tensor, grad_key.tensor, grad_key.tensor)
        params = BackwardParams(
            self._problem(query, key, causal, scale, cu_seqlens),
            *(_address(tensor) for tensor in pointers),
            *(_strides(tensor) for tensor in strided),
            deterministic,
        )
        size = self.c.emulated_backward_workspace_bytes(ctypes.byref(params))
        workspace = Output((size // 4,), torch.float32, alignment=256)
        params.workspace = _address(workspace.tensor)
        self._call("backward", params, seed, grad_out, query, key, out, lse, workspace.tensor)
        workspace.check()
        return grad_query.check(), grad_key.check()

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        *,
        seqlens: Tensor | None = None,
        block_table: Tensor | None = None,
        scale: float | None = None,
        num_splits: int = 0,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """query [b, s, h, e]; key [b, t, g, e], or with block_table pages [pages, page_size, g, e].

        Returns out like query and lse [b, h, s].
        """
        query, key = guarded(query), guarded(key)
        batch, s, heads, _ = query.shape
        out, lse = Output(query.shape, query.dtype), Output((batch, heads, s), torch.float32)
        params = self._decode_params(
            query, key, out.tensor, lse.tensor, seqlens, block_table, scale, num_splits
        )
        size = self.c.emulated_decode_workspace_bytes(ctypes.byref(params))
        workspace = Output((size // 4,), torch.float32, alignment=256)
        params.workspace = _address(workspace.tensor)
        self._call("decode", params, seed, query, key)
        workspace.check()
        return out.check(), lse.check()

    def decode_num_splits(self, query: Tensor, key: Tensor) -> int:
        """What num_splits=0 stands for on this machine, for a contiguous cache."""
        lse = torch.empty(query.shape[0], query.shape[2], query.shape[1])
        params = self._decode_params(query, key, query, lse, None, None, None, 0)
        return int(self.c.emulated_decode_num_splits(ctypes.byref(params)))

    @staticmethod
    def _decode_params(
        query: Tensor,
        key: Tensor,
        out: Tensor,
        lse: Tensor,
        seqlens: Tensor | None,
        block_table: Tensor | None,
        scale: float | None,
        num_splits: int,
    ) -> DecodeParams:
        batch, s, heads, head_size = query.shape
        scale = head_size**-0.5 if scale is None else scale
        capacity, table_stride, page_size, num_pages = key.shape[1], 0, 0, 0
        if block_table is not None:
            capacity, table_stride = block_table.shape[1] * key.shape[1], block_table.stride(0)
            page_size, num_pages = key.shape[1], key.shape[0]
        sizes = (DTYPES[query.dtype], batch, heads, key.shape[2], head_size, s, capacity)
        return DecodeParams(
            *sizes,
            *(_address(seqlens), scale),
            *(_address(tensor) for tensor in (query, key, None, out, lse)),
            *(_strides(tensor) for tensor in (query, key, key, out)),
            *(_address(block_table), table_stride, page_size, num_pages, num_splits),
        )


@functools.cache
def emulator() -> Emulator:
    return Emulator(build(read_sources()))
