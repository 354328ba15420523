"""Simulate runs in one process and print what was counted beside the formulas, as JSON.

simulation_worker.py: reads [[world size, [flags of the trainer]], ...] from stdin.
"""

from __future__ import annotations

import json
import sys

from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.profiling.hardware import find_gpu
from megatron_sharedproj.profiling.run_plan import SENT, plan
from megatron_sharedproj.quiet import quiet_libraries
from megatron_sharedproj.training.simulation import simulate


def main() -> None:
    quiet_libraries()
    found = []
    for world, line in json.load(sys.stdin):
        args = build_parser().parse_args(line)
        config = run_config(args, args.vocab_size, world)
        rows = plan(config, world, find_gpu("A100-80GB"), 0.4)
        for row, rank in zip(rows, simulate(config, world), strict=True):
            found.append(
                {
                    "built": rank.parameters,
                    "counted": {part: rank.sent_bytes(part) for part in SENT[:-1]},
                    "total": rank.sent_bytes(),
                    "formula": {part: row[f"sent_{part}_bytes"] for part in SENT},
                    "parameters": row["rank_parameters"],
                    "stage": row["pipeline_stage"],
                    "kinds": [[c.purpose, c.kind, c.ranks, c.calls] for c in rank.collectives],
                }
            )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
