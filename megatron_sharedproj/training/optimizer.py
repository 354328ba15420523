"""Megatron-Core's data-parallel wrapper, optimizer and schedule, set up from a RunConfig."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sharedproj.config import ParallelConfig, TrainConfig


def wrap_data_parallel(
    chunks: list[Any], parallel: ParallelConfig, train: TrainConfig
) -> list[DistributedDataParallel]:
    """Megatron's DistributedDataParallel: gradients in contiguous fp32 buffers, averaged over replicas."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=(train.bf16 or train.fp16) and not parallel.grad_reduce_in_bf16,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        average_in_collective=False,
    )
    # As in Megatron-LM: only the first chunk's buckets can overlap with anything.
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], parallel: ParallelConfig, train: TrainConfig
) -> Any:
    """AdamW (decoupled weight decay) with clipping, over Megatron's parameter groups."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        decoupled_lr=train.decoupled_lr,
        decoupled_min_lr=train.decoupled_min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=train.bf16,
        fp16=train.fp16,
        params_dtype=getattr(torch, train.params_dtype),
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(config)
    if train.weight_decay_on_all:
        # Megatron's standard overrides exempt biases and norms, beside the decoupled learning rate.
        overrides = {key: value for key, value in overrides.items() if "wd_mult" not in value}
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides)
    use_fused_update(optimizer)
    return optimizer


def use_fused_update(optimizer: Any) -> None:
    """Update in one pass where Megatron has torch's AdamW (no apex, no Transformer Engine).

    To be called again after loading: a state dict brings its own groups.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False


def build_schedule(optimizer: Any, train: TrainConfig) -> OptimizerParamScheduler:
    """Linear warm-up, then the decay style; counted in sequences, as in Megatron-LM."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.samples_after(train.lr_warmup_iters),
        lr_decay_steps=train.samples_after(train.lr_decay_iters),
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train.samples_after(train.train_iters),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
