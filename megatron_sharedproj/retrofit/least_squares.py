"""The shared key/value that changes a trained attention least, on given activations.

Plain least squares of one W against W_k and W_v over the same inputs is their mean. But keys and values are
only defined up to an invertible map: K -> K M with Q -> Q M^-T leaves the scores, V -> V N with O -> N^-1 O
the output. So what is sought is a tensor t = W x + b of one head and maps with k ~ R_k t and v ~ R_v t; the
projections of queries and of the output absorb them: R_k^T q meets t, and O R_v takes it. The error of a key
counts as far as queries see it, that of a value as far as the output does:

    w_k E |C_q^1/2 (k - R_k t)|^2 / E |C_q^1/2 k|^2 + w_v E |C_o^1/2 (v - R_v t)|^2 / E |C_o^1/2 v|^2

with C_q the second moment of a group's queries and C_o = sum O_h^T O_h. Without rotary positions that is a
reduced-rank regression, solved by one eigendecomposition (A. Izenman, 1975; Eckart-Young). With them R_k has
to commute with every rotation; it is the identity here, and W and R_v are found in turns. A constant in all
keys changes no softmax (without rotary positions), and one in all values passes into the output's bias, as
attention's weights sum to one: both are free there.

Several key/value heads may be merged into one (grouped queries): each keeps maps of its own.

Shape legend: m heads merged into one, e head size, d hidden size, r rotated elements of a head, n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Turns of the alternating solution, which ends earlier where a turn gains nothing.
_TURNS = 100
# Directions with less than this share of the largest second moment are not divided by.
_RIDGE = 1e-8


@dataclass(frozen=True)
class Moments:
    """What is kept of n activations x [d], in fp64.

    Attributes:
        second: [d, d], the mean of x x^T; mean: [d]; tokens: n.
    """

    second: Tensor
    mean: Tensor
    tokens: int = 0

    @property
    def centred(self) -> Tensor:
        """[d, d], the covariance."""
        return self.second - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Merged:
    """A shared key/value head and the maps that its queries and outputs absorb; fp64.

    Attributes:
        weight, bias: [e, d], [e] of t = W x + b.
        key_maps, value_maps: [m, e, e]: key i is about R_k t, value i about R_v t.
        value_constants: [m, e]: what is to be added to value i; zero where the output has no bias for it.
        error: the criterion's value over that of a t = 0: 0 exact, 1 nothing kept.
    """

    weight: Tensor
    bias: Tensor
    key_maps: Tensor
    value_maps: Tensor
    value_constants: Tensor
    error: float


def _root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root [e, e] of a second moment and its inverse; a ridge keeps both finite."""
    values, vectors = torch.linalg.eigh((metric + metric.mT) / 2)
    values = values.clamp(min=_RIDGE * values[..., -1:].clamp(min=1e-300))
    root = values.sqrt()
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors / root[..., None, :]) @ vectors.mT


def _scaled(metric: Tensor, second: Tensor) -> Tensor:
    """Metrics [m, e, e] such that the weighted size of all tensors with those second moments is 1."""
    return metric / (metric * second).sum().clamp(min=1e-300)


def _per_head(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[m, e, d] and [m, e] in fp64."""
    weight = weight.double()
    return weight, torch.zeros_like(weight[..., 0]) if bias is None else bias.double()


def merge_least_squares(
    key: tuple[Tensor, Tensor | None],
    value: tuple[Tensor, Tensor | None],
    moments: Moments,
    *,
    query_second: Tensor,
    output_second: Tensor,
    key_weight: float = 1.0,
    value_weight: float = 1.0,
    angles: Tensor | None = None,
) -> Merged:
    """Merge m key heads and m value heads into one shared head.

    Args:
        key, value: weight [m, e, d] and bias [m, e]; None: the model has no biases.
        moments: of the inputs x.
        query_second: [m, e, e], C_q of the queries that read each key head.
        output_second: [m, e, e], C_o of the output projections that read each value head.
        key_weight, value_weight: w_k and w_v.
        angles: [distances, r / 2], what the pairs (i, i + r / 2) of a key's first r elements are turned by
            against a query, at some distances between the two; None: no rotary positions.
    Raises:
        ValueError: for moments that are not finite, or weights that are negative or all zero.
    """
    if not (bool(moments.second.isfinite().all()) and bool(moments.mean.isfinite().all())):
        raise ValueError("calibration: the model's activations are not finite; take another checkpoint")
    if min(key_weight, value_weight) < 0 or key_weight + value_weight <= 0:
        raise ValueError(
            f"--key-weight {key_weight}, --value-weight {value_weight}: must be at least 0, and one above 0"
        )
    biased = value[1] is not None
    (wk, bk), (wv, bv) = _per_head(*key), _per_head(*value)
    # Without biases a constant cannot be moved elsewhere, so that it has to be fitted, too.
    sigma = moments.centred if biased else moments.second
    if angles is None:
        metrics = _weights(wk, wv, sigma, query_second, output_second, key_weight, value_weight)
        mix, key_maps, value_maps, error = _free(wk, wv, sigma, metrics)
        weight = mix @ torch.cat([wk, wv]).flatten(0, 1)
        # Any constant will do: this one is in the same proportion.
        bias = mix @ torch.cat([bk, bv]).flatten()
    else:
        turned = _averaged(query_second, angles)
        # The constant 1 as one more input carries the biases: a rotated constant is not one to all queries.
        ones = torch.cat([moments.mean, moments.mean.new_ones(1)])
        full = torch.zeros(len(ones), len(ones), dtype=torch.float64)
        full[:-1, :-1], full[-1], full[:, -1] = moments.second, ones, ones
        k, v = torch.cat([wk, bk[..., None]], -1), torch.cat([wv, bv[..., None]], -1)
        metrics = _weights(k, v, full, turned, output_second, key_weight, value_weight)
        both, value_maps, error = _in_turns(k, v, full, metrics)
        weight, bias = both[:, :-1], both[:, -1]
        key_maps = torch.eye(wk.shape[1], dtype=torch.float64).expand(wk.shape[0], -1, -1).clone()
        if biased:
            value_maps = _regression(wv, weight, moments.centred)
    constants = torch.zeros_like(bv)
    if biased:
        means = weight @ moments.mean + bias
        constants = wv @ moments.mean + bv - value_maps @ means
    return Merged(weight, bias, key_maps, value_maps, constants, error)


def _weights(
    k: Tensor, v: Tensor, sigma: Tensor, query: Tensor, output: Tensor, key_weight: float, value_weight: float
) -> Tensor:
    """Metrics [2 m, e, e] of all keys, then of all values."""
    keys = key_weight * _scaled(query.double(), k @ sigma @ k.mT)
    return torch.cat([keys, value_weight * _scaled(output.double(), v @ sigma @ v.mT)])


def _free(k: Tensor, v: Tensor, sigma: Tensor, metrics: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """The best t of rank e for any maps: the leading directions of all weighted keys and values.

    Returns:
        mix [e, 2 m e] of all keys, then values, that gives t; the maps of keys and of values; the error.
    """
    m, e, d = k.shape
    root, inverse = _root(metrics)
    stacked = (root @ torch.cat([k, v])).flatten(0, 1)
    values, vectors = torch.linalg.eigh(stacked @ sigma @ stacked.mT)
    leading = vectors[:, -e:]
    error = float((values[:-e].clamp(min=0).sum() / values.clamp(min=0).sum().clamp(min=1e-300)).item())
    mix = (leading.mT.view(e, 2 * m, 1, e) @ root).reshape(e, 2 * m * e)
    weight = leading.mT @ stacked
    maps = inverse @ leading.view(2 * m, e, e)
    # Any invertible map of t is as good: near the first key head, and of the weights' usual size.
    left, _, right = torch.linalg.svd(k[0] @ sigma @ weight.mT)
    size = torch.cat([k, v]).square().mean().sqrt() / weight.square().mean().sqrt().clamp(min=1e-300)
    turn = size * (left @ right)
    maps = maps @ torch.linalg.inv(turn)
    return turn @ mix, maps[:m], maps[m:], error


def _regression(v: Tensor, weight: Tensor, sigma: Tensor) -> Tensor:
    """[m, e, e]: the maps of t = W x to v_i in the least squares sense."""
    second = weight @ sigma @ weight.mT
    ridge = _RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    return torch.linalg.solve(second + ridge, (v @ sigma @ weight.mT).mT).mT


def _averaged(query: Tensor, angles: Tensor) -> Tensor:
    """C_q [m, e, e] as unrotated keys meet it: its mean over the rotations of some distances."""
    e, half = query.shape[-1], angles.shape[-1]
    total = torch.zeros_like(query, dtype=torch.float64)
    for turn in angles.double():
        rotation = torch.eye(e, dtype=torch.float64)
        first, second = torch.arange(half), torch.arange(half) + half
        rotation[first, first] = rotation[second, second] = turn.cos()
        rotation[first, second], rotation[second, first] = -turn.sin(), turn.sin()
        total += rotation.mT @ query.double() @ rotation
    return total / len(angles)


def _in_turns(k: Tensor, v: Tensor, sigma: Tensor, metrics: Tensor) -> tuple[Tensor, Tensor, float]:
    """The best t for keys as they are and values up to a map: W given R_v, then R_v given W."""
    m = len(k)
    for_keys, for_values = metrics[:m], metrics[m:]

    def error(weight: Tensor, maps: Tensor) -> float:
        off = torch.cat([k - weight, v - maps @ weight])
        return float((metrics * (off @ sigma @ off.mT)).sum().item())

    best: tuple[float, Tensor, Tensor] | None = None
    # From the keys' mean, and from that of keys and values.
    for weight in (k.mean(0), (k + v).mean(0) / 2):
        last = float("inf")
        for _ in range(_TURNS):
            maps = _regression(v, weight, sigma)
            pulled = maps.mT @ for_values
            left = (for_keys + pulled @ maps).sum(0)
            ridge = _RIDGE * left.diagonal().mean() * torch.eye(len(left), dtype=torch.float64)
            weight = torch.linalg.solve(left + ridge, (for_keys @ k + pulled @ v).sum(0))
            now = error(weight, maps)
            if best is None or now < best[0]:
                best = now, weight, maps
            if last - now < 1e-6 * now:
                break
            last = now
    assert best is not None
    off, weight, maps = best
    return weight, maps, off / max(error(torch.zeros_like(weight), maps), 1e-300)
