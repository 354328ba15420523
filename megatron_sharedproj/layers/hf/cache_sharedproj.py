"""Key/value caches that store one tensor where key and value are one (K=V), for transformers.

This file travels with an exported model: torch and transformers only.

A cache of `transformers` concatenates the whole past for every token. These layers write into a buffer with
room to spare, and store [b, t, g, e]: the heads of one token side by side, which the CPU decode kernel reads
in four fifths of the time of [b, g, t, e] with 8 groups, and in the same with one. transformers sees the
transposed view.

Untied variants get two such buffers and the same policy, so a comparison between them is fair. With rotary
positions a tied key/value is one buffer too, but for two cases: `store_both`, and a separate rotary head,
whose second buffer is [b, t, 1, r]. Keys that are rotated when they are read need the positions of their
tokens: the cache keeps those once for all layers.

Shape legend: b batch, t cached tokens, s new tokens, g groups (key/value heads), e head size, r rotated
elements of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

# Tokens by which a dynamic buffer grows.
BLOCK = 256


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind the tensors, each storage counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


class _SharedStore(CacheLayerMixin):  # type: ignore[misc]
    """What both layers share: one buffer [b, t, g, e] if tied, else two, and what is done to all of them.

    The two may have other heads and sizes.
    """

    tied: bool
    _stored: list[Tensor]

    def _visible(self, buffer: Tensor) -> Tensor:
        """The part of a buffer [b, t, g, e] that transformers sees, as [b, g, t, e]."""
        raise NotImplementedError

    @property
    def keys(self) -> Tensor | None:
        """[b, g, t, e], a view; None before the first token."""
        return self._visible(self._stored[0]) if self._stored else None

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._assign(0, tensor)

    @property
    def values(self) -> Tensor | None:
        """[b, g, t, e], a view, of the keys' memory where they are tied."""
        return self._visible(self._stored[-1]) if self._stored else None

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        # transformers writes keys, then values the same way: once is enough for one tensor.
        if not self.tied and tensor is not None:
            self._assign(1, tensor)

    def _assign(self, index: int, tensor: Tensor | None) -> None:
        if tensor is None:
            self._stored = []
        else:
            self._stored[index : index + 1] = [tensor.transpose(1, 2)]

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values as attention takes them: one object where they are tied."""
        keys = self._visible(self._stored[0])
        return keys, keys if self.tied else self._visible(self._stored[1])

    def _incoming(self, key_states: Tensor, value_states: Tensor) -> list[Tensor]:
        """The new tensors [b, s, g, e] to store."""
        if not self.tied:
            return [key_states.transpose(1, 2), value_states.transpose(1, 2)]
        if value_states is not key_states and not torch.compiler.is_compiling():
            raise ValueError("value_states: this cache stores one tensor (K=V); pass key_states for both")
        return [key_states.transpose(1, 2)]

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was."""
        self._change_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        self._change_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._change_batch(lambda x: x[indices])

    def offload(self) -> None:
        """Move to the CPU, the tied tensor once."""
        self._stored = [x.to("cpu", non_blocking=True) for x in self._stored]

    def prefetch(self) -> None:
        """Move back to the device of the first update."""
        self._stored = [x.to(self.device, non_blocking=True) for x in self._stored]

    def nbytes(self) -> int:
        """Bytes allocated, spare room included, each storage counted once."""
        return storage_bytes(self._stored)

    def get_max_cache_shape(self) -> int:
        """get_max_length under the name that transformers 5.8 has."""
        return int(self.get_max_length())


class SharedKVLayer(_SharedStore, DynamicLayer):  # type: ignore[misc]
    """A layer's cache that grows by blocks; one tensor where ``tied``.

    Args:
        tied: key and value are one tensor.

    Without gradients a token is written in place. With gradients enabled the past is concatenated, since
    autograd may have saved it (prefix tuning). A view that was handed out is overwritten by later tokens
    after a crop, as in a static cache.
    """

    is_croppable = True

    def __init__(self, tied: bool) -> None:
        self.tied = tied
        self._stored = []
        self._length = 0
        self._owned = False
        super().__init__()

    def _visible(self, buffer: Tensor) -> Tensor:
        return buffer[:, : self._length].transpose(1, 2)

    def _assign(self, index: int, tensor: Tensor | None) -> None:
        super()._assign(index, tensor)
        self._length = 0 if tensor is None else tensor.shape[-2]
        self._owned = False  # whoever assigned it may go on using it

    def __copy__(self) -> SharedKVLayer:
        # Both see the same memory from here on: whoever writes next takes its own.
        self._owned = False
        twin = type(self)(self.tied)
        twin.__dict__.update(self.__dict__, _stored=list(self._stored))
        return twin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; memory is taken by the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append s tokens.

        Args:
            key_states, value_states: [b, g, s, e]; the same object where they are tied. A separate rotary
                head comes in the place of the values, [b, 1, s, r].
        Returns:
            All of both, [b, ., t, .]; the same object where they are tied.
        Raises:
            ValueError: for another batch size, or two tensors in a tied cache.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = self._incoming(key_states, value_states)
        if self._stored and self._stored[0].shape[0] != key_states.shape[0]:
            raise ValueError(
                f"key_states has batch {key_states.shape[0]}: the cache holds "
                f"{self._stored[0].shape[0]} sequences"
            )
        end = self._length + key_states.shape[-2]
        if torch.is_grad_enabled():
            past = [x[:, : self._length] for x in self._stored]
            self._stored = [torch.cat(pair, 1) for pair in zip(past, new, strict=True)] if past else new
            self._owned = False
        else:
            if not self._has_room(end):
                self._grow(new, end)
            for buffer, x in zip(self._stored, new, strict=True):
                buffer[:, self._length : end] = x
        self._length = end
        return self._pair()

    def _has_room(self, end: int) -> bool:
        if not self._owned or self._stored[0].shape[1] < end:
            return False
        # PyTorch forbids writing to an inference tensor outside inference mode.
        return torch.is_inference_mode_enabled() or not self._stored[0].is_inference()

    def _grow(self, new: list[Tensor], end: int) -> None:
        capacity = -(-end // BLOCK) * BLOCK
        grown = [x.new_empty((x.shape[0], capacity, *x.shape[2:])) for x in new]
        for buffer, old in zip(grown, self._stored, strict=False):
            buffer[:, : self._length] = old[:, : self._length]
        self._stored, self._owned = grown, True

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        before = [x.untyped_storage().data_ptr() for x in self._stored]
        self._stored = [change(x) for x in self._stored]
        # A slice as index gives a view, which the next write must not reach through.
        after = [x.untyped_storage().data_ptr() for x in self._stored]
        self._owned = before != after and not any(x.requires_grad for x in self._stored)

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self._length

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length after the next update, and the offset of the first key."""
        return self._length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -n tokens from the end; a positive n is the length to keep (as in transformers 5.8)."""
        if tokens_to_remove < 0:
            self._length = max(0, self._length + tokens_to_remove)
        elif tokens_to_remove > 0:
            self._length = min(self._length, tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        self._stored, self._length, self._owned, self.is_initialized = [], 0, False, False


class SharedKVStaticLayer(_SharedStore, StaticLayer):  # type: ignore[misc]
    """A layer's cache of a fixed size at a fixed address, for torch.compile; one tensor where ``tied``.

    Args:
        max_cache_len: tokens it can hold.
        tied: key and value are one tensor.
        value_shape: heads and their size of what comes in the place of the values, where that is known to be
            another shape than the keys'.
    """

    cumulative_length: Tensor

    def __init__(self, max_cache_len: int, tied: bool, value_shape: tuple[int, int] | None = None) -> None:
        self.tied = tied
        self.value_shape = value_shape
        self._stored = []
        super().__init__(max_cache_len=max_cache_len)

    def _visible(self, buffer: Tensor) -> Tensor:
        return buffer.transpose(1, 2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, zeroed: what a mask hides is still multiplied."""
        self.dtype, self.device = key_states.dtype, key_states.device
        b, g, _, e = key_states.shape
        shapes = [(g, e)] if self.tied else [(g, e), self.value_shape or (g, e)]
        self.batch_size = self.max_batch_size = b
        self.num_heads, self.k_head_dim, self.v_head_dim = g, e, shapes[-1][1]
        self._stored = [
            torch.zeros((b, self.max_cache_len, *shape), dtype=self.dtype, device=self.device)
            for shape in shapes
        ]
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            # Without it a compiled step cannot run as a CUDA graph, as it writes to its inputs.
            for tensor in (*self._stored, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write s tokens behind those stored.

        Args:
            key_states, value_states: as SharedKVLayer.update.
        Returns:
            The whole buffers, [b, ., max_cache_len, .]; the same object where they are tied.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        s = key_states.shape[-2]
        positions = torch.arange(s, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(s)
        for buffer, x in zip(self._stored, self._incoming(key_states, value_states), strict=True):
            buffer.index_copy_(1, positions, x)
        return self._pair()

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for i, buffer in enumerate(self._stored):
            changed = change(buffer)
            if changed.shape == buffer.shape:
                buffer.copy_(changed)  # the address stays
            else:
                self._stored[i] = changed.clone()
        if self._stored:
            self.batch_size = self.max_batch_size = self._stored[0].shape[0]

    def get_max_length(self) -> int:
        """Tokens it can hold."""
        return self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """As SharedKVLayer.crop; what was removed is overwritten later, and masked until then."""
        if tokens_to_remove < 0:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
        elif tokens_to_remove > 0:
            self.cumulative_length.clamp_(max=tokens_to_remove)


class SharedProjCache(Cache):  # type: ignore[misc]
    """The cache of a SharedProj model: one tensor per layer for K=V, two otherwise.

    Args:
        config: SharedProjConfig, or any config with ``tied_kv`` and ``num_hidden_layers``.
        max_cache_len: tokens of a static cache; None: a dynamic one.
        offloading, offload_only_non_sliding: as in transformers' Cache.

    Attributes:
        layout: what ``update`` takes and gives as key and value: "pair", both as the attention sees them
            (one object where that sees one); "rope_head", the tied tensor and the rotated separate head;
            "at_read", the tied tensor, not rotated.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        tied = getattr(config, "caches_one_tensor", config.tied_kv)
        self.layout = "pair"
        shape = None
        if getattr(config, "rope_head", False):
            self.layout, shape = "rope_head", (1, config.rotary_dim)
        elif getattr(config, "rotates_at_read", False):
            self.layout = "at_read"

        def layer(tied: bool) -> SharedKVLayer | SharedKVStaticLayer:
            if max_cache_len is None:
                return SharedKVLayer(tied)
            return SharedKVStaticLayer(max_cache_len, tied, shape)

        # int32 [b, t, 1, 1]: whatever is done to the layers is done to it.
        self._positions = layer(True) if self.layout == "at_read" else None
        super().__init__(
            layers=[layer(tied) for _ in range(config.num_hidden_layers)],
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
        )

    @property
    def max_cache_len(self) -> int:
        """Tokens that a static cache can hold, -1 for a dynamic one: peft's prefix tuning asks for it."""
        return int(self.layers[0].get_max_length())

    def append_positions(self, position_ids: Tensor, batch_size: int) -> Tensor:
        """Note the positions of the tokens that the layers get next; once per forward, before them.

        Args:
            position_ids: [1 or b, s].
        Returns:
            Of all tokens, int32 [b, t], or [b, max_cache_len] of a static cache. Tokens that the layers got
            without positions have those of their places.
        """
        assert self._positions is not None
        new = position_ids.to(torch.int32).expand(batch_size, -1)[:, None, :, None]
        known, past = self._positions.get_seq_length(), self.layers[0].get_seq_length()
        if isinstance(known, int) and isinstance(past, int) and known != past:
            self._positions.crop(past) if past else self._positions.reset()
            if known < past:
                places = torch.arange(known, past, dtype=torch.int32, device=new.device)
                filling = places.expand(batch_size, -1)[:, None, :, None]
                self._positions.update(filling, filling)
        return self._positions.update(new, new)[0][:, 0, :, 0]

    def early_initialization(
        self, batch_size: int, num_heads: Any, head_dim: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        """As in transformers."""
        super().early_initialization(batch_size, num_heads, head_dim, dtype, device)
        if self._positions is not None and self._positions.supports_early_init:
            none = torch.zeros((batch_size, 1, 0, 1), dtype=torch.int32, device=device)
            self._positions.lazy_initialization(none, none)

    def _change_all(self, name: str, *args: Any) -> None:
        getattr(super(), name)(*args)
        if self._positions is not None and self._positions.is_initialized:
            getattr(self._positions, name)(*args)

    def reset(self) -> None:
        """Forget all tokens."""
        self._change_all("reset")

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -n tokens from the end; a positive n is the length to keep (as in transformers 5.8)."""
        self._change_all("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was."""
        self._change_all("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        self._change_all("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._change_all("batch_select_indices", indices)

    def nbytes(self) -> int:
        """Bytes of keys and values over all layers, spare room included, each storage counted once.

        Positions, where they are kept, come beside them: :meth:`position_bytes`.
        """
        return storage_bytes(x for layer in self.layers for x in layer._stored)

    def position_bytes(self) -> int:
        """Bytes of the tokens' positions: 4 per token for all layers, 0 unless keys are rotated when read."""
        return 0 if self._positions is None else storage_bytes(self._positions._stored)


__all__ = ["BLOCK", "SharedKVLayer", "SharedKVStaticLayer", "SharedProjCache"]
