"""The key/value cache of a model built from SharedProjectionAttention: one tensor per layer for K=V.

Shape legend: b batch, s new tokens, t tokens stored, g groups (key/value heads), e head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_sharedproj.torch_layers.attention import SharedProjectionAttention
from megatron_sharedproj.torch_layers.errors import argument_names
from megatron_sharedproj.variants import CACHE_POLICIES, CachedTensor

# Tokens by which the storage grows.
BLOCK = 256


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind the tensors, each storage counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@dataclass
class _Layer:
    """One attention's storage: [b, capacity, heads, size] each, the first ``length`` tokens exist."""

    specs: tuple[CachedTensor, ...]
    length: int = 0
    tensors: list[Tensor] = field(default_factory=list)


class SharedProjectionCache:
    """What every SharedProjectionAttention in a model has seen; for inference, under torch.no_grad().

    Args:
        model: the model, or one attention. Each of its attentions must be called once per forward.
        max_tokens: allocate for so many from the start, and refuse more; None: grow by blocks of 256.
        policy: of variants.CACHE_POLICIES, how ``kv_rotary="rotate_keys"`` is cached: half the bytes
            (rotate_at_read), or both tensors and nothing to rotate when read (store_both).
    Raises:
        ValueError: for a model without such an attention, or one that is not causal.

    All sequences of a batch have the same length: pad them on the left, and give the attention a mask over
    all tokens seen. Rotary positions are then counted from the padding; only their distances matter.
    """

    def __init__(
        self, model: nn.Module, *, max_tokens: int | None = None, policy: str = CACHE_POLICIES[0]
    ) -> None:
        attentions = [x for x in model.modules() if isinstance(x, SharedProjectionAttention)]
        if not attentions:
            raise ValueError(
                f"model {type(model).__name__}: has no SharedProjectionAttention; a patched Hugging Face "
                "model has its own cache, which generate() makes"
            )
        if not all(attention.causal for attention in attentions):
            raise ValueError(
                "model: an attention that is not causal sees later tokens and cannot be cached; use "
                "causal=True"
            )
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens}: must be at least 1, or None to grow")
        self.policy, self.max_tokens = policy, max_tokens
        with argument_names():
            self._layers = {x: _Layer(x.cached_tensors(policy)) for x in attentions}

    @property
    def length(self) -> int:
        """Tokens that all layers hold: the position of the next one."""
        return min(layer.length for layer in self._layers.values())

    def length_of(self, attention: SharedProjectionAttention) -> int:
        """Tokens that one attention holds.

        Raises:
            ValueError: for an attention of another model.
        """
        return self._layer(attention).length

    def append(self, attention: SharedProjectionAttention, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Store an attention's new tokens.

        Args:
            new: [b, s, heads, size] each, as SharedProjectionAttention.cached_tensors says.
        Returns:
            All that it has stored, [b, t, heads, size] each: views that the next call's tokens do not change.
        Raises:
            ValueError: with gradients enabled, beyond max_tokens, or for another batch size, dtype or device.
        """
        layer = self._layer(attention)
        if torch.is_grad_enabled() and any(x.requires_grad for x in new):
            raise ValueError("cache: has no gradient; call the model under torch.no_grad()")
        end = layer.length + new[0].shape[1]
        if self.max_tokens is not None and end > self.max_tokens:
            raise ValueError(f"max_tokens {self.max_tokens}: the cache would hold {end}; make it larger")
        if layer.tensors:
            old = layer.tensors[0]
            held, given = (
                (old.shape[0], old.dtype, old.device),
                (new[0].shape[0], new[0].dtype, new[0].device),
            )
            if held != given:
                raise ValueError(f"x has batch, dtype and device {given}: the cache holds {held}")
        if not layer.tensors or layer.tensors[0].shape[1] < end:
            self._grow(layer, new, end)
        for stored, x in zip(layer.tensors, new, strict=True):
            stored[:, layer.length : end] = x
        layer.length = end
        return tuple(stored[:, :end] for stored in layer.tensors)

    def _layer(self, attention: SharedProjectionAttention) -> _Layer:
        layer = self._layers.get(attention)
        if layer is None:
            raise ValueError("cache: was made for another model; make one with SharedProjectionCache(model)")
        return layer

    def _grow(self, layer: _Layer, new: tuple[Tensor, ...], end: int) -> None:
        capacity = -(-end // BLOCK) * BLOCK if self.max_tokens is None else self.max_tokens
        for index, (spec, x) in enumerate(zip(layer.specs, new, strict=True)):
            grown = x.new_empty(x.shape[0], capacity, spec.heads, spec.size)
            if index < len(layer.tensors):
                grown[:, : layer.length] = layer.tensors[index][:, : layer.length]
                layer.tensors[index] = grown
            else:
                layer.tensors.append(grown)

    def reorder(self, indices: Tensor) -> None:
        """Sequence i becomes what sequence indices[i] was (beam search); the batch may change."""
        for layer in self._layers.values():
            layer.tensors = [x.index_select(0, indices.to(x.device)) for x in layer.tensors]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens of every sequence.

        Raises:
            ValueError: for a negative length.
        """
        if length < 0:
            raise ValueError(f"length {length}: must be at least 0")
        for layer in self._layers.values():
            layer.length = min(layer.length, length)

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        for layer in self._layers.values():
            layer.length, layer.tensors = 0, []

    def tensors(self) -> list[Tensor]:
        """The stored tokens [b, t, heads, size], layer by layer."""
        return [x[:, : layer.length] for layer in self._layers.values() for x in layer.tensors]

    def nbytes(self) -> int:
        """Bytes allocated over all layers, spare room included, each storage counted once."""
        return storage_bytes(x for layer in self._layers.values() for x in layer.tensors)
