"""Two ranks choose among damaged checkpoints: agreement_worker.py FOLDER NAME [NAME ...].

Rank 1 is shown another latest iteration first, as after a write that it does not see yet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_sharedproj.checkpointing.selection import Choice, agree, choose, find_damage


def attempt(root: Path, fallback: bool) -> str:
    try:
        choice = choose(root, "--save", fallback=fallback)
    except ValueError as error:
        if fallback:
            return str(error)
        choice = Choice(root, root / "iter_0000006", "--save")
    if dist.get_rank() == 1:
        choice = Choice(root, root / "iter_0000002", "--save")
    try:
        return agree(choice, fallback=fallback).folder.name
    except ValueError as error:
        return str(error)


def main() -> None:
    dist.init_process_group("gloo")
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        root = folder / name
        found = {"strict": attempt(root, False), "fallback": attempt(root, True)}
        if name == "whole":
            found["verified"] = int(not find_damage(root / "iter_0000006", contents=True))
        (folder / f"{name}.{dist.get_rank()}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
