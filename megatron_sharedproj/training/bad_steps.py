"""Steps whose loss or gradient is NaN or infinite: skipped and described, and too many in a row fatal."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_sharedproj.config import write_json

FOLDER = "bad_steps"
# Parameters named in a file; a NaN in the loss reaches all of them.
_NAMED = 50


class BadStepsError(RuntimeError):
    """As many bad steps in a row as ``--max-nan-iterations`` allows."""


def describe(trainer: Any, loss: float, learning_rate: float) -> str:
    """Write what is known of a bad step to ``<save>/bad_steps``, from each rank that has a part in it.

    Returns:
        What is wrong, in words.
    """
    iteration, train, first = trainer.iteration + 1, trainer.config.train, trainer.consumed_samples
    what = f"loss is {loss}" if not math.isfinite(loss) else "loss is finite but its gradient is not"
    found: dict[str, int] = {}
    for chunk in trainer.chunks:
        for name, parameter in chunk.module.named_parameters():
            bad = parameter.main_grad.numel() - int(torch.isfinite(parameter.main_grad).sum())
            if bad:
                found[name] = bad
    if trainer.config.checkpoint.save and (found or not math.isfinite(loss)):
        folder, rank = Path(trainer.config.checkpoint.save) / FOLDER, torch.distributed.get_rank()
        description = {
            "iteration": iteration,
            "rank": rank,
            "what": what,
            "loss": repr(loss),
            "learning_rate": learning_rate,
            "samples": [first, first + train.batch_size_at(first)],
            "parameters_with_bad_gradients": len(found),
            "bad_elements": dict(list(found.items())[:_NAMED]),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"iter_{iteration:07d}_rank{rank}.json", description)
        except OSError as error:  # of this rank alone, while the others go on
            print(f"note: {folder} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
    return what
