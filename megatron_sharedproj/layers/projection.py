"""One column-parallel projection that holds only the tensors a variant has.

Weight [g * p * e, d], p = projected heads in a group (variants.AttentionVariant.group_layout): groups are
contiguous, ``q.. kv | q.. kv``, so the tensor-parallel shard is a plain slice of axis 0. With fewer groups
than ranks (MQA) a group has several ranks: each holds its own query heads and a copy of the group's keys and
values, whose gradient is summed over them. A checkpoint has one tensor either way.

Shape legend: s sequence, b batch, h heads, g groups, t ranks, e head size, d hidden size, k heads of a group
that are not queries (1 if key and value are tied, else 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import layers as engine
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor
from torch.nn import Parameter

from megatron_sharedproj.device import get_device
from megatron_sharedproj.variants import get_variant


def projection_size(config: Any, variant: str) -> int:
    """Rows of the projection weight for a Megatron TransformerConfig, over all ranks."""
    groups = config.num_query_groups
    heads = get_variant(variant).heads_per_group(config.num_attention_heads, groups)
    return groups * heads * config.kv_channels


class SharedProjectionMixin:
    """Makes a Megatron column-parallel linear allocate the variant's rows, not Q + K + V.

    SelfAttention.__init__ asks its ``linear_qkv`` for q + 2 kv rows; this ignores that number, which
    keeps Megatron's constructor (whose signature differs between releases) as it is.
    """

    # Whether this rank holds whole keys and values, though its group has several ranks; else the rows are
    # cut without regard to heads, and layers/attention.py gathers the output.
    replicates_kv = False

    def __init__(self, input_size: int, output_size: int, *, config: Any, variant: str, **kwargs: Any):
        super().__init__(  # type: ignore[call-arg]
            input_size, projection_size(config, variant), config=config, **kwargs
        )


@dataclass(frozen=True)
class OwnHeads:
    """Heads of the projection weight that a rank holds where a group has several ranks.

    Attributes:
        group: of this rank; groups: g.
        copy: which copy of the group's keys and values this rank has; 0: the one that counts.
        queries, keys: places of its heads among all of the weight, which has ``total``.
    Raises:
        ValueError: from :meth:`of`, for a number of ranks that is no multiple of the groups.
    """

    group: int
    groups: int
    copy: int
    queries: range
    keys: range
    total: int

    @classmethod
    def of(cls, config: Any, variant: str, rank: int, ranks: int) -> OwnHeads:
        heads, groups = config.num_attention_heads, config.num_query_groups
        if ranks % groups or heads % ranks:
            raise ValueError(
                f"--tensor-model-parallel-size {ranks}: must divide --num-attention-heads {heads}, and "
                f"divide --num-query-groups {groups} or be a multiple of it"
            )
        # A variant that ties query and key has as many groups as heads: never fewer than ranks.
        (_, queries), *others = get_variant(variant).group_layout(heads, groups)
        per_group = queries + len(others)
        group, copy = divmod(rank, ranks // groups)
        start, local = group * per_group, heads // ranks
        own = range(start + copy * local, start + (copy + 1) * local)
        keys = range(start + queries, start + per_group)
        return cls(group, groups, copy, own, keys, groups * per_group)


class SharedProjectionLinear(SharedProjectionMixin, ColumnParallelLinear):
    """``linear_qkv`` of the local implementation.

    With fewer groups than ranks its parameters are ``weight`` [h/t e, d] and ``bias`` [h/t e] of the queries,
    and ``kv_weight`` [k e, d] and ``kv_bias`` [k e]; else ``weight`` and ``bias``, a slice of all rows.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        variant: str,
        init_method: Any,
        bias: bool = True,
        tp_group: Any = None,
        **kwargs: Any,
    ):
        tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        if config.num_query_groups >= tp_group.size():
            super().__init__(
                input_size, output_size, config=config, variant=variant, init_method=init_method, bias=bias,
                tp_group=tp_group, **kwargs,
            )  # fmt: skip
            return
        own = OwnHeads.of(config, variant, tp_group.rank(), tp_group.size())
        rows = (len(own.queries) + len(own.keys)) * config.kv_channels
        ColumnParallelLinear.__init__(
            self, input_size, rows * tp_group.size(), config=config, init_method=init_method, bias=False,
            skip_weight_param_allocation=True, tp_group=tp_group, **kwargs,
        )  # fmt: skip
        del self.weight, self.bias  # both None
        self.replicates_kv, self.own, self.head_size = True, own, config.kv_channels
        device = None if config.use_cpu_initialization else get_device().current()
        # All rows, from the stream that the ranks share: the weights of a seed are the same at any size.
        whole = torch.empty(own.total * self.head_size, input_size, dtype=torch.float32, device=device)
        if config.perform_initialization:
            init_method(whole)
        for prefix, heads in (("", own.queries), ("kv_", own.keys)):
            part = whole[heads.start * self.head_size : heads.stop * self.head_size]
            self._add(f"{prefix}weight", part.to(config.params_dtype, copy=True))
            if bias:
                self._add(f"{prefix}bias", part.new_zeros(len(part), dtype=config.params_dtype))
            else:
                self.register_parameter(f"{prefix}bias", None)

    def _add(self, name: str, value: Tensor) -> None:
        parameter = Parameter(value)
        # By this mark Megatron counts a parameter on every rank, in norms: of copies only the first has it.
        counted = not name.startswith("kv_") or self.own.copy == 0
        set_tensor_model_parallel_attributes(parameter, counted, 0, 1)
        self.register_parameter(name, parameter)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, d] -> this rank's rows [s, b, ...], queries first, and no bias that is left to add."""
        if not self.replicates_kv:
            return super().forward(input_, *args, **kwargs)
        if not (torch.is_grad_enabled() or self.sequence_parallel):
            # Decoding reads each weight once; to join them would cost as much again twice.
            parts = ((self.weight, self.bias), (self.kv_weight, self.kv_bias))
            return torch.cat([self._product(input_, *part) for part in parts], dim=-1), None
        kv = _SumGradients.apply(self.kv_weight, self.kv_bias, self.own, self.tp_group)
        weight, bias = (
            None if mine is None else torch.cat([mine, theirs])
            for mine, theirs in zip((self.weight, self.bias), kv, strict=True)
        )
        return self._product(input_, weight, bias), None

    def _product(self, input_: Tensor, weight: Any, bias: Any) -> Tensor:
        # Asked of the module, where a CPU has its own (device.py).
        return engine.linear_with_grad_accumulation_and_async_allreduce(
            input_,
            weight,
            bias,
            gradient_accumulation_fusion=False,  # it would look for the buffer of a joined weight
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron's; the tensors of a checkpoint are the same for any number of groups and ranks."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if not self.replicates_kv:
            return state
        for name, parameter in self.named_parameters():
            replicated = name.startswith("kv_")
            *_, replica = state[f"{prefix}{name}"].replica_id
            state[f"{prefix}{name}"] = ShardedTensorFactory(
                f"{prefix}{name.removeprefix('kv_')}",
                parameter,
                _heads_apart(
                    self.own.keys if replicated else self.own.queries, self.own.total, sharded_offsets
                ),
                torch.cat,
                (0, self.own.copy if replicated else 0, replica),
            )
        return state


def _heads_apart(places: range, total: int, offsets: Any) -> Any:
    """What makes of [n e, ...] n tensors of a checkpoint that has `total`: all pieces must be of one size."""
    axis = len(offsets)

    def build(key: str, rows: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                key, head, *offsets, (axis, place, total), replica_id=replica_id, prepend_axis_num=axis
            )
            for place, head in zip(places, rows.detach().chunk(len(places)), strict=True)
        ]

    return build


class _SumGradients(torch.autograd.Function):
    """A group's weight [k e, d] and bias [k e] or None, whose gradients are summed over the group's ranks.

    In each backward pass, which needs nothing of the caller; Megatron sums once a step, by itself, only what
    all ranks hold. One message among all ranks: groups of fewer would have to be made by every process.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight: Tensor, bias: Tensor | None, own: OwnHeads, tp_group: Any
    ) -> tuple[Tensor, Tensor | None]:
        ctx.own, ctx.tp_group = own, tp_group
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given: Sequence[Tensor] = [grad for grad in grads if grad is not None]
        sizes = [grad.numel() for grad in given]
        message = given[0].new_zeros(ctx.own.groups, sum(sizes))
        mine = message[ctx.own.group]
        torch.cat([grad.flatten() for grad in given], out=mine)
        torch.distributed.all_reduce(message, group=ctx.tp_group)
        parts = iter(mine.split(sizes))
        return *(None if grad is None else next(parts).view_as(grad) for grad in grads), None, None


def te_shared_projection() -> type:
    """``linear_qkv`` of the Transformer Engine implementation (norm and projection fused).

    Raises:
        ImportError: if Transformer Engine is not installed.
    """
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    class TESharedProjectionLinear(SharedProjectionMixin, TELayerNormColumnParallelLinear):
        pass

    return TESharedProjectionLinear
