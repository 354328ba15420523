"""The caches of transformers, for a patched attention: one tensor per layer where key and value are one.

Imports transformers; patching.py imports it when a cache is used.

Shape legend: b batch, t tokens, g groups (key/value heads), e head size, r rotated elements of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from megatron_sharedproj.layers.hf.cache_sharedproj import SharedKVLayer, SharedKVStaticLayer


class PatchedStaticLayer(SharedKVStaticLayer):  # type: ignore[misc]
    """A static layer whose second tensor may have another shape and dtype than the keys.

    That is a separate rotary head [b, t, 1, r], or positions [b, t, 1, 1].
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, zeroed."""
        super().lazy_initialization(key_states, value_states)
        if self.tied:
            return
        b, heads, _, size = value_states.shape
        shape = (b, self.max_cache_len, heads, size)
        self._stored[1] = torch.zeros(shape, dtype=value_states.dtype, device=self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self._stored[1])


def share_layer(cache: Cache, index: int, *, tied: bool) -> None:
    """Make an empty layer of a cache one that stores one tensor (``tied``), or two.

    generate() and the model make a DynamicCache of their own: it is still empty when the first attention sees
    it.

    Raises:
        ValueError: for a layer that holds tokens already, or of another kind than a dynamic or static one.
    """
    while len(cache.layers) <= index:
        cache.layers.append(SharedKVLayer(tied))
    layer = cache.layers[index]
    if type(layer) in (SharedKVLayer, PatchedStaticLayer) and layer.tied == tied:
        return
    if layer.is_initialized and int(layer.get_seq_length()):
        raise ValueError(
            f"cache: layer {index} holds tokens of a model that was not patched alike; start with an empty "
            "one"
        )
    if type(layer) in (DynamicLayer, SharedKVLayer):
        cache.layers[index] = SharedKVLayer(tied)
    elif type(layer) in (StaticLayer, SharedKVStaticLayer, PatchedStaticLayer):
        cache.layers[index] = PatchedStaticLayer(layer.max_cache_len, tied)
    else:
        raise ValueError(
            f"cache: layer {index} is a {type(layer).__name__}, which stores key and value apart; use a "
            "DynamicCache or a StaticCache"
        )
