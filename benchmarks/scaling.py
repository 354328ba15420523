#!/usr/bin/env python3
"""The table of docs/scaling.md: what a rank of each run holds and sends, counted by the trainer's dry run.

    python benchmarks/scaling.py                  print the tables (Markdown); about 10 seconds a row
    python benchmarks/scaling.py --only 300m      those whose name has a text in it

Nothing is measured: no GPU, no network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30

_PAPER = (
    "--seq-length 2048 --max-position-embeddings 2048 --no-bias-gelu-fusion --attention-dropout 0 "
    "--vocab-size 50257"
)
_LLAMA = (
    "--seq-length 4096 --max-position-embeddings 4096 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --vocab-size 32000"
)
MODELS = {
    "300M": f"--num-layers 20 --hidden-size 1024 --num-attention-heads 16 {_PAPER}",
    "1.2B": f"--num-layers 22 --hidden-size 2048 --num-attention-heads 32 {_PAPER}",
    "7B": f"--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008 {_LLAMA}",
    "70B": f"--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --ffn-hidden-size 28672 "
    f"--group-query-attention --num-query-groups 8 {_LLAMA}",
}
_SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
_TP8 = f"--tensor-model-parallel-size 8 --sequence-parallel {_SHARDED}"
# Model, GPU, GPUs, micro batch, global batch, layout.
RUNS: tuple[tuple[str, str, int, int, int, str], ...] = (
    ("300M", "A100-40GB", 8, 6, 1152, _SHARDED),
    ("300M", "H100-80GB", 64, 6, 1152, _SHARDED),
    ("1.2B", "A100-40GB", 8, 2, 576, _SHARDED),
    ("1.2B", "H100-80GB", 64, 3, 576, _SHARDED),
    ("7B", "A100-40GB", 8, 1, 512, _TP8),
    ("7B", "A100-40GB", 8, 1, 512, f"--tensor-model-parallel-size 4 --sequence-parallel {_SHARDED}"),
    ("7B", "H100-80GB", 64, 1, 512, f"--tensor-model-parallel-size 2 --sequence-parallel {_SHARDED}"),
    ("70B", "H100-80GB", 64, 1, 512, _TP8),
    ("70B", "H100-80GB", 64, 1, 512, f"--pipeline-model-parallel-size 4 {_TP8}"),
    ("70B", "H100-80GB", 512, 1, 1024, f"--pipeline-model-parallel-size 4 {_TP8}"),
)
VARIANTS = ("qkv", "qk_eq_v")
HEAD = (
    "model", "GPUs", "layout", "variant", "parameters of a rank", "GiB of a rank", "there",
    "sent per step, GiB", "s/step at 40% MFU", "GB/s to hide it", "s/step measured",
)  # fmt: skip


def simulated(flags: list[str]) -> list[dict[str, Any]]:
    """The rows of one dry run: its first rank, and that of the last pipeline stage."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "megatron_sharedproj.pretrain", *flags]
        command += ["--simulate-output", str(output)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1])
        return json.loads(output.read_text())


def cells(model: str, rows: list[dict[str, Any]]) -> list[str]:
    """One line of the table: of the rank that needs most memory."""
    for row in rows:
        assert row["built_parameters"] == row["rank_parameters"]
    row = max(rows, key=lambda r: r["total_bytes"])
    sent, seconds = max(r["counted_total_bytes"] for r in rows), row["assumed_seconds_per_step"]
    layout = ", ".join(
        f"{name} {row[f'{size}_parallel_size']}"
        for name, size in (("TP", "tensor_model"), ("PP", "pipeline_model"), ("DP", "data"))
        if row[f"{size}_parallel_size"] > 1
    )
    fits = "" if row["total_bytes"] < 0.9 * row["gpu_memory_bytes"] else " (too much)"
    return [
        model, f"{row['world_size']} x {row['gpu']}", layout, f"`{row['variant']}`",
        f"{row['built_parameters']:,}", f"{row['total_bytes'] / GIB:.1f}{fits}",
        f"{row['gpu_memory_bytes'] / GIB:.1f}", f"{sent / GIB:.1f}", f"{seconds:.2f}",
        f"{sent / seconds / 1e9:.1f}", "",
    ]  # fmt: skip


def main() -> int:
    """Exit code: 0 done, 2 a run that the trainer refuses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name has it")
    args = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for model, gpu, gpus, micro, batch, layout in RUNS:
        for variant in VARIANTS if args.only.lower() in model.lower() else ():
            flags = (
                f"{MODELS[model]} --attention-variant {variant} --bf16 --lr 1e-4 --train-iters 1000 {layout}"
            )
            flags += f" --micro-batch-size {micro} --global-batch-size {batch}"
            flags += f" --simulate-world-size {gpus} --simulate-gpu {gpu} --simulate-mfu 0.4"
            try:
                print("| " + " | ".join(cells(model, simulated(flags.split()))) + " |", flush=True)
            except ValueError as error:
                print(f"error: {model}: {error}", file=sys.stderr)
                return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
