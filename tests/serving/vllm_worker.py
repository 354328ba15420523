"""Run by an interpreter that has vLLM: token ids in, greedy tokens and the cache's layout out.

Usage: python vllm_worker.py JOB.json RESULT.json

JOB: {"model": DIR, "prompts": [[id, ...], ...], "new_tokens": N, "context": tokens}
RESULT: {"version", "transformers", "model_class", "greedy": per prompt [N], "logprobs": per prompt [N],
    "cache": per layer {"heads", "head_size", "bytes_per_token"}}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# The engine in this process: its worker can be asked for its model and cache.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import transformers  # noqa: E402
import vllm  # noqa: E402


def _model_class(worker: Any) -> str:
    return type(worker.get_model()).__name__


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuation of all prompts in one batch, in 32 bits."""
    llm = vllm.LLM(
        job["model"],
        skip_tokenizer_init=True,
        trust_remote_code=True,
        dtype="float32",
        max_model_len=job["context"],
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False, logprobs=1
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
    greedy = [list(output.token_ids) for output in outputs]
    logprobs = [
        [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        for output in outputs
    ]
    specs = llm.collective_rpc("get_kv_cache_spec")[0]
    return {
        "version": vllm.__version__,
        "transformers": transformers.__version__,
        "model_class": llm.collective_rpc(_model_class)[0],
        "greedy": greedy,
        "logprobs": logprobs,
        "cache": {
            name: {
                "heads": spec.num_kv_heads,
                "head_size": spec.head_size,
                "bytes_per_token": spec.page_size_bytes / spec.block_size,
            }
            for name, spec in specs.items()
        },
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))))
