"""GGUF files, read back with gguf's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import models
from megatron_sharedproj.conversion import gguf_file, weights
from megatron_sharedproj.conversion.stock import to_gpt2, to_llama

LLAMA_LIKE = {"normalization": "RMSNorm", "activation": "swiglu"}
KINDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(models.PAPER, {}),
    "untied": {},
    "no_bias": {},
    "llama": {},
    "rope_q_eq_k": LLAMA_LIKE,
}


def random_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Random tensors under the export's names."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        name: entry.shape(i) for entry in weights.name_map(config) for i, name in enumerate(entry.names)
    }
    shapes |= {name: (models.VOCAB, 64) for name in weights.vocabulary_names(config).values()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, config: Any, **options: Any) -> tuple[gguf.GGUFReader, dict[str, torch.Tensor]]:
    tensors = random_tensors(config)
    path = folder / "model.gguf"
    options = {"tokenizer_json": None, "eos_token_id": models.VOCAB - 1, **options}
    gguf_file.write_gguf(path, config, tensors, **options)
    assert [entry.name for entry in folder.iterdir()] == ["model.gguf"]
    return gguf.GGUFReader(path), tensors


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


def expected_tensors(config: Any, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """llama.cpp's names and layouts, written out by hand from the stock form."""
    if config.position_embedding_type == "rope":
        found = to_llama(config, tensors).tensors
        names = {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        prefix = "model.layers."
    else:
        found = to_gpt2(config, tensors, repeat_groups=False).tensors
        names = {
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
            "ln_1": "attn_norm",
            "ln_2": "ffn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        }
        prefix = "transformer.h."
    out = {}
    for name, tensor in found.items():
        stem, _, kind = name.rpartition(".")
        layer = ""
        if stem.startswith(prefix):
            number, _, stem = stem.removeprefix(prefix).partition(".")
            layer = f"blk.{number}."
        values = tensor.numpy()
        if stem.split(".")[-1].startswith("c_") and kind == "weight":
            values = values.T
        if stem in ("self_attn.q_proj", "self_attn.k_proj"):
            e = config.kv_channels
            # Element i of a half goes to 2 i, its partner i + e/2 to 2 i + 1.
            order = [head * e + i + half * e // 2 for head in range(len(values) // e)
                     for i in range(e // 2) for half in (0, 1)]  # fmt: skip
            values = values[order]
        out[f"{layer}{names[stem]}.{kind}"] = values
    return out


@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_reads_back(name: str, tmp_path: Path) -> None:
    config = models.config(name, **KINDS[name])
    reader, tensors = write(tmp_path, config)
    expected = expected_tensors(config, tensors)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(tensor.data, expected[key], err_msg=key)
    architecture = value(reader, "general.architecture")
    shape = {
        "block_count": 2,
        "context_length": models.POSITIONS,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": config.num_query_groups,
        "attention.key_length": 16,
        "vocab_size": models.VOCAB,
    }
    assert {key: value(reader, f"{architecture}.{key}") for key in shape} == shape
    assert value(reader, "tokenizer.ggml.model") == "none"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_are_rounded_and_vectors_kept(dtype: str, tmp_path: Path) -> None:
    config = models.config("qk_eq_v")
    reader, tensors = write(tmp_path, config, dtype=dtype)
    low = getattr(torch, dtype)
    expected = expected_tensors(config, tensors)
    kinds = set()
    for tensor in reader.tensors:
        wanted = torch.tensor(expected[tensor.name])
        if wanted.dim() == 2 and tensor.name != "position_embd.weight":
            wanted = wanted.to(low).float()
            kinds.add(tensor.tensor_type.name)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        np.testing.assert_array_equal(values, wanted.numpy(), err_msg=tensor.name)
    assert kinds == {"F16" if dtype == "float16" else "BF16"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from megatron_sharedproj.data.tokenizers import train_bpe

    return train_bpe(["the cat and the hat, then that; hot hats"] * 3, 280, tmp_path_factory.mktemp("bpe"))


def with_vocabulary(rows: int) -> tuple[Any, dict[str, torch.Tensor]]:
    config = models.config("qk_eq_v")
    tensors = random_tensors(config)
    tensors["model.embed_tokens.weight"] = torch.randn(rows, 64)
    return config, tensors


def test_tokenizer_travels_in_the_file(tokenizer: Any, tmp_path: Path) -> None:
    described = json.loads(tokenizer.to_json())
    added = {"id": 281, "content": "<tab>", "special": False}
    described["added_tokens"].append(added)
    config, tensors = with_vocabulary(283)
    path = tmp_path / "model.gguf"
    gguf_file.write_gguf(path, config, tensors, tokenizer_json=json.dumps(described), eos_token_id=0)
    reader = gguf.GGUFReader(path)
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert value(reader, "tokenizer.ggml.eos_token_id") == value(reader, "tokenizer.ggml.bos_token_id") == 0
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    for token, index in described["model"]["vocab"].items():
        assert tokens[index] == token
    assert tokens[0] == "<|endoftext|>" and types[0] == gguf.TokenType.CONTROL
    assert tokens[281] == "<tab>" and types[281] == gguf.TokenType.USER_DEFINED
    assert tokens[282] == "[PAD282]" and types[282] == gguf.TokenType.UNUSED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    assert value(reader, "tokenizer.ggml.merges") == merges and merges


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        (("model", "type"), "Unigram", "Unigram"),
        (("model", "byte_fallback"), True, "byte fallback"),
        (("pre_tokenizer",), {"type": "Sequence", "pretokenizers": []}, "Sequence"),
        (("pre_tokenizer", "use_regex"), False, "ByteLevel"),
        (("pre_tokenizer", "add_prefix_space"), True, "space before"),
        (("normalizer",), {"type": "NFC"}, "NFC"),
        (("model", "merges"), [], "merges"),
    ],
)
def test_other_tokenizers_are_refused(
    path: tuple[str, ...], change: Any, words: str, tokenizer: Any, tmp_path: Path
) -> None:
    described = json.loads(tokenizer.to_json())
    target = described
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = change
    config, tensors = with_vocabulary(300)
    with pytest.raises(ValueError, match=words) as error:
        gguf_file.write_gguf(
            tmp_path / "m.gguf", config, tensors, tokenizer_json=json.dumps(described), eos_token_id=0
        )
    assert str(error.value).startswith("--format gguf: ") and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_mistakes_leave_nothing_behind(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    config, tensors = with_vocabulary(270)
    options: dict[str, Any] = {"tokenizer_json": None, "eos_token_id": 0}
    with pytest.raises(ValueError, match="beyond the model's 270 rows"):
        gguf_file.write_gguf(path, config, tensors, tokenizer_json=tokenizer.to_json(), eos_token_id=0)
    config, tensors = with_vocabulary(300)
    with pytest.raises(ValueError, match="eos_token"):
        gguf_file.write_gguf(path, config, tensors, tokenizer_json=tokenizer.to_json(), eos_token_id=None)
    with pytest.raises(ValueError, match="--dtype int8"):
        gguf_file.write_gguf(path, config, tensors, dtype="int8", **options)
    with pytest.raises(ValueError, match="--format gguf: llama.cpp has no such model: .*rope.*LayerNorm"):
        gguf_file.write_gguf(path, models.config("rope_qkv"), tensors, **options)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    with pytest.raises(ValueError, match="c_fc.weight has values beyond its range"):
        gguf_file.write_gguf(path, config, tensors, dtype="float16", **options)
    assert not list(tmp_path.iterdir())


def test_notes(tmp_path: Path) -> None:
    config = models.config("q_mqa", activation="gelu")
    tensors = random_tensors(config)
    notes = gguf_file.write_gguf(
        tmp_path / "m.gguf", config, tensors, tokenizer_json=None, eos_token_id=0, dtype="bfloat16"
    )
    assert "key and value of 1 head(s), 128 bytes per token" in notes[0] and "--format gguf" in notes[0]
    assert notes[1] == gguf_file.GELU_NOTE
