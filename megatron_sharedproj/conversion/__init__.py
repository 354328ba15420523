"""Weights in and out: Hugging Face, stock architectures, GGUF, the paper's released checkpoints."""
