"""The released architecture as PyTorch modules with its names, and files of it as the release saves them.

Shape legend: b batch, T tokens, d hidden size, h heads, g groups, e head size, V vocabulary, P positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Name here -> (attention modules with their rows in heads, groups; None: as many as heads), 4 heads.
HEADS = 4
KINDS: dict[str, tuple[dict[str, int], int | None]] = {
    "qkv": ({"c_attn": 12}, None),
    "q_eq_k": ({"c_kv": 8}, None),
    "qk_eq_v": ({"c_q": 4, "c_k": 4}, None),
    "q_eq_k_eq_v": ({"c_k": 4}, None),
    "gqa": ({"c_q": 4, "c_kv": 4}, 2),
    "mqa": ({"c_q": 4, "c_kv": 2}, 1),
    "q_gqa": ({"c_q": 4, "c_k": 2}, 2),
    "q_mqa": ({"c_q": 4, "c_kv": 1}, 1),
}
# What the importer has to find: variant and groups.
EXPECTED = {
    "qkv": ("qkv", 4),
    "q_eq_k": ("q_eq_k", 4),
    "qk_eq_v": ("qk_eq_v", 4),
    "q_eq_k_eq_v": ("q_eq_k_eq_v", 4),
    "gqa": ("qkv", 2),
    "mqa": ("qkv", 1),
    "q_gqa": ("qk_eq_v", 2),
    "q_mqa": ("qk_eq_v", 1),
}


def model_config(kind: str, **changes: Any) -> dict[str, Any]:
    """The release's model_config, small: 2 layers of 4 heads of 8."""
    values = {
        "vocab_size": 96,
        "n_positions": 48,
        "n_layer": 2,
        "n_embd": 32,
        "n_head": HEADS,
        "n_inner": 80,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "use_bias": True,
        "tie_word_embeddings": True,
        "use_flash_attention": True,
    }
    if KINDS[kind][1] is not None:
        values["n_kv_groups"] = KINDS[kind][1]
    return {**values, **changes}


class Attention(nn.Module):
    bias: Tensor

    def __init__(self, kind: str, c: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.heads, self.size = kind, c["n_head"], c["n_embd"] // c["n_head"]
        for name, rows in KINDS[kind][0].items():
            setattr(self, name, nn.Linear(c["n_embd"], rows * self.size, bias=c["use_bias"]))
        self.c_proj = nn.Linear(c["n_embd"], c["n_embd"], bias=c["use_bias"])
        mask = torch.tril(torch.ones(c["n_positions"], c["n_positions"]))
        self.register_buffer("bias", mask.view(1, 1, *mask.shape))

    def roles(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "qkv":
            q, k, v = self.c_attn(x).chunk(3, dim=-1)
        elif self.kind == "q_eq_k":
            k, v = self.c_kv(x).chunk(2, dim=-1)
            q = k
        elif self.kind == "q_eq_k_eq_v":
            q = k = v = self.c_k(x)
        elif self.kind in ("qk_eq_v", "q_gqa"):
            q, k = self.c_q(x), self.c_k(x)
            v = k
        elif self.kind == "q_mqa":
            q, k = self.c_q(x), self.c_kv(x)
            v = k
        else:
            q = self.c_q(x)
            k, v = self.c_kv(x).chunk(2, dim=-1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        split = [y.view(b, t, -1, self.size) for y in self.roles(x)]
        out = torch.empty(b, t, self.heads, self.size)
        for head in range(self.heads):  # one at a time: nothing to get wrong in a broadcast
            q, k, v = (y[:, :, head // (self.heads // y.shape[2])] for y in split)
            scores = q @ k.transpose(1, 2) / self.size**0.5
            scores = scores.masked_fill(self.bias[0, :, :t, :t] == 0, float("-inf"))
            out[:, :, head] = scores.softmax(-1) @ v
        return self.c_proj(out.view(b, t, d))


class MLP(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c_fc = nn.Linear(c["n_embd"], c["n_inner"], bias=c["use_bias"])
        self.c_proj = nn.Linear(c["n_inner"], c["n_embd"], bias=c["use_bias"])

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, kind: str, c: dict[str, Any]) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(c["n_embd"], eps=c["layer_norm_epsilon"])
        self.attn = Attention(kind, c)
        self.ln_2 = nn.LayerNorm(c["n_embd"], eps=c["layer_norm_epsilon"])
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """[b, T] tokens -> [b, T, V] logits."""

    def __init__(self, kind: str, c: dict[str, Any]) -> None:
        super().__init__()
        self.wte = nn.Embedding(c["vocab_size"], c["n_embd"])
        self.wpe = nn.Embedding(c["n_positions"], c["n_embd"])
        self.h = nn.ModuleList(Block(kind, c) for _ in range(c["n_layer"]))
        self.ln_f = nn.LayerNorm(c["n_embd"], eps=c["layer_norm_epsilon"])
        self.lm_head = (
            None if c["tie_word_embeddings"] else nn.Linear(c["n_embd"], c["vocab_size"], bias=False)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        return F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)


def build(kind: str, seed: int = 1, **changes: Any) -> GPT:
    """A model whose every parameter, biases and norms too, is random."""
    model = GPT(kind, model_config(kind, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def content(model: GPT, kind: str, *, final: bool = True, **changes: Any) -> dict[str, Any]:
    """What the release saves: behind DistributedDataParallel, masks included."""
    optimizer = {} if final else {"optimizer_state_dict": torch.optim.AdamW(model.parameters()).state_dict()}
    return {
        "step": 37,
        "epoch": 0,
        "tokens_seen": 1234,
        "model_state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        **optimizer,
        "model_config": model_config(kind, **changes),
        "train_config": {
            "learning_rate": 2e-4,
            "beta2": 0.95,
            "warmup_steps": 500,
            "output_dir": "./outputs",
        },
    }


def save(path: Path, model: GPT, kind: str, **changes: Any) -> Path:
    torch.save(content(model, kind, **changes), path)
    return path
