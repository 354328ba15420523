"""Megatron-Core's ``core_attention`` slot, filled by this package's attention op.

Shape legend: s query length, t key length, b batch, h heads on this rank, g groups on this rank, e head size.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_sharedproj.ops.attention import attention


class SharedProjectionCoreAttention(MegatronModule):
    """softmax(scale Q K^T) V through ops.attention; takes key and value as one tensor.

    Same constructor and forward as megatron.core.transformer.dot_product_attention.DotProductAttention.

    Raises:
        ValueError: for options that this op does not compute (sliding windows, attention bias, explicit
            masks, packed sequences), instead of ignoring them.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ):
        super().__init__(config=config)
        for option in ("window_size", "apply_query_key_layer_scaling"):
            if getattr(config, option, None):
                raise ValueError(
                    f"{option}={getattr(config, option)}: not supported by projection-sharing attention"
                )
        if config.context_parallel_size > 1:
            raise ValueError(f"--context-parallel-size {config.context_parallel_size}: not supported; use 1")
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            query: [s, b, h, e].
            key, value: [t, b, g, e]; one tensor for the variants that tie them.
        Returns:
            [s, b, h * e].
        """
        for name, given in (("attention_bias", attention_bias), ("packed_seq_params", packed_seq_params)):
            if given is not None:
                raise ValueError(f"{name}: not supported by projection-sharing attention")
        mask_type = attn_mask_type if attn_mask_type is not None else self.attn_mask_type
        if mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(
                f"attention mask type {mask_type.name}: supported are causal and no_mask, not explicit masks"
            )
        dropout = self.dropout if self.training else 0.0
        # Heads are split over the tensor-parallel ranks: each needs its own random stream.
        stream = get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext()
        with stream:
            out = attention(
                query,
                key,
                value,
                causal=mask_type is AttnMaskType.causal,
                scale=self.scale,
                dropout_p=dropout,
            )
        return out.view(out.shape[0], out.shape[1], -1)
