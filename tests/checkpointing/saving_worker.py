"""Two tensor-parallel ranks save while the disk of the second is full: saving_worker.py FOLDER."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch.distributed as dist

import tiny
from megatron_sharedproj import distributed
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.checkpointing.saver import SaveError
from megatron_sharedproj.device import get_device
from megatron_sharedproj.quiet import quiet_libraries


def main() -> None:
    quiet_libraries()
    folder = Path(sys.argv[1])
    get_device().install()
    distributed.initialize(get_device(), tensor_model_parallel_size=2)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for name in ("now", "behind"):
        line = tiny.flags(
            folder / "tiny_text_document", tensor_model_parallel_size=2, save=folder / name,
            async_save=name == "behind",
        )  # fmt: skip
        trainer = tiny.trainer(line)
        error = ""
        for iteration in (1, 2, 3):
            trainer.iteration = iteration
            if iteration == 2 and dist.get_rank() == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
            try:
                trainer.save()
                trainer.finish_save()
            except SaveError as problem:
                error = str(problem)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        saved = sorted(files.iteration_of(path) or 0 for path in files.iteration_dirs(folder / name))
        (folder / f"{name}.{dist.get_rank()}").write_text(json.dumps({"error": error, "saved": saved}))
        dist.barrier()
    distributed.finalize()


if __name__ == "__main__":
    main()
