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
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np

from qjax.core.steps import TableKey
from qjax.core.typing import Array, Float
from qjax.models.schedules import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    SPACINGS,
    Schedule,
    spaced_timesteps,
)

__all__ = ["VARIANCES", "LinearSampler", "Row"]

VARIANCES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)

_CHOICES = {
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": SPACINGS,
    "beta_schedule": BETA_SCHEDULES,
    "variance_type": VARIANCES,
}

# Settings of other schedulers that say nothing about a linear one-step sampler; the last two
# are found in old configs only.
_OF_OTHERS = {
    "variance_type",
    "set_alpha_to_one",
    "skip_prk_steps",
    "interpolation_type",
    "tensor_format",
    "timestep_values",
}

Row = Mapping[str, Array]
"""The coefficients of one step, scalars; `t` is int32, the others float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSampler(abc.ABC):
    """Settings and update of a one-step sampler; the fields are those of diffusers' configs."""

    name: ClassVar[str]
    """Name in step tables and messages."""
    diffusers_class: ClassVar[str]
    """Name of the scheduler class with the same update."""

    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """The noise schedule of training."""
    prediction_type: str = "epsilon"
    """What the network answers, one of `PREDICTION_TYPES`."""
    timestep_spacing: str = "leading"
    """Which timesteps are visited, one of `SPACINGS` (`schedules.spaced_timesteps`)."""
    steps_offset: int = 0
    """Added to the timesteps of `"leading"`."""
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

    def __post_init__(self) -> None:
        _raise_for(_bad_choices(vars(self)), type(self).__name__)

    @abc.abstractmethod
    def rows(self, steps: int, *, eta: float = 0.0) -> dict[str, np.ndarray]:
        """The coefficients of every step, as the module names them, each `[s]`."""

    @abc.abstractmethod
    def table_key(
        self, steps: int, *, eta: float = 0.0, guidance_scale: float | None = None
    ) -> TableKey:
        """The settings of a run, as the entries of a step table are compared with them."""

    @abc.abstractmethod
    def noise_scale(self, row: Row, variance: Array | None) -> Array:
        """The noise's standard deviation, from the row and the network's variance channels."""

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """The sampler with the settings of a scheduler's config.

        The class named in the config is not looked at, so DDIM can be read from the config
        of a PNDM or Euler scheduler, as diffusers allows; `sampler_from_diffusers` looks.

        Raises:
          ValueError: If the config has unknown keys that are set, or unknown values; it names
            all of them.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"schedule"}
        known = own | {field.name for field in dataclasses.fields(Schedule)} | _OF_OTHERS
        bad = _bad_choices(config)
        for key, value in config.items():
            # None and False switch off a setting that we do not have: nothing is lost.
            if not key.startswith("_") and key not in known and value not in (None, False):
                bad.append(f"{key}={value!r} (unknown)")
        _raise_for(bad, cls.__name__)
        settings = {key: value for key, value in config.items() if key in own}
        return cls(schedule=Schedule.from_diffusers(config), **settings)

    def to_diffusers(self) -> dict[str, Any]:
        """The scheduler config of diffusers; `timestep_spacing="respaced"` only we can read."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del own["schedule"]
        return {"_class_name": self.diffusers_class, **self.schedule.to_diffusers(), **own}

    def timesteps(self, steps: int) -> np.ndarray:
        """The timesteps visited in `steps` steps, int64 `[s]`, falling."""
        return spaced_timesteps(
            steps,
            num_train_timesteps=self.schedule.num_train_timesteps,
            spacing=self.timestep_spacing,
            steps_offset=self.steps_offset,
        )

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
        if "absorbed_variance" in row:
            rest = std**2 - row["absorbed_variance"]
            # The inner where keeps the gradient of the root finite where nothing is left.
            std = jnp.where(rest > 0, jnp.sqrt(jnp.where(rest > 0, rest, 1)), 0)
        return mean + std * noise, ()

    def _clip(self, x_0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        if self.thresholding:
            magnitude, axes = jnp.abs(x_0), tuple(range(1, x_0.ndim))
            bound = jnp.quantile(
                magnitude, self.dynamic_thresholding_ratio, axis=axes, keepdims=True
            )
            bound = jnp.clip(bound, 1, self.sample_max_value)
            return jnp.clip(x_0, -bound, bound) / bound
        if self.clip_sample:
            return jnp.clip(x_0, -self.clip_sample_range, self.clip_sample_range)
        return x_0

    def _rows(self, alpha_bar: np.ndarray, **own: np.ndarray) -> dict[str, np.ndarray]:
        """The sampler's own coefficients, those of the prediction type, and the gain.

        Args:
          alpha_bar: At the timesteps visited, `[s]`.
          **own: `mean_from_x0`, `mean_from_x`, `mean_from_noise`, `noise_std` and what else
            `noise_scale` reads, each `[s]`.
        """
        timesteps = self.timesteps(len(alpha_bar))
        if self.prediction_type == "epsilon" and not np.all(alpha_bar > 0):
            raise ValueError(
                f"an epsilon prediction says nothing about x_0 where the sample is pure noise; "
                f"alpha_bar is 0 at timestep {timesteps[int(np.argmin(alpha_bar))]}. Use "
                f"rescale_betas_zero_snr=False, or timestep_spacing='leading'."
            )
        signal, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        one, zero = np.ones_like(signal), np.zeros_like(signal)
        if self.prediction_type == "epsilon":
            x0_from_x, x0_from_prediction = 1 / signal, -sigma / signal
            noise_from_x, noise_from_prediction = zero, one
        elif self.prediction_type == "v_prediction":
            x0_from_x, x0_from_prediction = signal, -sigma
            noise_from_x, noise_from_prediction = sigma, signal
        else:
            x0_from_x, x0_from_prediction = zero, one
            noise_from_x, noise_from_prediction = 1 / sigma, -signal / sigma
        gain = own["mean_from_x0"] * x0_from_prediction
        gain = gain + own["mean_from_noise"] * noise_from_prediction
        rows = {
            "x0_from_x": x0_from_x,
            "x0_from_prediction": x0_from_prediction,
            "noise_from_x": noise_from_x,
            "noise_from_prediction": noise_from_prediction,
            "prediction_gain": gain,
            **own,
        }
        rows = {name: np.asarray(value, np.float32) for name, value in rows.items()}
        return {"t": timesteps.astype(np.int32), **rows}


def _bad_choices(config: Mapping[str, Any]) -> list[str]:
    """Every setting whose value is not among its choices, with the choices."""
    return [
        f"{key}={config[key]!r} (one of {', '.join(choices)})"
        for key, choices in _CHOICES.items()
        if key in config and config[key] not in choices
    ]


def _raise_for(bad: list[str], name: str) -> None:
    if bad:
        raise ValueError(f"every setting of {name} must be one it knows; got {'; '.join(bad)}.")
