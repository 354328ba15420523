"""Stock architectures: the same logits as the Megatron model, and refusals that name what would work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models
from megatron_sharedproj import formulas
from megatron_sharedproj.conversion import stock, weights

# Kind -> (format, changes): everything that fits a stock architecture.
FITTING: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("gpt2", {}) for name in models.PAPER},
    "no_bias": ("gpt2", {}),
    "untied": ("gpt2", {}),
    "llama": ("llama", {}),
    "rope_q_eq_k": ("llama", {"normalization": "RMSNorm", "activation": "swiglu"}),
    "tied_llama": ("llama", {}),
    "rotate_keys": (
        "llama",
        {"qk_layernorm": False, "num_query_groups": 1, "normalization": "RMSNorm", "activation": "swiglu"},
    ),
    "rope_qkv": ("llama", {"normalization": "RMSNorm", "activation": "swiglu", "num_query_groups": 1}),
}


def build_stock(result: stock.StockModel) -> Any:
    """The transformers model, every parameter loaded from the file's names."""
    import transformers

    cls = getattr(transformers, result.config["architectures"][0])
    # Eager is transformers' own plain arithmetic.
    model = cls(cls.config_class(**result.config, attn_implementation="eager")).eval()
    missing, unexpected = model.load_state_dict(result.tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    assert bool(missing) == result.config["tie_word_embeddings"]
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", FITTING)
def test_logits_are_megatrons(name: str, parallel_state: Any) -> None:
    target, changes = FITTING[name]
    config = models.config(name, **changes)
    ours = models.build(config)
    tensors = weights.to_hugging_face(config, dict(ours.state_dict()), models.VOCAB)
    result = getattr(stock, f"to_{target}")(config, tensors, eos_token_id=models.VOCAB - 1)
    tokens = models.tokens()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        expected = ours(tokens, positions, None)[..., : models.VOCAB]
        found = build_stock(result)(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    storages = [tensor.untyped_storage().data_ptr() for tensor in result.tensors.values()]
    assert len(set(storages)) == len(storages)


def test_config_names_what_the_model_is() -> None:
    config = models.config("q_mqa", attention_dropout=0.0, hidden_dropout=0.2)
    tensors = _zeros(config)
    found = stock.to_gpt2(config, tensors, bos_token_id=3, eos_token_id=4).config
    expected = {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": models.VOCAB,
        "n_inner": 96,
        "activation_function": "gelu_pytorch_tanh",
        "bos_token_id": 3,
        "eos_token_id": 4,
        "pad_token_id": None,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.2,
        "dtype": "float32",
    }
    assert {name: found[name] for name in expected} == expected


def _zeros(config: Any) -> dict[str, torch.Tensor]:
    """Tensors of the right shapes."""
    out = {name: torch.zeros(models.VOCAB, 64) for name in weights.vocabulary_names(config).values()}
    for entry in weights.name_map(config):
        out.update({name: torch.zeros(entry.shape(i)) for i, name in enumerate(entry.names)})
    return out


@pytest.mark.parametrize("name", models.ALL)
def test_every_model_has_a_format_or_a_reason(name: str) -> None:
    config = models.config(name)
    table = stock.formats(config)
    assert table["sharedproj"] is None
    assert (table["gguf"] is None) == (None in (table["gpt2"], table["llama"]))
    converters = {"gpt2": stock.to_gpt2, "llama": stock.to_llama}
    for target, convert in converters.items():
        if table[target] is None:
            convert(config, _zeros(config))
            continue
        with pytest.raises(ValueError) as error:
            convert(config, _zeros(config))
        line = str(error.value)
        assert line.startswith(f"--format {target}: ") and "--format sharedproj" in line
        assert "\n" not in line and f"use --format {target}" not in line


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("rope_qkv", "gpt2", "position_embedding_type rope"),
        ("wide_heads", "gpt2", "normalization RMSNorm"),
        ("swiglu", "gpt2", "activation swiglu"),
        ("llama_qk_norm", "llama", "Qwen3"),
        ("qk_eq_v", "llama", "position_embedding_type learned_absolute"),
        ("partial_rope", "llama", "rotary_percent 0.5"),
        ("rope_qkv", "llama", "normalization LayerNorm"),
        (
            "rotate_values",
            "llama",
            "attention_variant qk_eq_v, kv_rotary rotate_values: .*--kv-rotary rotate_keys",
        ),
        ("partial", "llama", "kv_rotary partial"),
        ("separate_rope_head", "llama", "kv_rotary separate_rope_head"),
        ("rotate_keys_half", "llama", "rotary_percent 0.5"),
        ("rotate_values_one", "gguf", "position_embedding_type rope.*kv_rotary rotate_values"),
    ],
)
def test_refusal_names_field_and_value(name: str, target: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stock.check_format(models.config(name), target)


def test_heads_wider_than_the_hidden_size_are_refused() -> None:
    config = models.config("qk_eq_v", kv_channels=24)
    assert "kv_channels 24" in str(stock.refusal(config, "gpt2"))
    with pytest.raises(ValueError, match="--format onnx"):
        stock.check_format(config, "onnx")


@pytest.mark.parametrize(("name", "cached"), [("qk_eq_v", 4), ("q_mqa", 1), ("qkv", 8), ("mqa", 2)])
def test_note_says_what_the_cache_costs(name: str, cached: int) -> None:
    config = models.config(name)
    own = cached * 16 * 2 * 2  # head size, layers, bytes
    assert formulas.kv_cache_bytes_per_token(config) == own
    note = stock.to_gpt2(config, _zeros(config)).note
    assert f"{8 * 16 * 2 * 2} bytes per token" in note
    assert ("no saving from K=V" in note) == config.variant.tied_kv
    assert note.endswith(f"transformers holds {own}") if name != "qkv" else "the same" in note
