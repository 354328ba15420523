"""What the attention of a trained model does on given text, layer by layer and head by head.

Similarity and rank are those of the projected tensors (normed where the model norms them, not yet rotated);
scores and attention are those that the model computes, rotary positions included. What a variant ties is
named "tied", not measured: its CKA or symmetry is 1 by construction.

Shape legend: n tokens, s sequence length, b batch, h query heads, g groups (key/value heads), e head size,
d hidden size, p projected heads in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sharedproj.evaluation.perplexity import packed_row
from megatron_sharedproj.evaluation.similarity import (
    PairSums,
    attention_sums,
    cka_of_sums,
    effective_rank,
    rank_for_variance,
    singular_values,
    symmetry,
    symmetry_parts,
)
from megatron_sharedproj.inference.loading import LoadedModel
from megatron_sharedproj.variants import AttentionVariant

TIED = "tied"
ROLES = ("query", "key", "value")
PAIRS = (("key", "value"), ("query", "key"))

# What a row of a layer or a head holds, and what it says.
MEASURES = {
    "cka_key_value": "linear CKA of keys and values",
    "cka_key_value_unbiased": "the same from the unbiased estimator of HSIC",
    "cka_key_value_heads": "mean of the heads' CKA of keys and values (layers only)",
    "cka_query_key": "linear CKA of queries and keys",
    "cka_query_key_unbiased": "the same from the unbiased estimator of HSIC",
    "cka_query_key_heads": "mean of the heads' CKA of queries and keys (layers only)",
    **{f"effective_rank_{role}": f"effective rank of the centred {role} activations" for role in ROLES},
    **{f"rank99_{role}": f"singular values that hold 99% of the {role} variance" for role in ROLES},
    **{f"weight_rank_{role}": f"effective rank of the {role} weight" for role in ROLES},
    "score_symmetry": "symmetry of the scores before the mask, -1 to 1",
    "score_symmetry_centred": "the same without the means of rows and columns",
    "weight_symmetry": "symmetry of W_q^T W_k, -1 to 1",
    "entropy": "attention entropy in nats, from the second position on",
    "entropy_share": "the same over the log of the tokens seen",
    "first_token": "weight on the first token, from the second position on",
    "self": "weight on the position itself, from the second position on",
}


@dataclass
class Diagnosis:
    """What was measured on a model.

    Attributes:
        layers: one row per layer: ``layer`` (from 0, as in the names of weights), ``head`` None, and
            MEASURES; scores' and attention's are means over the heads.
        heads: one row per layer and query head, with the figures of the group that it reads.
        loss: nats per token; tokens: n; seq_length: s.
    """

    layers: list[dict[str, Any]]
    heads: list[dict[str, Any]]
    loss: float
    tokens: int
    seq_length: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, each layer before its heads."""
        heads = {
            row["layer"]: [head for head in self.heads if head["layer"] == row["layer"]]
            for row in self.layers
        }
        return [row for layer in self.layers for row in (layer, *heads[layer["layer"]])]


class _LayerSums:
    """Running sums of one layer's attention."""

    def __init__(self, variant: AttentionVariant):
        self.names = {role: getattr(variant, role) for role in ROLES}
        self.pairs = [pair for pair in PAIRS if self.names[pair[0]] != self.names[pair[1]]]
        tensors = dict.fromkeys(self.names.values())
        # Of each projected tensor with itself, and of those that play two roles; whole layers, then heads.
        self.own = [{name: PairSums() for name in tensors} for _ in range(2)]
        self.cross = [{pair: PairSums() for pair in self.pairs} for _ in range(2)]
        self.symmetry: dict[bool, tuple[Tensor, Tensor]] = {}
        self.attention: dict[str, Tensor] = {}
        self.positions = 0

    def add_projected(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """query [s, b, h, e]; key, value [s, b, g, e]."""
        roles = {role: x.flatten(0, 1).double() for role, x in zip(ROLES, (query, key, value), strict=True)}
        tensors = {self.names[role]: x for role, x in roles.items()}
        for whole, own, cross in zip((True, False), self.own, self.cross, strict=True):
            for name, x in tensors.items():
                x = x.flatten(1)[:, None] if whole else x
                own[name].add(x, x)
            for left, right in self.pairs:
                x, y = roles[left], roles[right]
                if whole:
                    x, y = x.flatten(1)[:, None], y.flatten(1)[:, None]
                else:
                    y = y.repeat_interleave(x.shape[1] // y.shape[1], dim=1)
                cross[left, right].add(x, y)

    def add_scores(self, query: Tensor, key: Tensor, scale: float) -> None:
        """As the attention sees them: query [s, b, h, e], key [s, b, g, e]."""
        keys = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        for centred in (False, True):
            # [b, h, s, e]: each sequence has scores of its own.
            parts = symmetry_parts(query.permute(1, 2, 0, 3), keys.permute(1, 2, 0, 3), centred=centred)
            product, square = (part.sum(0) for part in parts)
            before = self.symmetry.get(centred, (0.0, 0.0))
            self.symmetry[centred] = product + before[0], square + before[1]
        for index in range(query.shape[1]):
            for name, value in attention_sums(query[:, index], key[:, index], scale).items():
                self.attention[name] = self.attention.get(name, 0.0) + value
        self.positions += query.shape[1] * (query.shape[0] - 1)

    def figures(self, weights: dict[str, Tensor]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The layer's figures, and each query head's.

        Args:
            weights: role -> [heads, e, d].
        """
        heads = weights["query"].shape[0]
        layer: dict[str, Any] = {}
        by_head: dict[str, list[Any]] = {}

        def per_head(name: str, values: Tensor) -> None:
            by_head[name] = values.repeat_interleave(heads // values.shape[0]).tolist()

        for pair in PAIRS:
            name = f"cka_{pair[0]}_{pair[1]}"
            for key, unbiased in ((name, False), (f"{name}_unbiased", True)):
                if pair not in self.pairs:
                    layer[key], by_head[key] = TIED, [TIED] * heads
                else:
                    layer[key] = self._cka(pair, 0, unbiased).item()
                    per_head(key, self._cka(pair, 1, unbiased))
            tied = pair not in self.pairs
            layer[f"{name}_heads"] = TIED if tied else float(np.mean(by_head[name]))
        for measure, function in (("effective_rank", effective_rank), ("rank99", rank_for_variance)):
            for role in ROLES:
                whole, parts = (singular_values(own[self.names[role]].covariance()) for own in self.own)
                layer[f"{measure}_{role}"] = function(whole)[0].item()
                per_head(f"{measure}_{role}", function(parts))
        for role in ROLES:
            weight = weights[role].double()
            layer[f"weight_rank_{role}"] = effective_rank(torch.linalg.svdvals(weight.flatten(0, 1))).item()
            per_head(f"weight_rank_{role}", effective_rank(torch.linalg.svdvals(weight)))
        keys = weights["key"].repeat_interleave(heads // weights["key"].shape[0], dim=0)
        symmetries = {
            "score_symmetry": self.symmetry[False][0] / self.symmetry[False][1],
            "score_symmetry_centred": self.symmetry[True][0] / self.symmetry[True][1],
            "weight_symmetry": symmetry(weights["query"].mT, keys.mT),
        }
        for name, values in symmetries.items():
            if ("query", "key") in self.pairs:
                layer[name] = values.mean().item()
                per_head(name, values)
            else:
                layer[name], by_head[name] = TIED, [TIED] * heads
        for name, values in self.attention.items():
            layer[name] = (values / self.positions).mean().item()
            per_head(name, values / self.positions)
        rows = [{name: values[head] for name, values in by_head.items()} for head in range(heads)]
        return {name: layer[name] for name in MEASURES}, rows

    def _cka(self, pair: tuple[str, str], part: int, unbiased: bool) -> Tensor:
        left, right = (self.own[part][self.names[role]] for role in pair)
        return cka_of_sums(left, right, self.cross[part][pair], unbiased=unbiased)


def head_weights(attention: Any, variant: AttentionVariant) -> dict[str, Tensor]:
    """The weight of each role in a layer's interleaved projection: role -> [heads, e, d], a view."""
    heads, groups = attention.config.num_attention_heads, attention.config.num_query_groups
    layout = variant.group_layout(heads, groups)
    weight = attention.linear_qkv.weight.detach()
    by_group = weight.view(groups, sum(count for _, count in layout), -1, weight.shape[1])
    parts = by_group.split([count for _, count in layout], dim=1)
    named = {name: part.flatten(0, 1) for (name, _), part in zip(layout, parts, strict=True)}
    return {role: named[getattr(variant, role)] for role in ROLES}


@contextmanager
def _watched(model: Any, sums: list[_LayerSums]) -> Iterator[None]:
    """Feed each layer's tensors to its sums while the model runs; afterwards the model is as before."""
    undo: list[Callable[[], None]] = []
    try:
        for layer, own in zip(model.decoder.layers, sums, strict=True):
            undo.append(_watch_projection(layer.self_attention, own))
            core = layer.self_attention.core_attention
            hook = core.register_forward_pre_hook(
                lambda module, args, own=own: own.add_scores(args[0], args[1], module.scale)
            )
            undo.append(hook.remove)
        yield
    finally:
        for back in undo:
            back()


def _watch_projection(attention: Any, sums: _LayerSums) -> Callable[[], None]:
    # What comes before rotary positions passes through no module that could be hooked: an attribute of this
    # instance hides the class's method for a while.
    project = attention.get_query_key_value_tensors

    def watching(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = project(*args, **kwargs)
        sums.add_projected(query, key, value)
        return query, key, value

    attention.get_query_key_value_tensors = watching
    return lambda: delattr(attention, "get_query_key_value_tensors")


@torch.no_grad()
def diagnose(
    loaded: LoadedModel,
    stream: NDArray[Any],
    *,
    seq_length: int = 0,
    micro_batch_size: int = 8,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Run a model over whole rows of a token stream, documents back to back, and measure its attention.

    Only sums are kept, about 5 d^2 float64 numbers per layer, and the scores of one sequence at a time.

    Args:
        loaded: a model of one process.
        stream: token ids [n + 1 or more]; what fills no row is left out.
        seq_length: s; 0: the run's.
        say: told how many rows of how many are done.
    Raises:
        ValueError: for a length beyond the model's positions, or too few tokens for a row.
    """
    positions = loaded.config.model.max_position_embeddings
    seq_length = seq_length or min(loaded.config.train.seq_length, positions)
    if not 2 <= seq_length <= positions:
        raise ValueError(f"--seq-length {seq_length}: must be from 2 to the model's {positions} positions")
    if micro_batch_size < 1:
        raise ValueError(f"--micro-batch-size {micro_batch_size}: must be at least 1")
    count = (len(stream) - 1) // seq_length
    if count * seq_length < 4:
        raise ValueError(
            f"--tokens: {len(stream)} tokens are too few for a row of {seq_length} and the token after it; "
            "give more text, or a shorter --seq-length"
        )
    variant = loaded.config.model.variant
    layers = loaded.model.decoder.layers
    sums = [_LayerSums(variant) for _ in layers]
    places = torch.arange(seq_length, device=loaded.device)
    nats = 0.0
    with _watched(loaded.model, sums):
        for start in range(0, count, micro_batch_size):
            rows = [
                packed_row(stream, seq_length, i) for i in range(start, min(start + micro_batch_size, count))
            ]
            tokens, labels, _ = (
                torch.from_numpy(np.stack(part)).to(loaded.device) for part in zip(*rows, strict=True)
            )
            losses = loaded.model(tokens, places.expand_as(tokens), None, labels=labels)
            nats += losses.double().sum().item()
            say(start + len(rows), count)
    found = Diagnosis([], [], nats / (count * seq_length), count * seq_length, seq_length)
    for index, (layer, own) in enumerate(zip(layers, sums, strict=True)):
        figures, heads = own.figures(head_weights(layer.self_attention, variant))
        found.layers.append({"layer": index, "head": None, **figures})
        found.heads += [{"layer": index, "head": head, **row} for head, row in enumerate(heads)]
    return found
