"""GPT-2 and Llama-shaped directories compute here what transformers computes, and what cannot is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj import formulas
from megatron_sharedproj.conversion.foreign_models import read_foreign

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

BOUND = 1e-5
VOCAB, POSITIONS = 90, 48
LLAMA_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2_SHAPE),
    "gpt2 sizes": (
        "GPT2",
        {**GPT2_SHAPE, "n_inner": 40, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    ),
    "gpt2 untied": ("GPT2", {**GPT2_SHAPE, "tie_word_embeddings": False}),
    "gpt2 tanh": ("GPT2", {**GPT2_SHAPE, "activation_function": "gelu_pytorch_tanh"}),
    "llama": ("Llama", LLAMA_SHAPE),
    "llama tied, theta": (
        "Llama",
        {**LLAMA_SHAPE, **THETA, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "llama attention bias": ("Llama", {**LLAMA_SHAPE, "attention_bias": True}),
    "llama all biases": ("Llama", {**LLAMA_SHAPE, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**LLAMA_SHAPE, "sliding_window": None, "head_dim": 12}),
    "mistral wide window": ("Mistral", {**LLAMA_SHAPE, "sliding_window": POSITIONS}),
    "qwen2": ("Qwen2", LLAMA_SHAPE),
    "qwen3": ("Qwen3", {**LLAMA_SHAPE, "head_dim": 16}),
}


def build(name: str, **changes: Any) -> Any:
    """A transformers model whose every parameter is random, norms and biases too."""
    kind, shape = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**shape, **changes})
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{suffix}")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm = ("norm" in key or "ln_" in key) and key.endswith("weight")
            parameter.copy_(float(norm) + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Saves a model and returns its folder."""

    def save(name: str, **changes: Any) -> Path:
        build(name, **changes).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def quiet(line: str) -> None:
    raise AssertionError(f"nothing to say, but: {line}")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Replace tensors (None: take away); names have __ for a dot."""
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors) if callable(value) else value
    safetensors_torch.save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)


def imported_logits(folder: Path, tokens: Tensor, say: Any = quiet) -> tuple[Any, Tensor]:
    from megatron_sharedproj.conversion.weights import to_megatron
    from megatron_sharedproj.model import build_model

    config, tensors = read_foreign(folder, say=say)
    model = build_model(config, parallel_output=False).eval()
    missing = model.load_state_dict(to_megatron(config, tensors), strict=False).missing_keys
    assert not [key for key in missing if not key.endswith("_extra_state")]
    with torch.no_grad():
        logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return config, logits[..., :VOCAB]


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, POSITIONS), generator=torch.Generator().manual_seed(2))


def assert_same(model: Any, folder: Path, say: Any = quiet) -> Any:
    with torch.no_grad():
        wanted = model(tokens()).logits
    config, found = imported_logits(folder, tokens(), say)
    assert wanted.abs().max() > 1
    assert (found - wanted).abs().max() <= BOUND * wanted.abs().max()
    return config


@pytest.mark.usefixtures("parallel_state")
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    said: list[str] = []
    config = assert_same(model, tmp_path, said.append)
    assert config.attention_variant == "qkv" and config.padded_vocab_size == 128
    partial = {"llama attention bias": "mlp.down_proj", "qwen2": "self_attn.o_proj"}
    assert len(said) == (name in partial)
    assert all(f"zero biases added to {partial[name]}" in line or partial[name] in line for line in said)
    own = sum(p.numel() for p in model.parameters())
    tables = 1 + config.untie_embeddings_and_output_weights
    padding = tables * (config.padded_vocab_size - VOCAB) * config.hidden_size
    zeros = {"llama attention bias": 2 * (56 + 56 + 32), "qwen2": 2 * (32 + 56 + 56 + 32)}.get(name, 0)
    assert formulas.parameters(config)["total"] == own + padding + zeros


@pytest.mark.usefixtures("parallel_state")
def test_shards_and_their_index(tmp_path: Path) -> None:
    model = build("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(model, tmp_path)


@pytest.mark.usefixtures("parallel_state")
def test_folders_of_older_releases(saved: Any) -> None:
    """No prefix, mask buffers, a tied head written twice; rope_theta and rope_scaling beside each other."""
    folder = saved("gpt2")
    path = folder / "model.safetensors"
    old = {k.removeprefix("transformer."): v for k, v in safetensors_torch.load_file(path).items()}
    old["h.0.attn.bias"], old["h.0.attn.masked_bias"] = torch.ones(1, 1, 48, 48).tril(), torch.tensor(-1e4)
    old["lm_head.weight"] = old["wte.weight"].clone()
    safetensors_torch.save_file(old, path)
    edit_config(folder, n_ctx=POSITIONS, tie_word_embeddings="absent", scale_attn_weights="absent")
    assert_same(build("gpt2"), folder)
    shutil.rmtree(folder)

    folder = saved("llama tied, theta")
    edit_config(folder, rope_parameters="absent", rope_theta=500.0, rope_scaling=None, head_dim="absent")
    edit_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert_same(build("llama tied, theta"), folder)


def test_low_precision_stays_as_it_is(tmp_path: Path) -> None:
    build("llama").bfloat16().save_pretrained(tmp_path)
    _, tensors = read_foreign(tmp_path, say=quiet)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_embedding_dropout_that_differs_is_said(saved: Any) -> None:
    said: list[str] = []
    read_foreign(saved("gpt2", embd_pdrop=0.3), say=said.append)
    assert said == ["GPT2LMHeadModel: embd_pdrop 0.3 becomes resid_pdrop's 0.1"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
        ("gpt2", {"n_embd": "32"}, "n_embd '32': expected a whole number"),
        ("gpt2", {"n_layer": "absent"}, "has no n_layer"),
        ("gpt2", {"n_head": 0}, "num-attention-heads 0"),
        (
            "llama",
            {"architectures": ["MixtralForCausalLM"]},
            "MixtralForCausalLM.*supported are GPT2LMHeadModel",
        ),
        ("llama", {"architectures": "absent"}, "architectures None"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}}, "llama3"),
        ("llama", {"rope_parameters": "absent", "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("llama", {"rope_parameters": {"rope_theta": 500.5}}, "rope_theta 500.5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"head_dim": 7}, "head_dim 7: odd"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"num_key_value_heads": 3}, "3"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("mistral", {"sliding_window": 16}, "sliding_window 16"),
        ("mistral", {"sliding_window": "absent", "max_position_embeddings": 8192}, "sliding_window 4096"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
        ("gpt2", {"n_layer": 10**12}, "n_layer 1000000000000: at most"),
        ("gpt2", {"activation_function": ["gelu"]}, "activation_function"),
        ("llama", {"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta inf"),
        ("mistral", {"sliding_window": "x"}, "sliding_window 'x': not understood"),
        ("qwen3", {"layer_types": 3}, "layer_types 3: not understood"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_what_modelconfig_cannot_express_is_named(
    saved: Any, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = saved(name)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as refused:
        read_foreign(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, "1 tensor.* missing: model.norm.weight"),
        ({"model__layers__0__mlp__gate_proj__bias": torch.ones(56)}, "not understood: .*gate_proj.bias"),
        ({"model__norm__weight": torch.ones(31)}, r"model.norm.weight: shape \[31\], .* \[32\]"),
        ({"model__embed_tokens__weight": torch.ones(91, 32)}, r"shape \[91, 32\], .* \[90, 32\]"),
        (
            {"model__norm__weight": torch.full((32,), float("nan"))},
            "model.norm.weight holds infinities or NaN",
        ),
        ({"model__norm__weight": torch.ones(32, dtype=torch.int8)}, "torch.int8"),
    ],
)
def test_wrong_tensors_are_named(saved: Any, changes: dict[str, Any], message: str) -> None:
    folder = saved("llama")
    edit_tensors(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_foreign(folder)


def test_another_head_than_the_embedding_is_refused(saved: Any) -> None:
    folder = saved("llama tied, theta")
    edit_tensors(folder, lm_head__weight=torch.ones(VOCAB, 32))
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        read_foreign(folder)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 0x80  # in the header
    path.write_bytes(bytes(data))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 8)


@pytest.mark.parametrize("damage", [truncated, flipped, longer, Path.unlink])
def test_a_damaged_file_is_one_line(saved: Any, damage: Any) -> None:
    folder = saved("gpt2")
    damage(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors") as refused:
        read_foreign(folder)
    assert "\n" not in str(refused.value)


def test_a_missing_shard_and_a_way_out_of_the_folder(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first = sorted(set(values["weight_map"].values()))[0]
    (tmp_path / first).rename(tmp_path.parent / f"outside-{tmp_path.name}.safetensors")
    with pytest.raises(ValueError, match=first):
        read_foreign(tmp_path)
    moved = {
        k: f"../outside-{tmp_path.name}.safetensors" if v == first else v
        for k, v in values["weight_map"].items()
    }
    index.write_text(json.dumps({**values, "weight_map": moved}))
    with pytest.raises(ValueError, match=r"\.\./outside"):
        read_foreign(tmp_path)


def test_pickles_are_not_read(saved: Any) -> None:
    folder = saved("gpt2")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*safetensors"):
        read_foreign(folder)


def test_no_configuration(tmp_path: Path, saved: Any) -> None:
    with pytest.raises(ValueError, match="no config.json"):
        read_foreign(tmp_path)
    folder = saved("gpt2")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_foreign(folder)
