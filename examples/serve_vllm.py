"""Text from an exported folder through vLLM, and what its cache costs per token.

Run it with an interpreter that has vLLM (docs/serving.md); it needs nothing of this package.

    python examples/serve_vllm.py exported --prompt "Fellow citizens," --max-new-tokens 40
"""

from __future__ import annotations

import argparse
import os
from typing import Any

# The engine in this process, where it can be asked for its cache; 1 GiB of cache on a CPU.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder that tools/convert_to_hf.py wrote (sharedproj, gpt2 or llama)")
    parser.add_argument("--prompt", action="append", required=True, help="may be given more than once")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--max-model-len", type=int, help="tokens in a sequence; default: the model's")
    parser.add_argument(
        "--dtype", default="auto", help="default: vLLM's choice, bfloat16 for a 32-bit export"
    )
    args = parser.parse_args()

    import vllm

    llm: Any = vllm.LLM(
        args.model,
        # The sharedproj format's code lies in the folder; a stock format has none.
        trust_remote_code=True,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        enforce_eager=True,
    )
    sampling = vllm.SamplingParams(temperature=args.temperature, max_tokens=args.max_new_tokens)
    for request in llm.generate(args.prompt, sampling, use_tqdm=False):
        print(f"{request.prompt}{request.outputs[0].text}\n")
    layers = llm.collective_rpc("get_kv_cache_spec")[0].values()
    total = sum(layer.page_size_bytes / layer.block_size for layer in layers)
    heads = ", ".join(sorted({f"{layer.num_kv_heads} head(s) of {layer.head_size}" for layer in layers}))
    print(f"vLLM {vllm.__version__}: cache {total:.0f} bytes per token (key and value, {heads}, every layer)")


if __name__ == "__main__":
    main()
