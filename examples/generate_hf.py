#!/usr/bin/env python3
"""Generate from an exported folder with transformers alone, and say what its cache holds.

python examples/generate_hf.py exported --prompt "The state of the Union"
"""

from __future__ import annotations

import argparse

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what tools/convert_to_hf.py wrote")
    parser.add_argument("--prompt", default="Fellow citizens, the state of the Union")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()

    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(args.seed)
    out = model.generate(
        **inputs, max_new_tokens=args.max_new_tokens, do_sample=True, top_p=0.9, return_dict_in_generate=True
    )
    print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
    # transformers 5.24 names it cache, those before it past_key_values.
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    length = cache.get_seq_length()
    # Of a tied key/value both are one tensor.
    tensors = {x.data_ptr(): x for layer in cache.layers for x in (layer.keys, layer.values)}
    per_token = sum(x[0, :, 0].numel() * x.element_size() for x in tensors.values())
    print(
        f"{model.config.attention_variant}: cache of {length} tokens, {per_token} bytes each; "
        f"{cache.nbytes()} bytes allocated"
    )


if __name__ == "__main__":
    main()
