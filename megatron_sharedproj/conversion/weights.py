"""The one name map between Megatron's GPTModel and the Hugging Face form of the model.

Both ways are built from the same table, so that what one writes the other reads. Values are moved, never
computed: a round trip is bit for bit.

Shape legend: h heads, g groups, e head size, r rotated elements of a head, d hidden size, f ffn size,
p projected heads in a group, V vocabulary (rows of the Hugging Face embedding), W padded vocabulary
(Megatron's rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sharedproj.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_VOCABULARY = {"embedding.word_embeddings.weight": EMBEDDING, "output_layer.weight": HEAD}


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor and the Hugging Face tensors that hold its rows.

    Attributes:
        megatron: key in the state dict of a GPTModel (tensor-parallel size 1).
        names: Hugging Face names, in storage order.
        rows: rows of each name in one block.
        blocks: how often the sequence of names repeats: groups of a projection (q.. kv | q.. kv), else 1.
        columns: elements of a row, 0 for a vector.
    """

    megatron: str
    names: tuple[str, ...]
    rows: tuple[int, ...]
    blocks: int = 1
    columns: int = 0

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of Hugging Face tensor ``index``."""
        rows = self.blocks * self.rows[index]
        return (rows, self.columns) if self.columns else (rows,)

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors of a Megatron one."""
        blocked = tensor.reshape(self.blocks, sum(self.rows), *tensor.shape[1:])
        parts = blocked.split(list(self.rows), dim=1)
        for name, part in zip(self.names, parts, strict=True):
            yield name, part.flatten(0, 1)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        parts = [
            tensor.reshape(self.blocks, rows, *tensor.shape[1:])
            for rows, tensor in zip(self.rows, tensors, strict=True)
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)


def _norm(config: ModelConfig, megatron: str, name: str, size: int) -> list[Entry]:
    kinds = ("weight", "bias") if config.normalization == "LayerNorm" else ("weight",)
    return [Entry(f"{megatron}.{kind}", (f"{name}.{kind}",), (size,)) for kind in kinds]


def _linear(
    config: ModelConfig,
    megatron: str,
    names: Sequence[str],
    rows: Sequence[int],
    columns: int,
    blocks: int = 1,
) -> list[Entry]:
    kinds = {"weight": columns, "bias": 0} if config.add_bias_linear else {"weight": columns}
    return [
        Entry(f"{megatron}.{kind}", tuple(f"{name}.{kind}" for name in names), tuple(rows), blocks, width)
        for kind, width in kinds.items()
    ]


def name_map(config: ModelConfig) -> list[Entry]:
    """Every tensor of a model but those with a row per vocabulary entry (:func:`vocabulary_names`)."""
    d, e, f = config.hidden_size, config.kv_channels, config.ffn_hidden_size
    entries: list[Entry] = []
    if config.position_embedding_type == "learned_absolute":
        rows = (config.max_position_embeddings,)
        names = ("model.embed_positions.weight",)
        entries.append(Entry("embedding.position_embeddings.weight", names, rows, columns=d))
    layout = config.variant.group_layout(config.num_attention_heads, config.num_query_groups)
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        entries += _norm(config, f"{ours}.input_layernorm", f"{theirs}.input_layernorm", d)
        entries += _linear(
            config,
            f"{ours}.self_attention.linear_qkv",
            [f"{theirs}.self_attn.{name}_proj" for name, _ in layout],
            [heads * e for _, heads in layout],
            d,
            config.num_query_groups,
        )
        if config.rotary_scheme.rope_head:
            rope = f"{theirs}.self_attn.k_rope_proj"
            entries += _linear(config, f"{ours}.self_attention.linear_k_rope", [rope], [config.rope_size], d)
        if config.qk_layernorm:
            # One norm for a projected tensor, whatever roles it has.
            for name in ("k",) if config.variant.tied_qk else ("q", "k"):
                attention = f"{ours}.self_attention.{name}_layernorm"
                entries += _norm(config, attention, f"{theirs}.self_attn.{name}_norm", e)
        attended = config.num_attention_heads * e
        out = f"{theirs}.self_attn.o_proj"
        entries += _linear(config, f"{ours}.self_attention.linear_proj", [out], [d], attended)
        entries += _norm(config, f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm", d)
        up = ["gate_proj", "up_proj"] if config.activation == "swiglu" else ["up_proj"]
        entries += _linear(
            config, f"{ours}.mlp.linear_fc1", [f"{theirs}.mlp.{name}" for name in up], [f] * len(up), d
        )
        entries += _linear(config, f"{ours}.mlp.linear_fc2", [f"{theirs}.mlp.down_proj"], [d], f)
    return entries + _norm(config, "decoder.final_layernorm", "model.norm", d)


def vocabulary_names(config: ModelConfig) -> dict[str, str]:
    """Megatron's name -> Hugging Face's, of the tensors with a row per vocabulary entry."""
    untied = config.untie_embeddings_and_output_weights
    return {ours: theirs for ours, theirs in _VOCABULARY.items() if untied or theirs == EMBEDDING}


def to_hugging_face(config: ModelConfig, state: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The Hugging Face tensors of a model, without the rows that only pad its vocabulary.

    Args:
        state: state dict of the whole GPTModel (tensor-parallel size 1).
        vocab_size: rows V of the embedding to keep.
    Returns:
        Contiguous tensors by their Hugging Face names, in the dtypes they came in, no two of them in one
        storage. A tied projection is one tensor.
    """
    tensors = {theirs: state[ours][:vocab_size] for ours, theirs in vocabulary_names(config).items()}
    for entry in name_map(config):
        tensors.update(entry.split(state[entry.megatron]))
    return {name: _own(tensor.detach()) for name, tensor in tensors.items()}


def _own(tensor: Tensor) -> Tensor:
    # safetensors takes two tensors of one storage for one that is tied.
    shared = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()


def padding_rows(config: ModelConfig, state: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The rows [W - V, d] that :func:`to_hugging_face` leaves out, by Hugging Face name."""
    names = vocabulary_names(config)
    return {theirs: state[ours][vocab_size:].detach().clone() for ours, theirs in names.items()}


def to_megatron(
    config: ModelConfig, tensors: Mapping[str, Tensor], padding: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state dict of the whole GPTModel (tensor-parallel size 1) from Hugging Face tensors.

    Args:
        tensors: exactly the model's tensors, embeddings of V <= W rows.
        padding: the W - V missing rows. Where they are not known each is the mean of the others: by
            Jensen's inequality such a row never gets more than the average token's probability.
    Raises:
        ValueError: naming tensors that are missing, unknown or of another shape.
    """
    entries, vocabulary = name_map(config), vocabulary_names(config)
    shapes = {name: entry.shape(index) for entry in entries for index, name in enumerate(entry.names)}
    _check(tensors, shapes, set(vocabulary.values()))
    state = {}
    for ours, theirs in vocabulary.items():
        table = tensors[theirs]
        rows = config.padded_vocab_size - table.shape[0]
        if table.dim() != 2 or table.shape[1] != config.hidden_size or rows < 0:
            raise ValueError(
                f"{theirs}: shape {tuple(table.shape)}, expected at most {config.padded_vocab_size} rows of "
                f"{config.hidden_size}"
            )
        filling = table.float().mean(0, keepdim=True).to(table.dtype).expand(rows, -1)
        if padding is not None:
            filling = padding[theirs]
            wanted = (rows, config.hidden_size)
            if filling.shape != wanted:
                raise ValueError(f"padding of {theirs}: shape {tuple(filling.shape)}, expected {wanted}")
        state[ours] = torch.cat([table, filling.to(table.dtype)])
    for entry in entries:
        state[entry.megatron] = entry.join([tensors[name] for name in entry.names])
    return state


def _check(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], vocabulary: set[str]
) -> None:
    wanted = vocabulary | set(shapes)
    missing, unknown = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing or unknown:
        found = [f"{len(missing)} missing ({missing[0]}, ...)"] if missing else []
        found += [f"{len(unknown)} unknown ({unknown[0]}, ...)"] if unknown else []
        raise ValueError(f"tensors do not fit the configuration: {', '.join(found)}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensors[name].shape)}, the configuration says {shape}")
