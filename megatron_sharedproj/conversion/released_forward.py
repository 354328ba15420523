"""The released architecture as a plain function of a file's own tensors, and the check of an import by it.

It shares no name, layout or code with the conversion that it checks: a mistake there shows as a difference
of logits.

Shape legend: b batch, T tokens, d hidden size, h heads, g groups, e head size, P positions, V rows of wte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sharedproj.conversion.released_checkpoints import Released

# Largest difference of logits, relative to the largest logit; fp32 on the CPU.
BOUND = 1e-5
_LENGTHS = (1, 37, 256)


@dataclass(frozen=True)
class Check:
    """How far an import is from the file: largest |difference| and |logit|, over ``logits`` of them."""

    difference: float
    largest: float
    logits: int

    @property
    def relative(self) -> float:
        return self.difference / self.largest if self.largest else self.difference


def _linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    bias = state.get(f"{name}.bias")
    return F.linear(x, state[f"{name}.weight"].float(), None if bias is None else bias.float())


def _norm(state: Mapping[str, Tensor], name: str, x: Tensor, epsilon: float) -> Tensor:
    weight, bias = state[f"{name}.weight"].float(), state[f"{name}.bias"].float()
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def _attention(state: Mapping[str, Tensor], name: str, x: Tensor, heads: int, one_tensor: bool) -> Tensor:
    b, t, d = x.shape
    if f"{name}.c_attn.weight" in state:
        query, key, value = _linear(state, f"{name}.c_attn", x).split(d, dim=-1)
    elif f"{name}.c_kv.weight" in state:
        both = _linear(state, f"{name}.c_kv", x)
        key, value = (both, both) if one_tensor else both.chunk(2, dim=-1)
        query = _linear(state, f"{name}.c_q", x) if f"{name}.c_q.weight" in state else key
    else:
        key = value = _linear(state, f"{name}.c_k", x)
        query = _linear(state, f"{name}.c_q", x) if f"{name}.c_q.weight" in state else key
    e = d // heads
    # [b, h, T, e]; query head i reads group i // (h / g)
    q, k, v = (part.view(b, t, -1, e).transpose(1, 2) for part in (query, key, value))
    k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) / e**0.5
    future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
    attended = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    return _linear(state, f"{name}.c_proj", attended.transpose(1, 2).reshape(b, t, d))


@torch.no_grad()
def released_logits(
    state: Mapping[str, Tensor],
    tokens: Tensor,
    positions: Tensor,
    *,
    num_layers: int,
    num_heads: int,
    epsilon: float,
    one_tensor: bool,
) -> Tensor:
    """fp32 logits [b, T, V] of the released architecture.

    Args:
        state: Released.state; tokens, positions: int64 [b, T].
        one_tensor: what ``c_kv`` is: key and value at once (Q-MQA), or key then value.
    """
    x = state["wte.weight"][tokens].float() + state["wpe.weight"][positions].float()
    for layer in range(num_layers):
        name = f"h.{layer}"
        y = _norm(state, f"{name}.ln_1", x, epsilon)
        x = x + _attention(state, f"{name}.attn", y, num_heads, one_tensor)
        y = _norm(state, f"{name}.ln_2", x, epsilon)
        y = F.gelu(_linear(state, f"{name}.mlp.c_fc", y))
        x = x + _linear(state, f"{name}.mlp.c_proj", y)
    head = state.get("lm_head.weight", state["wte.weight"])
    return F.linear(_norm(state, "ln_f", x, epsilon), head.float())


def check_import(released: Released, folder: Path, *, seed: int = 0) -> Check:
    """Compare a written checkpoint, loaded back, with the file that it was made of.

    Random tokens in rows of several lengths, at the first and at the last positions. Needs this process to
    be the only one of its process group.

    Args:
        folder: iteration folder of the checkpoint.
    """
    from megatron_sharedproj.checkpointing import files
    from megatron_sharedproj.checkpointing.sharded import load_checkpoint
    from megatron_sharedproj.device import get_device
    from megatron_sharedproj.model import build_model

    config, device = files.checkpoint_config(folder).model, get_device()
    model = build_model(config, parallel_output=False)
    load_checkpoint(folder, device, model=model)
    model = model.to(device.setup(0)).eval()
    where = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    difference = largest = 0.0
    count, last = 0, config.max_position_embeddings
    for length in sorted({min(length, last) for length in _LENGTHS}):
        tokens = torch.randint(config.padded_vocab_size, (2, length), generator=generator)
        positions = torch.stack([torch.arange(length), torch.arange(last - length, last)])
        wanted = released_logits(
            released.state,
            tokens,
            positions,
            num_layers=config.num_layers,
            num_heads=config.num_attention_heads,
            epsilon=released.config.layernorm_epsilon,
            one_tensor=released.config.variant.tied_kv,
        )
        with torch.no_grad():
            found = model(tokens.to(where), positions.to(where), None).cpu()
        gap = (found - wanted).abs().max()
        # A NaN would pass a comparison with the bound.
        difference = max(difference, float(gap) if gap.isfinite() else float("inf"))
        largest = max(largest, float(wanted.abs().max()))
        count += wanted.numel()
    return Check(difference, largest, count)
