"""A model as a GGUF file, for llama.cpp and what is built on it. Needs the `gguf` package.

The architecture is llama.cpp's gpt2 or llama. Names come from the package's tensor map; what else its
converter does is done here too: linears are [out, in], the position table and all vectors stay in 32 bits,
and a Llama's query and key rows are interleaved (llama.cpp rotates neighbours, transformers halves).

Shape legend: V vocabulary, d hidden size, h heads, g groups, e head size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.conversion.stock import StockModel, stock_format, to_gpt2, to_llama

# --dtype -> gguf's tensor type and the file type that llama.cpp prints.
_DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
}
GELU_NOTE = (
    "llama.cpp computes GELU in its tanh form; this model was trained with the exact one, and its logits "
    "differ a little there (figures: docs/serving.md)"
)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError("--format gguf: gguf is not installed; install the [gguf] extra") from None
    return gguf


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_json: str | None,
    eos_token_id: int | None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    dtype: str = "float32",
    name: str = "",
) -> list[str]:
    """Write one GGUF file; the file appears whole or not at all.

    Args:
        config: shape of the model.
        tensors: the model under the sharedproj export's names, linears [out, in]; embedding [V, d].
        tokenizer_json: the tokenizer.json text (GPT-2's pre-tokenizer); None writes no tokenizer, and the
            engine then takes token ids only.
        eos_token_id, bos_token_id, pad_token_id: the tokenizer's; BOS is EOS where it has none.
        dtype: of the matrices: float32, float16 or bfloat16.
        name: of the model, for the file's general.name.
    The file is read back and compared before it gets its name.

    Returns:
        Notes for the user, one line each: what the cache costs, and where llama.cpp computes otherwise.
    Raises:
        ValueError: for a model, tokenizer or dtype that GGUF or llama.cpp cannot take, before any writing.
    """
    architecture = stock_format(config)
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(_DTYPES)}")
    gguf = _library()
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    if architecture == "gpt2":
        # llama.cpp's gpt2 graph takes fewer key/value heads than query heads; transformers' does not.
        stock = to_gpt2(config, tensors, repeat_groups=False, **ids)
    else:
        stock = to_llama(config, tensors, **ids)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    writer = gguf.GGUFWriter(temporary, architecture)
    _add_shape(gguf, writer, config, stock, dtype)
    writer.add_name(name or path.stem)
    if tokenizer_json is None:
        writer.add_tokenizer_model("none")
    else:
        _add_tokenizer(gguf, writer, tokenizer_json, stock.config["vocab_size"], ids)
    written = _add_tensors(gguf, writer, config, stock, dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check_written(gguf, temporary, written)
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    notes = [stock.note.replace(f"--format {architecture}", "--format gguf")]
    return [*notes, GELU_NOTE] if config.activation == "gelu" else notes


def _add_shape(gguf: Any, writer: Any, config: ModelConfig, stock: StockModel, dtype: str) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_query_groups)
    writer.add_key_length(config.kv_channels)
    writer.add_value_length(config.kv_channels)
    writer.add_vocab_size(stock.config["vocab_size"])
    if config.normalization == "LayerNorm":
        writer.add_layer_norm_eps(config.layernorm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    if config.position_embedding_type == "rope":
        writer.add_rope_freq_base(float(config.rotary_base))
        writer.add_rope_dimension_count(config.kv_channels)
    writer.add_file_type(getattr(gguf.LlamaFileType, _DTYPES[dtype][1]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def interleave_rotary_rows(rows: NDArray[Any], head_size: int) -> NDArray[Any]:
    """Rows [heads * e, ...] whose heads rotate element i with i + e/2, for a rotation of 2i with 2i + 1."""
    halves = rows.reshape(-1, 2, head_size // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _add_tensors(
    gguf: Any, writer: Any, config: ModelConfig, stock: StockModel, dtype: str
) -> dict[str, NDArray[Any]]:
    """Returns what the file will hold, by llama.cpp's names."""
    written = {}
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[writer.arch], config.num_layers)
    matrix = getattr(gguf.GGMLQuantizationType, _DTYPES[dtype][0])
    for source, tensor in stock.tensors.items():
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        values: NDArray[Any] = tensor.float().cpu().numpy()
        if writer.arch == "gpt2" and source.startswith("transformer.h.") and values.ndim == 2:
            values = values.T
        if writer.arch == "llama" and (".q_proj." in source or ".k_proj." in source):
            values = interleave_rotary_rows(values, config.kv_channels)
        kind = matrix if values.ndim == 2 and target != "position_embd.weight" else None
        kind = gguf.GGMLQuantizationType.F32 if kind is None else kind
        if kind == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError(
                f"--dtype {dtype}: {source} has values beyond its range; use bfloat16 or float32"
            )
        stored = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(target, stored, raw_dtype=kind)
        written[target] = stored
    return written


def _check_written(gguf: Any, path: Path, written: Mapping[str, NDArray[Any]]) -> None:
    """Read the file back: every tensor, byte for byte."""
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    wrong = [
        name
        for name, values in written.items()
        if name not in found or found[name].tobytes() != values.tobytes()
    ]
    if wrong or len(found) != len(written):
        raise ValueError(
            f"--format gguf: the file reads back another {(wrong or sorted(found))[0]}; disk full?"
        )


def _add_tokenizer(
    gguf: Any, writer: Any, tokenizer_json: str, vocab_size: int, ids: Mapping[str, int | None]
) -> None:
    described = json.loads(tokenizer_json)
    check_tokenizer(described)
    tokens, types = _tokens(gguf, described, vocab_size)
    # tokenizer.json has had both "a b" and ["a", "b"]; the byte-level alphabet has no space.
    pairs = described["model"]["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    eos = ids["eos_token_id"]
    if eos is None:  # llama.cpp would take id 11
        raise ValueError(
            "--format gguf: the tokenizer has no end-of-text token; set eos_token in its directory"
        )
    writer.add_eos_token_id(eos)
    writer.add_bos_token_id(eos if ids["bos_token_id"] is None else ids["bos_token_id"])
    if ids["pad_token_id"] is not None:
        writer.add_pad_token_id(ids["pad_token_id"])
    # Documents were encoded without either.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def check_tokenizer(described: Mapping[str, Any]) -> None:
    """Raise ValueError unless a parsed tokenizer.json is a byte-level BPE that splits text as GPT-2 does.

    That is the one pre-tokenizer that is written (llama.cpp's name: gpt-2); llama.cpp picks its splitting
    by a name, so another regular expression cannot travel in the file.
    """
    model, splitter = described["model"], described.get("pre_tokenizer") or {}
    reason = ""
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = model.get("type") if model.get("type") != "BPE" else "BPE with byte fallback"
        reason = f"its model is {kind}"
    elif splitter.get("type") != "ByteLevel" or not splitter.get("use_regex", True):
        reason = f"its pre-tokenizer is {splitter.get('type')}"
    elif splitter.get("add_prefix_space"):
        reason = "it puts a space before the text"
    elif described.get("normalizer"):
        reason = f"it normalizes text ({described['normalizer'].get('type')}), which llama.cpp does not"
    elif model.get("ignore_merges") or model.get("continuing_subword_prefix") or not model.get("merges"):
        reason = "its BPE has no merges, ignores them, or marks subwords"
    if reason:
        raise ValueError(
            "--format gguf: only a byte-level BPE with GPT-2's pre-tokenizer can be written, and for this "
            f"tokenizer {reason}; use --format sharedproj, gpt2 or llama, as the model allows"
        )


def _tokens(gguf: Any, described: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Spelling and gguf.TokenType of each of V ids; ids that no token has are named and unused."""
    kinds = gguf.TokenType
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [int(kinds.UNUSED)] * vocab_size
    entries = [(index, token, kinds.NORMAL) for token, index in described["model"]["vocab"].items()]
    for added in described.get("added_tokens", []):
        kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
        entries.append((added["id"], added["content"], kind))
    for index, token, kind in entries:
        if index >= vocab_size:
            raise ValueError(
                f"--format gguf: token id {index} of the tokenizer is beyond the model's {vocab_size} rows"
            )
        tokens[index], types[index] = token, int(kind)
    return tokens, types
