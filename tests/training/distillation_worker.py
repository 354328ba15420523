"""One torchrun launch that distils under several layouts and writes the losses as JSON.

    distillation_worker.py FOLDER

FOLDER holds the data, and the run folders `teacher` and `start` of one process. A layout of fewer ranks than
were started uses the first ones.
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
from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.device import get_device
from megatron_sharedproj.quiet import quiet_libraries

STEPS = 6
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True, "micro_batch_size": 2}
# name -> ranks, flags
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "TP2": (2, TP2),
    "TP2+SP": (2, {**TP2, "sequence_parallel": True}),
    "DP2": (2, {}),
    "CP2": (2, {"context_parallel_size": 2}),
    "PP2": (2, PP2),
    "PP2 interleaved": (2, {**PP2, "num_virtual_stages_per_pipeline_rank": 2}),
    "documents": (1, DOCUMENTS),
    "PP2 documents": (2, {**PP2, **DOCUMENTS}),
}


def flags(folder: Path, **changes: Any) -> list[str]:
    """Of a student, and with other `changes` of its teacher: four layers."""
    values = {"num_layers": 4, "lr": 1e-3, "min_lr": 1e-4, "train_iters": STEPS, "eval_iters": 1, **changes}
    return tiny.flags(folder / "tiny_text_document", values.pop("attention_variant", "qk_eq_v"), **values)


def distilling(folder: Path, **changes: Any) -> list[str]:
    """The student from `start` with the teacher from `teacher`."""
    start = {"load": folder / "start", "finetune": True, "distill_teacher": folder / "teacher"}
    return flags(folder, **{**start, **changes})


def run(line: list[str]) -> list[list[float]]:
    """Loss, distillation loss and gradient norm of each step, then the validation loss."""
    trainer = tiny.trainer(line)
    trainer.log.enabled = False
    seen: list[float] = []
    step = trainer._schedule_step
    trainer._schedule_step = lambda *args, **kw: seen.append(step(*args, **kw)) or seen[-1]
    iterator = trainer._iterator(trainer.train_data, 0)
    history = []
    while trainer.iteration < STEPS:
        trainer.step(iterator)
        history.append([*seen[-1], trainer.last_grad_norm])
    return [*history, [trainer.evaluate()["lm_loss"]]]


def main() -> None:
    quiet_libraries()
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    get_device().install()
    results = {}
    for index, (name, (ranks, changes)) in enumerate(LAYOUTS.items()):
        if rank >= ranks:
            continue
        os.environ["WORLD_SIZE"] = str(ranks)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store{index}", rank=rank, world_size=ranks
        )
        line = distilling(folder, **changes)
        config = run_config(build_parser().parse_args(line), tiny.VOCAB, ranks)
        distributed.initialize(get_device(), **distributed.group_sizes(config.parallel))
        results[name] = run(line)
        distributed.finalize()
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
