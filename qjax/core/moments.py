"""Mean and covariance of more features than fit into memory, from sums over parts.

    n, S = sum of f, P = sum of f f'     ->     mean = S / n, cov = (P - n mean mean') / (n - 1)

in float64. Sums of parts, added in one order, are the sums of the whole in that order to the last
bit, so a run that was cut in parts and resumed ends with the same statistics.
"""

from dataclasses import dataclass

import numpy as np

from qjax.core.metrics import FeatureStatistics
from qjax.core.typing import Array, Float

__all__ = ["FeatureMoments"]

# Rows that are widened to float64 at a time.
ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureMoments:
    """Sums over the features of a set of pictures; `a + b` are those of both sets.

    Attributes:
      n: How many.
      total: `[d]`, float64: the sum of the features.
      outer: `[d, d]`, float64: the sum of their products with themselves.
    """

    n: int
    total: Float[np.ndarray, " d"]
    outer: Float[np.ndarray, "d d"]

    @classmethod
    def zero(cls, d: int) -> "FeatureMoments":
        """Of no picture."""
        return cls(n=0, total=np.zeros(d), outer=np.zeros((d, d)))

    @classmethod
    def of(
        cls, features: Float[Array | np.ndarray, "n d"], weights: np.ndarray | None = None
    ) -> "FeatureMoments":
        """Of some features; with `weights` each counts so many times.

        Args:
          features: Of any float dtype.
          weights: Whole numbers, 0 or more.

        Raises:
          ValueError: If the features are not `[n, d]` or not finite.
        """
        if features.ndim != 2 or not np.isfinite(features).all():
            raise ValueError(
                f"features must be finite and [n, d]; got shape {features.shape} with "
                f"{int((~np.isfinite(features)).sum())} values that are not."
            )
        n = len(features) if weights is None else int(weights.sum())
        sums = cls.zero(features.shape[1])
        for start in range(0, len(features), ROWS):
            x = np.asarray(features[start : start + ROWS], np.float64)
            weighted = x
            if weights is not None:
                weighted = x * np.asarray(weights[start : start + ROWS], np.float64)[:, None]
            sums = cls(
                n=n, total=sums.total + weighted.sum(axis=0), outer=sums.outer + weighted.T @ x
            )
        return cls(n=n, total=sums.total, outer=sums.outer)

    def __add__(self, other: "FeatureMoments") -> "FeatureMoments":
        return FeatureMoments(
            n=self.n + other.n, total=self.total + other.total, outer=self.outer + other.outer
        )

    def statistics(self) -> FeatureStatistics:
        """Mean and unbiased covariance.

        Raises:
          ValueError: If there are fewer than two pictures.
        """
        if self.n < 2:
            raise ValueError(f"a covariance takes two pictures at least; got {self.n}.")
        mean = self.total / self.n
        cov = (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1)
        return FeatureStatistics(mean=mean, cov=(cov + cov.T) / 2, n=self.n)
