"""Foreign modules under the names of the Hugging Face form: which module holds the rows of which.

Every shape is checked before a value is read. Values are split and transposed, never computed.

Shape legend: d hidden size, V rows of the foreign embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.conversion.weights import name_map, vocabulary_names

_LISTED = 6  # names that an error spells out


@dataclass(frozen=True)
class Source:
    """A foreign module that holds one module of ours, or several one after another along its outputs.

    Attributes:
        modules: our modules, in storage order.
        transposed: its weight is [in, out], as in GPT-2's Conv1D.
    """

    modules: tuple[str, ...]
    transposed: bool = False


def gpt_sources(
    num_layers: int, attention: Mapping[str, tuple[str, ...]], *, transposed: bool = False
) -> dict[str, Source]:
    """Modules of a model with GPT-2's names (wte, wpe, h.N.ln_1, ...).

    Args:
        attention: module under ``h.N.attn`` -> the projections that it holds, in storage order.
        transposed: linear weights are [in, out].
    """
    outer = {"wte": "model.embed_tokens", "wpe": "model.embed_positions", "ln_f": "model.norm"}
    sources = {theirs: Source((ours,)) for theirs, ours in outer.items()}
    for layer in range(num_layers):
        theirs, ours = f"h.{layer}", f"model.layers.{layer}"
        for name, norm in (("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm")):
            sources[f"{theirs}.{name}"] = Source((f"{ours}.{norm}",))
        linears = {
            f"attn.{name}": tuple(f"self_attn.{p}_proj" for p in held) for name, held in attention.items()
        }
        linears |= {"attn.c_proj": ("self_attn.o_proj",)}
        linears |= {"mlp.c_fc": ("mlp.up_proj",), "mlp.c_proj": ("mlp.down_proj",)}
        for name, held in linears.items():
            sources[f"{theirs}.{name}"] = Source(tuple(f"{ours}.{module}" for module in held), transposed)
    return sources | {"lm_head": Source(("lm_head",))}


def tensor_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model by its Hugging Face name, embeddings with ``vocab_size`` rows."""
    shapes: dict[str, tuple[int, ...]] = {
        name: (vocab_size, config.hidden_size) for name in vocabulary_names(config).values()
    }
    for entry in name_map(config):
        shapes.update({name: entry.shape(index) for index, name in enumerate(entry.names)})
    return shapes


def rename(
    config: ModelConfig,
    vocab_size: int,
    sources: Mapping[str, Source],
    found: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    *,
    zeros: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a model by their Hugging Face names.

    Args:
        vocab_size: rows V of the foreign embedding.
        sources: foreign module -> what it holds.
        found: foreign tensor -> its shape: exactly those of the model.
        read: returns a foreign tensor.
        zeros: our tensors that the foreign model does not have and that are zero in it (biases).
    Returns:
        Tensors in the dtypes that they are read in; parts of a fused module are views of it.
    Raises:
        ValueError: naming tensors that are missing, not understood or of another shape.
    """
    shapes = tensor_shapes(config, vocab_size)
    wanted = dict(_wanted(sources, {n: s for n, s in shapes.items() if n not in zeros}))
    missing, unknown = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    if missing:
        raise ValueError(f"{len(missing)} tensor(s) missing: {listed(missing)}")
    if unknown:
        raise ValueError(f"{len(unknown)} tensor(s) not understood: {listed(unknown)}")
    for name, (source, targets) in wanted.items():
        rows = sum(shapes[target][0] for target in targets)
        shape: tuple[int, ...] = (rows, *shapes[targets[0]][1:])
        shape = shape[::-1] if source.transposed else shape
        if tuple(found[name]) != shape:
            raise ValueError(f"{name}: shape {list(found[name])}, the configuration says {list(shape)}")
    tensors: dict[str, Tensor] = {}
    for name, (source, targets) in wanted.items():
        whole = read(name)
        parts = (whole.t() if source.transposed else whole).split([shapes[t][0] for t in targets])
        tensors.update(zip(targets, parts, strict=True))
    dtype = tensors["model.embed_tokens.weight"].dtype
    return tensors | {name: torch.zeros(shapes[name], dtype=dtype) for name in zeros}


def _wanted(
    sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[Source, list[str]]]]:
    for module, source in sources.items():
        for kind in ("weight", "bias"):
            targets = [f"{held}.{kind}" for held in source.modules if f"{held}.{kind}" in shapes]
            if targets:
                yield f"{module}.{kind}", (source, targets)


def listed(names: Collection[str]) -> str:
    """Names for a message: the first few, sorted."""
    names = sorted(names)
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
