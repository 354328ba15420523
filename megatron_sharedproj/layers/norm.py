"""LayerNorm and RMSNorm in PyTorch that also work under sequence parallelism.

Megatron-Core's own fallback (WrappedTorchNorm) refuses sequence parallelism, and its local provider picks
it for RMSNorm even on GPUs with apex. The weights are replicated while each rank sees a part of the
sequence, so their gradients have to be summed over the tensor-parallel group: Megatron does that for
parameters marked ``sequence_parallel``.
"""

from __future__ import annotations

from typing import Any

import torch


class TorchNorm:
    """Builds torch.nn.LayerNorm or torch.nn.RMSNorm by ``config.normalization``."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> Any:
        if config.layernorm_zero_centered_gamma:
            raise ValueError("--apply-layernorm-1p: needs Transformer Engine or apex")
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
