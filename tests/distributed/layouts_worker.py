"""One torchrun launch that trains every model under the named layouts and writes the losses as JSON.

    layouts_worker.py FOLDER LAYOUT [LAYOUT ...]

A layout with fewer ranks than were started uses the first ones: the process group is made anew for each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed

import tiny
from megatron_sharedproj import distributed
from megatron_sharedproj.device import get_device
from megatron_sharedproj.quiet import quiet_libraries

STEPS = 20
SAVED_AT = 10

BATCH = 4

# name -> ranks, tensor-parallel size, further flags
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "TP1": (1, 1, {}),
    "TP2": (2, 2, {}),
    "TP2+SP": (2, 2, {"sequence_parallel": True}),
    "DP2": (2, 1, {}),
    "DP2+overlap": (2, 1, {"overlap_grad_reduce": True, "micro_batch_size": 1}),
    "TP2xDP2": (4, 2, {}),
    "TP4": (4, 4, {}),
    "gathered": (1, 1, {}),
}
RESUMED = ("TP2", "TP4")
# Saved under TP2xDP2 and continued by one process.
GATHERED = ("qk_eq_v", "Q-MQA")
LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "no_bias_gelu_fusion": None,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
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
    "llama GQA-2": ("qkv", 2, {**LLAMA, "position_embedding_type": "rope", "qk_layernorm": True}),
    "llama K=V": ("qk_eq_v", 0, LLAMA),
}


def run(line: list[str]) -> list[list[float]]:
    """Loss and gradient norm of every step that is left to do."""
    trainer = tiny.trainer(line)
    trainer.log.enabled = False
    iterator = trainer._iterator(trainer.train_data, trainer.consumed_samples)
    trainer.model.train()
    history = []
    while trainer.iteration < STEPS:
        trainer.step(iterator)
        history.append([trainer.last_loss, trainer.last_grad_norm])
        if trainer.iteration == SAVED_AT and trainer.config.checkpoint.save:
            trainer.save()
    return history


def draw_streams() -> list[list[float]]:
    """One number of the default and of the tracked random stream, of every rank, as dropout draws them."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    distributed.seed_all(7, data_parallel_offset=True)
    default = torch.rand(1)
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1)
    rows = [torch.zeros(2) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(rows, torch.cat([default, tracked]))
    return [row.tolist() for row in rows]


def main() -> None:
    quiet_libraries()
    folder, chosen = Path(sys.argv[1]), sys.argv[2:]
    rank, started = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    get_device().install()
    results: dict[str, dict[str, list[list[float]]]] = {}
    for index, layout in enumerate(chosen):
        ranks, tp, further = LAYOUTS[layout]
        assert ranks <= started
        if rank >= ranks:
            continue
        os.environ["WORLD_SIZE"] = str(ranks)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store{index}", rank=rank, world_size=ranks
        )
        distributed.initialize(get_device(), tensor_model_parallel_size=tp)
        results[layout] = {"streams": draw_streams()}
        for model, (variant, groups, shape) in MODELS.items():
            if layout == "gathered" and model not in GATHERED:
                continue
            line = tiny.flags(
                folder / "tiny_text_document",
                variant,
                groups,
                train_iters=STEPS,
                **{
                    "micro_batch_size": BATCH * tp // ranks,
                    "global_batch_size": BATCH,
                    "tensor_model_parallel_size": tp,
                    **shape,
                    **further,
                },
            )
            saved, split = folder / "checkpoints" / model, folder / "split" / model
            if layout == "gathered":
                results[layout][model] = run([*line, "--load", str(split)])
                continue
            target = {"TP1": saved, "TP2xDP2": split}.get(layout)
            results[layout][model] = run([*line, "--save", str(target)] if target else line)
            if layout in RESUMED:
                # The single process's checkpoint, continued here.
                results[layout][f"{model} resumed"] = run([*line, "--load", str(saved)])
        distributed.finalize()
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
