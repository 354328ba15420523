"""Sharded checkpoints in Megatron-Core's format, written aside and renamed."""

from megatron_sharedproj.checkpointing.files import (
    checkpoint_config,
    latest_iteration,
    resolve_checkpoint,
)

__all__ = ["checkpoint_config", "latest_iteration", "resolve_checkpoint"]
