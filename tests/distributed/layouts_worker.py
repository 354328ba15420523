"""One torchrun launch that trains models under the named layouts and writes the losses as JSON.

    layouts_worker.py FOLDER BACKEND LAYOUT [LAYOUT ...]

A layout with fewer ranks than were started uses the first ones: the process group is made anew for each.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed

import tiny
from megatron_sharedproj import distributed
from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.device import get_device
from megatron_sharedproj.quiet import quiet_libraries

TESTS = Path(__file__).resolve().parents[1]
STEPS = 20
SAVED_AT = 10

BATCH = 4

LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "no_bias_gelu_fusion": None,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
ROPE = {**LLAMA, "position_embedding_type": "rope"}
LLAMA_GQA = {**ROPE, "qk_layernorm": True}
# name -> variant, groups (0: as many as heads), further flags
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qkv": ("qkv", 0, {}),
    "q_eq_k": ("q_eq_k", 0, {}),
    "qk_eq_v": ("qk_eq_v", 0, {}),
    "q_eq_k_eq_v": ("q_eq_k_eq_v", 0, {}),
    "GQA-2": ("qkv", 2, {}),
    "MQA": ("qkv", 1, {}),
    "Q-GQA-2": ("qk_eq_v", 2, {}),
    "Q-MQA": ("qk_eq_v", 1, {}),
    "llama GQA-2": ("qkv", 2, LLAMA_GQA),
    "llama K=V": ("qk_eq_v", 0, LLAMA),
}
SCHEMES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "rotate_keys Q-MQA": ("qk_eq_v", 1, {**ROPE, "kv_rotary": "rotate_keys"}),
    "rotate_values": ("qk_eq_v", 2, {**LLAMA_GQA, "kv_rotary": "rotate_values"}),
    "partial": ("q_eq_k_eq_v", 0, {**LLAMA_GQA, "kv_rotary": "partial", "rotary_percent": 0.5}),
    "separate_rope_head": (
        "qk_eq_v", 2,
        {"position_embedding_type": "rope", "kv_rotary": "separate_rope_head", "rotary_percent": 0.5},
    ),
}  # fmt: skip
# Four layers, enough for two stages of two chunks.
DEEP = {
    f"deep {name}": (variant, groups, {**flags, "num_layers": 4})
    for name, (variant, groups, flags) in {**MODELS, **SCHEMES}.items()
    if name in ("qkv", "qk_eq_v", "Q-GQA-2", "Q-MQA", "llama GQA-2", "separate_rope_head")
}
DROPOUT = {
    "dropout": ("qk_eq_v", 0, {"num_layers": 4, "attention_dropout": 0.1, "hidden_dropout": 0.1}),
}
# Validated at the end, too.
DEEP["deep qk_eq_v"][2]["eval_iters"] = 2
DOCUMENTS = {
    "documents": (
        "qk_eq_v", 2,
        {"num_layers": 4, "reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True},
    ),
}  # fmt: skip
MASKED = {"masked": ("qk_eq_v", 2, {"eod_mask_loss": True})}
TIED = {name: DEEP[name] for name in ("deep qk_eq_v", "deep Q-MQA")}
# Under four tensor-parallel ranks several have the same key and value.
FEW_GROUPS = {name: MODELS[name] for name in ("MQA", "Q-GQA-2", "Q-MQA", "llama GQA-2")}
# Those that go on under yet another layout.
CARRIED = ("qk_eq_v", "Q-MQA", "deep qk_eq_v", "deep Q-MQA")


@dataclass(frozen=True)
class Layout:
    """Ranks, flags and models; ``loads`` names layouts whose checkpoints go on under this one.

    ``carried`` limits those, and ``trains`` is False where nothing else is run. ``gathers``: with a linear
    that cuts the projection's rows without regard to heads, as Transformer Engine's.
    """

    ranks: int
    flags: dict[str, Any] = field(default_factory=dict)
    models: dict[str, tuple[str, int, dict[str, Any]]] = field(default_factory=lambda: MODELS)
    saves: bool = False
    loads: tuple[str, ...] = ()
    carried: tuple[str, ...] = tuple({**MODELS, **SCHEMES, **DEEP, **DROPOUT, **MASKED, **DOCUMENTS})
    trains: bool = True
    gathers: bool = False


TP2, TP4 = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 4}
PP2, PP4 = {"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 4}
CP2 = {"context_parallel_size": 2}
WITH_SCHEMES = {**MODELS, **SCHEMES}
SP = {"sequence_parallel": True}
CHUNKS2 = {"num_virtual_stages_per_pipeline_rank": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
SHARDED = {"use_distributed_optimizer": True}
# Micro batches of one sequence: a pipeline has several in flight.
ONES = {"micro_batch_size": 1}

LAYOUTS: dict[str, Layout] = {
    "TP1": Layout(1, models=WITH_SCHEMES, saves=True),
    "masked": Layout(1, models=MASKED),
    "TP2": Layout(2, TP2, WITH_SCHEMES, loads=("TP1",)),
    "TP2+SP": Layout(2, {**TP2, **SP}, WITH_SCHEMES),
    "DP2": Layout(2),
    "DP2+overlap": Layout(2, {"overlap_grad_reduce": True, **ONES}),
    "TP2xDP2": Layout(4, TP2, saves=True),
    "TP4": Layout(4, TP4, loads=("TP1",)),
    "TP2 gathering rows": Layout(2, TP2, {"Q-MQA": MODELS["Q-MQA"]}, saves=True, gathers=True),
    "TP4 few groups": Layout(
        4, TP4, FEW_GROUPS, saves=True, loads=("TP1", "TP2xDP2", "TP2 gathering rows"),
        carried=tuple(FEW_GROUPS),
    ),
    "TP2 few groups": Layout(2, TP2, FEW_GROUPS, loads=("TP4 few groups",), trains=False),
    "gathered": Layout(1, loads=("TP2xDP2", "TP4 few groups"), carried=(*CARRIED, "Q-GQA-2"), trains=False),
    # Pipelines
    "one": Layout(1, models=DEEP, saves=True),
    "PP2": Layout(2, {**PP2, **ONES}, DEEP, loads=("one",), carried=CARRIED),
    "PP2 interleaved": Layout(2, {**PP2, **CHUNKS2, **ONES}, DEEP, saves=True),
    "TP2xPP2": Layout(
        4, {**TP2, **PP2, **ONES}, {**DEEP, **DROPOUT}, saves=True, loads=("PP2 interleaved", "TP2xPP2"),
        carried=(*CARRIED, "dropout"),
    ),
    "documents": Layout(1, {"micro_batch_size": 2}, DOCUMENTS),
    "PP2 documents": Layout(2, {**PP2, **CHUNKS2, "micro_batch_size": 2}, DOCUMENTS),
    "PP2xDP2": Layout(4, {**PP2, **ONES, "overlap_grad_reduce": True}, DEEP),
    "PP2 interleaved xDP2": Layout(
        4, {**PP2, **CHUNKS2, **ONES, **FULL, "recompute_num_layers": 1, "overlap_grad_reduce": True}, DEEP
    ),
    "TP2xPP2+SP": Layout(4, {**TP2, **PP2, **SP, **FULL, **ONES}, DEEP),
    "TP2xPP2 interleaved": Layout(4, {**TP2, **PP2, **CHUNKS2, **SP, **ONES}, DEEP, loads=("one",)),
    "PP4": Layout(4, {**PP4, **ONES}, DEEP, loads=("one", "TP2xPP2"), carried=CARRIED),
    "CP2": Layout(2, CP2, WITH_SCHEMES, loads=("TP1",), carried=CARRIED),
    "TP2xCP2+SP": Layout(4, {**TP2, **CP2, **SP}, MASKED),
    "CP4": Layout(4, {"context_parallel_size": 4}),
    "PP2xCP2": Layout(4, {**PP2, **CP2, **ONES, **FULL}, DEEP),
    "deep TP2": Layout(2, TP2, DEEP, loads=("TP2xPP2",), carried=CARRIED, trains=False),
    "deep gathered": Layout(1, {}, DEEP, loads=("TP2xPP2",), carried=CARRIED, trains=False),
    # The distributed optimizer: a tied embedding has a gradient bucket of its own on a pipeline stage.
    "PP2 interleaved xDP2 sharded": Layout(4, {**PP2, **CHUNKS2, **ONES, **SHARDED}, TIED, saves=True),
    "TP2xDP2 sharded": Layout(
        4, {**TP2, **SHARDED}, TIED, saves=True, loads=("PP2 interleaved xDP2 sharded",)
    ),
    "one sharded": Layout(1, SHARDED, TIED, loads=("TP2xDP2 sharded",), trains=False),
}  # fmt: skip


def watch(trainer: Any) -> list[int]:
    """Most forward passes of this rank that wait for their backward, and of those of its first chunk."""
    waiting, most = [0, 0], [0, 0]

    def count(change: int, first: bool) -> None:
        for place in range(1 + first):
            waiting[place] += change
            most[place] = max(most[place], waiting[place])

    def after(first: bool, output: Any) -> None:
        count(1, first)
        output.register_hook(lambda gradient: count(-1, first))

    for index, chunk in enumerate(trainer.chunks):
        chunk.module.decoder.register_forward_hook(
            lambda module, inputs, output, first=index == 0: after(first, output)
        )
    return most


def run(line: list[str], waiting: list[list[int]] | None = None) -> list[list[float]]:
    """Loss and gradient norm of every step that is left to do, then validation loss and perplexity.

    Args:
        waiting: takes what :func:`watch` finds on every rank.
    """
    trainer = tiny.trainer(line)
    trainer.log.enabled = False
    most = watch(trainer) if waiting is not None else []
    iterator = trainer._iterator(trainer.train_data, trainer.consumed_samples)
    history = []
    while trainer.iteration < STEPS:
        trainer.step(iterator)
        history.append([trainer.last_loss, trainer.last_grad_norm])
        if trainer.iteration == SAVED_AT and trainer.config.checkpoint.save:
            trainer.save()
    if trainer.config.train.eval_iters:
        history.append(list(trainer.evaluate().values()))
    assert copies_differ(trainer) == []
    if waiting is not None:
        waiting += [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(waiting, most)
    return history


def copies_differ(trainer: Any) -> list[str]:
    """Names of keys' and values' weights that are not bit for bit what another rank with their group has."""
    from megatron.core import parallel_state

    group, wrong = parallel_state.get_tensor_model_parallel_group(), []
    for name, module in trainer.bare_model.named_modules():
        if not getattr(module, "replicates_kv", False):
            continue
        for part in ("kv_weight", "kv_bias"):
            mine = getattr(module, part)
            if mine is not None:
                all_of = [torch.empty_like(mine) for _ in range(group.size())]
                torch.distributed.all_gather(all_of, mine.detach(), group=group)
                sharing = group.size() // module.own.groups
                first = all_of[group.rank() // sharing * sharing]
                wrong += [] if torch.equal(first, mine) else [f"{name}.{part}"]
    return wrong


def initial_weights(line: list[str]) -> dict[str, float]:
    """The sum of every tensor of a fresh model, by its place in the whole model."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    state = tiny.trainer(line).bare_model.sharded_state_dict()
    tensors = [entry for entry in state.values() if isinstance(entry, ShardedTensor)]
    mine = {f"{t.key} {t.global_offset}": t.data.double().sum().item() for t in tensors}
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def draw_streams() -> list[list[float]]:
    """One number of the default and of the tracked random stream, of every rank, as dropout draws them."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    distributed.seed_all(7, data_parallel_offset=True)
    device = get_device().current()
    default = torch.rand(1, device=device)
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1, device=device)
    rows = [torch.zeros(2, device=device) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(rows, torch.cat([default, tracked]))
    return [row.tolist() for row in rows]


def gathering_linear() -> Any:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megatron_sharedproj.layers.projection import SharedProjectionMixin

    return type("GatheringLinear", (SharedProjectionMixin, ColumnParallelLinear), {})


def flags_of(folder: Path, layout: Layout, model: str) -> list[str]:
    variant, groups, shape = layout.models[model]
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    replicas = layout.ranks // math.prod(layout.flags.get(name, 1) for name in names)
    values = {"micro_batch_size": BATCH // replicas, "global_batch_size": BATCH, **shape, **layout.flags}
    return tiny.flags(folder / "tiny_text_document", variant, groups, train_iters=STEPS, **values)


def launch(folder: Path, layouts: list[str], backend: str = "gloo") -> dict[str, Any]:
    """Train under the layouts in one torchrun launch: layout -> model -> [loss, gradient norm] per step."""
    tiny.write_data(folder)
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    ranks = max(LAYOUTS[name].ranks for name in layouts)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(Path(__file__)), str(folder), backend, *layouts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())


def main() -> None:
    quiet_libraries()
    folder, backend, chosen = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rank, started = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = get_device()
    device.install()
    device.setup(int(os.environ["LOCAL_RANK"]), shared=backend == "gloo")
    from megatron_sharedproj.layers import specs

    usual = specs.SharedProjectionLinear
    results: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(chosen):
        layout = LAYOUTS[name]
        assert layout.ranks <= started
        if rank >= layout.ranks:
            continue
        os.environ["WORLD_SIZE"] = str(layout.ranks)
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/store{index}", rank=rank, world_size=layout.ranks
        )
        line = flags_of(folder, layout, next(iter(layout.models)))
        config = run_config(build_parser().parse_args(line), tiny.VOCAB, layout.ranks)
        distributed.initialize(device, backend=backend, **distributed.group_sizes(config.parallel))
        results[name] = {"streams": draw_streams()}
        specs.SharedProjectionLinear = gathering_linear() if layout.gathers else usual
        if layout.models is DEEP:
            results[name]["weights"] = {
                model: initial_weights(flags_of(folder, layout, model))
                for model in ("deep qk_eq_v", "deep llama GQA-2")
            }
        for model in layout.models:
            line = flags_of(folder, layout, model)
            target = ["--save", str(folder / name / model)] if layout.saves else []
            if layout.trains and model == "deep qkv":
                results[name][model] = run([*line, *target], results[name].setdefault("waiting", []))
            elif layout.trains:
                results[name][model] = run([*line, *target])
            if model in layout.carried:
                for source in layout.loads:
                    if (folder / source / model).exists():
                        results[name][f"{model} from {source}"] = run(
                            [*line, "--load", str(folder / source / model)]
                        )
        distributed.finalize()
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
