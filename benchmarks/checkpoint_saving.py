"""What a checkpoint costs the training: saved at once, by our writer thread, by Megatron-Core's queue.

    python benchmarks/checkpoint_saving.py --folder DIR [--hidden-size 512] [--rounds 4]

Each round saves once in each way, one after another in one process that trains on meanwhile, and prints the
time that training lost: the beginning and the end of the save, and by how much the steps between were slower
than the median step without a save. --folder should be on the disk that matters; every way syncs its files.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_sharedproj import distributed
from megatron_sharedproj.device import get_device
from megatron_sharedproj.quiet import quiet_libraries


def build(args: argparse.Namespace, root: Path) -> Any:
    from megatron_sharedproj.arguments import build_parser
    from megatron_sharedproj.pretrain import build_trainer, prepare

    line = (
        "--attention-variant qk_eq_v --mock-data --tokenizer-type NullTokenizer --vocab-size 8191 --lr 1e-4 "
        "--train-iters 100000 --eval-iters 0 --num-workers 0 --log-interval 1000000 --attention-dropout 0 "
        f"--num-layers {args.num_layers} --hidden-size {args.hidden_size} --num-attention-heads 8 "
        f"--save {root} "
        f"--seq-length 256 --max-position-embeddings 256 --micro-batch-size {args.micro_batch_size}"
    )
    return build_trainer(*prepare(build_parser().parse_args(line.split())))


class OurSave:
    """CheckpointSaver, at once or behind the training."""

    def __init__(self, trainer: Any, copy: bool):
        self.trainer, self.copy = trainer, copy

    def begin(self, iteration: int) -> bool:
        state = {"iteration": iteration, "consumed_samples": 0}
        t = self.trainer
        t.saver.begin(model=t.model.module, optimizer=t.optimizer, train_state=state, copy=self.copy)
        return not self.copy and t.saver.complete() is not None

    def poll(self) -> bool:
        return self.trainer.saver.poll() is not None


class MegatronSave:
    """AsyncCallsQueue: a process forked for each save, which sees the state as it was then."""

    def __init__(self, trainer: Any, root: Path):
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.trainer, self.root, self.queue = trainer, root, AsyncCallsQueue()

    def begin(self, iteration: int) -> bool:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        from megatron_sharedproj.checkpointing.sharded import state_to_save

        folder = self.root / f"megatron_{iteration}"
        folder.mkdir()
        t = self.trainer
        state = state_to_save(t.model.module, t.optimizer, t.device)
        request = dist_checkpointing.save(
            state, str(folder), TorchDistSaveShardedStrategy("torch_dist", 1), async_sharded_save=True
        )
        self.queue.schedule_async_request(request)
        return False

    def poll(self) -> bool:
        return bool(self.queue.maybe_finalize_async_calls(blocking=False))


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--ways", default="at once,our thread,megatron queue")
    args = parser.parse_args()
    quiet_libraries()
    distributed.initialize(get_device(), seed=1)
    root = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        trainer = build(args, root)
        trainer.log.enabled = False
        iterator = trainer._iterator(trainer.train_data, 0)
        steps = [timed(lambda: trainer.step(iterator))[0] for _ in range(10)]
        usual = statistics.median(steps[2:])
        ways: dict[str, Any] = {
            "at once": OurSave(trainer, False),
            "our thread": OurSave(trainer, True),
            "megatron queue": MegatronSave(trainer, root),
        }
        ways = {name: ways[name] for name in args.ways.split(",")}
        lost: dict[str, list[tuple[float, float, float, int]]] = {name: [] for name in ways}
        for round_ in range(args.rounds):
            for index, (name, way) in enumerate(ways.items()):
                iteration = 1 + round_ * len(ways) + index
                start = time.perf_counter()
                begin, done = timed(lambda way=way, iteration=iteration: way.begin(iteration))
                ending, slower, count = 0.0, 0.0, 0
                while not done:
                    slower += timed(lambda: trainer.step(iterator))[0] - usual
                    count += 1
                    ending, done = timed(way.poll)
                seconds = time.perf_counter() - start
                lost[name].append((begin + slower + ending, begin, seconds, count))
                calm = [timed(lambda: trainer.step(iterator))[0] for _ in range(5)]
                usual = statistics.median(calm)
                for folder in root.iterdir():
                    if folder.is_dir():
                        shutil.rmtree(folder)
        size = 12 * sum(p.numel() for p in trainer.model.parameters()) / 1e6
        print(f"state {size:.0f} MB, usual step {usual:.3f} s, {torch.get_num_threads()} thread(s)")
        for name, rows in lost.items():
            first, rest = rows[0], rows[1:] or rows
            total, begin, seconds, count = (statistics.median(column) for column in zip(*rest, strict=True))
            print(
                f"{name:15} lost {total:.2f} s (first {first[0]:.2f}), of it {begin:.2f} s at the beginning; "
                f"complete after {seconds:.2f} s and {count:.0f} step(s)"
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)
        distributed.finalize()


if __name__ == "__main__":
    main()
