"""Exported GGUF files in llama.cpp: transformers' logits and tokens, the tokenizer, the cache's size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from test_vllm import LLAMA

STEPS = 40
# llama.cpp looks GELU up in a table of 16-bit values; SiLU it computes.
GELU_TOLERANCE, TOLERANCE = 2e-2, 1e-4
CASES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "kv": ("gpt2", GELU_TOLERANCE, {"attention_variant": "qk_eq_v"}),
    "exact_gelu": ("gpt2", GELU_TOLERANCE, {"attention_variant": "qk_eq_v", "activation": "gelu"}),
    "q_mqa": ("gpt2", GELU_TOLERANCE, {"attention_variant": "qk_eq_v", "num_query_groups": 1}),
    "q_kv_one": ("gpt2", GELU_TOLERANCE, {"attention_variant": "q_eq_k_eq_v", "add_bias_linear": False}),
    "llama": ("llama", TOLERANCE, LLAMA),
}


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    return engines.interpreter(engines.LLAMA, Path(request.config.cache.mkdir("serving")))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_tokens_and_cache(name: str, python: Path, parallel_state: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    stock, tolerance, changes = CASES[name]
    twin, config = engines.exported(tmp_path, changes, stock)
    folder, _ = engines.exported(tmp_path, changes, "gguf")
    model = AutoModelForCausalLM.from_pretrained(twin).eval()
    expected = engines.continuations(model, STEPS)
    prompts = [one.prompt for one in expected]
    job = {
        "model": str(folder / "model.gguf"),
        "prompts": prompts,
        "new_tokens": STEPS,
        "context": engines.CONTEXT,
        "cache": "f32",
        "text": engines.TEXT * 2 + "unseen words, 1234",
    }
    result = engines.ask(python, "llama_worker.py", job, tmp_path)
    with torch.no_grad():
        for prompt, found in zip(prompts, result["logits"], strict=True):
            logits = model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(torch.tensor(found), logits, rtol=0, atol=tolerance)
    assert result["greedy"] == [one.tokens for one in expected]
    encoded = Tokenizer.from_file(str(twin / "tokenizer.json")).encode(job["text"], add_special_tokens=False)
    assert result["text_ids"] == encoded.ids
    # Key and value, for the model's groups.
    size = re.search(r"size = +([\d.]+) MiB \( *(\d+) cells", "\n".join(result["cache_log"]))
    assert size is not None, result["cache_log"]
    per_token = 2 * config.num_query_groups * 64 * config.num_layers * 4
    assert float(size[1]) * 2**20 / int(size[2]) == pytest.approx(per_token, rel=0.02)
