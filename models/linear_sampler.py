"""The update that one-step samplers share: linear in `x_t`, the prediction and fresh noise.

With `p` the prediction and `z` normal noise, a step is

    x_0    = x0_from_x    * x_t + x0_from_prediction    * p        then clipped
    noise  = noise_from_x * x_t + noise_from_prediction * p
    x_prev = mean_from_x0 * x_0 + mean_from_x * x_t + mean_from_noise * noise + noise_std * z

so that a sampler is data for a scan: one row of coefficients per step. The first two lines
hold the prediction type and are worked out here; the third is the sampler's own.

`prediction_gain`, the derivative of `x_prev` by `p` where nothing is clipped, is in the row
too: an error of the prediction, of variance `v`, has the variance `prediction_gain^2 v` in
`x_prev`, and a noise correction takes that much from the sampler's own noise through the
optional row entry `absorbed_variance`, leaving `mean_from_noise` as the schedule has it.

Coefficients are computed in float64 and stored as float32.

References:
  Saharia et al., Imagen, 2022, https://arxiv.org/abs/2205.11487 (dynamic thresholding).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.core.typing import Array, Float
from qjax.models.sampler_settings import Row, SamplerSettings, as_rows

__all__ = [
    "VARIANCES",
    "LinearSampler",
    "absorbed_variance",
    "noise_left",
    "prediction_coefficients",
    "threshold",
]

VARIANCES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSampler(SamplerSettings):
    """Settings and update of a one-step sampler that may clip x_0."""

    clip_sample: bool = True
    """Whether x_0 is clipped at every step. Set it to False for latents."""
    clip_sample_range: float = 1.0
    """Largest magnitude after clipping."""
    thresholding: bool = False
    """Dynamic thresholding in place of clipping: the range is a quantile of each image."""
    dynamic_thresholding_ratio: float = 0.995
    """That quantile of |x_0|, 0 to 1."""
    sample_max_value: float = 1.0
    """Upper bound of the range, whose lower bound is 1; at 1.0 it is plain clipping."""

    @abc.abstractmethod
    def noise_scale(self, row: Row, variance: Array | None) -> Array:
        """The noise's standard deviation, from the row and the network's variance channels."""

    def init(self, x_t: Float[Array, "b h w c"]) -> tuple[()]:
        """No state: every step looks at one prediction only."""
        return ()

    def step(
        self,
        row: Row,
        state: tuple[()],
        x_t: Float[Array, "b h w c"],
        prediction: Float[Array, "b h w c2"],
        noise: Float[Array, "b h w c"],
    ) -> tuple[Float[Array, "b h w c"], tuple[()]]:
        """The sample of the next step, and the state.

        Args:
          row: One step of `rows`; optionally with `absorbed_variance`, which is taken from
            the variance of the noise, down to 0 at most.
          state: `()`.
          x_t: Noisy sample, float32.
          prediction: The network's answer in its first c channels, float32; a variance it
            has learned in the next c.
          noise: Standard normal noise, float32.
        """
        c = x_t.shape[-1]
        prediction, variance = prediction[..., :c], prediction[..., c:]
        x_0 = self._clip(row["x0_from_x"] * x_t + row["x0_from_prediction"] * prediction)
        direction = row["noise_from_x"] * x_t + row["noise_from_prediction"] * prediction
        mean = (
            row["mean_from_x0"] * x_0
            + row["mean_from_x"] * x_t
            + row["mean_from_noise"] * direction
        )
        std = self.noise_scale(row, variance if variance.shape[-1] == c else None)
        return mean + noise_left(row, std) * noise, ()

    def _clip(self, x_0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        if self.thresholding:
            return threshold(
                x_0, ratio=self.dynamic_thresholding_ratio, max_value=self.sample_max_value
            )
        if self.clip_sample:
            return jnp.clip(x_0, -self.clip_sample_range, self.clip_sample_range)
        return x_0

    def _rows(
        self, timesteps: np.ndarray, alpha_bar: np.ndarray, **own: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The sampler's own coefficients, those of the prediction type, and the gain.

        Args:
          timesteps: The timesteps visited, `[s]`.
          alpha_bar: There, `[s]`.
          **own: `mean_from_x0`, `mean_from_x`, `mean_from_noise`, `noise_std` and what else
            `noise_scale` reads, each `[s]`.
        """
        if self.prediction_type == "epsilon" and not np.all(alpha_bar > 0):
            raise ValueError(
                f"an epsilon prediction says nothing about x_0 where the sample is pure noise; "
                f"alpha_bar is 0 at timestep {timesteps[int(np.argmin(alpha_bar))]}. Use "
                f"rescale_betas_zero_snr=False, or timestep_spacing='leading'."
            )
        given = prediction_coefficients(self.prediction_type, alpha_bar)
        gain = own["mean_from_x0"] * given["x0_from_prediction"]
        gain = gain + own["mean_from_noise"] * given["noise_from_prediction"]
        return as_rows(timesteps, prediction_gain=gain, **given, **own)


def prediction_coefficients(prediction_type: str, alpha_bar: np.ndarray) -> dict[str, np.ndarray]:
    """How x_0 and the noise follow from `x_t` and the prediction: the module's first two lines.

    Args:
      prediction_type: One of `PREDICTION_TYPES`.
      alpha_bar: At every step, above 0 for `"epsilon"` and below 1 for `"sample"`.

    Returns:
      `x0_from_x`, `x0_from_prediction`, `noise_from_x` and `noise_from_prediction`.
    """
    signal, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    one, zero = np.ones_like(signal), np.zeros_like(signal)
    if prediction_type == "epsilon":
        x0, noise = (1 / signal, -sigma / signal), (zero, one)
    elif prediction_type == "v_prediction":
        x0, noise = (signal, -sigma), (sigma, signal)
    else:
        x0, noise = (zero, one), (1 / sigma, -signal / sigma)
    return {
        "x0_from_x": x0[0],
        "x0_from_prediction": x0[1],
        "noise_from_x": noise[0],
        "noise_from_prediction": noise[1],
    }


def absorbed_variance(gain: Any, k: Any, variance: Any) -> Any:
    """Variance in the next sample of what is left of quantization noise: `(gain / (1 + k))^2 v`.

    Args:
      gain: `prediction_gain` of the row.
      k: What the prediction is divided by, less 1.
      variance: v, of the rest of the noise before that.
    """
    return (gain / (1 + k)) ** 2 * variance


def noise_left(row: Row, std: Array) -> Array:
    """What remains of the noise's standard deviation after the row's `absorbed_variance`.

    The variance goes down to 0 at most; without the entry `std` is returned.
    """
    if "absorbed_variance" not in row:
        return std
    rest = std**2 - row["absorbed_variance"]
    # The inner where keeps the gradient of the root finite where nothing is left.
    return jnp.where(rest > 0, jnp.sqrt(jnp.where(rest > 0, rest, 1)), 0)


def threshold(
    x_0: Float[Array, "b h w c"], *, ratio: float, max_value: float
) -> Float[Array, "b h w c"]:
    """Dynamic thresholding: every image clipped to a range of its own and divided by it.

    Args:
      x_0: Clean samples.
      ratio: Which quantile of |x_0| is the range, 0 to 1.
      max_value: Upper bound of the range, whose lower bound is 1.
    """
    axes = tuple(range(1, x_0.ndim))
    bound = jnp.quantile(jnp.abs(x_0), ratio, axis=axes, keepdims=True)
    bound = jnp.clip(bound, 1, max_value)
    return jnp.clip(x_0, -bound, bound) / bound
