"""Quantization noise of a sampler step: its moments, and what of it can be corrected.

With `e` the guided answer of the float network and `q` that of the quantized one on the same
sample, the noise `D = q - e` is split into a part that follows `e` and a rest (PTQD):

    D = k e + D'
    k        = cov(e, D) / var(e)          least squares over all samples, channels and pixels
    mu[c]    = mean of D' in channel c
    variance = mean over channels of the variance of D' within the channel

and the corrected answer is

    (q - mu) / (1 + k) = e + (D' - mu) / (1 + k)

The paper takes no k below 0, `max(k, 0)`: where the noise runs against the answer nothing is
divided, and `mu` and `variance` are those of the rest that is left with k = 0. That rest still
follows the answer, against it: the answer's variance is smaller for it, where a sampler takes
it for independent noise, and absorbs too much.

The paper's line has one intercept for all channels, though a mean is taken off in each: where
channels have biases of their own, their differences are mistaken for a slope. `slope="within"`
takes the moments about each channel's means, which is least squares with all that is corrected.
Where k is below 0, where the quantized answer is too small, the paper leaves it; `slope="signed"` is
`"within"` of either sign.

Dividing by `1 + k` is not the best scalar. The answer of least squared error is

    e ~ g (q - mu),    g = cov(e, q) / var(q) within channels         slope="mmse"

which is smaller where there is noise, and may be larger than 1: it is safe for either sign of
k. What it leaves is uncorrelated with its own result, and not with `e`: its variance falls
below the float network's, so there is nothing for a sampler to absorb.

All moments are sums over samples and pixels in float64, by channel: five of them and a count
describe a step, whatever the number of samples.

References:
  He et al., PTQD: Accurate Post-Training Quantization for Diffusion Models, NeurIPS 2023,
  https://arxiv.org/abs/2305.10657.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np

from qjax.core.typing import Float, Int

__all__ = ["Bias", "Correction", "Moments", "Slope", "fit_correction", "residual_test"]

Bias = Literal["residual", "total", "none"]
Slope = Literal["pooled", "within", "signed", "mmse"]

# Of what is multiplied by, 1 / (1 + k), for networks whose answer is noise alone.
_GAINS = (0.1, 10.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Sums over samples and pixels by channel, float64 `[c]`.

    Attributes:
      count: Values in a channel.
      e: Sum of the float answer.
      ee: Of its square.
      d: Of the noise.
      dd: Of its square.
      ed: Of their product.
    """

    count: int
    e: Float[np.ndarray, " c"]
    ee: Float[np.ndarray, " c"]
    d: Float[np.ndarray, " c"]
    dd: Float[np.ndarray, " c"]
    ed: Float[np.ndarray, " c"]

    @classmethod
    def of(cls, e: Float[np.ndarray, "b h w c"], d: Float[np.ndarray, "b h w c"]) -> "Moments":
        """The moments of some samples.

        Args:
          e: Guided answers of the float network.
          d: The quantized ones minus these.

        Raises:
          ValueError: If the shapes differ, or a value is not finite.
        """
        e, d = (np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in (e, d))
        if e.shape != d.shape:
            raise ValueError(f"e and d must have the same shape; got {e.shape} and {d.shape}.")
        if not (np.isfinite(e).all() and np.isfinite(d).all()):
            raise ValueError(
                "the answers of both networks must be finite; they are not. Quantize fewer "
                "layers, or to more bits."
            )
        total = lambda x: x.sum(axis=0)
        return cls(len(e), total(e), total(e * e), total(d), total(d * d), total(e * d))

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of samples."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Moments(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def slope(self) -> float:
        """k, of either sign; 0 if the answer is constant."""
        var_e, _, cov = self._pooled()
        return cov / var_e if var_e > 0 else 0.0

    @property
    def correlation(self) -> float:
        """Pearson's, of the noise with the answer; 0 if either is constant."""
        var_e, var_d, cov = self._pooled()
        return cov / math.sqrt(var_e * var_d) if var_e > 0 and var_d > 0 else 0.0

    @property
    def signal(self) -> float:
        """Mean square of the float answer."""
        return float(self.ee.mean() / self.count)

    @property
    def bias(self) -> Float[np.ndarray, " c"]:
        """Mean of the noise."""
        return self.d / self.count

    def error(self, correction: "Correction | None" = None) -> float:
        """Mean square of what is wrong with the answer, as it is or corrected."""
        k, mu, _ = NO_CORRECTION if correction is None else correction
        a, n = 1 / (1 + k), self.count
        # (q - mu) a - e = (a - 1) e + a (D - mu)
        square = self.dd - 2 * mu * self.d + n * np.square(mu)
        cross = self.ed - mu * self.e
        power = (a - 1) ** 2 * self.ee + 2 * a * (a - 1) * cross + a**2 * square
        return float(np.mean(power) / n)

    def _pooled(self) -> tuple[float, float, float]:
        """Variances of answer and noise and their covariance, over all channels."""
        n = self.count * len(self.e)
        e, d = self.e.sum() / n, self.d.sum() / n
        var_e = self.ee.sum() / n - e * e
        var_d = self.dd.sum() / n - d * d
        return max(float(var_e), 0.0), max(float(var_d), 0.0), float(self.ed.sum() / n - e * d)


class Correction(NamedTuple):
    """One row of the step table's entry `"noise_correction"` (`samplers.correct_prediction`).

    Attributes:
      k: Above -1; 0 for none.
      mu: `[c]`; zeros for none.
      variance: Of the rest, before it is divided by `1 + k`; 0 for none to absorb.
    """

    k: float
    mu: Float[np.ndarray, " c"]
    variance: float


NO_CORRECTION = Correction(0.0, np.zeros(1), 0.0)


def fit_correction(
    moments: Moments, *, correlated: bool = True, bias: Bias = "residual", slope: Slope = "pooled"
) -> Correction:
    """What is corrected of a step's noise; the head of the file has the formulas.

    Args:
      moments: Of the step.
      correlated: Whether the part that follows the answer is; else k is 0.
      bias: `"residual"`, the mean of the rest; `"total"`, that of the whole noise, as the authors'
        program has it, which leaves `-k mean(e) / (1 + k)`; or `"none"`.
      slope: `"pooled"`, the paper's, or `"within"`, both not below 0; `"signed"` or `"mmse"`.
    """
    n = moments.count
    mean_e, mean_d = moments.e / n, moments.d / n
    var_e = moments.ee / n - mean_e**2
    var_d = moments.dd / n - mean_d**2
    cov = moments.ed / n - mean_e * mean_d
    k = 0.0
    if correlated and slope == "pooled":
        k = max(moments.slope, 0.0)
    elif correlated and slope == "within":
        k = max(_ratio(cov, var_e, 0.0), 0.0)
    elif correlated and slope == "signed":
        k = max(_ratio(cov, var_e, 0.0), 1 / _GAINS[1] - 1)
    elif correlated:
        gain = _ratio(var_e + cov, var_e + 2 * cov + var_d, 1.0)
        k = 1 / float(np.clip(gain, *_GAINS)) - 1
    mu = mean_d - k * mean_e if bias == "residual" else mean_d
    if bias == "none":
        mu = np.zeros_like(mean_d)
    rest = float(np.mean(var_d - 2 * k * cov + k**2 * var_e))
    return Correction(k, mu, max(rest, 0.0))


def _ratio(above: np.ndarray, below: np.ndarray, otherwise: float) -> float:
    """The ratio of two sums over channels."""
    return float(above.sum() / below.sum()) if below.sum() > 0 else otherwise


class ResidualTest(NamedTuple):
    """How near a sample of the rest is to a normal distribution.

    Attributes:
      skewness: 0 for a normal distribution.
      kurtosis: Excess; 0 for a normal distribution.
      p_value: Of D'Agostino and Pearson's test; below 0.01 the paper would call it not normal.
        It depends on how many values were drawn.
    """

    skewness: float
    kurtosis: float
    p_value: float


def residual_test(
    e: Float[np.ndarray, " n"],
    d: Float[np.ndarray, " n"],
    channel: Int[np.ndarray, " n"],
    correction: Correction,
) -> ResidualTest:
    """D'Agostino and Pearson's test of a sample of the rest (`scipy.stats.normaltest`).

    The rest is taken about the bias of its channel. Values that are all the same are none of a
    normal distribution: their p-value is 0.

    Args:
      e: Values of the float answer.
      d: Of the noise.
      channel: Of each.
      correction: Of the step.
    """
    from scipy import stats  # a second of its own, and nobody else needs it

    mu = np.broadcast_to(correction.mu, (int(np.max(channel)) + 1,))
    x = np.asarray(d, np.float64) - correction.k * np.asarray(e, np.float64) - mu[channel]
    if np.ptp(x) <= 1e-12 * max(float(np.abs(x).max()), 1e-300):
        return ResidualTest(0.0, 0.0, 0.0)
    return ResidualTest(
        float(stats.skew(x)), float(stats.kurtosis(x)), float(stats.normaltest(x).pvalue)
    )
