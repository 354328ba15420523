"""Projection-sharing attention as Megatron-Core layer specs."""
