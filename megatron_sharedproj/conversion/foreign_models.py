"""Hugging Face directories of GPT-2 and of Llama-shaped models, as ``qkv`` models.

An architecture is a row of a table: where its configuration keeps what, what it fixes, and what it may not
say because ModelConfig cannot. Sources: the configuration and modelling classes of transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.conversion.renaming import Source, gpt_sources, rename, tensor_shapes
from megatron_sharedproj.conversion.weight_files import read_config, read_tensors
from megatron_sharedproj.data.tokenizers import padded_vocab_size

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Architecture:
    """How one transformers class reads its config.json, and what its modules are called.

    Attributes:
        fields: ModelConfig's field -> config.json's, where the value is the same.
        defaults: what the class takes for a field that config.json does not have.
        allowed: config.json's field -> the values that ModelConfig can express.
        fixed: ModelConfig's fields that the class fixes.
        activation: config.json's field of the activation; activations: its value -> ours.
        biases: pattern of our module -> True, or config.json's field that says whether it has a bias; a
            module that no pattern matches has none.
        vocab_size: config.json's field.
        prefix: of every tensor but the head's; checkpoints without it exist.
        ignored: pattern of tensors that are no parameters (buffers of older releases).
        sources: modules by number of layers.
    """

    fields: dict[str, str]
    defaults: dict[str, Any]
    allowed: dict[str, tuple[Any, ...]]
    fixed: dict[str, Any]
    activation: str
    activations: dict[str, str]
    sources: Callable[[int, bool], dict[str, Source]]
    biases: dict[str, bool | str] = field(default_factory=dict)
    vocab_size: str = "vocab_size"
    prefix: str = ""
    ignored: str = r"(?!)"


def _gpt2_sources(num_layers: int, qk_layernorm: bool) -> dict[str, Source]:
    return gpt_sources(num_layers, {"c_attn": ("q", "k", "v")}, transposed=True)


def _llama_sources(num_layers: int, qk_layernorm: bool) -> dict[str, Source]:
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    attention += [f"self_attn.{name}_norm" for name in "qk"] if qk_layernorm else []
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    modules = ["input_layernorm", "post_attention_layernorm", *attention, *mlp]
    names = [f"model.layers.{layer}.{module}" for layer in range(num_layers) for module in modules]
    # The names of the Hugging Face form are Llama's.
    return {name: Source((name,)) for name in ("model.embed_tokens", "model.norm", "lm_head", *names)}


def _llama_like(
    *, biases: dict[str, bool | str], defaults: dict[str, Any] | None = None, qk_layernorm: bool = False
) -> Architecture:
    return Architecture(
        fields={
            "num_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "num_attention_heads": "num_attention_heads",
            "num_query_groups": "num_key_value_heads",
            "kv_channels": "head_dim",
            "ffn_hidden_size": "intermediate_size",
            "max_position_embeddings": "max_position_embeddings",
            "layernorm_epsilon": "rms_norm_eps",
            "init_method_std": "initializer_range",
            "attention_dropout": "attention_dropout",
        },
        defaults={
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            "rope_theta": 10000.0,
            **(defaults or {}),
        },
        allowed={"use_sliding_window": (False, None), "quantization_config": (None,)},
        fixed={
            "position_embedding_type": "rope",
            "normalization": "RMSNorm",
            "hidden_dropout": 0.0,
            "scaled_init": False,
            "qk_layernorm": qk_layernorm,
        },
        activation="hidden_act",
        activations={"silu": "swiglu", "swish": "swiglu"},
        sources=_llama_sources,
        biases=biases,
        ignored=r".*\.rotary_emb\.inv_freq",
    )


_ATTENTION_FIELD: dict[str, bool | str] = {r"self_attn\.[qkvo]_proj": "attention_bias"}

ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture(
        fields={
            "num_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "ffn_hidden_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "layernorm_epsilon": "layer_norm_epsilon",
            "init_method_std": "initializer_range",
            "attention_dropout": "attn_pdrop",
            "hidden_dropout": "resid_pdrop",
        },
        defaults={
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "attn_pdrop": 0.1,
            "resid_pdrop": 0.1,
            "tie_word_embeddings": True,
            "n_inner": None,
        },
        allowed={
            "scale_attn_weights": (True, None),
            "scale_attn_by_inverse_layer_idx": (False, None),
            "reorder_and_upcast_attn": (False, None),
            "add_cross_attention": (False, None),
            "quantization_config": (None,),
        },
        fixed={"position_embedding_type": "learned_absolute", "normalization": "LayerNorm"},
        activation="activation_function",
        # gelu_new and gelu_pytorch_tanh are one function.
        activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        sources=_gpt2_sources,
        biases={r".*_proj": True},
        prefix="transformer.",
        ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "LlamaForCausalLM": _llama_like(biases={**_ATTENTION_FIELD, r"mlp\..*": "mlp_bias"}),
    "MistralForCausalLM": _llama_like(biases={}, defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": _llama_like(biases={r"self_attn\.[qkv]_proj": True}),
    "Qwen3ForCausalLM": _llama_like(biases=_ATTENTION_FIELD, defaults={"head_dim": 128}, qk_layernorm=True),
}


def read_foreign(
    folder: Path, *, say: Callable[[str], None] = print
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A Hugging Face directory as a ``qkv`` model: config.json and safetensors, nothing pickled, no network.

    Args:
        say: is told, a line each, where the model is expressed in another way than the directory's.
    Returns:
        The configuration, whose ``padded_vocab_size`` is the number of embedding rows rounded up to 128; and
        the tensors by the names of the Hugging Face form, all embedding rows of the directory, in its dtypes.
    Raises:
        ValueError: one line naming the folder, and the field with its value or the tensor.
    """
    values = read_config(folder)
    try:
        name, architecture = _architecture(values)
        values = {**architecture.defaults, **values}
        config, zeros = _model_config(architecture, values)
    except ValueError as error:
        raise ValueError(f"--load {folder}: config.json: {error}") from None
    found = {}
    for key, tensor in read_tensors(folder).items():
        short = key.removeprefix(architecture.prefix)
        if not re.fullmatch(architecture.ignored, short):
            found[short] = tensor
    # Some releases wrote a tied head twice.
    written_twice = None if config.untie_embeddings_and_output_weights else found.pop(_HEAD, None)
    try:
        tensors = rename(
            config,
            int(values[architecture.vocab_size]),
            architecture.sources(config.num_layers, config.qk_layernorm),
            {short: tuple(tensor.shape) for short, tensor in found.items()},
            lambda short: _checked(short, found[short]),
            zeros=zeros,
        )
    except ValueError as error:
        raise ValueError(f"--load {folder}: {error}") from None
    if written_twice is not None and not written_twice.equal(tensors[_EMBEDDING]):
        raise ValueError(
            f"--load {folder}: {_HEAD} differs from the embedding, though tie_word_embeddings is true"
        )
    if zeros:
        modules = sorted({re.sub(r"model\.layers\.\d+\.|\.bias", "", zero) for zero in zeros})
        say(
            f"{name}: zero biases added to {', '.join(modules)}: here all linear layers have one or none "
            "(the same function; training on moves them)"
        )
    embedding_dropout = values.get("embd_pdrop", config.hidden_dropout)
    if embedding_dropout != config.hidden_dropout:
        say(f"{name}: embd_pdrop {embedding_dropout} becomes resid_pdrop's {config.hidden_dropout}")
    return config, tensors


def _checked(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; quantised weights are not supported")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds infinities or NaN, which no trained weight is; the file is damaged")
    return tensor


def _architecture(values: Mapping[str, Any]) -> tuple[str, Architecture]:
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"architectures {names!r}: supported are {', '.join(ARCHITECTURES)}")
    return name, ARCHITECTURES[name]


def _model_config(architecture: Architecture, values: dict[str, Any]) -> tuple[ModelConfig, set[str]]:
    """The ModelConfig, and the biases that it has and the architecture has not."""
    _check_values(architecture, values)
    given = {ours: values.get(theirs) for ours, theirs in architecture.fields.items()}
    fields = {ours: value for ours, value in given.items() if value is not None} | architecture.fixed
    if fields["position_embedding_type"] == "rope":
        fields["rotary_base"] = _rotary_base(values)
    rows = values[architecture.vocab_size]
    try:
        config = ModelConfig(
            **fields,
            padded_vocab_size=padded_vocab_size(rows),
            activation=architecture.activations[values[architecture.activation]],
            untie_embeddings_and_output_weights=not values["tie_word_embeddings"],
        )
    except TypeError as error:
        raise ValueError(f"a value of the wrong kind ({error})") from None
    biases = {name for name in tensor_shapes(config, rows) if re.search(r"_proj\.bias$", name)}
    present = {name for name in biases if _has_bias(architecture, values, name)}
    if not present:
        return config.replace(add_bias_linear=False), set()
    return config, biases - present


def _has_bias(architecture: Architecture, values: Mapping[str, Any], name: str) -> bool:
    module = re.sub(r"model\.layers\.\d+\.|\.bias$", "", name)
    for pattern, says in architecture.biases.items():
        if re.fullmatch(pattern, module):
            return bool(values.get(says, False)) if isinstance(says, str) else says
    return False


def _check_values(architecture: Architecture, values: Mapping[str, Any]) -> None:
    """Refuse what is missing, of the wrong kind, or beyond what ModelConfig expresses."""
    optional = {"num_key_value_heads", "head_dim", "n_inner"}
    needed = {*architecture.fields.values(), architecture.vocab_size, "tie_word_embeddings"} - optional
    missing = sorted(name for name in needed if values.get(name) is None)
    if missing:
        raise ValueError(f"has no {', '.join(missing)}")
    real = {"layernorm_epsilon", "init_method_std", "attention_dropout", "hidden_dropout"}
    numbers = {theirs: (int, float) if ours in real else int for ours, theirs in architecture.fields.items()}
    for name, kind in (numbers | {architecture.vocab_size: int}).items():
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or value < 0):
            raise ValueError(f"{name} {value!r}: expected a {'whole ' if kind is int else ''}number")
    for name, allowed in architecture.allowed.items():
        if values.get(name) not in allowed:
            raise ValueError(f"{name} {values[name]!r}: not supported, only {json.dumps(allowed[0])} is")
    activation = values[architecture.activation]
    if not isinstance(activation, str) or activation not in architecture.activations:
        known = ", ".join(architecture.activations)
        raise ValueError(f"{architecture.activation} {activation!r}: not supported; {known} is")
    for name, sort in (("sliding_window", int), ("layer_types", list)):
        if values.get(name) is not None and not isinstance(values[name], sort):
            raise ValueError(f"{name} {values[name]!r}: not understood")
    window, positions = values.get("sliding_window"), values.get("max_position_embeddings")
    if "sliding_window" in architecture.defaults and window is not None and window < (positions or 0):
        raise ValueError(
            f"sliding_window {window}: not supported below max_position_embeddings {positions}; null is"
        )
    kinds = [kind for kind in values.get("layer_types") or () if kind != "full_attention"]
    if kinds:
        raise ValueError(f"layer_types {kinds[:1]}: not supported, only full_attention is")


def _rotary_base(values: Mapping[str, Any]) -> int:
    """theta, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{name} {rope!r}: not supported")
        kind = rope.get("rope_type", rope.get("type", "default"))
        further = {key: value for key, value in rope.items() if key not in _ROPE_FIELDS and value is not None}
        if kind != "default" or further or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"{name} {json.dumps(rope)}: not supported, only rope_type default is")
    if values.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"partial_rotary_factor {values['partial_rotary_factor']}: not supported, only 1.0 is"
        )
    theta = (values.get("rope_parameters") or {}).get("rope_theta", values["rope_theta"])
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta < 1 or theta % 1 != 0:
        raise ValueError(f"rope_theta {theta!r}: only a whole number is supported")
    size = values.get("head_dim") or values["hidden_size"] // max(values["num_attention_heads"], 1)
    if size % 2:
        raise ValueError(f"head_dim {size}: odd, and rotary positions need an even one")
    return int(theta)


_ROPE_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
