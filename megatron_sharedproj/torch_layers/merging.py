"""One key/value projection made of two trained ones: the start of a retrofit.

Paper: "Do Transformers Need Three Projections?" (arXiv 2606.04032), the K=V models made by surgery: the mean
of both projections, or either of them.

Shape legend: g groups (key/value heads), e head size, d hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

MERGES = ("mean", "keep_key", "keep_value")


def merge_key_value(key: Tensor, value: Tensor, method: str = "mean") -> Tensor:
    """Weight or bias of the tied projection.

    Args:
        key, value: [g * e, d] or [g * e], of the trained key and value projections.
        method: one of MERGES.
    Returns:
        A new tensor of the same shape and dtype.
    Raises:
        ValueError: for an unknown method, or shapes that differ.
    """
    if method not in MERGES:
        raise ValueError(f"{method}: unknown way to merge key and value; choose one of {', '.join(MERGES)}")
    if key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)}, value {tuple(value.shape)}: shapes must be equal to merge")
    if method == "mean":
        compute = torch.promote_types(key.dtype, torch.float32)
        return ((key.to(compute) + value.to(compute)) / 2).to(key.dtype)
    return (key if method == "keep_key" else value).clone()
