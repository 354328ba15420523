"""One torchrun launch that generates with every model over two ranks, and writes what each rank has as JSON.

tp_worker.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_sharedproj import distributed
from megatron_sharedproj.device import get_device
from megatron_sharedproj.inference.engine import EngineOptions, requests_for
from megatron_sharedproj.inference.sampling import Sampling
from megatron_sharedproj.quiet import quiet_libraries
from random_models import CASES, ROTARY, load

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {f"{v}-{g}": (v, g, {}) for v, g in CASES} | {
    name: ROTARY[name]
    for name in (
        "qkv-2 half rope",
        "q_eq_k rope",
        "rotate_keys",
        "rotate_keys-1 half",
        "rotate_values-2",
        "partial-2",
        "separate_rope_head-2",
        "separate_rope_head-1",
    )
}
PROMPTS = ["1 2 3", " ".join(["4 9 7"] * 25), "5"]
# name -> engine, temperature
WAYS = {
    "paged": (EngineOptions(max_batch_size=2), 2.0),
    "contiguous": (
        EngineOptions(cache="contiguous", prefill_chunk_size=40, kv_cache_policy="store_both"),
        0.0,
    ),
    "none": (EngineOptions(cache=""), 0.0),
}


def results(name: str, ranks: int) -> dict[str, Any]:
    """Texts of one model made in every way, and the bytes of its cache on this rank."""
    from megatron_sharedproj.inference.engine import Engine
    from megatron_sharedproj.inference.generate import measured

    variant, groups, shape = MODELS[name]
    loaded = load(variant, groups, positions=100, tensor_parallel=ranks, **shape)
    found: dict[str, Any] = {}
    for way, (options, temperature) in WAYS.items():
        engine = Engine(loaded, options)
        # A process's own stream must not matter, nor that it differs between the ranks.
        torch.manual_seed(torch.distributed.get_rank())
        wanted = requests_for(loaded.tokenizer, PROMPTS, max_new_tokens=6)
        done = engine.run(wanted, Sampling(temperature, seed=8))
        found[way] = [[c.tokens, c.text, c.finish_reason] for c in done]
        generation = measured(engine, done)
        found[f"{way} bytes"] = [
            engine.figures.cache_bytes,
            generation.cache_bytes,
            generation.cache_formula_bytes,
        ]
    return found


def main() -> None:
    quiet_libraries()
    folder = Path(sys.argv[1])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.initialize(get_device(), tensor_model_parallel_size=ranks)
    found = {name: results(name, ranks) for name in MODELS}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    distributed.finalize()


if __name__ == "__main__":
    main()
