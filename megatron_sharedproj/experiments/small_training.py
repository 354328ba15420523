"""How small models learn: Adam, linear warm-up and cosine decay, gradient clipping (paper.md, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Optimization of a small model.

    Attributes:
        steps: optimizer steps; warmup: those with a rising learning rate.
        lr: peak learning rate, which a cosine takes to zero; clip: largest gradient norm.
        weight_decay: AdamW's; 0 is Adam.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 0
    clip: float = 5.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warmup < self.steps:
            raise ValueError(f"steps {self.steps}, warmup {self.warmup}: need 0 <= warmup < steps")

    def factor(self, step: int) -> float:
        """Share of the peak learning rate in a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def train(model: nn.Module, batches: Iterable[Batch], loss_of: Loss, schedule: Schedule) -> list[float]:
    """Train for ``schedule.steps`` batches; the losses, one per step.

    Args:
        batches: (inputs, targets); at least as many as steps.
        loss_of: model, inputs, targets -> a scalar.
    Raises:
        ValueError: where a loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay, foreach=True
    )
    model.train()
    losses: list[float] = []
    for step, (inputs, targets) in zip(range(schedule.steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * schedule.factor(step)
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {step + 1}: loss {losses[-1]}; lower the learning rate {schedule.lr}")
    if len(losses) < schedule.steps:
        raise ValueError(f"batches: {len(losses)} of them for {schedule.steps} steps")
    return losses
