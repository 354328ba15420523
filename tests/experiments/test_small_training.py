"""The training of small models against Adam written out, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_sharedproj.experiments.small_training import Schedule, train


def squares(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return ((model(inputs) - targets) ** 2).mean()


def data(steps: int, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(4, 3, generator=generator, dtype=torch.float64),
            scale * torch.randn(4, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(steps)
    ]


def adam(
    weight: Tensor, batches: list[tuple[Tensor, Tensor]], schedule: Schedule
) -> tuple[Tensor, list[float]]:
    """A linear map without bias by AdamW's formulas, its gradient by hand."""
    first, second, losses = torch.zeros_like(weight), torch.zeros_like(weight), []
    for step, (x, y) in enumerate(batches):
        error = x @ weight.T - y
        losses.append((error**2).mean().item())
        gradient = 2 * error.T @ x / error.numel()
        gradient = gradient * min(1.0, schedule.clip / (gradient.norm().item() + 1e-6))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rise = (step + 1) / schedule.warmup if step < schedule.warmup else None
        decay = (1 + math.cos(math.pi * (step - schedule.warmup) / (schedule.steps - schedule.warmup))) / 2
        lr = schedule.lr * (decay if rise is None else rise)
        weight = weight * (1 - lr * schedule.weight_decay)
        weight = weight - lr * (first / (1 - 0.9 ** (step + 1))) / (
            (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        )
    return weight, losses


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(12, lr=0.05, warmup=4),
        Schedule(12, lr=0.05, warmup=4, clip=0.1),
        Schedule(12, lr=0.05, weight_decay=0.5),
        Schedule(1, lr=0.05),
    ],
)
def test_steps_are_adams_with_the_schedule_and_clipping(schedule: Schedule) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    batches = data(schedule.steps, scale=20.0)
    weight, losses = adam(model.weight.detach().clone(), batches, schedule)
    assert train(model, batches, squares, schedule) == pytest.approx(losses, rel=1e-9)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-9, atol=1e-9)


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    factors = [Schedule(10, warmup=4).factor(step) for step in range(11)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5) and factors[10] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert Schedule(3).factor(0) == 1.0


def test_no_more_batches_are_drawn_than_steps() -> None:
    drawn: list[int] = []

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        for number in itertools.count():
            drawn.append(number)
            yield data(1)[0]

    model = nn.Linear(3, 2, dtype=torch.float64).eval()
    assert len(train(model, endless(), squares, Schedule(3))) == 3
    assert drawn == [0, 1, 2] and model.training


def test_too_few_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batches: 2 of them for 3 steps"):
        train(nn.Linear(3, 2, dtype=torch.float64), data(2), squares, Schedule(3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it(value: float) -> None:
    batches = data(3)
    batches[1][1][0, 0] = value
    with pytest.raises(ValueError, match=f"step 2: loss {value}; lower the learning rate 0.001"):
        train(nn.Linear(3, 2, dtype=torch.float64), batches, squares, Schedule(3))


@pytest.mark.parametrize("sizes", [{"steps": 0}, {"steps": 3, "warmup": 3}, {"steps": 3, "warmup": -1}])
def test_bad_schedules_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need 0 <= warmup < steps"):
        Schedule(**sizes)
