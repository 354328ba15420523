"""The shared tensor of least squares: exact where there is one, never worse than others, bias and rotation.

Shape legend: m heads merged, e head size, d hidden size, n tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj.retrofit.least_squares import Merged, Moments, merge_least_squares

E, D, N = 6, 20, 400


def inputs(seed: int = 0) -> Tensor:
    """[n, d] with a mean and correlations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return torch.randn(N, D, generator=generator, dtype=torch.float64) @ mix + torch.randn(
        D, generator=generator, dtype=torch.float64
    )


def moments(x: Tensor) -> Moments:
    return Moments(x.mT @ x / len(x), x.mean(0), len(x))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric(m: int, seed: int) -> Tensor:
    a = random(m, E, 2 * E, seed=seed)
    return a @ a.mT


def criterion(
    merged: Merged,
    x: Tensor,
    key: Any,
    value: Any,
    query: Tensor,
    output: Tensor,
    angles: Tensor | None = None,
) -> float:
    """The criterion written out over all tokens, its share of what t = 0 leaves."""
    k, v = (torch.einsum("med,nd->nme", w, x) + (0 if b is None else b) for w, b in (key, value))
    t = x @ merged.weight.mT + merged.bias
    parts = []
    for true, maps, weight, is_key in (
        (k, merged.key_maps, query, True),
        (v, merged.value_maps, output, False),
    ):
        off = true - torch.einsum("mef,nf->nme", maps, t)
        if angles is None and key[1] is not None:
            off, true = off - off.mean(0), true - true.mean(0)
        if not is_key and angles is not None:
            off = off - merged.value_constants
        parts.append(
            torch.einsum("nme,mef,nmf->", off, weight, off)
            / torch.einsum("nme,mef,nmf->", true, weight, true)
        )
    return float(sum(parts) / 2)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_a_common_space_is_found_exactly(m: int, biased: bool) -> None:
    """Keys and values that are maps of one tensor of e elements (plus constants, with biases)."""
    x, shared = inputs(), random(E, D, seed=1)
    weights = [random(m, E, E, seed=seed) @ shared for seed in (2, 3)]
    biases = [random(m, E, seed=seed) if biased else None for seed in (4, 5)]
    key, value = zip(weights, biases, strict=True)
    found = merge_least_squares(key, value, moments(x), query_second=metric(m, 6), output_second=metric(m, 7))
    assert found.error < 1e-12
    t = x @ found.weight.mT + found.bias
    k, v = (torch.einsum("med,nd->nme", w, x) + (0 if b is None else b) for w, b in (key, value))
    off = k - torch.einsum("mef,nf->nme", found.key_maps, t)
    # One constant for all tokens at most, which no softmax sees.
    assert (off - off.mean(0)).abs().max() < 1e-8 and (biased or off.abs().max() < 1e-8)
    again = torch.einsum("mef,nf->nme", found.value_maps, t) + found.value_constants
    torch.testing.assert_close(again, v, rtol=0, atol=1e-8)
    if not biased:
        assert not found.bias.any() and not found.value_constants.any()


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_no_other_tensor_is_better(m: int, biased: bool) -> None:
    x, query, output = inputs(), metric(m, 6), metric(m, 7)
    weights = [random(m, E, D, seed=seed) for seed in (1, 2)]
    biases = [random(m, E, seed=seed) if biased else None for seed in (3, 4)]
    key, value = zip(weights, biases, strict=True)
    found = merge_least_squares(key, value, moments(x), query_second=query, output_second=output)
    best = criterion(found, x, key, value, query, output)
    assert best == pytest.approx(found.error, rel=1e-6)

    # Gradient descent on all of it, from the solution, from the mean and from elsewhere.
    starts = [(found.weight, found.key_maps, found.value_maps)]
    eye = torch.eye(E, dtype=torch.float64).expand(m, E, E)
    starts += [((key[0] + value[0]).mean(0) / 2, eye, eye), (random(E, D, seed=8), eye, eye)]
    for start in starts:
        parameters = [tensor.clone().requires_grad_() for tensor in start]
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            trial = Merged(
                parameters[0], found.bias, parameters[1], parameters[2], found.value_constants, 0.0
            )
            k, v = (torch.einsum("med,nd->nme", w, x) + (0 if b is None else b) for w, b in (key, value))
            t = x @ trial.weight.mT + (0 if not biased else trial.bias)
            total = torch.zeros((), dtype=torch.float64)
            for true, maps, weight in ((k, trial.key_maps, query), (v, trial.value_maps, output)):
                off = true - torch.einsum("mef,nf->nme", maps, t)
                size = true - true.mean(0) if biased else true
                off = off - off.mean(0) if biased else off
                total = total + torch.einsum("nme,mef,nmf->", off, weight, off) / torch.einsum(
                    "nme,mef,nmf->", size, weight, size
                )
            total.backward()
            assert total.item() / 2 >= best * (1 - 1e-9)
            optimizer.step()


def test_one_weight_alone_keeps_that_role() -> None:
    x = inputs()
    key, value = (random(1, E, D, seed=1), None), (random(1, E, D, seed=2), None)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        found = merge_least_squares(
            key, value, moments(x), query_second=metric(1, 3), output_second=metric(1, 4),
            key_weight=weights[0], value_weight=weights[1],
        )  # fmt: skip
        assert found.error < 1e-9


ANGLES = -torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.3])).double()  # 4 of 6 elements turn


@pytest.mark.parametrize("biased", [True, False])
def test_rotated_keys_stay_and_values_are_mapped(biased: bool) -> None:
    """A value that is a map of the key: exact with R_k the identity, biases included."""
    x, weight = inputs(), random(1, E, D, seed=1)
    bias = random(1, E, seed=2) if biased else None
    turn = random(1, E, E, seed=3)
    value = turn @ weight, random(1, E, seed=4) if biased else None
    found = merge_least_squares(
        (weight, bias),
        value,
        moments(x),
        query_second=metric(1, 5),
        output_second=metric(1, 6),
        angles=ANGLES,
    )
    t = x @ found.weight.mT + found.bias
    if not biased:
        assert found.error < 1e-9
        torch.testing.assert_close(t, x @ weight[0].mT, rtol=0, atol=1e-4)
    v = x @ value[0][0].mT + (0 if not biased else value[1][0])
    rest = t @ found.value_maps[0].mT + found.value_constants[0] - v
    assert rest.square().mean() < (1e-9 if not biased else 1e-2) * v.square().mean()
    assert torch.equal(found.key_maps, torch.eye(E, dtype=torch.float64)[None])


def test_with_rotation_it_beats_the_closed_forms() -> None:
    from megatron_sharedproj.retrofit.least_squares import _averaged

    x, query, output = inputs(), metric(2, 5), metric(2, 6)
    key, value = (random(2, E, D, seed=1), None), (random(2, E, D, seed=2), None)
    found = merge_least_squares(
        key, value, moments(x), query_second=query, output_second=output, angles=ANGLES
    )
    seen = _averaged(query, ANGLES)
    best = criterion(found, x, key, value, seen, output, ANGLES)
    assert best == pytest.approx(found.error, rel=1e-6)
    eye = torch.eye(E, dtype=torch.float64).expand(2, E, E)
    for weight in (key[0].mean(0), value[0].mean(0), (key[0] + value[0]).mean(0) / 2):
        plain = Merged(weight, found.bias, eye, eye, found.value_constants, 0.0)
        assert best < 0.9 * criterion(plain, x, key, value, seen, output, ANGLES)


def test_averaged_queries_are_those_of_all_distances() -> None:
    """The metric of keys behind a rotation, against products of complex numbers."""
    from megatron_sharedproj.retrofit.least_squares import _averaged

    queries, key = random(50, E, seed=1), random(E, seed=2)
    seen = _averaged((queries.mT @ queries)[None] / 50, ANGLES)[0]
    total = 0.0
    for angles in ANGLES:
        turned = key.clone()
        pair = torch.complex(key[:2], key[2:4]) * torch.polar(torch.ones(2, dtype=torch.float64), angles)
        turned[:2], turned[2:4] = pair.real, pair.imag
        total += float((queries @ turned).square().mean())
    assert float(key @ seen @ key) == pytest.approx(total / len(ANGLES))


def test_dead_and_dependent_directions_are_no_trouble() -> None:
    x = inputs()
    x[:, 3] = 0
    x[:, 4] = x[:, 5]
    key, value = (random(1, E, D, seed=1), None), (random(1, E, D, seed=2), None)
    key[0][:, 2] = 0
    value[0][:, 1] = value[0][:, 0]
    query = metric(1, 3)
    query[:, 0] = query[:, :, 0] = 0  # no query looks at it
    for angles in (None, ANGLES):
        found = merge_least_squares(
            key, value, moments(x), query_second=query, output_second=metric(1, 4), angles=angles
        )
        for tensor in (found.weight, found.key_maps, found.value_maps):
            assert tensor.isfinite().all() and tensor.abs().max() < 1e6
        assert 0 <= found.error < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_weight": -1.0}, "--key-weight -1.0, --value-weight 1.0: must be at least 0"),
        ({"key_weight": 0.0, "value_weight": 0.0}, "one above 0"),
        ({"moments": Moments(torch.full((D, D), torch.nan), torch.zeros(D))}, "activations are not finite"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {
        "moments": moments(inputs()),
        "query_second": metric(1, 1),
        "output_second": metric(1, 2),
        **changes,
    }
    pair = random(1, E, D, seed=1), None
    with pytest.raises(ValueError, match=message):
        merge_least_squares(pair, pair, **given)
