"""Run by an interpreter that has llama-cpp-python: token ids in, logits and greedy tokens out.

Usage: python llama_worker.py JOB.json RESULT.json

JOB: {"model": FILE.gguf, "prompts": [[id, ...], ...], "new_tokens": N, "context": tokens,
    "cache": "f32" | "f16", "text": "..." or none}
RESULT: {"version", "logits": per prompt [tokens][V], "greedy": per prompt [N], "text_ids": of the text,
    "cache_log": llama.cpp's lines about its cache}
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp

LOG: list[str] = []


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    LOG.append(text.decode(errors="replace"))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Logits of each prompt in one pass, then greedy decoding token by token over the cache."""
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    cache = llama_cpp.GGML_TYPE_F32 if job["cache"] == "f32" else llama_cpp.GGML_TYPE_F16
    model = llama_cpp.Llama(
        job["model"],
        n_ctx=job["context"],
        n_batch=job["context"],
        logits_all=True,
        n_threads=1,
        n_threads_batch=1,
        type_k=cache,
        type_v=cache,
        flash_attn=False,
        verbose=True,
    )
    logits, greedy = [], []
    for prompt in job["prompts"]:
        model.reset()
        model.eval(prompt)
        logits.append(model.scores[: len(prompt)].tolist())
        chosen: list[int] = []
        for _ in range(job["new_tokens"]):
            chosen.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(chosen[-1:])
        greedy.append(chosen)
    text = job.get("text")
    return {
        "version": llama_cpp.__version__,
        "logits": logits,
        "greedy": greedy,
        "text_ids": model.tokenize(text.encode(), add_bos=False, special=False) if text else None,
        "cache_log": [line.strip() for line in "".join(LOG).splitlines() if "kv_cache" in line],
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))))
