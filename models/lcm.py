"""Multistep sampling of latent consistency models.

The network was distilled to jump from any noisy sample to x_0. A step jumps, and then goes back
up to the noise of the next timestep with fresh noise (Luo et al., algorithm 3):

    clean  = c_skip(t) x_t + c_out(t) x_0
    x_prev = sqrt(a') clean + sqrt(1 - a') z,        the last one: x_prev = clean

with `a'` for alpha_bar at the next timestep, `t' = timestep_scaling t`, and the boundary
conditions of consistency models, with standard deviation 0.5 of the data,

    c_skip = 0.25 / (t'^2 + 0.25),    c_out = t' / sqrt(t'^2 + 0.25)

The timesteps are those of the distillation, `original_inference_steps` of them, thinned out.
The update is that of `linear_sampler`; only its coefficients are worked out here.

References:
  Luo et al., Latent Consistency Models, 2023, https://arxiv.org/abs/2310.04378.
  Song et al., Consistency Models, 2023, https://arxiv.org/abs/2303.01469 (appendix C).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from qjax.core.steps import TableKey
from qjax.core.typing import Array
from qjax.models.linear_sampler import LinearSampler
from qjax.models.sampler_settings import Row
from qjax.models.schedules import Schedule

__all__ = ["LCM"]

_DATA_VARIANCE = 0.5**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LCM(LinearSampler):
    """Sampling of latent consistency models: one to eight steps, all but the last with noise.

    `timestep_spacing` and `steps_offset` have no effect, as in diffusers.
    """

    name: ClassVar[str] = "lcm"
    diffusers_class: ClassVar[str] = "LCMScheduler"

    schedule: Schedule = dataclasses.field(default_factory=Schedule.scaled_linear)
    """The noise schedule of training."""
    clip_sample: bool = False
    """Whether x_0 is clipped at every step."""
    original_inference_steps: int = 50
    """How many timesteps the distillation used, evenly spaced up to the last."""
    timestep_scaling: float = 10.0
    """What timesteps are multiplied by in the boundary conditions."""

    def timesteps(self, steps: int) -> np.ndarray:
        """The timestep of every step, int64 `[s]`, falling.

        Raises:
          ValueError: If there are not so many timesteps in the distillation, or more of those
            than of training.
        """
        train, original = self.schedule.num_train_timesteps, self.original_inference_steps
        if not 1 <= steps <= original <= train:
            raise ValueError(
                f"1 <= steps <= original_inference_steps <= num_train_timesteps must hold; got "
                f"{steps=}, original_inference_steps={original}, num_train_timesteps={train}."
            )
        distilled = np.arange(original, 0, -1) * (train // original) - 1
        return distilled[np.linspace(0, original, steps, endpoint=False).astype(np.int64)]

    def rows(self, steps: int, *, eta: float = 0.0) -> dict[str, np.ndarray]:
        """The coefficients of every step, each `[s]`.

        Args:
          steps: s, 1 to `original_inference_steps`.
          eta: 0; the noise is what the schedule makes it.

        Raises:
          ValueError: If `eta` or `steps` is outside its range, or x_0 cannot be told from
            the prediction at one of the timesteps.
        """
        self._check_eta(eta)
        t = self.timesteps(steps)
        a = self.schedule.alpha_bar[t]
        a_prev = np.append(a[1:], 1.0)
        scaled = self.timestep_scaling * t
        skip = _DATA_VARIANCE / (scaled**2 + _DATA_VARIANCE)
        out = scaled / np.sqrt(scaled**2 + _DATA_VARIANCE)
        return self._rows(
            t,
            a,
            mean_from_x0=np.sqrt(a_prev) * out,
            mean_from_x=np.sqrt(a_prev) * skip,
            mean_from_noise=np.zeros(steps),
            noise_std=np.sqrt(1 - a_prev),
        )

    def table_key(
        self, steps: int, *, eta: float = 0.0, guidance_scale: float | None = None
    ) -> TableKey:
        """The settings of a run, without `eta`."""
        return self._key(steps, guidance_scale)

    def noise_scale(self, row: Row, variance: Array | None) -> Array:
        """The row's; a variance the network has learned has no part in LCM."""
        return row["noise_std"]
