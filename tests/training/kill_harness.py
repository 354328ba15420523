"""Kills a training run with SIGKILL at random moments and starts it again, until it is done.

The ranks are forked from a process that has imported the trainer and done nothing else: a start takes half a
second, so that many kills fit into a test. With several ranks, half of the kills take all of them, as a lost
node does, and half take one; the others are then ended as by torchrun: SIGTERM, after a grace SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tiny
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.checkpointing.selection import find_damage
from megatron_sharedproj.quiet import quiet_libraries

STEPS, SAVE_INTERVAL = 40, 4
LONGEST = 0.9
"""Seconds that the first start may live; a start of several ranks takes longer to get to a step."""
GRACE = 30.0
"""Seconds that the ranks left over have to end, as under torchrun."""
ENDS = {0, 5, 128 + signal.SIGTERM, -signal.SIGTERM}
"""Their exit codes: done, a lost rank, stopped by a signal, stopped before the run listens to signals."""


def flags(prefix: Path, folder: Path, **changes: Any) -> list[str]:
    """A run with dropout that saves and validates often."""
    options = {
        "save": folder, "train_iters": STEPS, "save_interval": SAVE_INTERVAL, "eval_iters": 1,
        "eval_interval": 7, "hidden_dropout": 0.1, "attention_dropout": 0.1, "global_batch_size": 2,
        **changes,
    }  # fmt: skip
    return tiny.flags(prefix, **{"variant": "qk_eq_v", **options})


def _train(line: list[str], output: Path, rank: int, ranks: int, port: int) -> None:
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
    from megatron_sharedproj.pretrain import main

    os._exit(main(line))


def start(line: list[str], output: Path, ranks: int = 1) -> list[Any]:
    """The trainer's ranks, each in a forked process."""
    import torch

    quiet_libraries()
    import megatron_sharedproj.training.loop  # noqa: F401  (what a start would import)
    from megatron_sharedproj.device import get_device

    torch.set_num_threads(1)
    get_device().install()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork").Process
    processes = [fork(target=_train, args=(line, output, rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[Any], seconds: float | None = None) -> bool:
    """Whether all processes have ended within a time."""
    end = None if seconds is None else time.monotonic() + seconds
    for process in processes:
        process.join(None if end is None else max(0.0, end - time.monotonic()))
    return all(process.exitcode is not None for process in processes)


def kill(processes: list[Any], victim: int | None) -> list[int]:
    """SIGKILL to one rank, or to all (None); none is left when this returns. Returns their exit codes."""
    for process in processes if victim is None else [processes[victim]]:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        if process.is_alive():
            process.terminate()
    if not wait(processes, GRACE):
        for process in processes:
            process.kill()
        wait(processes)
    return [process.exitcode for process in processes]


@dataclass
class Campaign:
    """What happened to one run.

    Attributes:
        kills: times that it was killed; lost: steps that each kill cost.
    """

    kills: int
    lost: list[int]


def run_and_kill(
    line: list[str], folder: Path, *, seed: int, longest: float, allowed: int, ranks: int = 1
) -> Campaign:
    """Start, kill after a random time, start again, until the run ends by itself.

    Args:
        longest: seconds that a start may live; it grows, so that every run ends.
        allowed: steps between the log's last and the latest checkpoint after a kill.
    """
    draw, campaign = random.Random(seed), Campaign(0, [])
    output = folder.with_suffix(".output")
    latest = -1
    while True:
        processes = start(line, output, ranks)
        if wait(processes, draw.uniform(0.05, longest)):
            codes = [process.exitcode for process in processes]
            assert codes == [0] * ranks, (codes, output.read_text()[-3000:])
            return campaign
        codes = [process.exitcode for process in processes]
        assert set(codes) <= {None, 0}, (codes, output.read_text()[-3000:])
        victim = None if ranks == 1 or draw.random() < 0.5 else draw.randrange(ranks)
        codes = kill(processes, victim)
        if victim is not None:
            assert set(codes[:victim] + codes[victim + 1 :]) <= ENDS, (codes, output.read_text()[-3000:])
        campaign.kills += 1
        longest *= 1.02
        found = files.latest_iteration(folder)
        if found is not None:
            assert found >= latest, f"checkpoint {latest} was there, now the latest is {found}"
            latest = found
            assert find_damage(files.iteration_dir(folder, found), contents=True) == []
        logged = max((record["iteration"] for record in records(folder)), default=0)
        campaign.lost.append(logged - max(latest, 0))
        assert campaign.lost[-1] <= allowed, f"killed after step {logged}, the latest checkpoint is {latest}"


def records(folder: Path) -> list[dict[str, Any]]:
    """The JSON lines of a run; the last may be cut."""
    path, found = folder / "log.jsonl", []
    if path.is_file():
        for line in path.read_text().split("\n"):
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


_OF_THE_MACHINE = (
    "elapsed_ms_per_iteration", "tokens_per_second", "tflops_per_rank", "peak_memory_bytes",
    "peak_memory_rank", "peak_memory_bytes_per_rank",
)  # fmt: skip


def history(folder: Path) -> dict[tuple[int, bool], dict[str, Any]]:
    """(iteration, is a training record) -> the last record, without what depends on the machine."""
    return {
        (record["iteration"], "lm_loss" in record): {
            k: v for k, v in record.items() if k not in _OF_THE_MACHINE
        }
        for record in records(folder)
    }


def state(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the latest checkpoint: weights, moments, random streams."""
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    iteration = files.latest_iteration(folder)
    assert iteration is not None
    reader = checkpoint.FileSystemReader(str(files.iteration_dir(folder, iteration)))
    found = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in reader.read_metadata().state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }
    checkpoint.load(found, storage_reader=reader, no_dist=True)
    return {key: tensor.numpy() for key, tensor in found.items()}


def check_equal(folder: Path, reference: Path) -> None:
    """Every log line and every tensor of a run are those of another, bit for bit."""
    mine, other = history(folder), history(reference)
    assert mine.keys() == other.keys()
    differing = [(mine[key], other[key]) for key in other if mine[key] != other[key]]
    assert not differing, differing[:3]
    tensors, expected = state(folder), state(reference)
    assert tensors.keys() == expected.keys() and len(tensors) > 20
    for name, value in tensors.items():
        assert value.tobytes() == expected[name].tobytes(), name


def campaign_until(kills: int, folder: Path, *, ranks: int = 1, **changes: Any) -> tuple[int, int, int]:
    """Killed runs, one after another, until there were so many kills; each equal to one left alone.

    Returns:
        kills, runs, and the most steps that a kill cost.
    """
    prefix = tiny.write_data(folder)
    alone = folder / "alone"
    processes = start(flags(prefix, alone, **changes), folder / "alone.output", ranks)
    wait(processes)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * ranks, (codes, (folder / "alone.output").read_text()[-3000:])
    assert len([key for key in history(alone) if key[1]]) == STEPS
    # A save that is under way when the run is killed is of the interval before.
    allowed = SAVE_INTERVAL * (2 if changes.get("async_save") else 1)
    done, runs, lost = 0, 0, 0
    while done < kills:
        run = folder / f"killed{runs}"
        longest = LONGEST * (1 + (ranks > 1))
        line = flags(prefix, run, **changes)
        campaign = run_and_kill(line, run, seed=runs, longest=longest, allowed=allowed, ranks=ranks)
        check_equal(run, alone)
        done, runs, lost = done + campaign.kills, runs + 1, max([lost, *campaign.lost])
        print(f"{done} kills in {runs} runs, at most {lost} steps lost", file=sys.stderr, flush=True)
    return done, runs, lost


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        campaign_until(int(sys.argv[1]), Path(scratch), **json.loads(sys.argv[2] if sys.argv[2:] else "{}"))
