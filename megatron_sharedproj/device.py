"""The one seam between CPU and GPU: the rest of the code asks a :class:`Device` and never branches.

Megatron-Core has no device abstraction (it writes ``device="cuda"`` and ``torch.cuda.current_device()``
in its engine), so on a machine without a GPU :class:`CpuDevice` gives *its modules* another ``torch``:
the name ``torch`` inside ``megatron.core.*`` becomes a forwarding object whose CUDA names mean the CPU.
``torch`` and ``torch.cuda`` themselves stay as they are for everybody else. With it Megatron-Core's own
data-parallel, optimizer, schedule and checkpoint code runs on two CPU cores, the code that runs on GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_sharedproj.cpu_cross_entropy import vocab_parallel_cross_entropy
from megatron_sharedproj.cpu_linear import fp32_library, linear_with_grad_accumulation_and_async_allreduce
from megatron_sharedproj.cpu_memory import keep_freed_memory
from megatron_sharedproj.ops.zigzag import own_chunks

_ENGINE = "megatron.core"


class Device:
    """What the trainer needs to know of the hardware."""

    type = "cpu"
    backend = "gloo"
    trains_in_fp16 = False
    has_fused_kernels = False  # Megatron's fused bias, activation, dropout and loss, compiled for a GPU
    pins_memory = False
    capability: tuple[int, int] | None = None  # compute capability of a GPU

    def install(self) -> None:
        """Make Megatron-Core run on this device; idempotent, before the first use of it."""

    def setup(self, local_rank: int, *, shared: bool = False) -> torch.device:
        """Select this process's device.

        Args:
            shared: several processes may have the same one; gloo can do that, NCCL cannot.

        Raises:
            ValueError: if there are more processes than devices.
        """
        return torch.device("cpu")

    def current(self) -> torch.device:
        """The device that :meth:`setup` selected."""
        return torch.device("cpu")

    def rng_state(self) -> torch.Tensor:
        """State of the generator that dropout draws from: uint8 tensor on the CPU."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def copy_to_host(
        self, tensors: Mapping[Any, torch.Tensor], buffers: dict[Any, torch.Tensor]
    ) -> dict[Any, torch.Tensor]:
        """Copies in host memory, complete on return.

        Args:
            buffers: memory of an earlier call to copy into, by the same keys; new memory is put there
                (copying into fresh memory takes a CPU 6 times as long, and pinned memory is slow to get).
        """
        for key, tensor in tensors.items():
            buffer = buffers.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.pins_memory)
            buffers[key].copy_(tensor, non_blocking=True)
        self.synchronize()
        return {key: buffers[key] for key in tensors}

    def synchronize(self) -> None:
        """Wait until everything that was started is done."""

    def total_memory_bytes(self) -> int:
        """Memory that this process may use, bytes: the device's, or its share of the machine's."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes

    def peak_memory_bytes(self) -> int:
        """Most memory that this process has had: of tensors on a GPU, else its resident set."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def memory_stats(self) -> dict[str, int]:
        """Memory now, under Megatron's TensorBoard names with underscores; what the device can tell."""
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        # The kernel counts the two apart, and not to the page.
        peak = max(resident, self.peak_memory_bytes())
        return {"mem_allocated_bytes": resident, "mem_max_allocated_bytes": peak}

    def describe(self) -> str:
        return f"cpu ({torch.get_num_threads()} thread(s) per process)"

    def keep_freed_memory(self) -> contextlib.AbstractContextManager[None]:
        """Use freed memory again within: for steps that all need the same."""
        return contextlib.nullcontext()

    def products(self) -> str:
        """Which library computes fp32 matrix products here; empty where there is no choice."""
        return f"fp32 matrix products: {fp32_library()}"


class CpuDevice(Device):
    """CPU: gloo, fp32 or bf16, and the scoped ``torch`` for Megatron-Core's modules."""

    def install(self) -> None:
        if not any(isinstance(finder, _ScopedFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _ScopedFinder())
        for name, module in list(sys.modules.items()):
            if name.startswith(_ENGINE):
                _scope(module)
        # Megatron warns when its "GPU" streams move the CPU generator; here they are the CPU generator.
        logging.getLogger(f"{_ENGINE}.tensor_parallel.random").addFilter(_no_rng_warning)

    def keep_freed_memory(self) -> contextlib.AbstractContextManager[None]:
        return keep_freed_memory()


class CudaDevice(Device):
    """One NVIDIA GPU per process, NCCL; Megatron-Core as it is."""

    type = "cuda"
    backend = "nccl"
    trains_in_fp16 = True
    has_fused_kernels = True
    pins_memory = True

    @property
    def capability(self) -> tuple[int, int]:  # type: ignore[override]
        return torch.cuda.get_device_capability()

    def setup(self, local_rank: int, *, shared: bool = False) -> torch.device:
        count = torch.cuda.device_count()
        if local_rank >= count and not shared:
            raise ValueError(
                f"--nproc-per-node: local rank {local_rank} has no GPU, this machine has {count}; start at "
                "most one process per GPU, or let them share with --distributed-backend gloo"
            )
        torch.cuda.set_device(local_rank % count)
        return self.current()

    def current(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def rng_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def total_memory_bytes(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def memory_stats(self) -> dict[str, int]:
        stats = torch.cuda.memory_stats()
        return {
            "mem_reserved_bytes": stats["reserved_bytes.all.current"],
            "mem_allocated_bytes": stats["allocated_bytes.all.current"],
            "mem_max_allocated_bytes": stats["allocated_bytes.all.peak"],
            "mem_allocated_count": stats["allocation.all.current"],
        }

    def describe(self) -> str:
        return torch.cuda.get_device_name()

    def keep_freed_memory(self) -> contextlib.AbstractContextManager[None]:
        """Use freed memory again within: for steps that all need the same."""
        return contextlib.nullcontext()

    def products(self) -> str:
        return ""


def get_device() -> Device:
    """The device of this process: a GPU where torch finds one, else the CPU."""
    return CudaDevice() if torch.cuda.is_available() else CpuDevice()


# --- CPU: what Megatron-Core's modules see instead of torch ---------------------------------------------


class _Forwarding:
    """Looks like ``target`` except for the names set on it; caches what it forwards."""

    def __init__(self, target: Any, **overrides: Any):
        self.__dict__["_target"] = target
        self.__dict__.update(overrides)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not name.startswith("__"):
            self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)
        self.__dict__.pop(name, None)


class _NoStream:
    """A CUDA stream or event on a device that has no queue: everything is already done."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _NoStream:
        return self

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


_stand_in = torch.device("cpu")  # where Megatron's CUDA tensors are made


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Within it tensors are made without memory, those that Megatron-Core asks CUDA for too.

    For a simulated run, on the CPU device.
    """
    global _stand_in
    _stand_in = torch.device("meta")
    try:
        with _stand_in:
            yield
    finally:
        _stand_in = torch.device("cpu")


def _on_cpu(factory: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _stand_in
        return factory(*args, **kwargs)

    return create


def _scoped_torch() -> _Forwarding:
    nothing = _on_cpu(lambda *args, **kwargs: None)

    def get_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    random = _Forwarding(torch.cuda.random, get_rng_state=get_state, set_rng_state=set_state)
    cuda = _Forwarding(
        torch.cuda,
        current_device=lambda: _stand_in,
        synchronize=nothing,
        empty_cache=nothing,
        current_stream=_NoStream,
        default_stream=_NoStream,
        stream=lambda stream: contextlib.nullcontext(),
        Stream=_NoStream,
        Event=_NoStream,
        manual_seed=torch.manual_seed,
        get_rng_state=get_state,
        set_rng_state=set_state,
        random=random,
        is_current_stream_capturing=lambda: False,
    )
    factories = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "as_tensor")
    likes = ("zeros_like", "ones_like", "empty_like", "full_like")
    created = {name: _on_cpu(getattr(torch, name)) for name in factories + likes}
    return _Forwarding(torch, cuda=cuda, **created)


_TORCH = _scoped_torch()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _clip_grad_by_total_norm(
    parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    grads = [getattr(p, name).detach() for p in parameters if getattr(p, name, None) is not None]
    coefficient = max_norm / (total_norm + 1.0e-6)
    if grads and coefficient < 1.0:
        torch._foreach_mul_(grads, coefficient)


def _position_embedding_of_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
    return own_chunks(pos_emb, seq_dim, cp_group.size(), cp_group.rank())


# Functions whose bodies demand CUDA by more than a device name, without a public hook, and two public ones
# that are slow on a CPU.
_REPLACED = {
    "_set_cuda_rng_state": _set_rng_state,  # sets the CUDA generator through torch._C
    "clip_grad_by_total_norm_fp32": _clip_grad_by_total_norm,  # asserts 'torch.cuda.FloatTensor'
    "get_pos_emb_on_this_cp_rank": _position_embedding_of_rank,  # its index is pinned memory, then .cuda()
    "linear_with_grad_accumulation_and_async_allreduce": linear_with_grad_accumulation_and_async_allreduce,
    "vocab_parallel_cross_entropy": vocab_parallel_cross_entropy,
}


def _tie_embeddings(original: Any) -> Any:
    """LanguageModule's set-up of tied embeddings, whose copy between pipeline stages stays on the CPU.

    It moves the last stage's copy with ``Tensor.cuda()``, which a scoped ``torch`` cannot turn aside. So it
    is told that this rank has no part in the copying, and the copying is done here.
    """

    def setup_embeddings_and_output_layer(self: Any) -> None:
        asked: list[bool] = []

        def not_in_group() -> bool:
            asked.append(True)
            return False

        belongs = self._is_in_embd_group()
        self._is_in_embd_group = not_in_group
        try:
            original(self)
        finally:
            del self._is_in_embd_group
        weight = self.shared_embedding_or_output_weight()
        if asked and belongs and not weight.is_meta:
            torch.distributed.all_reduce(weight.data, group=self.embd_group)

    return setup_embeddings_and_output_layer


# Methods, for the same reason: module and class -> method -> what to make of it.
_REPLACED_METHODS = {
    (f"{_ENGINE}.models.common.language_module.language_module", "LanguageModule"): {
        "setup_embeddings_and_output_layer": _tie_embeddings
    },
}


def _no_rng_warning(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


# Their constructors sort parameters by the type names of CUDA tensors.
_OPTIMIZERS = ("Float16OptimizerWithFloat16Params", "DistributedOptimizer")


def _with_cuda_type_names(construct: Any) -> Any:
    """A constructor of an optimizer that sees the parameters' types under CUDA's names."""

    @functools.wraps(construct)
    def __init__(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        for parameter in parameters:
            name = parameter.type().replace("torch.", "torch.cuda.", 1)
            parameter.type = lambda name=name: name
        try:
            construct(self, optimizer, *args, **kwargs)
        finally:
            for parameter in parameters:
                del parameter.type

    return __init__


def _scope(module: ModuleType) -> None:
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = _TORCH
    for name in _OPTIMIZERS:
        optimizer = module.__dict__.get(name)
        if optimizer is not None and not hasattr(optimizer.__init__, "__wrapped__"):
            optimizer.__init__ = _with_cuda_type_names(optimizer.__init__)
    for name, replacement in _REPLACED.items():
        if name in module.__dict__:
            module.__dict__[name] = replacement
    for (home, class_name), methods in _REPLACED_METHODS.items():
        owner = module.__dict__.get(class_name) if module.__name__ == home else None
        for name, replace in methods.items():
            original = getattr(owner, name, None)
            # A module that was imported before install() is met again by each later call of it.
            if original is not None and original.__module__ == home:
                setattr(owner, name, replace(original))


class _ScopedLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _scope(module)


class _ScopedFinder(importlib.abc.MetaPathFinder):
    """Scopes Megatron-Core's modules as they are imported, the late ones too."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith(_ENGINE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _ScopedLoader(spec.loader.name, spec.loader.path)
        return spec
