"""The key/value cache of a tied variant: one buffer per layer, where Megatron allocates two.

Works on megatron.core's StaticInferenceContext: key_value_memory_dict maps a layer number to
(key buffer, value buffer), each [t, b, g, e]. For a tied variant both entries are the same buffer.

Shape legend: t maximum length, b batch, g groups on this rank, e head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def alias_tied_cache(attention: Any, context: Any, key: Tensor) -> None:
    """Give the layer one buffer as key and value cache, before Megatron allocates two.

    Raises:
        ValueError: for a dynamic (paged) context, which stores keys and values apart.
    """
    if not context.is_static_batching():
        raise ValueError(
            "dynamic batching: Megatron-Core's DynamicInferenceContext keeps keys and values in two "
            "buffers; use a StaticInferenceContext (tools/generate.py does)"
        )
    if attention.layer_number not in context.key_value_memory_dict:
        buffer = attention._allocate_memory(
            context.max_sequence_length, context.max_batch_size, attention.key_hidden_size, key.dtype
        )
        context.key_value_memory_dict[attention.layer_number] = (buffer, buffer)


def cache_storage_bytes(context: Any) -> int:
    """Bytes that a static context's cache really holds: each storage counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for buffers in context.key_value_memory_dict.values()
        for tensor in buffers
    }
    return sum(storages.values())
