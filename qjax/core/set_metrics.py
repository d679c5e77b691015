"""Inception Score, precision and recall: what features say of whole sets of pictures.

With `p(y | x)` the classes that a net sees in picture `x`, and `p(y)` their mean over the set,

    IS = exp(mean over x of KL(p(y | x) || p(y))),

between 1 and the number of classes. With the ball around each picture of a set that reaches to its
`k`-th nearest neighbour in the set, precision is the share of the generated pictures that lie in
a ball of the reference, recall the share of the reference's in one of the generated.

Everything is computed in float64 on the host.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

from qjax.core.typing import Array, Bool, Float

__all__ = ["InceptionScore", "PrecisionRecall", "inception_score", "precision_recall"]

AnyArray = Array | np.ndarray
# Distances of so many rows to all others are in memory at a time.
ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """An Inception Score.

    Attributes:
      mean: Over the splits.
      std: Over the splits, divided by their number as the original code does; 0 with one.
      splits: How many.
      n: Pictures.
    """

    mean: float
    std: float
    splits: int
    n: int


def inception_score(logits: Float[AnyArray, "n classes"], *, splits: int = 10) -> InceptionScore:
    """Inception Score: the mean over `splits` parts of the pictures, in their order.

    It grows with the size of a part: compare at equal `n` and `splits`. ADM's evaluator scores
    parts of 5,000, which is ten splits of 50,000.

    Args:
      logits: Of the classes; with the network of FID those without the bias.
      splits: Parts of as equal a size as can be.

    Raises:
      ValueError: If the logits are not finite and `[n, classes]`, or fewer than `splits`.

    References:
      Salimans et al., Improved Techniques for Training GANs, 2016,
      https://arxiv.org/abs/1606.03498.
    """
    x = np.asarray(logits)
    if x.ndim != 2 or not 1 <= splits <= len(x) or not np.isfinite(x).all():
        raise ValueError(
            f"logits must be finite and [n, classes] with n >= splits; got shape {x.shape}, "
            f"{splits=}."
        )
    ends = np.arange(splits + 1) * len(x) // splits
    scores = [_score(x[a:b]) for a, b in itertools.pairwise(ends)]
    return InceptionScore(
        mean=float(np.mean(scores)), std=float(np.std(scores)), splits=splits, n=len(x)
    )


def _score(logits: np.ndarray) -> float:
    log_p = special.log_softmax(logits.astype(np.float64), axis=1)
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    # x log x, which is 0 at 0, and not p log p - p log q, which a class nobody has would spoil.
    return float(np.exp((p * log_p).sum(axis=1).mean() - special.xlogy(marginal, marginal).sum()))


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionRecall:
    """Precision and recall, picture by picture.

    Attributes:
      inside: `[n]`, whether each generated picture lies in the manifold of the reference.
      covered: `[m]`, whether each picture of the reference lies in that of the generated.
      k: Neighbour that a ball reaches to.
    """

    inside: Bool[np.ndarray, " n"]
    covered: Bool[np.ndarray, " m"]
    k: int

    @property
    def precision(self) -> float:
        """Share of the generated pictures that look like the reference."""
        return float(self.inside.mean())

    @property
    def recall(self) -> float:
        """Share of the reference that the generated pictures reach."""
        return float(self.covered.mean())


def precision_recall(
    x: Float[AnyArray, "n d"], reference: Float[AnyArray, "m d"], *, k: int = 3
) -> PrecisionRecall:
    """Improved precision and recall of generated features against a reference.

    Args:
      x: Features of the generated pictures.
      reference: Features of the real ones, or of those to compare with.
      k: Neighbour that a ball reaches to, the picture itself not counted.

    Raises:
      ValueError: If the widths differ, features are not finite, or a set has `k` or fewer.

    References:
      Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing Generative Models,
      2019, https://arxiv.org/abs/1904.06991; on Inception features as Dhariwal and Nichol, 2021.
    """
    a, b = (np.asarray(features, np.float64) for features in (x, reference))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"both sets must be [n, d] of one width; got {a.shape} and {b.shape}. Take them from "
            "one layer of one net."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features must be finite; got a NaN or an infinity.")
    if k < 1 or min(len(a), len(b)) <= k:
        raise ValueError(
            f"k must be at least 1 and each set hold more than k; got {k=}, {len(a)}, {len(b)}."
        )
    reach_a, reach_b = _reaches(a, k), _reaches(b, k)
    inside, covered = np.zeros(len(a), bool), np.zeros(len(b), bool)
    for rows, distance in _squared_distances(a, b):
        inside[rows] = (distance <= reach_b).any(axis=1)
        covered |= (distance <= reach_a[rows, None]).any(axis=0)
    return PrecisionRecall(inside=inside, covered=covered, k=k)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of `a`, and their squared distances to all of `b`."""
    # About the common middle, so that little is lost when squares of lengths cancel.
    middle = b.mean(axis=0)
    a, b = a - middle, b - middle
    length = (b * b).sum(axis=1)
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        some = a[rows]
        squared = (some * some).sum(axis=1)[:, None] + length - 2 * some @ b.T
        yield rows, np.maximum(squared, 0.0)


def _reaches(features: np.ndarray, k: int) -> Float[np.ndarray, " n"]:
    """Squared distance of each to its `k`-th nearest neighbour, itself not counted."""
    reach = np.empty(len(features))
    for rows, distance in _squared_distances(features, features):
        own = np.arange(len(distance))
        distance[own, own + rows.start] = np.inf
        reach[rows] = np.partition(distance, k - 1, axis=1)[:, k - 1]
    return reach
