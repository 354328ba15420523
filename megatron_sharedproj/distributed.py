"""Process groups and random streams: what has to exist before a model is built."""

from __future__ import annotations

import datetime
import os
import random
import socket
import time

import numpy
import torch
import torch.distributed

from megatron_sharedproj.config import ParallelConfig, RunConfig
from megatron_sharedproj.device import Device


def world_size() -> int:
    """Processes that torchrun started (1 without torchrun)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def group_sizes(parallel: ParallelConfig) -> dict[str, int]:
    """The arguments of :func:`initialize` that a layout decides."""
    names = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "context_parallel_size",
    )
    return {name: getattr(parallel, name) for name in names}


def initialize(
    device: Device,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    num_virtual_stages_per_pipeline_rank: int = 1,
    context_parallel_size: int = 1,
    backend: str = "",
    timeout_minutes: int = 10,
    seed: int = 1234,
) -> torch.device:
    """Join torchrun's processes (or be the only one), split them into groups, seed the generators.

    Returns:
        The device of this rank.
    """
    device.install()
    from megatron.core import parallel_state

    local = device.setup(int(os.environ.get("LOCAL_RANK", "0")), shared=backend == "gloo")
    if not torch.distributed.is_initialized():
        if "RANK" not in os.environ:
            # A single process started without torchrun: a group of one on a free port.
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            os.environ.update(
                RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
        torch.distributed.init_process_group(
            backend or device.backend, timeout=datetime.timedelta(minutes=timeout_minutes)
        )
    if not parallel_state.model_parallel_is_initialized():
        chunks = num_virtual_stages_per_pipeline_rank
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=context_parallel_size,
            distributed_timeout_minutes=timeout_minutes,  # its default is 30, not the default group's
        )
    seed_all(seed)
    return local


def initialize_for(config: RunConfig, device: Device) -> torch.device:
    """:func:`initialize` as a run's configuration says, deterministic mode included."""
    if config.train.deterministic_mode:
        make_deterministic()
    return initialize(
        device,
        **group_sizes(config.parallel),
        backend=config.parallel.distributed_backend,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
        seed=config.train.seed,
    )


def seed_all(seed: int, *, data_parallel_offset: bool = False) -> None:
    """Seed every generator.

    The default stream (residual dropout) is equal on the tensor-parallel ranks of a replica, Megatron's
    tracked stream (attention dropout) differs between them.

    Args:
        data_parallel_offset: give each data-parallel and context-parallel rank and each pipeline stage its
            own streams. Weights must be drawn without it, training wants it: replicas that see different
            tokens, and layers on different stages, should not drop the same units.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if data_parallel_offset:
        seed += 100003 * parallel_state.get_data_parallel_rank(with_context_parallel=True)
        seed += 100 * parallel_state.get_pipeline_model_parallel_rank()  # Megatron-LM's offset
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def make_deterministic() -> None:
    """Repeatable kernels and collectives (``--deterministic-mode``); before any of them is initialised."""
    # What Megatron-LM asks its users to export.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True)


def is_rank_0() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed since a rank ended or does not answer (gloo, NCCL)."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def lost_ranks(seconds: float = 5.0) -> list[int]:
    """The ranks that do not report within some seconds, asked by one that a collective failed on.

    All that are left come here for the same reason, and tell each other through the store of the process
    group, which torchrun itself keeps.
    """
    # There is no public way to the store that init_process_group made.
    store = torch.distributed.distributed_c10d._get_default_store()
    ranks, deadline = range(torch.distributed.get_world_size()), time.monotonic() + seconds
    try:
        store.set(f"left/{torch.distributed.get_rank()}", "1")
        while lost := [rank for rank in ranks if not store.check([f"left/{rank}"])]:
            if time.monotonic() > deadline:
                return lost
            time.sleep(0.1)
    except (RuntimeError, OSError):  # the store went with the rank that kept it
        return [0]
    return []


def finalize() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
