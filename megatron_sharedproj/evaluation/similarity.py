"""What queries, keys, values and their scores look like: similarity, rank, symmetry, attention.

Plain functions of tensors. Sums over tokens are kept in float64, so that no activation has to stay:
:class:`PairSums` is fed batch by batch.

Shape legend: n tokens, s sequence length, b batch, h query heads, g groups (key/value heads), e head size,
m representations side by side (heads, or 1 for a whole layer), p and q features.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores held at a time: 64 MiB in fp32.
_SCORES = 1 << 24


class PairSums:
    """Sums over tokens of two representations, from which HSIC with linear kernels follows exactly.

    HSIC: A. Gretton et al., "Measuring Statistical Dependence with Hilbert-Schmidt Norms" (2005), and its
    unbiased estimator, L. Song et al., "Feature Selection via Dependence Maximization" (JMLR 13, 2012,
    theorem 2). With a linear kernel all of it is in feature space: p x q numbers, not n x n.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: x [n, m, p], y [n, m, q]; x may be y itself."""
        x, y = x.double(), y.double()
        xx, yy = x.square().sum(-1), y.square().sum(-1)
        new = [
            x.sum(0),
            y.sum(0),
            torch.einsum("nmp,nmq->mpq", x, y),
            xx.sum(0),
            yy.sum(0),
            (xx * yy).sum(0),
            torch.einsum("nm,nmp->mp", yy, x),
            torch.einsum("nm,nmq->mq", xx, y),
        ]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new
        self.count += x.shape[0]

    def covariance(self) -> Tensor:
        """Sum of the centred products, [m, p, q] float64: not divided by the number of tokens."""
        first_x, first_y, second = self._sums[:3]
        return second - first_x[..., :, None] * first_y[..., None, :] / self.count

    def hsic(self, *, unbiased: bool = False) -> Tensor:
        """HSIC of the m pairs up to a factor that cancels in CKA, [m] float64.

        Raises:
            ValueError: unbiased, for less than 4 tokens.
        """
        if not unbiased:
            return self.covariance().square().sum((-2, -1))
        n = self.count
        if n < 4:
            raise ValueError(f"{n} tokens: the unbiased estimator needs at least 4")
        first_x, first_y, second, xx, yy, both, x_by_yy, y_by_xx = self._sums
        # The kernels X X^T and Y Y^T without their diagonals.
        trace = second.square().sum((-2, -1)) - both
        sum_x, sum_y = first_x.square().sum(-1) - xx, first_y.square().sum(-1) - yy
        product = (
            torch.einsum("mp,mpq,mq->m", first_x, second, first_y)
            - (first_x * x_by_yy).sum(-1)
            - (first_y * y_by_xx).sum(-1)
            + both
        )
        return trace + sum_x * sum_y / ((n - 1) * (n - 2)) - 2 * product / (n - 2)


def cka_of_sums(xx: PairSums, yy: PairSums, xy: PairSums, *, unbiased: bool = False) -> Tensor:
    """CKA of m pairs, [m] float64, from the sums of each with itself and with the other.

    Of one of the two there may be fewer, m / k: each then stands for k that follow each other (groups). NaN
    where one of the two does not vary.
    """
    both = xy.hsic(unbiased=unbiased)
    own = [sums.hsic(unbiased=unbiased) for sums in (xx, yy)]
    left, right = (value.repeat_interleave(len(both) // len(value)) for value in own)
    return both / (left * right).sqrt()


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> float:
    """Linear CKA of x [n, p] and y [n, q]: 1 where one is a rotated, scaled and shifted copy of the other.

    S. Kornblith et al., "Similarity of Neural Network Representations Revisited" (ICML 2019), section 3: the
    squared Frobenius norm of Y^T X over the product of those of X^T X and Y^T Y unsquared, columns centred.

    Args:
        unbiased: from the unbiased estimator of HSIC. The plain one is too high by about features / tokens.
    """
    xx, yy, xy = PairSums(), PairSums(), PairSums()
    for sums, left, right in ((xx, x, x), (yy, y, y), (xy, x, y)):
        sums.add(left[:, None], right[:, None])
    return cka_of_sums(xx, yy, xy, unbiased=unbiased).item()


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp of the entropy of the singular values over their sum: [..., p] -> [...] float64, 1 to p.

    O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007). A
    matrix of zeros has none: NaN.
    """
    values = singular_values.double()
    share = values / values.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def rank_for_variance(singular_values: Tensor, share: float = 0.99) -> Tensor:
    """How many of the largest singular values hold a share of the squares: [..., p] -> [...] int64."""
    squares = singular_values.double().square().sort(-1, descending=True).values
    below = squares.cumsum(-1) < share * squares.sum(-1, keepdim=True)
    return below.sum(-1) + 1


def singular_values(covariance: Tensor) -> Tensor:
    """Of a matrix whose product with itself X^T X is given: [..., p, p] -> [..., p] float64."""
    return torch.linalg.eigvalsh(covariance.double()).clamp_min(0.0).sqrt()


def symmetry_parts(query: Tensor, key: Tensor, *, centred: bool = False) -> tuple[Tensor, Tensor]:
    """<S, S^T> and |S|^2 of S = Q K^T, without S: query, key [..., s, e] -> two of [...] float64.

    Args:
        centred: of S without the means of its rows and columns. What all keys have in common adds the same to
            a row, which softmax does not see; a common part of queries and keys is symmetric by itself.
    """
    query, key = query.double(), key.double()
    if centred:
        query, key = query - query.mean(-2, keepdim=True), key - key.mean(-2, keepdim=True)
    product = key.mT @ query
    return (product * product.mT).sum((-2, -1)), ((query.mT @ query) * (key.mT @ key)).sum((-2, -1))


def symmetry(query: Tensor, key: Tensor, *, centred: bool = False) -> Tensor:
    """How symmetric S = Q K^T is: query, key [..., s, e] -> [...] float64, from -1 to 1.

    (|S_sym|^2 - |S_anti|^2) / |S|^2 with S_sym = (S + S^T) / 2 and S_anti = (S - S^T) / 2: 1 symmetric,
    0 as of unrelated entries, -1 antisymmetric (M. Saponati et al., arXiv 2502.10927, of W_q^T W_k, which is
    ``symmetry(W_q^T, W_k^T)`` for weights [e, d]).
    """
    product, square = symmetry_parts(query, key, centred=centred)
    return product / square


def attention_sums(query: Tensor, key: Tensor, scale: float) -> dict[str, Tensor]:
    """Sums over the positions but the first, which has no choice, of one sequence's causal attention.

    Args:
        query: [s, h, e]; key: [s, g, e]; query head i reads group i // (h / g).
        scale: factor on the scores.
    Returns:
        [h] float64 each: ``entropy`` in nats; ``entropy_share``, over the log of the tokens seen;
        ``first_token`` and ``self``: the weight on the first token (attention sinks: G. Xiao et al., arXiv
        2309.17453) and on the position itself.
    """
    s, h, _ = query.shape
    per_group = h // key.shape[1]
    keys = key.repeat_interleave(per_group, dim=1)
    names = ("entropy", "entropy_share", "first_token", "self")
    sums = {name: torch.zeros(h, dtype=torch.float64, device=query.device) for name in names}
    size = max(1, _SCORES // (h * s))
    places = torch.arange(s, device=query.device)
    for start in range(1, s, size):
        rows = places[start : start + size]
        scores = torch.einsum("she,the->hst", query[rows].float(), keys.float()) * scale
        log_weights = scores.masked_fill(places > rows[:, None], float("-inf")).log_softmax(-1)
        weights = log_weights.exp()
        # 0 log 0 is 0: what is masked has no part.
        entropy = -(weights * log_weights.clamp_min(torch.finfo(torch.float32).min)).sum(-1).double()
        own = weights.gather(-1, rows.expand(h, -1)[..., None])
        sums["entropy"] += entropy.sum(-1)
        sums["entropy_share"] += (entropy / (rows + 1).double().log()).sum(-1)
        sums["first_token"] += weights[..., 0].double().sum(-1)
        sums["self"] += own.double().sum((-2, -1))
    return sums


def uniform_weight(seq_length: int) -> float:
    """The mean weight of the first token, and of the position itself, where all tokens seen weigh alike."""
    return sum(1.0 / seen for seen in range(2, seq_length + 1)) / max(seq_length - 1, 1)
