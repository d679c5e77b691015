"""How much a metric of a set of pictures would vary with other pictures: the bootstrap.

A resample draws `n` of `n` pictures with replacement, given as counts `[resamples, n]`; a metric
of it is computed with each picture counted so often. Two metrics of the same counts are paired:
their difference varies with what the two do not share.

A Frechet or kernel distance of a resample is larger than that of the set, since some pictures come
twice; its spread is about right all the same. So intervals here are `estimate +- z std`, the
standard bootstrap interval, and not quantiles. They tell how the number would vary between sets
of this size, not where it would go with more pictures.

References:
  Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 12.
  Gretton et al., A Kernel Two-Sample Test, 2012, https://jmlr.org/papers/v13/gretton12a.html.
"""

import itertools
from collections.abc import Iterable

import numpy as np
from scipy import special

from qjax.core.metrics import FeatureStatistics, Interval, frechet_distance
from qjax.core.moments import FeatureMoments
from qjax.core.typing import Array, Float, Int

__all__ = [
    "frechet_resamples",
    "inception_score_resamples",
    "kernel_resamples",
    "resample_counts",
    "standard_interval",
]

AnyArray = Array | np.ndarray
ROWS = 1024


def resample_counts(n: int, *, resamples: int, seed: int = 0) -> Int[np.ndarray, "r n"]:
    """How often each of `n` pictures is drawn, in each resample; rows sum to `n`.

    Raises:
      ValueError: If `n` or `resamples` is not at least 2.
    """
    if n < 2 or resamples < 2:
        raise ValueError(f"n and resamples must be at least 2; got {n=}, {resamples=}.")
    rng = np.random.default_rng(seed)
    draws = (rng.integers(n, size=n) for _ in range(resamples))
    return np.stack([np.bincount(drawn, minlength=n) for drawn in draws])


def standard_interval(
    estimate: float, resampled: Float[np.ndarray, " r"], *, n: int, level: float = 0.95
) -> Interval:
    """`estimate +- z std` with the standard deviation of the resampled values.

    Raises:
      ValueError: If `level` does not lie between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}.")
    half = float(special.ndtri((1 + level) / 2) * np.std(resampled, ddof=1))
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half, level=level, n=n)


def frechet_resamples(
    x: Float[AnyArray, "n d"],
    y: Float[AnyArray, "m d"] | FeatureStatistics,
    counts: Int[np.ndarray, "r n"],
    counts_y: Int[np.ndarray, "r m"] | None = None,
) -> Float[np.ndarray, " r"]:
    """Frechet distance of each resample of `x` to `y`.

    Args:
      x: Features.
      y: Features, or the statistics of a set that is not resampled.
      counts: As `resample_counts` gives them.
      counts_y: Those of `y`: `counts` for pictures that are paired with those of `x`; None leaves
        `y` as it is.
    """
    if isinstance(y, FeatureStatistics):
        sets: Iterable[FeatureStatistics] = itertools.repeat(y, len(counts))
    elif counts_y is None:
        sets = itertools.repeat(FeatureMoments.of(y).statistics(), len(counts))
    else:
        sets = (FeatureMoments.of(y, row).statistics() for row in counts_y)
    distances = [
        frechet_distance(FeatureMoments.of(x, row).statistics(), theirs).value
        for row, theirs in zip(counts, sets, strict=True)
    ]
    return np.array(distances)


def kernel_resamples(
    x: Float[AnyArray, "n d"],
    y: Float[AnyArray, "m d"],
    counts: Int[np.ndarray, "r n"],
    counts_y: Int[np.ndarray, "r m"],
    *,
    paired: bool = False,
) -> Float[np.ndarray, " r"]:
    """Unbiased squared MMD of each resample, of all pictures at once, with KID's kernel.

    With all counts 1 it is that of the sets themselves. Blocks of rows are computed and thrown
    away, so that no `[n, n]` array is in memory.

    Args:
      x: Features.
      y: The set to compare with.
      counts: As `resample_counts` gives them.
      counts_y: Those of `y`.
      paired: Whether `x[i]` and `y[i]` were drawn together, from the same noise for example. Such
        pairs are alike, and left out of the mean over both sets, without which the distance of
        equal distributions would come out negative (Gretton et al. 2012, equation 4). `counts` and
        `counts_y` must be equal then.

    Raises:
      ValueError: If `paired` is set and the counts differ.
    """
    if paired and not np.array_equal(counts, counts_y):
        raise ValueError("pairs are drawn together: counts and counts_y must be equal.")
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    u, v = np.asarray(counts, np.float64), np.asarray(counts_y, np.float64)
    n, m = len(a), len(b)
    own = lambda f, g, w: w @ (((f * g).sum(axis=1) / f.shape[1] + 1) ** 3)
    within_x = (_weighted(a, a, u, u) - own(a, a, u)) / (n * (n - 1))
    within_y = (_weighted(b, b, v, v) - own(b, b, v)) / (m * (m - 1))
    if paired:
        across = (_weighted(a, b, u, v) - own(a, b, u)) / (n * (n - 1))
    else:
        across = _weighted(a, b, u, v) / (n * m)
    return within_x + within_y - 2 * across


def _weighted(a: np.ndarray, b: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """`u K v'` of each row of the counts, `K` the kernel of all pairs."""
    total = np.zeros(len(u))
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        kernel = (a[rows] @ b.T / a.shape[1] + 1) ** 3
        total += np.sum((u[:, rows] @ kernel) * v, axis=1)
    return total


def inception_score_resamples(
    logits: Float[AnyArray, "n classes"], counts: Int[np.ndarray, "r n"]
) -> Float[np.ndarray, " r"]:
    """Inception Score of each resample, in one split."""
    log_p = special.log_softmax(np.asarray(logits, np.float64), axis=1)
    p = np.exp(log_p)
    share = counts / counts.sum(axis=1, keepdims=True)
    marginal = share @ p
    entropy = -special.xlogy(marginal, marginal).sum(axis=1)
    return np.exp(share @ (p * log_p).sum(axis=1) + entropy)
