"""Projection-sharing attention in plain PyTorch, for models that know nothing of Megatron.

Importing it imports neither Megatron-Core nor transformers; patch_model needs transformers.
"""

from megatron_sharedproj.torch_layers.attention import SharedProjectionAttention
from megatron_sharedproj.torch_layers.cache import SharedProjectionCache
from megatron_sharedproj.torch_layers.patching import cache_nbytes, patch_model

__all__ = ["SharedProjectionAttention", "SharedProjectionCache", "cache_nbytes", "patch_model"]
