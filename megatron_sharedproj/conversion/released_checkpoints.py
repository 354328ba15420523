"""The ``.pt`` files of the paper's released code, as tensors of the Hugging Face form.

A file says less than it should: ``c_kv`` is keys then values in one model and the ONE tied tensor in
another, so the variant follows from names, shapes and ``model_config`` together. Source: the released code.

Shape legend: d hidden size, h heads, g groups, e head size, P positions.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sharedproj.config import ModelConfig, RunConfig
from megatron_sharedproj.conversion.renaming import gpt_sources, listed, rename
from megatron_sharedproj.conversion.weight_files import MAX_LAYERS
from megatron_sharedproj.variants import get_variant

_MASK = re.compile(r"h\.\d+\.attn\.bias")
_ATTENTION = re.compile(r"h\.\d+\.attn\.(?!c_proj\.)(\w+)\.weight")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel's, torch.compile's
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """The attention modules of one of the released models, beside ``c_proj``.

    Attributes:
        modules: module -> the projections of ``variant`` that it holds, in storage order.
    """

    variant: str
    modules: dict[str, tuple[str, ...]]


LAYOUTS = (
    Layout("qkv", {"c_attn": ("q", "k", "v")}),
    Layout("q_eq_k", {"c_kv": ("k", "v")}),
    Layout("qk_eq_v", {"c_q": ("q",), "c_k": ("kv",)}),
    Layout("q_eq_k_eq_v", {"c_k": ("kv",)}),
    Layout("qkv", {"c_q": ("q",), "c_kv": ("k", "v")}),  # GQA, MQA
    Layout("qk_eq_v", {"c_q": ("q",), "c_kv": ("kv",)}),  # Q-MQA
)

# model_config's field -> ModelConfig's, where the value is the same.
_SAME = {
    "n_layer": "num_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "vocab_size": "padded_vocab_size",
    "n_inner": "ffn_hidden_size",
    "layer_norm_epsilon": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "use_bias": "add_bias_linear",
    "attn_pdrop": "attention_dropout",
    "resid_pdrop": "hidden_dropout",
}
_REQUIRED = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")
_WHOLE, _FLAGS = (*_REQUIRED, "n_inner", "n_kv_groups"), ("use_bias", "tie_word_embeddings")
# What the released dataclasses hold beside these; the last two, if a file has them, name the variant.
_OTHERS = {"n_kv_groups", "embd_pdrop", "tie_word_embeddings", "use_flash_attention"}
_NAMES_VARIANT = ("attention_variant", "attention_type")
_PARTS = ("model_state_dict", "model_config")
# train_config's field -> TrainConfig's.
_TRAINING = {
    "learning_rate": "lr",
    "min_lr": "min_lr",
    "warmup_steps": "lr_warmup_iters",
    "weight_decay": "weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "grad_clip": "clip_grad",
    "seed": "seed",
    "micro_batch_size": "micro_batch_size",
}
_PROVENANCE = ("step", "epoch", "tokens_seen", "val_metrics", "model_config", "train_config")


@dataclass
class Released:
    """One released checkpoint.

    Attributes:
        config: its shape; ``padded_vocab_size`` is the number of its embedding rows.
        tensors: fp32, by the names of the Hugging Face form, all embedding rows.
        layout: how its file holds the attention.
        state: the file's own tensors by the file's own names, without prefixes and mask buffers.
        step: optimizer steps; provenance: JSON-ready, what the file says of its training.
        notes: what the user should know, one line each.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    layout: Layout
    state: dict[str, Tensor]
    step: int
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def read_released(path: Path, *, variant: str | None = None, num_query_groups: int | None = None) -> Released:
    """Read a ``checkpoint_step_N.pt`` or ``final_model.pt``.

    Args:
        variant, num_query_groups: what the file leaves open, or to overrule its model_config.
    Raises:
        ValueError: one line naming the file, and the flag that settles what is open.
    """
    content = _load(path)
    try:
        return interpret(content, variant=variant, num_query_groups=num_query_groups)
    except ValueError as error:
        raise ValueError(f"--load {path}: {error}") from None


def interpret(content: Any, *, variant: str | None = None, num_query_groups: int | None = None) -> Released:
    """As :func:`read_released`, from the file's content."""
    parts: dict[str, Any] = {
        name: content.get(name) if isinstance(content, dict) else None for name in _PARTS
    }
    absent = [name for name, value in parts.items() if not isinstance(value, dict)]
    if absent:
        raise ValueError(
            f"holds no {' and no '.join(absent)}; give a checkpoint_step_N.pt or final_model.pt of the "
            "released code"
        )
    values = _checked_config(parts["model_config"])
    state, notes = _own_tensors(parts["model_state_dict"], values)
    layout, groups = _find_layout(state, values, variant, num_query_groups)
    fields = {ours: values[theirs] for theirs, ours in _SAME.items() if values.get(theirs) is not None}
    untied = not values.get("tie_word_embeddings", True)
    config = ModelConfig(
        # What the released code fixes; a configuration that says otherwise wins.
        **{"attention_dropout": 0.0, "hidden_dropout": 0.1, "init_method_std": 0.02, **fields},
        attention_variant=layout.variant,
        num_query_groups=groups,
        activation="gelu",
        scaled_init=False,
        untie_embeddings_and_output_weights=untied,
    )
    if not untied and _HEAD in state and not torch.equal(state.pop(_HEAD), state["wte.weight"]):
        raise ValueError(f"{_HEAD} differs from wte.weight, but model_config ties them (tie_word_embeddings)")
    embedding_dropout = values.get("embd_pdrop", 0.0)
    if embedding_dropout != config.hidden_dropout:
        notes.append(
            f"the released code drops {embedding_dropout} after the embedding, {config.hidden_dropout} after "
            "attention and MLP; training on from here has one --hidden-dropout for all three"
        )
    tensors = rename(
        config,
        config.padded_vocab_size,
        gpt_sources(config.num_layers, layout.modules),
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda name: state[name].float(),
    )
    provenance = {name: _plain(content[name]) for name in _PROVENANCE if name in content}
    step = content.get("step", 0)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step is {step!r}, not a number of steps")
    return Released(config, tensors, layout, state, step, provenance, notes)


def record_training(released: Released, run: RunConfig) -> None:
    """Set in ``run`` what the file says of its training; the released code pads its data and decays all."""
    run.train.weight_decay_on_all = True
    run.train.train_iters = released.step
    run.data.data_protocol = "padded"
    said = released.provenance.get("train_config")
    for theirs, ours in _TRAINING.items():
        value = said.get(theirs) if isinstance(said, dict) else None
        if type(value) is type(getattr(run.train, ours)):
            setattr(run.train, ours, value)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"--load {path}: no such file; give a .pt file of the released code")
    try:
        # Explicit, so that no environment variable turns it off. A file of the old format cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise ValueError(f"--load {path}: not a checkpoint that torch.load reads, or cut off") from None
        raise ValueError(
            f"--load {path}: refused, it holds a pickled {named[1]}, and reading that would run code of the "
            "file; only tensors and plain values are read"
        ) from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"--load {path}: cannot be read, is it cut off? ({reason})") from None


def _checked_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The file's model_config, with every field known and of the right kind."""
    unknown = [str(name) for name in values if name not in {*_SAME, *_OTHERS, *_NAMES_VARIANT}]
    if unknown:
        raise ValueError(f"model_config has field(s) not understood: {listed(unknown)}")
    missing = [name for name in _REQUIRED if values.get(name) is None]
    if missing:
        raise ValueError(f"model_config has no {', '.join(missing)}")
    for name in (*_WHOLE, *_FLAGS):
        value = values.get(name)
        good = isinstance(value, bool) if name in _FLAGS else type(value) is int and value > 0
        if value is not None and not good:
            expected = "true or false" if name in _FLAGS else "a positive whole number"
            raise ValueError(f"model_config: {name} is {value!r}, expected {expected}")
    if values["n_layer"] > MAX_LAYERS:
        raise ValueError(f"model_config: n_layer {values['n_layer']}: at most {MAX_LAYERS} are read")
    for name in ("layer_norm_epsilon", "initializer_range", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if not isinstance(values.get(name, 0.0), int | float):
            raise ValueError(f"model_config: {name} is {values[name]!r}, expected a number")
    if values["n_embd"] % values["n_head"]:
        raise ValueError(
            f"model_config: n_embd {values['n_embd']} is not divisible by n_head {values['n_head']}"
        )
    return dict(values)


def _own_tensors(found: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters by the released code's names, and a note of what was dropped."""
    state: dict[str, Tensor] = {}
    masks = 0
    for key, value in found.items():
        name = str(key)
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        is_mask = _MASK.fullmatch(name) is not None
        if not isinstance(value, Tensor) or not (is_mask or value.is_floating_point()):
            raise ValueError(f"{key}: is no floating-point tensor")
        if name in state:
            raise ValueError(f"{key}: {name} is there twice, with and without a prefix")
        if is_mask:
            _check_mask(name, value, values["n_positions"])
            masks += 1
        else:
            state[name] = value
    return state, [f"{masks} causal masks (h.N.attn.bias) dropped"] if masks else []


def _check_mask(name: str, mask: Tensor, positions: int) -> None:
    if mask.shape != (1, 1, positions, positions):
        raise ValueError(
            f"{name}: shape {list(mask.shape)}, expected the causal mask [1, 1, {positions}, {positions}]"
        )
    if not torch.equal(mask[0, 0], torch.ones(positions, positions, dtype=mask.dtype).tril()):
        raise ValueError(f"{name}: is not the causal mask; another mask makes another model")


def _find_layout(
    state: Mapping[str, Tensor], values: Mapping[str, Any], variant: str | None, groups: int | None
) -> tuple[Layout, int]:
    """The one reading of the attention tensors that fits names, shapes, model_config and flags."""
    modules = {match[1] for name in state if (match := _ATTENTION.fullmatch(name))}
    shapes = {name: tuple(state.get(f"h.0.attn.{name}.weight", torch.empty(0)).shape) for name in modules}
    seen = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())) or "none"
    heads, size = values["n_head"], values["n_embd"] // values["n_head"]
    readings = {}
    for layout in LAYOUTS:
        if set(layout.modules) == modules and all(len(shape) == 2 for shape in shapes.values()):
            found = _groups(layout, {name: shape[0] for name, shape in shapes.items()}, heads, size)
            if found:
                readings[layout.variant, found] = layout
    if not readings:
        raise ValueError(f"attention tensors {seen} fit no variant with {heads} heads of {size}")
    said = next((values[name] for name in _NAMES_VARIANT if values.get(name) is not None), None)
    name = variant or said
    claimed = get_variant(str(name)).name if name is not None else None
    claimed_groups = groups or values.get("n_kv_groups")
    fitting = [key for key in readings if claimed in (None, key[0]) and claimed_groups in (None, key[1])]
    possible = " or ".join(f"{name} with {g} group(s)" for name, g in readings)
    if len(fitting) == 1:
        return readings[fitting[0]], fitting[0][1]
    if fitting:
        raise ValueError(
            f"attention tensors {seen} can be {possible}, and model_config does not say; give "
            "--num-query-groups N or --attention-variant NAME"
        )
    claims = [f"--attention-variant {variant}"] if variant else [f"model_config's {said}"] if said else []
    claims += [f"--num-query-groups {groups}"] if groups else []
    if claimed_groups and not groups:
        claims.append(f"model_config's n_kv_groups {claimed_groups}")
    raise ValueError(
        f"{' and '.join(claims)}: contradicts the attention tensors {seen}, which are {possible}; correct "
        "the flag, or give --attention-variant and --num-query-groups to overrule model_config"
    )


def _groups(layout: Layout, rows: Mapping[str, int], heads: int, size: int) -> int:
    """Groups of a layout with these rows, or 0 where they do not fit."""
    variant = get_variant(layout.variant)
    found = set()
    for module, held in layout.modules.items():
        per_projection, rest = divmod(rows[module], len(held) * size)
        if rest:
            return 0
        shared = [name for name in held if variant.tied_qk or name != variant.query]
        found.update({per_projection} if shared else set())
        if len(shared) < len(held) and per_projection != heads:
            return 0
    groups = found.pop() if len(found) == 1 else 0
    try:
        variant.check_groups(heads, groups)
    except ValueError:
        return 0
    return groups


def _plain(value: Any) -> Any:
    """A JSON-ready copy."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
