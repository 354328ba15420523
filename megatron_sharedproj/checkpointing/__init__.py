"""Sharded checkpoints in Megatron-Core's format: written aside, checksummed, renamed, verified at load."""

from megatron_sharedproj.checkpointing.files import checkpoint_config, latest_iteration
from megatron_sharedproj.checkpointing.selection import resolve_checkpoint

__all__ = ["checkpoint_config", "latest_iteration", "resolve_checkpoint"]
