"""FLOPs of a forward pass as torch.profiler counts them, on the eager fp32 Hugging Face form of a model.

The released count was made this way: a bias is inside its addmm, scaling the scores is a mul, the residuals
and the position embedding are adds. torch.profiler counts mm, addmm, bmm, mul and add, and nothing else.

Shape legend: b batch (one sequence here), T tokens, d hidden size, h heads, g groups, e head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.conversion.config_map import hugging_face_config
from megatron_sharedproj.layers.hf import SharedProjConfig, SharedProjForCausalLM

_BYTES = 4  # float32
_NORMS = ("aten::rms_norm", "aten::layer_norm")

# What the profiler counts of our model and a released count does not have: the released code fills the masked
# scores, and its positions are a slice.
MASK, INDICES, NORMS = "adding the mask to the scores", "position indices and angles", "the insides of norms"


@dataclass
class Counted:
    """FLOPs of one forward pass over one sequence.

    Attributes:
        total: of the operations that the released count has too.
        left_out: what torch.profiler counted beside them, by reason.
    """

    total: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def eager_model(config: ModelConfig, device: str = "cpu") -> Any:
    """The eager fp32 Hugging Face form, all weights zero: a count does not depend on them.

    Args:
        device: "cpu", "cuda", or "meta" for shapes only.
    """
    values = hugging_face_config(config, vocab_size=config.padded_vocab_size, eos_token_id=None)
    options = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
    hf = SharedProjConfig(**options, use_compiled_kernel=False)
    hf._attn_implementation = "eager"
    with torch.device("meta"):
        model = SharedProjForCausalLM(hf)
    if device != "meta":
        model.to_empty(device=device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.tie_weights()  # to_empty gives each of two tied names a tensor
    return model.eval()


def needed_bytes(config: ModelConfig, seq_length: int) -> int:
    """Bytes that are enough to build a model and for :func:`count_flops`: weights and the widest tensors.

    Measured peaks: 3.1 GiB for 300M and 2048 tokens, where the scores [b, h, T, T] live up to eight times
    over, and 5.7 GiB for 1.2B and 1024; this says 3.8 and 5.9.
    """
    scores = 8 * config.num_attention_heads * seq_length**2
    logits = seq_length * config.padded_vocab_size
    stream = seq_length * (8 * config.hidden_size + 3 * config.ffn_hidden_size)
    # While it is built, a tied head has an embedding of its own.
    weights = formulas.parameters(config)["total"] + config.padded_vocab_size * config.hidden_size
    return _BYTES * (weights + stream + scores + logits)


def count_flops(model: Any, seq_length: int) -> Counted:
    """Run one forward pass over ``seq_length`` tokens, without a cache, and count.

    Args:
        model: of :func:`eager_model`.
    """
    tokens = torch.zeros(1, seq_length, dtype=torch.long, device=model.device)
    activities = [torch.profiler.ProfilerActivity.CPU]  # operators are recorded where they are called
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=activities, record_shapes=True, with_flops=True) as profiler,
    ):
        model(input_ids=tokens, use_cache=False)
    counted = Counted()
    for event in profiler.events():
        if not event.flops:
            continue
        reason = _left_out(event, seq_length)
        if reason:
            counted.left_out[reason] = counted.left_out.get(reason, 0) + event.flops
        else:
            counted.total += event.flops
    return counted


def _left_out(event: Any, seq_length: int) -> str:
    """Why an operation is not part of the released count; empty where it is."""
    if event.name not in ("aten::add", "aten::mul"):
        return ""
    shapes: Sequence[Sequence[int]] = event.input_shapes
    first, second = shapes[0], shapes[1] if len(shapes) > 1 else []
    parent = event.cpu_parent
    while parent is not None:
        if parent.name in _NORMS:
            return NORMS
        parent = parent.cpu_parent
    square = [seq_length, seq_length]
    if event.name == "aten::add" and len(first) == len(second) == 4:
        # [b, h, T, T] + [b, 1, T, T]
        if list(first[2:]) == list(second[2:]) == square and second[1] == 1:
            return MASK
    # [T], [1, T] and [1, T, 1, 1] of indices; activations are wider than a token.
    return INDICES if math.prod(first) <= seq_length else ""
