"""Similarity, rank, symmetry and attention against definitions written out in numpy, n x n matrices and all.

Shape legend: n tokens, s sequence, h heads, g groups, e head size, m side by side, p and q features.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sharedproj.evaluation import similarity
from megatron_sharedproj.evaluation.similarity import (
    PairSums,
    attention_sums,
    cka_of_sums,
    effective_rank,
    linear_cka,
    rank_for_variance,
    singular_values,
    symmetry,
    uniform_weight,
)

SIZES = [(20, 5, 7), (9, 30, 4), (4, 1, 1), (50, 3, 3)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, p: int, q: int) -> tuple[Tensor, Tensor]:
    """Two representations that share something, with means far from 0."""
    x = randn(n, p) + 3.0
    return x, x[:, :1] @ randn(1, q, seed=1) + randn(n, q, seed=2) - 2.0


def hsic(x: NDArray[Any], y: NDArray[Any], unbiased: bool) -> float:
    """From the kernels, n x n: trace(K H L H), or theorem 2 of Song et al. without its 1 / (n (n - 3))."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    if not unbiased:
        h = np.eye(n) - 1 / n
        return float(np.trace(k @ h @ m @ h))
    np.fill_diagonal(k, 0.0)
    np.fill_diagonal(m, 0.0)
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float(np.trace(k @ m) + middle - 2 / (n - 2) * one @ k @ m @ one)


def cka(x: Tensor, y: Tensor, unbiased: bool = False) -> float:
    a, b = x.double().numpy(), y.double().numpy()
    return hsic(a, b, unbiased) / math.sqrt(hsic(a, a, unbiased) * hsic(b, b, unbiased))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("n", "p", "q"), SIZES)
def test_cka_is_that_of_the_kernels(n: int, p: int, q: int, unbiased: bool) -> None:
    x, y = related(n, p, q)
    assert linear_cka(x, y, unbiased=unbiased) == pytest.approx(cka(x, y, unbiased), rel=1e-9)
    assert linear_cka(x, y, unbiased=unbiased) == pytest.approx(linear_cka(y, x, unbiased=unbiased))


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_does_not_see_rotation_scale_and_shift(unbiased: bool) -> None:
    x, y = related(40, 6, 5)
    turn = torch.linalg.qr(randn(6, 6, seed=3)).Q
    before = linear_cka(x, y, unbiased=unbiased)
    assert linear_cka(0.1 * x @ turn + 7.0, -3.0 * y - 1.0, unbiased=unbiased) == pytest.approx(before)
    assert linear_cka(x, 5.0 * x @ turn + 2.0, unbiased=unbiased) == pytest.approx(1.0)
    # Only those: another linear map changes it.
    assert linear_cka(x, x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1]).double())) < 0.95


def test_only_the_plain_estimate_is_too_high_for_few_tokens() -> None:
    pairs = [(randn(40, 60, seed=i), randn(40, 60, seed=100 + i)) for i in range(20)]
    assert min(linear_cka(x, y) for x, y in pairs) > 0.5
    assert abs(np.mean([linear_cka(x, y, unbiased=True) for x, y in pairs])) < 0.02


def test_cka_of_what_does_not_vary_is_no_number() -> None:
    assert math.isnan(linear_cka(torch.zeros(10, 2), randn(10, 3)))


@pytest.mark.parametrize("pieces", [[50], [1, 49], [7] * 7 + [1]])
def test_sums_come_in_pieces_and_side_by_side(pieces: list[int]) -> None:
    """Query heads against the keys of their groups, as diagnostics does; in float32, summed in float64."""
    n, heads, groups = 50, 4, 2
    x, y = randn(n, heads, 3).float(), (randn(n, groups, 5, seed=1)).float() + 1.0
    y = y + x[:, ::2, :1]
    xx, yy, xy = PairSums(), PairSums(), PairSums()
    for a, b in zip(x.split(pieces), y.split(pieces), strict=True):
        xx.add(a, a)
        yy.add(b, b)
        xy.add(a, b.repeat_interleave(2, dim=1))
    for unbiased in (False, True):
        found = cka_of_sums(xx, yy, xy, unbiased=unbiased)
        expected = [cka(x[:, i], y[:, i // 2], unbiased) for i in range(heads)]
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, rel=1e-6)
    centred = x.double() - x.double().mean(0)
    expected_values = torch.linalg.svdvals(centred.transpose(0, 1))
    torch.testing.assert_close(singular_values(xx.covariance()).flip(-1), expected_values)


def test_unbiased_needs_four_tokens() -> None:
    with pytest.raises(ValueError, match="3 tokens: the unbiased estimator needs at least 4"):
        linear_cka(randn(3, 2), randn(3, 2), unbiased=True)


def test_effective_rank_of_known_spectra() -> None:
    spectra = torch.tensor([[1.0, 1, 1, 1], [5, 0, 0, 0], [2, 1, 1, 0], [0, 0, 0, 0]])
    found = effective_rank(spectra)
    assert found[:3].tolist() == pytest.approx([4.0, 1.0, math.exp(1.5 * math.log(2))])
    assert math.isnan(found[3])
    torch.testing.assert_close(effective_rank(100 * spectra[:3]), found[:3])
    values = np.random.default_rng(0).random(17)
    share = values / values.sum()
    assert effective_rank(torch.from_numpy(values)).item() == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in share))
    )


def test_rank_for_variance() -> None:
    spectra = torch.tensor([[1.0, 1, 1, 1], [0, 10, 0, 1], [0, 10, 0, 2], [3, 0, 0, 0]])
    assert rank_for_variance(spectra).tolist() == [4, 1, 2, 1]
    assert rank_for_variance(spectra, 0.75).tolist() == [3, 1, 1, 1]


def plain_symmetry(scores: Tensor) -> float:
    even, odd = (scores + scores.T) / 2, (scores - scores.T) / 2
    return ((even.square().sum() - odd.square().sum()) / scores.square().sum()).item()


def test_symmetry_is_that_of_the_scores() -> None:
    query, key = randn(3, 11, 4) + 0.5, randn(3, 11, 4, seed=1) - 1.0
    centre = torch.eye(11).double() - 1 / 11
    for index in range(3):
        scores = query[index] @ key[index].T
        assert symmetry(query, key)[index].item() == pytest.approx(plain_symmetry(scores))
        without = centre @ scores @ centre
        assert symmetry(query, key, centred=True)[index].item() == pytest.approx(plain_symmetry(without))


def test_symmetry_of_symmetric_and_antisymmetric_scores() -> None:
    x, a = randn(9, 4), randn(4, 4, seed=1)
    assert symmetry(x, x).item() == pytest.approx(1.0)
    assert symmetry(x, x @ (a + a.T)).item() == pytest.approx(1.0)
    assert symmetry(x, x @ (a - a.T)).item() == pytest.approx(-1.0)
    # As large as the features are many, unrelated queries and keys are neither.
    assert abs(symmetry(randn(60, 60), randn(60, 60, seed=1)).item()) < 0.1
    # A common part of both makes scores symmetric, and is not seen without means.
    far = symmetry(randn(60, 60) + 50, randn(60, 60, seed=1) + 50)
    assert far.item() > 0.99
    assert abs(symmetry(randn(60, 60) + 50, randn(60, 60, seed=1) + 50, centred=True).item()) < 0.1


def test_symmetry_of_weights() -> None:
    w_q, w_k = randn(4, 12), randn(4, 12, seed=1)
    assert symmetry(w_q.mT, w_k.mT).item() == pytest.approx(plain_symmetry(w_q.T @ w_k))


def plain_attention(query: Tensor, key: Tensor, scale: float) -> dict[str, list[float]]:
    """Head by head and position by position."""
    s, h, _ = query.shape
    found: dict[str, list[float]] = {name: [] for name in ("entropy", "entropy_share", "first_token", "self")}
    for head in range(h):
        sums = dict.fromkeys(found, 0.0)
        keys = key[:, head // (h // key.shape[1])]
        for i in range(1, s):
            scores = [math.exp(scale * float(query[i, head] @ keys[j])) for j in range(i + 1)]
            weights = [x / sum(scores) for x in scores]
            entropy = -sum(p * math.log(p) for p in weights)
            sums["entropy"] += entropy
            sums["entropy_share"] += entropy / math.log(i + 1)
            sums["first_token"] += weights[0]
            sums["self"] += weights[i]
        for name, value in sums.items():
            found[name].append(value)
    return found


@pytest.mark.parametrize("scores", [1 << 24, 4 * 13 * 5, 1])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_position_by_position(groups: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_SCORES", scores)  # the whole, a few rows, a row at a time
    query, key = randn(13, 4, 6).float(), randn(13, groups, 6, seed=1).float()
    found = attention_sums(query, key, 0.7)
    for name, expected in plain_attention(query.double(), key.double(), 0.7).items():
        assert found[name].tolist() == pytest.approx(expected, rel=1e-5)


def test_uniform_and_certain_attention() -> None:
    s = 10
    found = attention_sums(torch.zeros(s, 2, 4), randn(s, 1, 4).float(), 1.0)
    logs = sum(math.log(seen) for seen in range(2, s + 1))
    for name, expected in {
        "entropy": logs, "entropy_share": s - 1.0, "first_token": uniform_weight(s) * (s - 1),
        "self": uniform_weight(s) * (s - 1),
    }.items():  # fmt: skip
        assert found[name].tolist() == pytest.approx([expected] * 2, rel=1e-6)
    # One-hot keys: every position finds itself.
    own = torch.eye(s)[:, None]
    found = attention_sums(1e4 * own, own, 1.0)
    assert found["self"].item() == s - 1 and found["first_token"].item() == 0.0
    assert found["entropy"].item() == pytest.approx(0.0, abs=1e-6)
    assert uniform_weight(3) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert all(value.item() == 0.0 for value in attention_sums(own[:1], own[:1], 1.0).values())
