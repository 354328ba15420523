"""Megatron's core_attention slot: packed sequences, deterministic mode, and options that it refuses.

Shape legend: n tokens of packed sequences, b batch, d hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sharedproj.config import ModelConfig

SHAPE: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "padded_vocab_size": 64,
    "max_position_embeddings": 16,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
LENGTHS = [5, 1, 9]
STARTS = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
VARIANTS = ["qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v"]

pytestmark = pytest.mark.usefixtures("parallel_state")


def layer(variant: str, dtype: torch.dtype, **changes: Any) -> Any:
    from megatron_sharedproj.model import build_model

    torch.manual_seed(3)
    config = ModelConfig(**SHAPE, attention_variant=variant)
    return build_model(config, dtype=dtype, **changes).decoder.layers[0].self_attention


def packed(**changes: Any) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    given = {
        "qkv_format": "thd",
        "cu_seqlens_q": STARTS,
        "cu_seqlens_kv": STARTS,
        "max_seqlen_q": 9,
        "max_seqlen_kv": 9,
    }
    return PackedSeqParams(**{**given, **changes})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("longest", [9, None])
def test_packed_sequences_equal_single_ones(
    variant: str, dtype: torch.dtype, tolerance: float, longest: int | None
) -> None:
    attention = layer(variant, dtype)
    hidden = torch.randn(15, 1, 32, dtype=dtype, requires_grad=True)
    params = packed(max_seqlen_q=longest, max_seqlen_kv=longest)
    out, _ = attention(hidden, None, packed_seq_params=params)
    parts = [attention(part, None)[0] for part in hidden.split(LENGTHS)]
    expected = torch.cat(parts)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, hidden, upstream)
    (wanted,) = torch.autograd.grad(expected, hidden, upstream)
    torch.testing.assert_close(out, expected, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(gradient, wanted, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"qkv_format": "bshd"}, "qkv_format=bshd: supported is thd"),
        ({"cu_seqlens_q_padded": STARTS}, "padding between sequences .* is not supported"),
    ],
)
def test_packed_forms_that_are_refused(changes: dict[str, Any], words: str) -> None:
    core = layer("qk_eq_v", torch.float32).core_attention
    query = torch.randn(15, 4, 8)
    with pytest.raises(ValueError, match=words):
        core(query, query, query, None, packed_seq_params=packed(**changes))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("thd", [False, True])
def test_a_tied_value_reaches_the_kernel_as_the_key(monkeypatch: Any, variant: str, thd: bool) -> None:
    from megatron_sharedproj.layers import core_attention
    from megatron_sharedproj.variants import get_variant

    seen = []
    name = "attention_packed" if thd else "attention"
    real = getattr(core_attention, name)

    def record(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
    ) -> Any:
        seen.append(value is key)
        return real(query, key, value, *rest, **options)

    monkeypatch.setattr(core_attention, name, record)
    attention = layer(variant, torch.float32)
    hidden = torch.randn(15, 1, 32, requires_grad=True)
    attention(hidden, None, packed_seq_params=packed() if thd else None)[0].sum().backward()
    assert seen == [get_variant(variant).tied_kv]


@pytest.mark.parametrize("option, value", [("window_size", (5, 0)), ("fp8", "e4m3")])
def test_options_that_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option}=.*: not supported by projection-sharing attention"):
        layer("qk_eq_v", torch.float32, **{option: value})


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_mode_reaches_the_kernel(monkeypatch: Any, deterministic: bool) -> None:
    from megatron_sharedproj.layers import core_attention

    seen = []
    real = core_attention.attention

    def record(*tensors: Any, **options: Any) -> torch.Tensor:
        seen.append(options["deterministic"])
        return real(*tensors, **options)

    monkeypatch.setattr(core_attention, "attention", record)
    attention = layer("qk_eq_v", torch.float32, deterministic_mode=deterministic)
    attention(torch.randn(6, 2, 32), None)
    assert seen == [deterministic]
