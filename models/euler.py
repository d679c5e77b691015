"""Euler's method in the noise level, and its ancestral variant.

diffusers steps with `y = sqrt(1 + sigma^2) x_t`, the sample whose signal is not scaled down, and
divides by that root before it calls the network. From level sigma to sigma', with
`e = (y - x_0) / sigma` (Karras et al., algorithm 1 without the correction),

    y' = y + (sigma' - sigma) e = x_0 + sigma' e

and the ancestral variant goes down further and back up with fresh noise,

    y' = x_0 + sigma_down e + sigma_up z,
    sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2,    sigma_down^2 = sigma'^2 - sigma_up^2

Here the samples between steps are `x_t`, what the network sees, as in every other sampler: y is
the same trajectory in other units, and predictions, gains and noise have the units they have in
DDIM. The two meet where they have to. The first `x_t` is standard normal noise times
`init_scale`, which is diffusers' `init_noise_sigma` over sqrt(1 + sigma^2): below 1 for
`"linspace"` and `"trailing"`. The last sample is y itself, which differs only where the last
sigma is not 0. Nothing is clipped, so a step is

    x_prev = mean_from_x x_t + mean_from_prediction p + noise_std z

with coefficients into which the prediction type and both units are multiplied.

References:
  Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
  https://arxiv.org/abs/2206.00364.
  Song et al., Denoising Diffusion Implicit Models, 2021, https://arxiv.org/abs/2010.02502
  (section 4.3: DDIM is the same step).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from qjax.core.steps import TableKey
from qjax.core.typing import Array, Float
from qjax.models.linear_sampler import noise_left, prediction_coefficients
from qjax.models.sampler_settings import DIFFUSERS_SPACINGS, Row, SamplerSettings, as_rows
from qjax.models.sigmas import (
    FINAL_SIGMAS,
    final_sigma,
    karras_sigmas,
    sigmas_at,
    timesteps_at,
    training_sigmas,
)

__all__ = ["Euler", "EulerAncestral"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EulerSampler(SamplerSettings):
    """The update both have: it is linear, and only the levels and the noise differ."""

    timestep_spacing: str = "linspace"
    """Which timesteps are visited. Those of `"linspace"` are not rounded: the network is called
    at fractional timesteps, with the level between those of training."""

    def table_key(
        self, steps: int, *, eta: float = 0.0, guidance_scale: float | None = None
    ) -> TableKey:
        """The settings of a run, without `eta`."""
        return self._key(steps, guidance_scale)

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
          x_t: Noisy sample as the network sees it, float32.
          prediction: The network's answer in its first c channels, float32.
          noise: Standard normal noise, float32.
        """
        prediction = prediction[..., : x_t.shape[-1]]
        mean = row["mean_from_x"] * x_t + row["mean_from_prediction"] * prediction
        return mean + noise_left(row, row["noise_std"]) * noise, ()

    def _visited(self, steps: int) -> np.ndarray:
        """The timesteps of the spacing, `[s]`: int64, or float32 where some are fractional."""
        whole = self._spaced(steps)
        if self.timestep_spacing != "linspace":
            return whole
        return _plain(np.linspace(0, self.schedule.num_train_timesteps - 1, steps)[::-1])

    def _rows(
        self, t: np.ndarray, sigmas: np.ndarray, down: np.ndarray, up: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The coefficients of every step.

        Args:
          t: Timesteps, `[s]`.
          sigmas: Levels, `[s + 1]`, above 0 but for the last.
          down: Level that a step goes down to, `[s]`.
          up: Standard deviation of the noise that brings it up again, `[s]`.
        """
        given = prediction_coefficients(self.prediction_type, 1 / (1 + sigmas[:-1] ** 2))
        unit = np.append(1 / np.sqrt(1 + sigmas[1:-1] ** 2), 1.0)
        mean_from_x = unit * (given["x0_from_x"] + down * given["noise_from_x"])
        gain = unit * (given["x0_from_prediction"] + down * given["noise_from_prediction"])
        highest = sigmas.max()
        if self.timestep_spacing == "leading":
            highest = np.sqrt(1 + highest**2)
        return as_rows(
            t,
            mean_from_x=mean_from_x,
            mean_from_prediction=gain,
            prediction_gain=gain,
            noise_std=unit * up,
            init_scale=highest / np.sqrt(1 + sigmas[0] ** 2),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(_EulerSampler):
    """Euler's method: deterministic, first order, at noise levels that can be chosen."""

    name: ClassVar[str] = "euler"
    diffusers_class: ClassVar[str] = "EulerDiscreteScheduler"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "timestep_spacing": DIFFUSERS_SPACINGS,
        "interpolation_type": ("linear", "log_linear"),
        "final_sigmas_type": FINAL_SIGMAS,
    }

    interpolation_type: str = "linear"
    """Levels: those of the timesteps (`"linear"`), or even in log sigma over all of training
    (`"log_linear"`), where the network is still given the timesteps of the spacing and the
    last step ends at the smallest level of training."""
    use_karras_sigmas: bool = False
    """Whether the levels are even in the seventh root, between the first and the last of those
    above; the network is given the timesteps that belong to them."""
    sigma_min: float | None = None
    """Last level for `use_karras_sigmas`; None as said there."""
    sigma_max: float | None = None
    """First one, likewise."""
    final_sigmas_type: str = "zero"
    """Where the last step ends: at no noise or at the smallest level of training."""

    def timesteps(self, steps: int) -> np.ndarray:
        """The timestep of every call, `[s]`, falling: int64, or float32 if any is fractional."""
        return self._grid(steps)[0]

    def rows(self, steps: int, *, eta: float = 0.0) -> dict[str, np.ndarray]:
        """The coefficients of every step, each `[s]`.

        Args:
          steps: s, 1 to T.
          eta: 0; Euler adds no noise.

        Raises:
          ValueError: If `eta` or `steps` is outside its range, or the levels do not fall.
        """
        self._check_eta(eta)
        t, sigmas = self._grid(steps)
        return self._rows(t, sigmas, sigmas[1:], np.zeros(steps))

    def _grid(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps `[s]` and levels `[s + 1]`."""
        training = training_sigmas(self.schedule)
        t = self._visited(steps)
        sigmas = sigmas_at(t, training)
        if self.interpolation_type == "log_linear":
            sigmas = np.geomspace(training[-1], training[0], steps + 1)
        if self.use_karras_sigmas:
            sigmas = karras_sigmas(
                steps,
                sigma_min=sigmas[-1] if self.sigma_min is None else self.sigma_min,
                sigma_max=sigmas[0] if self.sigma_max is None else self.sigma_max,
            )
            t = _plain(timesteps_at(sigmas, training))
        final = final_sigma(self.final_sigmas_type, training)
        return t, np.append(sigmas, final)[: steps + 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerAncestral(_EulerSampler):
    """Ancestral Euler: the noise of every step is drawn anew, as in DDIM with eta 1."""

    name: ClassVar[str] = "euler_ancestral"
    diffusers_class: ClassVar[str] = "EulerAncestralDiscreteScheduler"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": DIFFUSERS_SPACINGS,
    }

    def timesteps(self, steps: int) -> np.ndarray:
        """The timestep of every call, `[s]`, falling: int64, or float32 if any is fractional."""
        return self._visited(steps)

    def rows(self, steps: int, *, eta: float = 0.0) -> dict[str, np.ndarray]:
        """The coefficients of every step, each `[s]`.

        Args:
          steps: s, 1 to T.
          eta: 0; the noise is what the levels make it.

        Raises:
          ValueError: If `eta` or `steps` is outside its range.
        """
        self._check_eta(eta)
        t = self.timesteps(steps)
        sigmas = np.append(sigmas_at(t, training_sigmas(self.schedule)), 0.0)
        begin, end = sigmas[:-1], sigmas[1:]
        up = end * np.sqrt(np.maximum(1 - (end / begin) ** 2, 0))
        return self._rows(t, sigmas, np.sqrt(end**2 - up**2), up)


def _plain(t: np.ndarray) -> np.ndarray:
    """Timesteps as int64 if all are whole, else as the network is given them: float32."""
    return t.astype(np.int64 if np.all(t == np.round(t)) else np.float32)
