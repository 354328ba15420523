"""The division of a sequence over context-parallel ranks, by hand and there and back."""

from __future__ import annotations

import pytest
import torch

from megatron_sharedproj.ops.zigzag import by_rank, in_order, own_chunks


def test_a_rank_has_an_early_and_a_late_chunk() -> None:
    whole = torch.arange(12)
    found = [own_chunks(whole, 0, 3, rank).tolist() for rank in range(3)]
    assert found == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert own_chunks(whole.view(1, 12, 1), 1, 2, 1).flatten().tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_there_and_back(ranks: int) -> None:
    whole = torch.randn(16, 3, 2)
    parts = torch.stack([own_chunks(whole, 0, ranks, rank) for rank in range(ranks)])
    assert torch.equal(by_rank(whole, ranks), parts)
    assert torch.equal(in_order(parts), whole)


def test_lengths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence of 6: must be divisible by 4 chunks"):
        own_chunks(torch.zeros(2, 6), 1, 2, 0)
