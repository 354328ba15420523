"""The CPU device: Megatron-Core's modules see CUDA names that mean the CPU, and nobody else does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_sharedproj.cpu_linear import fp32_library
from megatron_sharedproj.device import CpuDevice, CudaDevice, get_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="describes machines without a GPU")

# A small module of the engine that nothing holds on to, so it can be imported again.
LEAF = "megatron.core.fusions.fused_bias_geglu"


@pytest.fixture(scope="module")
def leaf() -> Iterator[ModuleType]:
    """A module of megatron.core imported after install()."""
    get_device().install()
    before = sys.modules.pop(LEAF, None)
    yield importlib.import_module(LEAF)
    sys.modules.pop(LEAF)
    if before is not None:
        sys.modules[LEAF] = before


def test_without_a_gpu_it_is_the_cpu() -> None:
    device = get_device()
    assert isinstance(device, CpuDevice)
    assert (device.type, device.backend) == ("cpu", "gloo")
    assert device.setup(0) == torch.device("cpu")
    assert not device.trains_in_fp16
    assert "cpu" in device.describe()
    assert device.products() == f"fp32 matrix products: {fp32_library()}"


def test_more_processes_than_gpus_share_them_over_gloo_only(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(CudaDevice, "current", lambda self: torch.device("cuda", chosen[-1]))
    assert CudaDevice().setup(1) == torch.device("cuda", 1)
    with pytest.raises(
        ValueError, match="local rank 2 has no GPU, this machine has 2; .*--distributed-backend gloo"
    ):
        CudaDevice().setup(2)
    assert CudaDevice().setup(3, shared=True) == torch.device("cuda", 1)


def test_install_is_idempotent(leaf: ModuleType) -> None:
    finders, scoped = list(sys.meta_path), leaf.torch
    get_device().install()
    get_device().install()
    assert sys.meta_path == finders
    assert sum(type(finder).__module__ == "megatron_sharedproj.device" for finder in finders) == 1
    assert leaf.torch is scoped


def test_module_imported_before_is_prepared_too(leaf: ModuleType) -> None:
    scoped = leaf.torch
    leaf.torch = torch  # as if it had been imported before install()
    get_device().install()
    assert leaf.torch is scoped


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1)])
@pytest.mark.parametrize(
    "name, args",
    [
        ("zeros", (2,)), ("ones", (2,)), ("empty", (2,)), ("full", ((2,), 3.0)), ("tensor", ([1.0, 2.0],)),
        ("arange", (2,)), ("rand", (2,)), ("randn", (2,)), ("as_tensor", ([1.0, 2.0],)),
        ("zeros_like", (torch.ones(2),)), ("ones_like", (torch.ones(2),)), ("empty_like", (torch.ones(2),)),
        ("full_like", (torch.ones(2), 3.0)),
    ],
)  # fmt: skip
def test_engine_factories_make_cpu_tensors(leaf: ModuleType, name: str, args: Any, device: Any) -> None:
    tensor = getattr(leaf.torch, name)(*args, device=device)
    assert tensor.device == torch.device("cpu")
    assert tensor.shape == (2,)
    assert isinstance(tensor, leaf.torch.Tensor)


def test_engine_factories_pass_other_devices_on(leaf: ModuleType) -> None:
    assert leaf.torch.zeros(2, device="meta").is_meta
    assert leaf.torch.zeros(2).device == torch.device("cpu")


def test_engine_cuda_calls_mean_the_cpu(leaf: ModuleType) -> None:
    cuda = leaf.torch.cuda
    assert cuda.current_device() == torch.device("cpu")
    assert cuda.synchronize() is None
    assert cuda.is_available() is False
    with cuda.stream(cuda.Stream()):
        cuda.current_stream().wait_stream(cuda.Stream())
    assert torch.equal(cuda.get_rng_state(), torch.get_rng_state())


def test_torch_itself_is_untouched(leaf: ModuleType) -> None:
    assert leaf.torch is not torch
    assert type(torch) is type(sys)
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.cuda.Stream.__module__ == "torch.cuda.streams"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


def test_other_packages_are_untouched(leaf: ModuleType) -> None:
    import megatron_sharedproj.layers.norm as ours

    assert ours.torch is torch
    assert torch.nn.modules.linear.torch is torch


def test_rng_state_round_trip() -> None:
    device = get_device()
    state = device.rng_state()
    assert state.dtype == torch.uint8
    first = torch.rand(4)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


def test_memory_is_divided_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = get_device().total_memory_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert get_device().total_memory_bytes() == whole // 4


@pytest.fixture
def seeded(parallel_state: Any) -> Iterator[Any]:
    """(seed_all, Megatron's tracker); the generators are as before afterwards."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_sharedproj.distributed import seed_all

    state, tracker = torch.get_rng_state(), get_cuda_rng_tracker()
    states = tracker.get_states()
    yield seed_all, tracker
    torch.set_rng_state(state)
    tracker.set_states(states)


def test_forked_stream_is_reproducible_and_another_one(seeded: Any) -> None:
    seed_all, tracker = seeded

    def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seed_all(11)
        default = torch.rand(8)
        with tracker.fork():
            first = torch.rand(8)
        with tracker.fork():
            second = torch.rand(8)
        return default, first, second

    default, first, second = draw()
    for got, wanted in zip(draw(), (default, first, second), strict=True):
        assert torch.equal(got, wanted)
    assert not torch.equal(first, default)
    assert not torch.equal(second, first)  # it goes on where it stopped


def test_fork_leaves_the_default_stream_alone(seeded: Any) -> None:
    seed_all, tracker = seeded
    seed_all(11)
    expected = torch.rand(8)
    seed_all(11)
    with tracker.fork():
        torch.rand(3)
    assert torch.equal(torch.rand(8), expected)


def test_another_seed_gives_other_streams(seeded: Any) -> None:
    seed_all, tracker = seeded
    drawn = []
    for seed in (11, 12):
        seed_all(seed)
        with tracker.fork():
            drawn.append(torch.rand(8))
        drawn.append(torch.rand(8))
    assert len({tuple(values.tolist()) for values in drawn}) == 4
