"""Exported models in vLLM on the CPU: transformers' tokens, and what its cache costs (docs/serving.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import pytest
import torch

STEPS = 40
LLAMA: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "num_query_groups": 2,
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("kv", "sharedproj", {"attention_variant": "qk_eq_v"}),
    ("kv", "gpt2", {"attention_variant": "qk_eq_v"}),
    ("q_mqa", "sharedproj", {"attention_variant": "qk_eq_v", "num_query_groups": 1, "activation": "gelu"}),
    ("q_mqa", "gpt2", {"attention_variant": "qk_eq_v", "num_query_groups": 1, "activation": "gelu"}),
    ("q_kv_one", "sharedproj", {"attention_variant": "q_eq_k_eq_v"}),
    ("rope", "sharedproj", {"attention_variant": "qkv", "position_embedding_type": "rope"}),
    ("llama", "sharedproj", LLAMA),
    ("llama", "llama", LLAMA),
]
CLASSES = {"sharedproj": "TransformersForCausalLM", "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    return engines.interpreter(engines.VLLM, Path(request.config.cache.mkdir("serving")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "changes"), [case[1:] for case in CASES], ids=[f"{name}-{target}" for name, target, _ in CASES]
)
def test_tokens_and_cache(
    target: str, changes: dict[str, Any], python: Path, parallel_state: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder, config = engines.exported(tmp_path, changes, target)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    expected = engines.continuations(model, STEPS)
    prompts = [one.prompt for one in expected]
    job = {"model": str(folder), "prompts": prompts, "new_tokens": STEPS, "context": engines.CONTEXT}
    result = engines.ask(python, "vllm_worker.py", job, tmp_path)
    assert result["model_class"] == CLASSES[target]
    assert result["greedy"] == [one.tokens for one in expected]
    logprobs = torch.tensor([one.logprobs for one in expected])
    torch.testing.assert_close(torch.tensor(result["logprobs"]), logprobs, rtol=0, atol=1e-4)
    # Both tensors, whatever the variant; in 32 bits here. Where this fails vLLM has learned to store one.
    heads = config.num_attention_heads if target == "gpt2" else config.num_query_groups
    assert len(result["cache"]) == config.num_layers
    assert {layer["bytes_per_token"] for layer in result["cache"].values()} == {2 * heads * 64 * 4}
