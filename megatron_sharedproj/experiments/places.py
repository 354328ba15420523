"""Where runs of an experiment go when several run at once: GPUs of their own, or a share of the cores."""

from __future__ import annotations

import os

import torch


def places_for_runs(processes: int, at_once: int = 0) -> list[dict[str, str]]:
    """Environment variables of each place that a run can take.

    On GPUs a place is as many of the visible ones as a run has processes (CUDA_VISIBLE_DEVICES); on a CPU it
    is an equal share of the cores (OMP_NUM_THREADS).

    Args:
        processes: of a run.
        at_once: places; 0: as many as the machine has GPUs, or cores, for.
    Raises:
        ValueError: naming --processes or --at-once, where the GPUs are too few.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        cores = os.cpu_count() or 1
        count = at_once or max(1, cores // processes)
        threads = max(1, cores // (count * processes))
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * count
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    names = visible.split(",")[:gpus]
    if processes > gpus:
        raise ValueError(f"--processes {processes}: one for each GPU, and {gpus} are visible; give fewer")
    most = gpus // processes
    if at_once > most:
        raise ValueError(
            f"--at-once {at_once}: {gpus} GPUs hold {most} run(s) of {processes} process(es); "
            f"give {most} at most"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(names[i * processes : (i + 1) * processes])}
        for i in range(at_once or most)
    ]
