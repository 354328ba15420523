"""Every CUDA kernel once on small shapes: what benchmarks/gpu_all.sh runs under compute-sanitizer.

Shape legend: b batch, s query length, t key length, h query heads, g groups, e head size.
"""

from __future__ import annotations

import itertools
import sys

import torch


def main() -> int:
    if not torch.cuda.is_available():
        print("error: no GPU is visible here", file=sys.stderr)
        return 2
    from megatron_sharedproj.ops import extension

    if extension.BUILD_INFO.get("mode") != "cuda":
        print(f"error: {extension.MISSING or 'the extension was built without CUDA'}", file=sys.stderr)
        return 2
    ops = torch.ops.megatron_sharedproj
    count = 0
    for dtype, e, causal, deterministic in itertools.product(
        (torch.bfloat16, torch.float16), (64, 80, 128), (True, False), (True, False)
    ):
        # Ragged tiles, rows without a key, more keys than queries.
        for s, t, h, g in ((97, 97, 4, 2), (130, 70, 2, 1), (33, 200, 2, 2)):
            query = torch.randn(2, s, h, e, dtype=dtype, device="cuda", requires_grad=True)
            kv = torch.randn(2, t, g, e, dtype=dtype, device="cuda", requires_grad=True)
            out, _ = ops.attention(query, kv, None, causal, 0.1, deterministic=deterministic)
            torch.autograd.grad(out, (query, kv), torch.randn_like(out))
            count += 1
    for dtype, e, heads, splits in itertools.product(
        (torch.bfloat16, torch.float16), (64, 80, 128), (2, 8, 40), (1, 3)
    ):
        query = torch.randn(3, 1, heads, e, dtype=dtype, device="cuda")
        pages = torch.randn(12, 64, 2, e, dtype=dtype, device="cuda")
        lengths = torch.tensor([0, 65, 256], dtype=torch.int32, device="cuda")
        table = torch.randperm(12, device="cuda").view(3, 4).to(torch.int32)
        ops.attention_decode(query, pages, None, 0.1, lengths, table, splits)
        ops.attention_decode(query, pages.view(3, 256, 2, e), None, 0.1, lengths, None, splits)
        count += 2
    torch.cuda.synchronize()
    print(f"{count} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
