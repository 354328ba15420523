"""A rank of a run that is not there: its shard without memory, its collectives counted, nothing sent.

Megatron-Core sets its groups up over torch's fake process group, for any number of processes; the model and
its gradient buffers are meta tensors; Megatron's schedule then runs a step through the trainer's own forward
function, and every collective is seen on its way to its group.

Shape legend: b micro batch, s sequence length.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sharedproj.config import RunConfig
from megatron_sharedproj.device import get_device, on_meta


def _all_reduced(n: int, size: int) -> int:
    return 2 * (n - 1) * size // n


def _gathered(n: int, size: int) -> int:
    return (n - 1) * size // n


def _whole(n: int, size: int) -> int:
    return size


def _nothing(n: int, size: int) -> int:
    return 0


# Operator -> its name, and the bytes that a rank of n sends of the larger tensor: rings (formulas_memory.py).
_KINDS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "allreduce_": ("all-reduce", _all_reduced),
    "allreduce_coalesced_": ("all-reduce", _all_reduced),
    "_allgather_base_": ("all-gather", _gathered),
    "allgather_": ("all-gather", _gathered),
    "allgather_into_tensor_coalesced_": ("all-gather", _gathered),
    "_reduce_scatter_base_": ("reduce-scatter", _gathered),
    "reduce_scatter_": ("reduce-scatter", _gathered),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", _gathered),
    "alltoall_base_": ("all-to-all", _gathered),
    "broadcast_": ("broadcast", _whole),
    "send": ("send", _whole),
    "recv_": ("receive", _nothing),
    "barrier": ("barrier", _nothing),
}


class _Call(NamedTuple):
    name: str
    group: str
    ranks: tuple[int, ...]
    tensor_bytes: int


@dataclass(frozen=True)
class Collective:
    """What a rank does with one group in one optimizer step.

    Attributes:
        purpose: as in formulas_memory.communication_bytes, or context_parallel.
        kind: all-reduce, all-gather, reduce-scatter, send, ...
        ranks: size of the group; calls: in a step; tensor_bytes: of their tensors, the larger side;
        sent_bytes: over the network.
    """

    purpose: str
    kind: str
    ranks: int
    calls: int
    tensor_bytes: int
    sent_bytes: int


@dataclass(frozen=True)
class SimulatedRank:
    """A rank as Megatron-Core built it: its place, the parameters of its shard, its collectives in a step."""

    rank: int
    pipeline_stage: int
    parameters: int
    collectives: tuple[Collective, ...]

    def sent_bytes(self, purpose: str | None = None) -> int:
        """Bytes sent in a step, for one purpose or all."""
        return sum(c.sent_bytes for c in self.collectives if purpose in (None, c.purpose))


def simulate(config: RunConfig, world_size: int) -> list[SimulatedRank]:
    """Build rank 0, and the first rank of the last pipeline stage, and count their collectives.

    Runs on the CPU without touching a GPU, and must be alone in its process: it makes and destroys the
    process group. The optimizer does not run: its collectives are norms, which are scalars, and with the
    distributed optimizer the gathering of parameters, which is run by itself.

    Args:
        config: checked for ``world_size`` ranks (arguments.run_config).
    Raises:
        RuntimeError: if a process group exists already.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("a simulation needs a process without a process group")
    # Shapes need no GPU, and Megatron's fused GPU kernels do not run on meta tensors.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    get_device().install()
    # Megatron's order of ranks has the pipeline stages outermost.
    stages = config.parallel.pipeline_model_parallel_size
    ranks = [0] if stages == 1 else [0, world_size - world_size // stages]
    return [_simulate_rank(config, rank, world_size) for rank in ranks]


def _simulate_rank(config: RunConfig, rank: int, world_size: int) -> SimulatedRank:
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_sharedproj import distributed

    parallel, train = config.parallel, config.train
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=False,
        )
        distributed.seed_all(train.seed)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        replicas = parallel_state.get_data_parallel_world_size()
        batches = train.global_batch_size // (train.micro_batch_size * replicas)
        with on_meta():
            chunks = _wrapped_chunks(config)
            count = sum(p.numel() for chunk in chunks for p in chunk.parameters())
            calls = _calls(config, chunks, batches)
        return SimulatedRank(rank, stage, count, _collectives(calls))
    finally:
        distributed.finalize()


def _wrapped_chunks(config: RunConfig) -> list[Any]:
    """The rank's part of the model in Megatron's DistributedDataParallel, as the trainer builds it."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_sharedproj.model import build_chunks
    from megatron_sharedproj.training.optimizer import wrap_data_parallel

    # Overlapping moves collectives within the step, and sends the same.
    parallel = dataclasses.replace(config.parallel, overlap_grad_reduce=False, overlap_param_gather=False)
    chunks = build_chunks(
        config.model,
        parallel,
        dtype=getattr(torch, config.train.params_dtype),
        perform_initialization=False,
        finalize_model_grads_func=finalize_model_grads,
        batch_p2p_comm=False,  # torch cannot batch sends of meta tensors; one by one they are as many
    )
    return wrap_data_parallel(chunks, parallel, config.train)


def _calls(config: RunConfig, chunks: list[Any], batches: int) -> Counter[_Call]:
    """How often each collective runs in a step of so many micro batches."""
    # Every further micro batch (or round of them over the stages) adds the same calls.
    unit = config.parallel.pipeline_model_parallel_size
    if batches <= 2 * unit or batches % unit:
        return _step(config, chunks, batches)
    once, twice = (_step(config, chunks, n) for n in (unit, 2 * unit))
    further = batches // unit - 1
    return Counter({call: once[call] + further * (twice[call] - once[call]) for call in twice})


def _step(config: RunConfig, chunks: list[Any], batches: int) -> Counter[_Call]:
    """Forward and backward passes of a step, reduction of gradients, gathering of parameters."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_sharedproj.training.loop import forward_step

    train = config.train
    for chunk in chunks:
        chunk.zero_grad_buffer()
    iterators = [_batches(train.micro_batch_size, train.seq_length) for _ in chunks]
    with _Recorder() as recorder:
        get_forward_backward_func()(
            forward_step_func=partial(forward_step, device=torch.device("meta")),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=chunks,
            num_microbatches=batches,
            seq_length=train.seq_length,
            micro_batch_size=train.micro_batch_size,
            forward_only=False,
        )
        if config.parallel.use_distributed_optimizer:
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
    return recorder.calls


def _batches(b: int, s: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro batches without content: [b, s] ids, labels and positions, and a mask."""
    ids = torch.empty(b, s, dtype=torch.long, device="meta")
    mask = torch.empty(b, s, device="meta")
    while True:
        yield {"tokens": ids, "labels": ids, "position_ids": ids, "loss_mask": mask}


class _Recorder(TorchDispatchMode):
    """Counts the calls of process groups."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[_Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            group = next(
                torch.distributed.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject)
            )
            if group.size() > 1:
                ranks = tuple(torch.distributed.get_process_group_ranks(group))
                self.calls[_Call(name, group.group_name, ranks, _largest(args))] += 1
            if (
                "coalesced" in name
            ):  # torch has no meta kernel for these; all they return is the work's handle
                args = tuple([torch.empty(0, device="cpu")] if isinstance(a, list) else a for a in args)
        return func(*args, **(kwargs or {}))


def _largest(args: Any) -> int:
    """Bytes of the tensors on the larger side of a collective: what every rank has at its end, or had."""
    sides = []
    for argument in args:
        tensors = [argument] if isinstance(argument, torch.Tensor) else argument
        if isinstance(tensors, list | tuple) and tensors and isinstance(tensors[0], torch.Tensor):
            sides.append(sum(t.numel() * t.element_size() for t in tensors))
    return max(sides, default=0)


def _collectives(calls: Counter[_Call]) -> tuple[Collective, ...]:
    """Calls by purpose and kind, whatever the sizes of their tensors."""
    from megatron.core import parallel_state as state

    def ranks(group: Any) -> tuple[int, ...]:
        return tuple(torch.distributed.get_process_group_ranks(group))

    # Several of Megatron's groups have the same ranks, which say what a call is for.
    context = state.get_context_parallel_group()
    purposes = {
        ranks(state.get_data_parallel_group(with_context_parallel=True)): "data_parallel",
        ranks(state.get_pipeline_model_parallel_group()): "pipeline",
        ranks(state.get_tensor_model_parallel_group()): "tensor_parallel",
    }
    if (ends := state.get_embedding_group(check_initialized=False)) is not None:
        purposes.setdefault(ranks(ends), "pipeline")
    found: dict[tuple[str, str], list[int]] = {}
    for call, times in calls.items():
        kind, sent = _KINDS[call.name]
        purpose = purposes.get(call.ranks, "other")
        if call.group == context.group_name:
            purpose = "context_parallel"  # without further replicas its ranks are those of the gradients
        elif kind in ("send", "receive"):
            purpose = "pipeline"  # two stages also talk through the group of all ranks
        elif purpose == "data_parallel" and kind == "all-gather":
            purpose = "parameter_gather"
        n = len(call.ranks)
        sums = found.setdefault((purpose, kind), [n, 0, 0, 0])
        for i, value in enumerate((times, times * call.tensor_bytes, times * sent(n, call.tensor_bytes))):
            sums[i + 1] += value
    return tuple(Collective(*key, *sums) for key, sums in sorted(found.items()))
