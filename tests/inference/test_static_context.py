"""Megatron's own StaticInferenceContext with our attention: for users of the stock engine.

Shape legend: b batch, V padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj import formulas
from random_models import CASES, ROTARY, TIED, TOLERANCE, full_logits, load, random_tokens

pytestmark = pytest.mark.usefixtures("parallel_state")


@torch.no_grad()
def cached_logits(model: Any, tokens: Tensor, pieces: list[int]) -> tuple[Tensor, Any]:
    """Logits [b, V] after each piece, fed one after another through one cache; and the cache."""
    from megatron.core.inference.contexts.static_context import StaticInferenceContext

    context = StaticInferenceContext(tokens.shape[0], tokens.shape[1])
    start, found = 0, []
    for size in pieces:
        piece = tokens[:, start : start + size]
        positions = torch.arange(start, start + size).expand_as(piece)
        out = model(piece, positions, None, inference_context=context, runtime_gather_output=True)
        found.append(out[:, -1])
        start += size
        context.sequence_len_offset = start
        context.enable_decode_mode()
    return torch.stack(found, dim=1), context


MODELS = [(*case, {}) for case in CASES] + [
    ROTARY[name] for name in ROTARY if "rotate_keys" in name or name.startswith("q")
]


@pytest.mark.parametrize(("variant", "groups", "shape"), MODELS)
@pytest.mark.parametrize(
    "pieces",
    [[5, 1, 1, 1, 1, 1], [1] * 10, [4, 3, 3], [3, 1, 4, 2]],
    ids=["prefill and steps", "steps only", "chunks", "mixed"],
)
def test_cached_logits_are_those_of_a_full_forward(
    variant: str, groups: int, shape: dict[str, Any], pieces: list[int]
) -> None:
    model = load(variant, groups, **shape).model
    tokens = random_tokens(2, sum(pieces))
    expected = full_logits(model, tokens)
    found, _ = cached_logits(model, tokens, pieces)
    ends = [sum(pieces[: index + 1]) - 1 for index in range(len(pieces))]
    for index, position in enumerate(ends):
        torch.testing.assert_close(
            found[:, index],
            expected[:, position],
            **TOLERANCE,
            msg=lambda m, p=position: f"position {p}: {m}",
        )
    # The comparison sees a wrong position: neighbours differ by far more than the tolerance.
    assert (expected[:, 1:] - expected[:, :-1]).abs().amax(-1).min() > 0.1


@pytest.mark.parametrize(("variant", "groups"), CASES)
def test_measured_static_cache_bytes(variant: str, groups: int) -> None:
    from megatron_sharedproj.layers.kv_cache import cache_storage_bytes

    loaded = load(variant, groups)
    batch, length, element = 2, 12, 4
    _, context = cached_logits(loaded.model, random_tokens(batch, length), [length - 2, 1, 1])
    measured = cache_storage_bytes(context)
    assert measured == formulas.kv_cache_bytes_per_token(loaded.config.model, element) * batch * length
    # By hand: tensors x groups x head size x layers x 4 bytes, for each token.
    assert measured == (1 if variant in TIED else 2) * groups * 8 * 2 * element * batch * length

    buffers = context.key_value_memory_dict
    assert len(buffers) == 2
    for key, value in buffers.values():
        assert key.shape == (length, batch, groups, 8)
        assert (key is value) == (variant in TIED)
        assert (key.data_ptr() == value.data_ptr()) == (variant in TIED)
    assert len({key.data_ptr() for key, _ in buffers.values()}) == 2  # layers do not share


@pytest.mark.parametrize(("variant", "groups"), CASES)
def test_attention_reads_the_tied_cache_as_one_tensor(variant: str, groups: int) -> None:
    """A kernel that reads a tied key/value once tells it by identity, at decode steps too."""
    model = load(variant, groups).model
    seen: list[bool] = []
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[1] is inputs[2])
        )
    cached_logits(model, random_tokens(1, 6), [3, 1, 2])
    assert seen == [variant in TIED] * 6
