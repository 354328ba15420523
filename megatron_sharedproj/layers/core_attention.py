"""Megatron-Core's ``core_attention`` slot, filled by this package's attention op.

Shape legend: s query length, t key length, b batch, h heads on this rank, g groups on this rank, e head size.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_sharedproj.layers.context_parallel import context_parallel_attention
from megatron_sharedproj.ops.attention import attention, attention_packed


class SharedProjectionCoreAttention(MegatronModule):
    """softmax(scale Q K^T) V through ops.attention; takes key and value as one tensor.

    Packed sequences come as Megatron gives them (PackedSeqParams in its "thd" format).

    Same constructor and forward as megatron.core.transformer.dot_product_attention.DotProductAttention.

    Raises:
        ValueError: for options that this op does not compute (sliding windows, attention bias, explicit
            masks, padding between packed sequences), instead of ignoring them.
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
        for option in ("window_size", "apply_query_key_layer_scaling", "fp8", "fp4"):
            if getattr(config, option, None):
                raise ValueError(
                    f"{option}={getattr(config, option)}: not supported by projection-sharing attention"
                )
        self.context_group = None
        if config.context_parallel_size > 1:
            self.context_group = getattr(pg_collection, "cp", None) or get_context_parallel_group()
        self.tied_kv = False  # set by the layer: key and value come from one projected tensor
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
            query: [s, b, h, e], or [n, h, e] with packed_seq_params.
            key, value: [t, b, g, e] or [n, g, e]; one tensor for the variants that tie them.
            packed_seq_params: megatron.core.packed_seq_params.PackedSeqParams.
        Returns:
            [s, b, h * e], or [n, h * e].
        """
        if attention_bias is not None:
            raise ValueError("attention_bias: not supported by projection-sharing attention")
        if self.tied_kv and value is not key and value.data_ptr() == key.data_ptr():
            # Megatron made a view of each (packed sequences): they are one tensor still.
            value = key
        mask_type = attn_mask_type if attn_mask_type is not None else self.attn_mask_type
        if mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(
                f"attention mask type {mask_type.name}: supported are causal and no_mask, not explicit masks"
            )
        if packed_seq_params is not None and self.context_group is not None:
            raise ValueError("packed_seq_params: not supported with --context-parallel-size above 1")
        dropout = self.dropout if self.training else 0.0
        # Heads are split over the tensor-parallel ranks: each needs its own random stream.
        stream = get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext()
        options: dict[str, Any] = {
            "causal": mask_type is AttnMaskType.causal,
            "scale": self.scale,
            "dropout_p": dropout,
            "deterministic": bool(self.config.deterministic_mode),
        }
        with stream:
            if packed_seq_params is None and self.context_group is not None:
                out = context_parallel_attention(query, key, value, self.context_group, **options)
                return out.flatten(-2)
            if packed_seq_params is None:
                return attention(query, key, value, **options).flatten(-2)
            return attention_packed(query, key, value, *_lengths(packed_seq_params), **options).flatten(-2)


def document_lengths(tokens: Tensor, eod: int) -> PackedSeqParams:
    """The documents of a micro batch as packed sequences: attention starts anew at rows and after ``eod``.

    What Megatron's ``--reset-attention-mask`` asks for, as lengths instead of a mask of s x s per row: the
    tokens then go through the model as one row of b * s.

    Args:
        tokens: [b, s] int64, on the CPU: as lists of lengths the boundaries are needed there, and a GPU
            would have to be waited for.
    """
    b, s = tokens.shape
    ends = tokens == eod
    ends[:, -1] = True
    starts = torch.nn.functional.pad(ends.flatten().nonzero()[:, 0].int() + 1, (1, 0))
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=s, max_seqlen_kv=s
    )


def _lengths(packed: Any) -> tuple[Tensor, Tensor, int, int]:
    if packed.qkv_format != "thd":
        raise ValueError(f"packed_seq_params.qkv_format={packed.qkv_format}: supported is thd")
    if packed.cu_seqlens_q_padded is not None or packed.cu_seqlens_kv_padded is not None:
        raise ValueError(
            "packed_seq_params: padding between sequences (cu_seqlens_*_padded) is not supported"
        )
    longest = [
        given if given is not None else int(starts.diff().max())
        for given, starts in (
            (packed.max_seqlen_q, packed.cu_seqlens_q),
            (packed.max_seqlen_kv, packed.cu_seqlens_kv),
        )
    ]
    return packed.cu_seqlens_q, packed.cu_seqlens_kv, longest[0], longest[1]
