"""One torchrun launch that loads checkpoints under another tensor-parallel size and saves them again.

    checkpoints_worker.py SOURCE TARGET SIZE

SOURCE and TARGET hold a run folder for each model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_sharedproj import distributed
from megatron_sharedproj.checkpointing import files, resolve_checkpoint
from megatron_sharedproj.device import get_device
from megatron_sharedproj.quiet import quiet_libraries


def save(folder: Path, run: Any, model: Any) -> None:
    """A checkpoint as the trainer leaves one after 3 steps, without optimizer."""
    from megatron_sharedproj.checkpointing.saver import save_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    run.checkpoint.save = str(folder)
    state = {"iteration": 3, "consumed_samples": 24, "real_token_share": 1.0}
    save_checkpoint(run, get_device(), model=model, optimizer=None, train_state=state)


def main() -> None:
    source, target, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    quiet_libraries()
    device = get_device()
    distributed.initialize(device, tensor_model_parallel_size=size)

    from megatron_sharedproj.checkpointing.sharded import load_checkpoint
    from megatron_sharedproj.config import ParallelConfig
    from megatron_sharedproj.model import build_model

    for folder in sorted(source.iterdir()):
        found = resolve_checkpoint(folder)
        run = files.checkpoint_config(found)
        run.parallel = ParallelConfig(tensor_model_parallel_size=size)
        model = build_model(run.model, run.parallel)
        load_checkpoint(found, device, model=model)
        save(target / folder.name, run, model)
    distributed.finalize()


if __name__ == "__main__":
    main()
