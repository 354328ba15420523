"""Choosing tokens: the shares that temperature, top-k and top-p promise, and independent streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj.inference.sampling import Sampling, random_stream, sample, uniforms


def frequencies(logits: Tensor, draws: int = 4000, **options: Any) -> Tensor:
    """Shares [V] of the tokens drawn from logits [V]."""
    drawn = torch.rand(draws, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    chosen = sample(logits.expand(draws, -1).clone(), Sampling(**options), drawn)
    return torch.bincount(chosen, minlength=len(logits)) / draws


# Shuffled, so that an order by id is not an order by probability.
PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.2, 0.25])


def test_temperature() -> None:
    logits = PROBABILITIES.log()
    assert frequencies(logits, temperature=0.0)[1] == 1.0
    assert frequencies(logits, temperature=0.01)[1] == 1.0
    for temperature in (1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        found = frequencies(logits, temperature=temperature)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.03)


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (5, None), (9, None), (0, None)]
)
def test_top_k_keeps_k(k: int, kept: list[int] | None) -> None:
    kept = kept or [0, 1, 2, 3, 4]
    expected = torch.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    found = frequencies(PROBABILITIES.log(), top_k=k)
    assert found.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.03)


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (1e-9, [1]),
        (0.39, [1]),
        (0.41, [1, 4]),
        (0.64, [1, 4]),
        (0.66, [1, 3, 4]),
        (0.94, [1, 2, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: list[int]) -> None:
    found = frequencies(PROBABILITIES.log(), top_p=p)
    assert found.nonzero().flatten().tolist() == kept
    expected = torch.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.03)


def test_filters_are_applied_per_row_and_together() -> None:
    rows = torch.stack([PROBABILITIES.log(), PROBABILITIES.flip(0).log()]).repeat(500, 1)
    drawn = torch.rand(1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    chosen = sample(rows, Sampling(top_k=3, top_p=0.6), drawn).view(500, 2)
    # Of the best three, 0.4 / 0.85 and 0.25 / 0.85 reach 0.6.
    assert set(chosen[:, 0].tolist()) == {1, 4}
    assert set(chosen[:, 1].tolist()) == {3, 0}


@pytest.mark.parametrize("drawn", [0.0, 0.5, 1.0 - 2**-53])
def test_the_ends_of_the_range_choose_a_possible_token(drawn: float) -> None:
    logits = torch.full((1, 50), float("-inf"))
    logits[0, 7:20] = torch.randn(13, generator=torch.Generator().manual_seed(0))
    chosen = sample(logits, Sampling(), torch.tensor([drawn], dtype=torch.float64))
    assert 7 <= chosen.item() < 20
    assert {0.0: 7, 1.0 - 2**-53: 19}.get(drawn, chosen.item()) == chosen.item()


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-30, 1e-6, 1e30, 1e300])
def test_extreme_temperatures_choose_a_token(temperature: float) -> None:
    logits = torch.tensor([[300.0, 2.0, 299.0, float("-inf")]])
    chosen = sample(logits, Sampling(temperature), torch.tensor([0.999], dtype=torch.float64))
    assert chosen.item() == (2 if temperature > 1 else 0)


def test_streams_depend_on_their_three_numbers_alone() -> None:
    keys = [(seed, prompt, index) for seed in (1, 12) for prompt in (0, 3, 23) for index in (0, 1)]
    first = uniforms([random_stream(*key) for key in keys])
    assert len(set(first.tolist())) == len(keys)
    for key, value in zip(keys, first, strict=True):
        torch.rand(5)  # the process's own stream does not matter
        assert uniforms([random_stream(*key)]).item() == value


def test_a_rows_token_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * 3
    drawn = uniforms([random_stream(5, row, 0) for row in range(6)])
    options = Sampling(0.8, 20, 0.9)
    together = sample(logits, options, drawn)
    alone = [sample(logits[row : row + 1], options, drawn[row : row + 1]).item() for row in range(6)]
    assert together.tolist() == alone
